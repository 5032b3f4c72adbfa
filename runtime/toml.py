"""TOML that somebody else wrote, within bounds."""

import re
import tomllib
from typing import Any

MAX_DEPTH = 100  # of names with dots between them, far beyond what a file of settings has
_NAME = re.compile(r"""[ \t]*["']?[\w-]+["']?[ \t]*""")


def parse_toml(data: bytes) -> dict[str, Any]:
    """The table in ``data``; a byte order mark, which some editors write, is skipped.

    Raises:
        ValueError: says what is wrong; the caller adds the file's name.
    """
    try:
        text = data.decode("utf-8-sig")
        _check_names(text)
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("not valid TOML: its brackets are nested too deep") from None
    except ValueError as error:  # a TOMLDecodeError, text that is not UTF-8, a number without end
        raise ValueError(f"not valid TOML: {str(error)[:200]}") from None


def _check_names(text: str) -> None:
    """Refuse ``a.a.a.a``... without end: tomllib takes time and memory by the square of that."""
    depth = 0
    for part in text.split("."):
        depth = depth + 1 if _NAME.fullmatch(part) else 0
        if depth > MAX_DEPTH:
            raise ValueError("a name of more than 100 parts")
