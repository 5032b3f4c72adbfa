"""An image of the dataset as a record: its bytes on demand, and its caption, weight and repeats."""

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from precompute.dataset.parquet_files import read_cell
from precompute.settings import EncodeSettings
from runtime.files import open_regular
from runtime.messages import shortened
from shards.format import sample_key

MAX_IMAGE_BYTES = 2 * 10**9  # 180 million pixels of 16 bits and four channels take 1.4 GB
PACKS = (".tar", ".parquet", ".arrow")  # files that are read as a folder of their images would be
DIGEST_DIGITS = 20  # of a sha256 in hex, as a key has
MTIME_GRACE_NS = 2_000_000_000  # a file changed within it may change again and keep its mtime


# Errors of one file; others are of its disk.
FILE_ERRNOS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
)


def short_digest(sha256: str) -> str:
    """A sha256 in hex, shortened to what fingerprints store; empty stays empty."""
    return sha256[:DIGEST_DIGITS]


@dataclass(frozen=True, slots=True)  # there is one for each of a million rows
class Blob:
    """A span of bytes in a file or a tar, as it was when the dataset was read.

    ``size`` is in bytes; ``mtime_ns`` is of the file, so for a member of a tar that of the tar.
    With a ``column`` the file is a parquet table, and ``offset`` the number of a row.
    """

    file: Path
    size: int
    mtime_ns: int
    offset: int = 0
    column: str = ""

    @classmethod
    def of(cls, file: Path) -> "Blob":
        """A whole file, as it is now."""
        stat = file.stat()
        return cls(file, stat.st_size, stat.st_mtime_ns)

    def place_in(self, dataset: Path) -> str:
        """Where the bytes lie, as a memory knows them: the path in the dataset, offset, column."""
        inside = str(self.file).removeprefix(f"{dataset}/")
        if inside == str(self.file):  # of --masks, elsewhere: a cache names no folder of a machine
            inside = f"elsewhere-{short_digest(hashlib.sha256(os.fsencode(self.file)).hexdigest())}"
        return f"{inside}:{self.offset}{' ' if self.column else ''}{self.column}"

    def read(self) -> bytes:
        """The bytes as they were when the dataset was read.

        Raises:
            OSError: the disk fails.
            ValueError: it changed since, is gone, or may not be read: no other file is affected.
        """
        try:
            with open_regular(self.file) as file:
                changed = os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns
                if self.column and not changed:
                    data = read_cell(file, self.column, self.offset)
                else:
                    file.seek(self.offset)
                    data = file.read(self.size)
        except OSError as error:
            if error.errno not in FILE_ERRNOS:
                error.filename = os.fspath(self.file)  # an error of a read names no file
                raise
            is_missing = error.errno == errno.ENOENT
            why = "no such file" if is_missing else f"cannot be read: {error.strerror}"
            raise ValueError(why) from error
        if changed or len(data) != self.size:
            raise ValueError("it changed while the dataset was encoded; encode again")
        return data


@dataclass(frozen=True)
class SourceImage:
    """An image with its captions. ``path`` is relative, posix; the key comes from it alone.

    The path of a tar's member is ``pack.tar/member.jpg``. ``weight`` is the weight of its loss,
    ``repeats`` how often an epoch takes it, ``split`` the split that its list names (else empty),
    ``num_blank_captions`` how many blank captions were dropped because there are others,
    ``header`` the short digest, width and height, where the image had to be read with the dataset,
    ``has_other_caption`` whether another text beside it says something else, ``roles`` the role
    of each caption, "" for one without; empty if none has any.
    """

    path: str
    image: Blob
    captions: tuple[str, ...]
    weight: float = 1.0
    repeats: int = 1
    mask: Blob | None = None
    split: str = ""
    num_blank_captions: int = 0
    header: tuple[str, int, int] | None = None
    has_other_caption: bool = False
    roles: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        return sample_key(self.path)


