"""TOML that somebody else wrote, within bounds."""

import tomllib
from typing import Any

from runtime.text import first_line

MAX_DOTS = 1000  # in a line: tomllib takes time and memory by the square of a name's parts


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
