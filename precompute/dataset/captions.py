"""What is done to captions between the file and the text encoders."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from precompute.dataset.records import Record, Rejected
from precompute.settings import EncodeSettings
from shards.plan import derive_key

MOST_CAPTIONS = 65_535  # the index counts them in 16 bits


def settle(
    record: Record, settings: EncodeSettings, why: str = "its caption is empty"
) -> Record | Rejected:
    """The record with its captions as they are encoded; ``why`` is said of one without any."""
    captions = record.captions or ("",)
    may_be_empty = bool(record.captions) and settings.empty_captions
    if not may_be_empty and not all(captions):
        if settings.missing_caption == "reject":
            return Rejected(record.path, "its caption is empty" if record.captions else why)
        instead = "" if settings.missing_caption == "empty" else settings.missing_caption
        captions = tuple(caption or instead for caption in captions)
    if not all(map(is_text, captions)):
        return Rejected(record.path, "its caption holds half a character (a lone surrogate)")
    if settings.shuffle_tags:
        captions = tuple(
            order
            for number, caption in enumerate(captions)
            for order in shuffled(
                caption, settings.shuffle_tags, settings.keep_tokens, f"{record.key}/{number}"
            )
        )
    if len(captions) > MOST_CAPTIONS:
        return Rejected(record.path, f"{len(captions)} captions; at most {MOST_CAPTIONS} fit")
    return replace(
        record, captions=tuple(_prefixed(one, settings.caption_prefix) for one in captions)
    )


def texts_of(text: str, settings: EncodeSettings) -> tuple[str, ...]:
    """The captions that a text file holds: all of it, or each line that is not blank."""
    if not settings.caption_lines:
        return (text.strip(),)
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    return lines or ("",)


def shuffled(caption: str, num: int, keep: int, key: str) -> list[str]:
    """``num`` different orders of the comma-separated tags behind the first ``keep``.

    All orders where there are fewer. Drawn by ``key`` alone: the same in every run, and a larger
    ``num`` only adds.
    """
    tags = [tag.strip() for tag in caption.split(",")]
    tags = [tag for tag in tags if tag]
    head, tail = tags[:keep], tags[keep:]
    twins = math.prod(math.factorial(count) for count in Counter(tail).values())
    num = min(num, math.factorial(len(tail)) // twins)
    generator = np.random.Generator(np.random.Philox(key=derive_key("tags", key)))
    orders: dict[str, None] = {}
    while len(orders) < num:
        order = generator.permutation(len(tail))
        orders[", ".join([*head, *(tail[place] for place in order)])] = None
    return [*orders]


def _prefixed(caption: str, prefix: str) -> str:
    """An empty caption stays so: it teaches what no prompt means."""
    if not prefix or not caption:
        return caption
    return prefix + caption if prefix[-1].isspace() else f"{prefix} {caption}"


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
