"""What the scripts' command lines share: kinds of values, errors of one line, and a YAML file as further words."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml

from rasengan import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose help keeps the lines of the script's docstring, and whose errors are UserErrors."""

    def __init__(self, description: str, epilog: str | None = None):
        # Without abbreviations: a token behind --hub_tok would not be known for one.
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # argparse takes one negative number for a value, but not "-1,0" or "-1e-3"; no flag here begins so.
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def add_base_flags(self, component_flags: dict[str, str]):
        """Add the flags that say where the base model is; return the function that adds more to their group.

        Args:
            component_flags: the flag of each component's own place.
        """
        add = self.add_argument_group("base model", "a hub id, a pipeline folder, or single components").add_argument
        add("--pretrained_model_name_or_path", type=path_type, help="hub id or folder of the SDXL base")
        for name, flag in component_flags.items():
            add(flag, type=path_type, help=f"hub id or folder of the {name} alone{', run in fp32' * (name == 'vae')}")
        add("--revision", help="git revision on the hub")
        add("--variant", help="of the weight files, such as fp16, which halves the download")
        add("--cache_dir", type=path_type, help="where downloads go")
        return add

    def add_data_flags(self, interpolations: Iterable[str]):
        """Add the flags that say which pictures there are and how they are cropped; return what adds more of them.

        Args:
            interpolations: the names of the ways to resize.
        """
        add, switch = self.add_argument_group("data").add_argument, argparse.BooleanOptionalAction
        add("--dataset_name", type=path_type, help="hub id of a dataset, or a local copy of one")
        add("--dataset_config_name", help="the dataset's configuration, where it has several")
        add("--train_data_dir", type=path_type, help="folder of pictures with a .txt each, or a metadata.jsonl")
        add("--image_column", default="image", help="[%(default)s]")
        add("--caption_column", default="text", help="of captions, each a text or a list of texts [%(default)s]")
        add("--max_train_samples", type=number_type(1), help="use only so many pictures, drawn by the seed")
        side = number_type(8, most=8192)
        add("--resolution", type=side, default=512, help="side of the square crops, in px [%(default)s]")
        add("--aspect_ratio_buckets", action=switch, default=False, help="crop to the nearest of several shapes [off]")
        add("--bucket_step_px", type=side, default=64, help="bucket sides are multiples of it [%(default)s]")
        add("--center_crop", action=switch, default=True, help="off: crop at random, the VAE in the loop [on]")
        add("--random_flip", action=switch, default=False, help="mirror half of the samples [off]")
        filters = sorted(interpolations)
        add("--image_interpolation_mode", default="lanczos", choices=filters, help="how to resize [%(default)s]")
        add("--skip_bad_images", action=switch, default=False, help="leave broken pictures out, do not stop [off]")
        return add

    def parse_args(self, words=None, namespace=None):
        """Parse words, and say of those that no flag takes only where they stand: one may be a token."""
        words = sys.argv[1:] if words is None else list(words)
        values, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flags = [_flag_of(word) for word in unknown if word.startswith("--")]
            before = _flag_before(words, words.index(unknown[0]))
            where = ", ".join(flags) or (f"what follows {before}" if before else "the first word")
            self.error(f"unrecognized arguments: {where}")
        return values

    def parse_known_args(self, words=None, namespace=None):
        """Parse words that are UTF-8: neither tokenizers nor TensorBoard take others."""
        words = sys.argv[1:] if words is None else list(words)
        for position, word in enumerate(words):
            if any("\ud800" <= letter <= "\udfff" for letter in word):  # how Python hands on other bytes
                flag = _flag_before(words, position + 1)
                which = f"The value of {flag}" if flag else "The first word"
                raise UserError(f"{which} is not UTF-8. Give a name or a text that is.")
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        """Raise what is wrong, without the usage."""
        message = re.sub("ignored explicit argument .*", "it takes no value", message, flags=re.DOTALL)
        raise UserError(f"{' '.join(message.split())}. --help lists the flags.")


def _flag_of(word: str) -> str:
    name = _without_token(word.partition("=")[0])
    return name if name.isascii() else ascii(name)


def _without_token(name: str) -> str:
    """Return a name without what follows the token's flag, which is the token where a space or colon was forgotten."""
    return re.sub(r"(hub[-_]?token).*", r"\1", name, flags=re.DOTALL | re.IGNORECASE)


def _flag_before(words: list[str], end: int) -> str | None:
    """Return the last flag of the words before a position; None if there is none."""
    return next((_flag_of(word) for word in reversed(words[:end]) if word.startswith("--")), None)


def number_type(minimum: float = -math.inf, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite number of a kind, from a minimum to a maximum."""
    bounds = f"from {minimum} to {most}" if most < math.inf else f"of {minimum} or more"
    what = "a whole number" if kind is int else "a number"
    expected = what if minimum == -math.inf else f"{what} {bounds}"

    def read(text: str) -> float:
        try:
            value = kind(text)
            fits = math.isfinite(value) and minimum <= value <= most
        except (ValueError, OverflowError):  # the latter of a whole number beyond all floats
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    read.__name__ = kind.__name__  # what --help and argparse call the kind
    return read


def numbers_type(text: str) -> list[float]:
    """Return the finite numbers of a list with commas, each once."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor several with commas between them")
    return list(dict.fromkeys(values))


