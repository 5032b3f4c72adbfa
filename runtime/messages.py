"""Text for messages: unsafe characters escaped, long values cut, numbers with their nouns."""

import re
from typing import Any

# Control characters but for tab and newline, the marks that reverse writing direction, and halves
# of a surrogate pair: a name or a caption must not be able to clear a screen, or to show other text
# than it has.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""``text`` with unsafe characters as escapes (``\x1b``); newlines and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 200 characters; else its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def shortened(value: Any, limit: int = 60) -> str:
    """A value in a message: whatever a file holds, the message stays one short line."""
    text = value if isinstance(value, str) and len(value) > limit else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def pluralize(number: int, noun: str) -> str:
    """``1 shard``, ``2,000 shards``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