@dataclass(frozen=True)
class ImportedFile:
    """A file of another trainer's cache from which a sample's latents or text are taken.

    ``digest`` is a short one of its arrays, ``suffix`` what stands behind the names of those that
    are taken (``_128x96``; empty where it has one size alone).
    """

    blob: Blob
    digest: str
    suffix: str = ""


@dataclass(frozen=True)
class Rejected:
    """An image that is not encoded, and why; both as text, whatever bytes its name has."""

    path: str
    reason: str
    is_duplicate: bool = False  # dropped because that was asked for, and not because it is bad

    def __post_init__(self) -> None:
        for name in ("path", "reason"):
            object.__setattr__(self, name, _as_text(getattr(self, name)))

    @property
    def key(self) -> str:
        return sample_key(self.path)


def _as_text(text: str) -> str:
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError:  # a lone surrogate from a JSON string
        return text.encode("utf-8", "backslashreplace").decode()
    return data.decode("utf-8", "backslashreplace")


@dataclass
class Source:
    """The images of one cache, and what became of the dataset's other files.

    Every file of the folder is the image of a record, a sidecar of one (or of a rejected image),
    among ``rejected``, or in one of the two lists of paths.
    """

    records: list[SourceImage]
    rejected: list[Rejected]
    hidden: list[str] = field(default_factory=list)  # system files; a folder ends with "/"
    unused: list[str] = field(default_factory=list)  # neither an image nor a sidecar of one


@dataclass
class Memory:
    """Remembers what was read from files, so that an unchanged file is not opened again.

    ``known`` is an earlier run's ``seen``. Both are JSON: a file's path, relative to the dataset,
    to [size, mtime_ns, content]. The content is what ``read`` made of the file.
    """

    stored: dict[str, list[Any]] = field(default_factory=dict)
    seen: dict[str, list[Any]] = field(default_factory=dict)
    _started: int = field(default_factory=time.time_ns)

    def recall(self, path: str, size: int, mtime_ns: int, read: Callable[[], Any]) -> Any:
        """The content of a file: remembered if size and mtime are the same, else from
        ``read()``."""
        remembered = self.find(path, size, mtime_ns)
        return self.remember(path, size, mtime_ns, read()) if remembered is None else remembered

    def find(self, path: str, size: int, mtime_ns: int) -> Any:
        """The remembered content of a file if its size and mtime are the same, else None."""
        row = self.stored.get(path)
        if row is None or row[0] != size or row[1] != mtime_ns:
            return None
        self.seen[path] = row
        return row[2]

    def remember(self, path: str, size: int, mtime_ns: int, content: Any) -> Any:
        """Remember the content, unless the file may change unnoticed; return the content."""
        if mtime_ns < self._started - MTIME_GRACE_NS:
            self.seen[path] = [size, mtime_ns, content]
        return content


# One JSON object about an image, from a list or a tar: its captions, weight and repeats.

TEXT_FIELDS = ("text", "caption")
JSON_FIELDS = ("caption", "text", "prompt", "tags")  # of a file beside an image
FILE_FIELDS = ("file_name", "file", "image")
# Guessed where a row has none of these.
MORE_TEXT_FIELDS = ("prompt", "captions", "prompts", "description", "tags")
MORE_FILE_FIELDS = ("path", "file_path", "filepath", "filename", "image_path", "image_file", "url")
MAX_WEIGHT = 1e6
MAX_REPEATS = 10**6  # an epoch's entries are counted, shuffled and stored


