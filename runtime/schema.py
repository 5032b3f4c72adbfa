"""Validates JSON that is read back, before its values are used.

A digest tells that a file is as it was written, not that shardtune wrote it: whoever forges one
makes the digest too. So what is read back is checked for types and ranges, and refused as damaged.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
LARGEST = 2**53  # of an integer that nothing else bounds


def read_json(data: bytes | str) -> Any:
    """
    Raises:
        ValueError: it is no JSON, or so deep or long that Python does not read it.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def integer(minimum: int = 0, maximum: int = LARGEST) -> Check:
    """A whole number in a range."""
    return lambda value: type(value) is int and minimum <= value <= maximum


def number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and abs(value) <= 1e300


def text(value: Any) -> bool:
    """Text without unpaired surrogates, so that it can be written and printed."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def like(pattern: str) -> Check:
    """Text that the pattern matches from end to end."""
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def each(check: Check, length: int | None = None) -> Check:
    """A list whose items all pass ``check``, of the given length if any."""
    return lambda value: (
        isinstance(value, list) and length in (None, len(value)) and all(map(check, value))
    )


def row(*checks: Check) -> Check:
    """A list of fixed length; each value passes its own check."""
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(checks)
        and all(check(item) for check, item in zip(checks, value, strict=True))
    )


def either(*checks: Check) -> Check:
    """What passes any of the checks."""
    return lambda value: any(check(value) for check in checks)


def maybe(check: Check) -> Check:
    """What passes ``check``, or null."""
    return lambda value: value is None or check(value)


def table(keys: Check, values: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(keys(key) and values(v) for key, v in value.items())
    )


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with these fields; it may have others."""
    return lambda value: misfit(value, required, optional) is None


def misfit(
    value: Any, required: Mapping[str, Check], optional: Mapping[str, Check] | None = None
) -> str | None:
    """What is wrong with an object of these fields; None if nothing is."""
    if not isinstance(value, dict):
        return "it is no JSON object"
    for name, check in required.items():
        if name not in value or not check(value[name]):
            return f"its {name} is not what shardtune writes"
    for name, check in (optional or {}).items():
        if name in value and not check(value[name]):
            return f"its {name} is not what shardtune writes"
    return None


def record(value: Any) -> bool:
    """An object with any fields."""
    return isinstance(value, dict)


DIGEST = like("[0-9a-f]{64}")
SIDE = integer(1, 2**20)  # a side of a tensor or an image
BUCKET = each(SIDE, 2)
REPEATS = integer(1, 10**6)
SHARD = like(r"\d+x\d+-\d{6,9}")
