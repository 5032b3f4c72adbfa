"""An image of the dataset as a record: its bytes on demand, and what a list says of it."""

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.files import open_regular
from runtime.text import shortened
from shards.format import sample_key

MAX_IMAGE_BYTES = 2 * 10**9  # 180 million pixels of 16 bits and four channels take 1.4 GB
MTIME_GRACE_NS = 2_000_000_000  # a file changed within it may change again and keep its mtime


# Errors of one file, not of its disk.
ITS_OWN = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
)


@dataclass(frozen=True)
class Blob:
    """Bytes that lie in a file, or in a tar, as they were when the dataset was read.

    ``size`` is their number; ``mtime_ns`` that of the file, so of the whole tar.
    """

    file: Path
    size: int
    mtime_ns: int
    offset: int = 0

    @classmethod
    def of(cls, file: Path) -> "Blob":
        """A whole file, as it is now."""
        stat = file.stat()
        return cls(file, stat.st_size, stat.st_mtime_ns)

    def read(self) -> bytes:
        """The bytes; never others, nor fewer.

        Raises:
            OSError: the disk fails.
            ValueError: it changed since, is gone, or may not be read: no other file is affected.
        """
        try:
            with open_regular(self.file) as file:
                changed = os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            if error.errno not in ITS_OWN:
                error.filename = os.fspath(self.file)  # an error of a read names no file
                raise
            is_gone = error.errno == errno.ENOENT
            why = "no such file" if is_gone else f"cannot be read: {error.strerror}"
            raise ValueError(why) from error
        if changed or len(data) != self.size:
            raise ValueError("it changed while the dataset was encoded; encode again")
        return data


@dataclass(frozen=True)
class SourceImage:
    """An image with its captions. ``path`` is relative, posix; the key comes from it alone.

    Of a tar's member it is ``pack.tar/member.jpg``. ``weight`` is of the loss; ``repeats`` how
    often an epoch takes it; ``split`` what its list says of it, if anything; ``num_blank`` how many
    blank captions were dropped because there are others.
    """

    path: str
    image: Blob
    captions: tuple[str, ...]
    weight: float = 1.0
    repeats: int = 1
    mask: Blob | None = None
    split: str = ""
    num_blank: int = 0

    @cached_property
    def key(self) -> str:
        return sample_key(self.path)


@dataclass(frozen=True)
class Rejected:
    """An image that is not encoded, and why; both as text, whatever bytes its name has."""

    path: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("path", "reason"):
            object.__setattr__(self, name, _as_text(getattr(self, name)))

    @property
    def key(self) -> str:
        return sample_key(self.path)


def _as_text(text: str) -> str:
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # half a character, of a JSON string
        return text.encode("utf-8", "backslashreplace").decode()
    return data.decode("utf-8", "backslashreplace")


@dataclass
class Source:
    """All that one cache is made from.

    Every file of the folder is the image of a record, a sidecar that was read for one (or for what
    was rejected), among ``rejected``, or among the two lists of paths.
    """

    records: list[SourceImage]
    rejected: list[Rejected]
    hidden: list[str] = field(default_factory=list)  # the system's; a whole folder ends with "/"
    unused: list[str] = field(default_factory=list)  # neither an image nor a sidecar of one


@dataclass
class Memory:
    """What files held when they were last read, so that an unchanged one is not opened again.

    ``known`` is an earlier run's ``seen``; both are JSON: a file's path, relative to the dataset,
    to [size, mtime_ns, what it held].
    """

    known: dict[str, list[Any]] = field(default_factory=dict)
    seen: dict[str, list[Any]] = field(default_factory=dict)
    _now: int = field(default_factory=time.time_ns)

    def recall(self, path: str, size: int, mtime_ns: int, read: Callable[[], Any]) -> Any:
        """What the file holds: remembered if its size and mtime are, else from ``read()``."""
        remembered = self.find(path, size, mtime_ns)
        return self.keep(path, size, mtime_ns, read()) if remembered is None else remembered

    def find(self, path: str, size: int, mtime_ns: int) -> Any:
        """What the file held, if it was then of this size and time; else None."""
        row = self.known.get(path)
        if row is None or row[0] != size or row[1] != mtime_ns:
            return None
        self.seen[path] = row
        return row[2]

    def keep(self, path: str, size: int, mtime_ns: int, held: Any) -> Any:
        """Remember what the file holds, unless it may change unnoticed; returns it."""
        if mtime_ns < self._now - MTIME_GRACE_NS:
            self.seen[path] = [size, mtime_ns, held]
        return held


# One JSON object about an image, from a list or a tar: its captions, weight and repeats.

TEXT_FIELDS = ("text", "caption")
MOST_WEIGHT = 1e6
MOST_REPEATS = 10**6  # an epoch's entries are counted, shuffled and stored


@dataclass(frozen=True)
class MetadataEntry:
    """``captions`` is empty where the object has none."""

    captions: tuple[str, ...] = ()
    weight: float = 1.0
    repeats: int = 1
    split: str = ""


NO_ROW = MetadataEntry()


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


def read_row(row: dict[str, Any]) -> MetadataEntry:
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
    return MetadataEntry(captions, float(weight), repeats, split if isinstance(split, str) else "")


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