@dataclass(frozen=True)
class Columns:
    """The fields or columns that name an image and hold its captions, likeliest first.

    With ``every_caption`` all of them are captions, else the first one that a row has. ``roles``
    has the role of the captions of each column; empty where they have none.
    """

    image: tuple[str, ...]
    captions: tuple[str, ...]
    every_caption: bool = False
    are_chosen: bool = False
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: EncodeSettings) -> "Columns":
        """Those of the settings, and for what they do not name the usual ones."""
        image, captions = settings.image_column, settings.caption_columns
        return cls(
            (image,) if image else FILE_FIELDS + MORE_FILE_FIELDS,
            captions or TEXT_FIELDS + MORE_TEXT_FIELDS,
            bool(captions),
            bool(image or captions),
            settings.roles,
        )

    def image_fields(self, present: Iterable[str]) -> tuple[str, ...]:
        """The fields that may name the image of a row with the fields ``present``: where none is
        chosen, also ``image_file_name``, or the only one of such a name (imagefolder has them)."""
        if len(self.image) == 1:
            return self.image
        more = [name for name in present if name.endswith("_file_name") and "mask" not in name]
        more = [name for name in more if name == "image_file_name"] or more
        return (*self.image, *more) if len(more) == 1 else self.image

    def lower(self) -> "Columns":
        """As the header of a .csv is read: in any letter case."""
        image, captions = (tuple(map(str.lower, names)) for names in (self.image, self.captions))
        roles = {name.lower(): role for name, role in self.roles.items()}
        return Columns(image, captions, self.every_caption, self.are_chosen, roles)


@dataclass(frozen=True)
class MetadataEntry:
    """What a list, or the JSON of a tar's member, says of an image; ``captions`` may be empty, and
    ``roles`` is, where they have none."""

    captions: tuple[str, ...] = ()
    weight: float = 1.0
    repeats: int = 1
    split: str = ""
    roles: tuple[str, ...] = ()


NO_ENTRY = MetadataEntry()


def parse_row(line: str | bytes) -> dict[str, Any]:
    """Parse one line of a list, or the JSON of a tar's member.

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


def read_entry(
    row: dict[str, Any],
    text_fields: tuple[str, ...] = TEXT_FIELDS,
    every_caption: bool = False,
    roles: Mapping[str, str] | None = None,
) -> MetadataEntry:
    """Check the fields of a row that encode uses; missing ones have their defaults.

    The captions are those of the first of ``text_fields`` that the row has, or of all of them.

    Raises:
        ValueError: a field has a value that it cannot have.
    """
    weight, repeats = row.get("weight"), row.get("repeats")
    weight, repeats = 1.0 if weight is None else weight, 1 if repeats is None else repeats
    if not _is_number(weight) or not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(
            f"its weight must be a number from 0 to {MAX_WEIGHT:g}, not {shortened(weight)}"
        )
    if type(repeats) is not int or not 1 <= repeats <= MAX_REPEATS:
        raise ValueError(
            f"its repeats must be a whole number from 1 to {MAX_REPEATS}, not {shortened(repeats)}"
        )
    split = row.get("split")
    names = [name for name in text_fields if row.get(name) is not None]
    pairs = [
        (caption, roles.get(name, "") if roles else "")
        for name in (names if every_caption else names[:1])
        for caption in _captions(row[name], text_fields)
    ]
    return MetadataEntry(
        tuple(caption for caption, _ in pairs),
        float(weight),
        repeats,
        split if isinstance(split, str) else "",
        tuple(role for _, role in pairs) if roles else (),
    )


def captions_of_field(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The captions in one field, none where it is missing or null.

    Raises:
        ValueError: it is neither text nor a list of texts.
    """
    return () if row.get(name) is None else _captions(row[name], (name,))


def captions_of_object(row: dict[str, Any], joined: bool = False) -> tuple[str, ...]:
    """The captions in a JSON object about an image: text or a list of texts, or else its tags.

    ``joined`` is kohya's metadata, where tags go behind the caption.

    Raises:
        ValueError: a field is neither text nor a list of texts.
    """
    named = next(
        (name for name in JSON_FIELDS[:-1] if row.get(name) is not None and row[name] != ""), None
    )
    captions = () if named is None else _captions(row[named], (named,))
    if row.get("tags") is None or (captions and not joined):
        return captions
    tags = ", ".join(filter(None, _captions(row["tags"], ("tags",))))
    if not captions:
        return (tags,) if tags else ()
    return tuple(f"{caption}, {tags}" if tags else caption for caption in captions)


def first_field(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first named field that is not missing or null; else None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _captions(value: Any, fields: tuple[str, ...]) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no caption: none of {', '.join(fields)} is text or a list of texts")
    return tuple(text.strip() for text in texts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
