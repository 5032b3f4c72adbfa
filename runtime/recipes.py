"""Options from a TOML file: ``train --config``."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from runtime.text import shortened
from runtime.toml import parse_toml

MAX_BYTES = 1_000_000
MAX_NAME = 60  # characters of an unknown option in a message


def read_recipe(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Options from a TOML file, by their names with ``-`` or ``_``; ``known`` are the names, with
    ``_``, that there are.

    Raises:
        ValueError: unreadable, an option that stands there twice, or a key that is no option (the
            nearest and the known ones are listed).
    """
    values: dict[str, Any] = {}
    for key, value in _read_toml(path).items():
        name = key.replace("-", "_")
        if name in values:
            raise ValueError(
                f"{path}: {_written(name)} is there twice, with - and with _ in its name; "
                "keep one of the two"
            )
        values[name] = value
    if unknown := sorted(set(values) - set(known)):
        near = get_close_matches(unknown[0], known, n=3)
        hint = f"did you mean {' or '.join(map(_written, near))}? " if near else ""
        names = ", ".join(sorted(map(_written, known)))
        raise ValueError(f"{path}: unknown option {_written(unknown[0])} ({hint}known: {names})")
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # a device without end ends here too
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES:,} bytes: not a recipe")
    try:
        return parse_toml(data.decode("utf-8-sig"))  # some editors write a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _written(name: str) -> str:
    return name.replace("_", "-") if len(name) <= MAX_NAME else shortened(name)
