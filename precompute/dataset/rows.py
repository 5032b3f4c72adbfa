"""One JSON object about an image, of a list or of a tar: its captions, weight and repeats."""

import json
from dataclasses import dataclass
from typing import Any

from runtime.text import shortened

TEXT_FIELDS = ("text", "caption")
MOST_WEIGHT = 1e6
MOST_REPEATS = 10**6  # an epoch's entries are counted, shuffled and stored


@dataclass(frozen=True)
class Row:
    """``captions`` is empty where the object has none."""

    captions: tuple[str, ...] = ()
    weight: float = 1.0
    repeats: int = 1
    split: str = ""


NO_ROW = Row()


def load_row(line: str | bytes) -> dict[str, Any]:
    """
    Raises:
        ValueError: not a JSON object.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {str(error)[:200]}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def read_row(row: dict[str, Any]) -> Row:
    """
    Raises:
        ValueError: a field that cannot be meant so.
    """
    weight, repeats = row.get("weight"), row.get("repeats")
    weight, repeats = 1.0 if weight is None else weight, 1 if repeats is None else repeats
    if not _is_number(weight) or not 0 <= weight <= MOST_WEIGHT:
        raise ValueError(
            f"its weight must be a number from 0 to {MOST_WEIGHT:g}, not {shortened(weight)}"
        )
    if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
        raise ValueError(
            f"its repeats must be a whole number from 1 to {MOST_REPEATS}, not {shortened(repeats)}"
        )
    split = row.get("split")
    captions = _captions(first_field(row, TEXT_FIELDS))
    return Row(captions, float(weight), repeats, split if isinstance(split, str) else "")


def first_field(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of the fields that is there and not null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _captions(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no caption: none of {', '.join(TEXT_FIELDS)} is text or a list of texts")
    return tuple(text.strip() for text in texts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