def share_or_count_type(text: str) -> float | int:
    """Return a share, a float between 0 and 1, or a count, a whole number of 1 or more."""
    for kind, least, under in ((int, 1, math.inf), (float, 0.0, 1.0)):
        try:
            value = kind(text)
        except ValueError:
            continue
        if least <= value < under and value > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is neither a share between 0 and 1 nor a whole number of 1 or more")


def path_type(text: str) -> str:
    """Return a path or a hub id, with ~ as the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, as an unset variable is")
    if "\0" in text:
        raise argparse.ArgumentTypeError("it holds a null byte")
    return os.path.expanduser(text)


def is_token(text: str) -> bool:
    """Say whether a text can be a token of the hub, which travels in the header of a request."""
    return re.fullmatch("[!-~]+", text) is not None


def token_type(text: str) -> str:
    """Return a token of the hub without the space around it; an error does not show it."""
    token = text.strip()
    if not token:
        raise argparse.ArgumentTypeError("it is empty, as an unset variable is")
    if not is_token(token):
        raise argparse.ArgumentTypeError("it holds what no token does, such as a space (it is not shown here)")
    return token


def conditioning_cache_dir(given: str | None, environ: Mapping[str, str]) -> str:
    """Return the folder of what is encoded once: the given one, or the user's cache folder's."""
    return os.path.expanduser(given or os.path.join(environ.get("XDG_CACHE_HOME", "~/.cache"), "rasengan"))


def weighted_place_type(text: str) -> tuple[str, float]:
    """Return the place and the weight of PLACE[:WEIGHT], 1 where there is none; a colon of the place itself stays.

    A path that exists under the whole text is a place without a weight.
    """
    place, colon, ending = text.rpartition(":")
    try:
        weight = float(ending) if colon and not Path(text).exists() else None
    except ValueError:
        weight = None
    if weight is None:
        return path_type(text), 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text!r} does not end with a finite weight")
    return path_type(place), weight


def words_of_file(file: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return a YAML mapping's names and values as command-line words, so that both are parsed and checked alike.

    A list gives several values, true and false give --name and --no-name, and null leaves a name out.

    Args:
        file: to read.
        parser: whose flags the names are; --config itself is none of them.

    Raises:
        UserError: the file cannot be read, is no mapping, or holds an unknown name, one twice, or a value of another
            kind.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        # A few aliases of aliases would make a value of gigabytes.
        aliases = (event for event in yaml.parse(text, yaml.SafeLoader) if isinstance(event, yaml.AliasEvent))
        alias = next(aliases, None)
        settings = None if alias else yaml.safe_load(text)
        root = None if alias else yaml.compose(text, yaml.SafeLoader)
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:  # a ValueError of a 13th month, say
        raise UserError(f"--config {file} cannot be read: {_reason(error)}. Correct it.") from None
    if alias:
        line = alias.start_mark.line + 1
        raise UserError(f"--config {file}: line {line} names another value by an alias. Write the value itself.")
    lines = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():  # of two YAML would take the last
        name, line = _without_token(str(key.value)), key.start_mark.line + 1
        if name in lines:
            raise UserError(
                f"--config {file}: line {line} gives {name!r} again, after line {lines[name]}. Keep one of them."
            )
        lines[name] = line
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise UserError(f"--config {file} holds no names with values. Write lines such as `rank: 16`.")
    return words_of(settings, parser, f"--config {file}")


def words_of(settings: Mapping[str, object], parser: argparse.ArgumentParser, source: str) -> list[str]:
    """Return names and values as `words_of_file` does; `source` says in errors where they stand."""
    flags = {action.dest: action for action in parser._actions if action.dest not in {"config", "help"}}
    words = []
    for name, value in settings.items():
        if name not in flags:
            raise UserError(f"{source}: {_without_token(str(name))!r} is no flag. --help lists them.")
        try:
            words += [] if value is None else _words(flags[name], value)
        except ValueError as expected:
            given = "something else" if name == "hub_token" else repr(value)
            raise UserError(f"{source}: {name} is {given}. Write {expected}.") from None
    return words


def _reason(error: Exception) -> str:
    # YAML's own text quotes the line, which may be that of the token.
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        place = f"in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
        return f"{' '.join(str(error.problem).split())} {place}"
    return " ".join(str(error).split())


def _words(flag: argparse.Action, value) -> list[str]:
    name = flag.dest
    if isinstance(flag, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list) and flag.nargs:
        if not value or not all(isinstance(i, str | int | float) and not isinstance(i, bool) for i in value):
            raise ValueError("one or several texts or numbers")
        if any(str(item).startswith("-") for item in value):
            raise ValueError("texts that do not begin with a dash")
        return [f"--{name}", *map(str, value)]
    if value is False and "no" in (flag.choices or ()):
        value = "no"  # which YAML reads as false
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a text or a number")
    return [f"--{name}={value}"]
