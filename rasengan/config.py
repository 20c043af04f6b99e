"""A YAML file as the words of a command line, so that both are parsed and checked alike."""

from pathlib import Path

import yaml

from rasengan import UserError


def read_words(file: str, switches: dict[str, bool]) -> list[str]:
    """Return a YAML mapping's names and values as command-line words.

    A list gives several values, true and false give --name and --no-name, and null leaves a name out.

    Args:
        file: to read.
        switches: the names that there are, and whether each is a switch.

    Raises:
        UserError: the file cannot be read, is no mapping, or holds an unknown name.
    """
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} cannot be read: {' '.join(str(error).split())}. Correct it.") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {file} holds no names with values. Write lines such as `rank: 16`.")
    words = []
    for name, value in settings.items():
        if name not in switches:
            raise UserError(f"--config {file}: {name!r} is no flag. --help lists them.")
        if value is None:
            continue
        if switches[name] and not isinstance(value, bool):
            raise UserError(f"--config {file}: {name} is {value!r}. Write true or false.")
        if switches[name]:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            # YAML reads a bare no as false.
            words.append(f"--{name}={'no' if value is False else value}")
    return words
