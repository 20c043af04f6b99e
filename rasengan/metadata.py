"""A folder's metadata: in which file and line they are not what the datasets library reads."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet

from rasengan import first_line, printable


FILE_NAMES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # what datasets takes for it
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number"}
_KINDS |= {bool: "true or false", type(None): "null"}


def find_fault(files: Iterable[Path]) -> str | None:
    """Say in which file and line metadata are not what the datasets library reads; None if nothing is seen here.

    Args:
        files: of the folder, those of other names too.
    """
    for file in sorted(file for file in files if file.name in FILE_NAMES):
        if file.suffix == ".parquet":
            if fault := _fault_of_parquet(file):
                return f"{file} {fault}"
            continue
        try:
            content = file.read_bytes()
        except OSError as error:
            return f"{file}: {error.strerror}."
        try:
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            number = content.count(b"\n", 0, error.start) + 1
            return f"{file}, line {number}: this is no text in UTF-8. Save the file as such."
        if not any(line.strip() for line in lines):
            example = json.dumps({"file_name": "one.png", "text": "a caption"})
            return f"{file} is empty. Write a line for each picture, such as {example}."
        fault = _fault_of_csv(lines) if file.suffix == ".csv" else _fault_of_jsonl(lines)
        if fault:
            return f"{file}, {printable(fault)}."
    return None


def _fault_of_parquet(file: Path) -> str | None:
    try:
        rows = pyarrow.parquet.read_metadata(file).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        return f"is no parquet file: {first_line(error)}"
    return None if rows else "has no rows. Write one for each picture."


def _fault_of_csv(lines: list[str]) -> str | None:
    first = next(number for number, line in enumerate(lines, 1) if line.strip())
    rows = csv.reader(lines[first - 1 :])
    try:
        columns = next(rows)
    except csv.Error as error:
        return f"line {first}: {error}"
    if not any(map(_names_pictures, columns)):
        return f"line {first}: no column is file_name, but {', '.join(columns)}"
    has_rows = False
    try:
        for row in filter(None, rows):
            has_rows = True
            if len(row) > len(columns):
                return (
                    f"line {first - 1 + rows.line_num}: there are {len(row)} values for {len(columns)} columns. Put "
                    'those with commas in quotes: "a, b"'
                )
    except csv.Error:  # of a field that is too long for this reader alone
        return None
    return None if has_rows else f"line {first}: the columns' names are there, and no line for a picture below"


def _names_pictures(column: str) -> bool:
    return column in {"file_name", "file_names"} or column.endswith(("_file_name", "_file_names"))


def _fault_of_jsonl(lines: list[str]) -> str | None:
    seen = {}  # of each key what kind of value it has, and where
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_twins)
            json.dumps(row, ensure_ascii=False).encode()
        except _Twice as error:
            return f"line {number}: {error} stands there twice"
        except UnicodeEncodeError as error:
            return f"line {number}: {ascii(error.object[error.start])} is half a character"
        except json.JSONDecodeError as error:
            return f"line {number}: this is no JSON: {error.msg} at character {error.pos + 1}"
        except (RecursionError, ValueError) as error:  # brackets in brackets, or a number of thousands of digits
            return f"line {number}: this cannot be read: {first_line(error)}"
        if not isinstance(row, dict):
            return f"line {number}: this is {_KINDS[type(row)]}, not an object in braces"
        if not any(map(_names_pictures, row)):
            return f"line {number}: there is no file_name"
        if "file_name" in row and not isinstance(row["file_name"], str):
            return f"line {number}: file_name is {_KINDS[type(row['file_name'])]}, not the name of a file in quotes"
        if any("::" in str(value) for key, value in row.items() if _names_pictures(key)):
            return f"line {number}: a file's name holds ::, which marks a file in an archive. Rename it"
        for key, value in row.items():
            if isinstance(value, list) and len(set(map(type, value)) - {type(None)}) > 1:
                return f"line {number}: {key} is a list of values of different kinds"
            first_kind, first = seen.setdefault(key, (type(value), number)) if value is not None else (None, None)
            if first_kind not in (None, type(value)) and {first_kind, type(value)} != {int, float}:
                return f"line {number}: {key} is {_KINDS[type(value)]}, and {_KINDS[first_kind]} in line {first}"
    return None


class _Twice(Exception):
    """A key that an object has twice."""


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    row = {}
    for key, value in pairs:
        if key in row:
            raise _Twice(key)
        row[key] = value
    return row
