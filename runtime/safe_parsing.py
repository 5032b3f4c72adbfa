"""Reads JSON and TOML that others wrote, within bounds of size and depth.

A name may belong to a pipe that never ends, JSON may be nested deeper than Python recurses, and a
number may have more digits than ``int`` takes. Each is a ``ValueError`` of one line.
"""

import errno
import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from runtime import files
from runtime.files import format_bytes
from runtime.messages import first_line

MAX_JSON_BYTES = 100_000_000  # a tokenizer.json has up to 20 MB, a list of tensors up to 10


def open_regular(path: Path) -> BinaryIO:
    """``files.open_regular``, with the path in its message.

    Raises:
        ValueError: a pipe, a device or a socket.
        OSError: it cannot be opened.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        return files.open_regular(path)
    except ValueError:
        raise ValueError(f"{path}: not a regular file") from None


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """All bytes of a regular file that has at most ``max_bytes``.

    Raises:
        ValueError: not a regular file, or larger.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
        size = os.fstat(file.fileno()).st_size
    if len(data) > max_bytes:
        largest = format_bytes(max_bytes)
        raise ValueError(f"{path}: has {format_bytes(size)}; at most {largest} are read")
    return data


def parse_json(
    text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """A JSON value; ``pairs`` makes each object, as ``json.loads``' ``object_pairs_hook``.

    Raises:
        ValueError: not JSON, nested too deep, or with a number of too many digits.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: not a regular file, too large, not JSON, or no object; names the file.
        FileNotFoundError: there is none.
        OSError: it cannot be read.
    """
    data = read_bounded(path, MAX_JSON_BYTES)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


MAX_DOTS = 1000  # in a line: tomllib takes time and memory by the square of a name's parts


def read_sealed(path: Path) -> dict[str, Any]:
    """The fields of a JSON file that has a digest of them; earlier versions wrote it without.

    Raises:
        OSError: it cannot be opened.
        ValueError: damaged, or no JSON object.
    """
    data = read_bounded(path, MAX_JSON_BYTES)
    value = parse_json(data)
    if isinstance(value, dict) and files.DIGEST not in value:
        return value
    return files.unseal(data)


def parse_toml(text: str) -> dict[str, Any]:
    """The table in ``text``.

    Raises:
        ValueError: says what is wrong; the caller adds the file's name.
    """
    for number, line in enumerate(text.split("\n"), start=1):  # a name ends with its line
        if line.count(".") > MAX_DOTS:
            raise ValueError(f"not valid TOML (line {number} has more than {MAX_DOTS} dots)")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("not valid TOML (nested too deep)") from None
    except ValueError as error:  # also a number of too many digits
        raise ValueError(f"not valid TOML ({first_line(error)})") from None
