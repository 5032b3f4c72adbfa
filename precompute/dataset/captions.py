"""Caption text made ready for the text encoders: bytes decoded, text normalized."""

import codecs
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from precompute.dataset.records import PACKS, Memory, Rejected, SourceImage
from precompute.images.described import description_of
from precompute.settings import EncodeSettings
from shards.plan import derive_key

REPEATS = re.compile(r"\d{1,4}_(?=.)")  # how often an epoch takes the images of a folder
KEEP_SEPARATOR = "|||"
WILDCARD = re.compile(r"\{([^{}|]*\|[^{}]*)\}")
WILDCARD_LIST = re.compile(r"__([^\W_][\w ./-]{0,99}?)__")
MAX_EXPANDED = 100_000  # characters: a list may name itself twice
WEIGHT = re.compile(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)::")
MAX_NESTED = 20  # wildcards in wildcards
MAX_MISSES = 100  # draws in a row that give no new variant: there may be no more of them
MAX_CAPTIONS = 65_535  # the index counts them in 16 bits
MAX_TEXT_BYTES = 1 << 20  # of a text file; no encoder reads more than a few thousand tokens
_BYTE_ORDER_MARKS = (  # longest first: that of UTF-32 begins as that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def detect_encoding(head: bytes) -> str:
    """The encoding of a text that begins with ``head``: by its byte order mark, else by its NULs.

    UTF-16 without such a mark, as some Windows programs save it, has a NUL in every other byte of
    Latin text. No text in UTF-8 has any NUL.

    Raises:
        ValueError: there are NULs, and not as in UTF-16.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return "utf-8"
    pairs = max(1, len(head) // 2)
    high, low = head[0::2].count(0), head[1::2].count(0)
    if 2 * low >= pairs and not high:
        return "utf-16-le"
    if 2 * high >= pairs and not low:
        return "utf-16-be"
    raise ValueError("holds NUL characters: save it as UTF-8")


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, or as ``detect_encoding`` knows it; its lines end with \\n.

    Raises:
        ValueError: why it has none, to be put behind the file's name.
    """
    encoding = detect_encoding(data)
    name = encoding.upper().removesuffix("-SIG").removesuffix("-LE").removesuffix("-BE")
    try:
        return unify_lines(data.decode(encoding))
    except UnicodeDecodeError:
        raise ValueError(f"is not {name} text") from None


def unify_lines(text: str) -> str:
    r"""Line ends of Windows and of old Macs as ``\n``: a caption is the same wherever it lies."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def normalize_captions(
    record: SourceImage,
    settings: EncodeSettings,
    memory: Memory,
    missing_reason: str = "its caption is empty",
) -> SourceImage | Rejected:
    """The record with its captions as they are encoded; ``missing_reason`` is said of one without
    any. ``memory`` has what images say themselves."""
    if not record.captions and (text := _other_caption(record, settings, memory)):
        record = replace(record, captions=(text,), roles=())
    captions = tuple(map(_one_form, record.captions)) or ("",)
    roles = record.roles if any(captions) else ()
    if any(captions) and not all(captions) and not settings.empty_captions:
        # One of several that a tool left blank: the others say what the image shows.
        record = replace(record, num_blank_captions=captions.count(""))
        roles = tuple(itertools.compress(roles, captions))
        captions = tuple(filter(None, captions))
    may_be_empty = bool(record.captions) and settings.empty_captions
    if not may_be_empty and not all(captions):
        if settings.missing_caption == "reject":
            return Rejected(
                record.path, "its caption is empty" if record.captions else missing_reason
            )
        instead = "" if settings.missing_caption == "empty" else settings.missing_caption
        captions = tuple(caption or instead for caption in captions)
    if not all(map(is_text, captions)):
        return Rejected(record.path, "its caption holds half a character (a lone surrogate)")
    if any("\0" in caption for caption in captions):
        return Rejected(record.path, "its caption holds NUL characters: save it as UTF-8")
    try:
        captions, roles = _variants(captions, roles, record.key, settings)
    except ValueError as error:
        return Rejected(record.path, str(error))
    if len(captions) > MAX_CAPTIONS:
        return Rejected(record.path, f"{len(captions)} captions; at most {MAX_CAPTIONS} fit")
    return replace(
        record,
        captions=tuple(
            _framed(caption, settings.caption_prefix, settings.caption_suffix)
            for caption in captions
        ),
        roles=roles if any(roles) else (),
    )


def _variants(
    captions: tuple[str, ...], roles: tuple[str, ...], key: str, settings: EncodeSettings
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The captions, and their roles, by ``--wildcards`` and then ``--shuffle-tags``.

    Raises:
        ValueError: a wildcard cannot be expanded.
    """
    if settings.wildcards:
        captions, roles = _expanded(
            captions,
            roles,
            lambda caption, number: expand_wildcards(
                caption, settings.wildcards, f"{key}/{number}", settings.wildcard_lists
            ),
        )
    if settings.shuffle_tags:
        captions, roles = _expanded(
            captions,
            roles,
            lambda caption, number: shuffled_tags(
                caption,
                settings.shuffle_tags,
                settings.keep_tokens,
                f"{key}/{number}",
                settings.tag_dropout,
            ),
        )
    return captions, roles


def _expanded(
    captions: tuple[str, ...], roles: tuple[str, ...], expand: Callable[[str, int], list[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The variants that ``expand`` makes of each caption and its number, in the role of that
    caption where ``roles`` is not empty."""
    variants = [expand(caption, number) for number, caption in enumerate(captions)]
    role_each = zip(roles, variants, strict=True) if roles else ()
    return (
        tuple(text for texts in variants for text in texts),
        tuple(role for role, texts in role_each for _ in texts),
    )


def _one_form(caption: str) -> str:
    """A caption as it is encoded, wherever it lay: without a byte order mark that a tool took for
    text, and with the line ends of Unix."""
    return unify_lines(caption).strip("\ufeff").strip()


def _other_caption(record: SourceImage, settings: EncodeSettings, memory: Memory) -> str:
    """What ``--caption-from`` makes of an image's path, or finds in its file; may be empty."""
    *folders, name = record.path.split("/")
    if settings.caption_from == "metadata":

        def read() -> str:
            try:
                return description_of(record.image.read())
            except (OSError, ValueError):  # encode will say why
                return ""

        place = record.image.place_in(settings.dataset)
        size, mtime_ns = record.image.size, record.image.mtime_ns
        return str(memory.recall(f"description {place}", size, mtime_ns, read))
    if settings.caption_from == "filename":
        return name.rpartition(".")[0] or name
    if settings.caption_from == "folder":
        folders = [folder for folder in folders if not folder.lower().endswith(PACKS)]
        return REPEATS.sub("", folders[-1]).strip() if folders else ""
    return ""


def captions_of_text(text: str, settings: EncodeSettings) -> tuple[str, ...]:
    """The captions that a text file holds: all of it, or each line that is not blank."""
    if not settings.caption_lines:
        return (text.strip(),)
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    return lines or ("",)


def shuffled_tags(
    caption: str, num: int, num_kept: int, key: str, dropout: float = 0.0
) -> list[str]:
    """``num`` different orders of the comma-separated tags behind the first ``num_kept``.

    If there are fewer orders, all of them. They depend on ``key`` alone, so they are the same in
    every run, and a larger ``num`` only adds more. With ``dropout`` each of these tags is dropped
    with that probability; a caption is never left empty, and it may be fewer than ``num``.

    In a caption with ``|||``, as kohya's keep_tokens_separator, what stands before it keeps its
    place instead of the first ``num_kept``, and so does what stands behind a second one.
    """
    first, separator, rest = caption.partition(KEEP_SEPARATOR)
    middle, _, last = rest.partition(KEEP_SEPARATOR)
    end = _split_tags(last)
    if separator:
        head, tail = _split_tags(first), _split_tags(middle)
    else:
        tags = _split_tags(caption)
        head, tail = tags[:num_kept], tags[num_kept:]
    if dropout:
        return _dropped_tags(head, tail, end, num, key, dropout)
    num_equal = math.prod(math.factorial(count) for count in Counter(tail).values())
    num = min(num, math.factorial(len(tail)) // num_equal)
    generator = np.random.Generator(np.random.Philox(key=derive_key("tags", key)))
    orders: dict[str, None] = {}
    while len(orders) < num:
        order = generator.permutation(len(tail))
        orders[", ".join([*head, *(tail[place] for place in order), *end])] = None
    return [*orders]


def _split_tags(text: str) -> list[str]:
    return [tag for tag in map(str.strip, text.split(",")) if tag]


def _dropped_tags(
    head: list[str], tail: list[str], end: list[str], num: int, key: str, dropout: float
) -> list[str]:
    generator = np.random.Generator(np.random.Philox(key=derive_key("tags", key)))
    texts: dict[str, None] = {}
    misses = 0
    while len(texts) < num and misses < MAX_MISSES:
        order = generator.permutation(len(tail))
        is_kept = generator.random(len(tail)) >= dropout
        kept = [tail[place] for place, keep in zip(order, is_kept, strict=True) if keep]
        text = ", ".join([*head, *kept, *end])
        misses = 0 if text and text not in texts else misses + 1
        if text:
            texts[text] = None
    return [*texts] or [", ".join([*head, *tail, *end])]


def expand_wildcards(caption: str, num: int, key: str, lists: Path | None = None) -> list[str]:
    """At most ``num`` different expansions of the ``{a|b|2::c}`` and ``__name__`` in a caption.

    Inner ones come first. ``2::`` is a weight; a part without one has weight 1. Braces without
    ``|`` stay. ``__name__`` is a line of ``lists``/name.txt, which may hold either again. The
    expansions depend on ``key`` and the lists alone, and a larger ``num`` only adds more.

    Raises:
        ValueError: there is no such list, or a list is its own part; to be put behind a name.
    """
    if not (WILDCARD.search(caption) or WILDCARD_LIST.search(caption)):
        return [caption]
    generator = np.random.Generator(np.random.Philox(key=derive_key("wildcards", key)))
    texts: dict[str, None] = {}
    misses = 0

    def of_group(match: re.Match[str]) -> str:
        return _choose(match[1].split("|"), generator)

    def of_list(match: re.Match[str]) -> str:
        return _choose(_lines_of_list(lists, match[1]), generator)

    while len(texts) < num and misses < MAX_MISSES:
        text = caption
        for _ in range(MAX_NESTED):
            text, num_groups = WILDCARD.subn(of_group, text)
            text, num_lists = WILDCARD_LIST.subn(of_list, text)
            if not (num_groups or num_lists):
                break
            if len(text) > MAX_EXPANDED:
                raise ValueError(f"its wildcards give more than {MAX_EXPANDED:,} characters")
        if WILDCARD_LIST.search(text):
            raise ValueError(f"its wildcards hold wildcards, {MAX_NESTED} deep: a circle?")
        text = text.strip()
        misses = misses + 1 if text in texts else 0
        texts[text] = None
    return [*texts]


def _lines_of_list(lists: Path | None, name: str) -> list[str]:
    """The lines of a list of wildcards, without blank ones and those that begin with #."""
    if lists is None:
        raise ValueError(
            f"its caption has __{name}__: give --wildcard-lists FOLDER with {name}.txt"
        )
    path = lists / f"{name}.txt"
    try:
        if ".." in name.split("/"):
            raise FileNotFoundError
        stat = path.stat()
        return _read_list(path, stat.st_mtime_ns, stat.st_size)
    except OSError:
        raise ValueError(
            f"its caption has __{name}__, and no {name}.txt can be read in --wildcard-lists"
        ) from None


@lru_cache(maxsize=1000)
def _read_list(path: Path, _mtime_ns: int, num_bytes: int) -> list[str]:
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"the list {path.name} has more than {MAX_TEXT_BYTES:,} bytes")
    try:
        text = decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"the list {path.name} {error}") from None
    stripped = (line.strip() for line in text.split("\n"))
    lines = [line for line in stripped if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"the list {path.name} is empty")
    return lines


def _choose(options: Sequence[str], generator: np.random.Generator) -> str:
    """One of the parts of a wildcard, by their weights."""
    weights, parts = [], []
    for text in options:
        match = WEIGHT.match(text)
        weights.append(float(match[1]) if match else 1.0)
        parts.append(text[match.end() :] if match else text)
    shares = np.cumsum(weights)
    place = int(np.searchsorted(shares, generator.random() * shares[-1], side="right"))
    return parts[min(place, len(parts) - 1)]


def _framed(caption: str, prefix: str, suffix: str) -> str:
    """Put the prefix before a caption and the suffix behind it; an empty one stays empty, for it
    teaches the empty prompt."""
    if not caption:
        return caption
    if prefix:
        caption = prefix + caption if prefix[-1].isspace() else f"{prefix} {caption}"
    if suffix:
        begins_apart = suffix[0].isspace() or suffix[0] == ","
        caption = caption + suffix if begins_apart else f"{caption} {suffix}"
    return caption


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
