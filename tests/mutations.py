"""Damaged bytes and forged JSON for the fuzz tests, and how a parser must end on them."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Try = Callable[[random.Random], str]  # one input; how it ended: "read" or "refused"

PIECES = (
    *(b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"\\ud800"', b"\\u0000"),
    *(b"\x1b[2J", b"\n", b"\r", b" --", b"NaN", b"-Infinity", b"inf", b"-1", b"1e400"),
    *(b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a." * 900),
    *(b"null", b"true", b"[]", b"{}", b'""', b"#", b"=", b"[", b"\\", b'"', b'"""', b"'", b","),
    *(b"1979-05-27T07:32:00Z", b"\n[[prompt]]\n", b"[prompt.subset]\n"),
)
# These strings become in ``json_text`` what ``json.dumps`` cannot write.
WRITTEN = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "nested": "[" * 2000 + "]" * 2000,
    "digits": "9" * 5000,
}
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 2**31, 2**40, 2**63, 10**400, 1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "fp16", "\ud800", "a\0b", "a\nb", "9" * 5000),
    *("../x", "/etc/passwd", "x" * 300, *WRITTEN),
    *([], [1], ["x"], [[1]], [None] * 3, [10**30], [2**20, 2**20], {}, {"a": 1}),
)
NAMES = ("../x", "\0", "unknown", "")


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to four changes: flipped, cut out, repeated, noise, or something nasty."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        length = rng.choice((0, 1, 2, 8, 40, rng.randrange(len(changed) + 1)))
        end = min(len(changed), start + length)
        how = rng.randrange(6)
        if how == 0 and end > start:
            changed[start] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[start:end]
        elif how == 2:
            changed[start:start] = changed[start:end] * rng.randrange(3)
        elif how == 3:
            changed[start:start] = rng.randbytes(rng.randrange(1, 9))
        elif how == 4 and rng.random() < 0.3:
            del changed[start:]
        else:
            changed[start : start + min(length, 40)] = rng.choice(PIECES)
    return bytes(changed)


def forge(rng: random.Random, value: Any) -> Any:
    """A JSON value with one of its parts replaced, renamed, doubled or taken away."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(VALUES))
    key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
    changed, kind = value.copy(), rng.random()
    if kind < 0.08:
        del changed[key]
    elif kind < 0.12 and isinstance(changed, dict):
        changed[rng.choice(NAMES)] = changed.pop(key)
    elif kind < 0.12:
        changed.append(copy.deepcopy(value[key]))
    else:
        changed[key] = forge(rng, value[key])
    return changed


def json_text(value: Any, **options: Any) -> str:
    """JSON, with what ``WRITTEN`` stands for."""
    return with_written(json.dumps(value, **options))


def with_written(text: str) -> str:
    for name, written in WRITTEN.items():
        text = text.replace(f'"{name}"', written)
    return text


def damaged_json(rng: random.Random, value: Any) -> bytes:
    """A JSON value forged, or its text damaged, or both."""
    kind = rng.random()
    text = json_text(forge(rng, value) if kind < 0.6 else value).encode()
    return damage(rng, text) if kind > 0.5 else text


def ending(
    read: Callable[[], Any], named: Path | None, actual: type[Exception] = ValueError
) -> str:
    """ "read", or "refused" where ``read`` raises ``ours``, in one line that names ``named``.

    A subclass that a library raises (of decoding, of JSON) is none of ours.
    """
    try:
        read()
    except actual as error:
        text = str(error)
        assert type(error).__module__ != "json.decoder", error
        assert not isinstance(error, UnicodeError), error
        assert text and "\n" not in text and len(text) < 2000, text[:500]
        assert named is None or str(named) in text, text[:500]
        return "refused"
    return "read"
