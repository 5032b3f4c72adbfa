"""What the user has, as stable records: a path, a file, captions. Nothing is opened but text."""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.sample import sample_key

PICTURES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".ppm",
        ".pgm",
        ".heic",
    ]
)
LISTS = ("captions.jsonl", "metadata.jsonl")
FILE_FIELDS = ("file_name", "file", "image")
TEXT_FIELDS = ("text", "caption")


@dataclass(frozen=True)
class Record:
    """A picture with its captions. ``path`` is relative, posix; the key comes from it alone."""

    path: str
    file: Path
    captions: tuple[str, ...]

    @property
    def key(self) -> str:
        return sample_key(self.path)


@dataclass(frozen=True)
class Rejected:
    """A picture that is not encoded, and why."""

    path: str
    reason: str

    @property
    def key(self) -> str:
        return sample_key(self.path)


@dataclass
class Source:
    """All that one cache is made from."""

    records: list[Record]
    rejected: list[Rejected]


def read_data_set(root: Path, val_share: float, empty_captions: bool = False) -> dict[str, Source]:
    """The sources by the sub-folder of the cache they belong in: "" alone, or train and val.

    With ``empty_captions`` a picture may have an empty one, and is not rejected for it.

    Raises:
        ValueError: no such folder, nothing in it, or one that can be read in two ways.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder" if not root.exists() else f"{root}: no folder")
    is_split = (root / "train").is_dir() and (root / "val").is_dir()
    if is_split and not any((root / name).is_file() for name in LISTS):
        loose = [path.name for path in sorted(root.iterdir()) if _is_picture(path)]
        if loose:
            raise ValueError(f"{root}: {loose[0]} lies beside train/ and val/: in which is it?")
        if val_share:
            raise ValueError(f"{root}: has its own val/; leave --val-share out")
        for path in sorted(root.iterdir()):
            if path.is_dir() and path.name not in ("train", "val"):
                warnings.warn(f"{path}: not read: only train/ and val/ are", stacklevel=2)
        return {name: read_source(root / name, empty_captions) for name in ("train", "val")}
    source = read_source(root, empty_captions)
    return split(source, val_share) if val_share else {"": source}


def split(source: Source, val_share: float) -> dict[str, Source]:
    """Split by key: a picture stays on its side whatever joins or leaves the set."""

    def is_val(key: str) -> bool:
        return int(key[:8], 16) / 2**32 < val_share

    parts = {}
    for name in ("train", "val"):
        wanted = name == "val"
        parts[name] = Source(
            [record for record in source.records if is_val(record.key) == wanted],
            [rejected for rejected in source.rejected if is_val(rejected.key) == wanted],
        )
        if not parts[name].records:
            raise ValueError(f"--val-share {val_share} leaves no picture for {name}")
    return parts


def read_source(folder: Path, empty_captions: bool = False) -> Source:
    """Records of one folder: by its list, else by a text file beside each picture."""
    lists = [folder / name for name in LISTS if (folder / name).is_file()]
    if len(lists) > 1:
        raise ValueError(f"{folder}: both {LISTS[0]} and {LISTS[1]}; keep one")
    pictures = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_picture(path)
    }
    found = [*(_listed(lists[0]) if lists else _with_text_files(folder, pictures))]
    if not empty_captions:
        found = [_refuse_empty(item) for item in found]
    named = {item.path for item in found}
    if lists:
        why = f"not named in {lists[0].name}, so it has no caption"
        found += [Rejected(_shown(path), why) for path in pictures - named]
    if not found:
        raise ValueError(f"{folder}: no pictures in it ({' '.join(sorted(PICTURES))})")
    records = [item for item in found if isinstance(item, Record)]
    rejected = [item for item in found if isinstance(item, Rejected)]
    return Source(sorted(records, key=lambda r: r.key), sorted(rejected, key=lambda r: r.key))


def _is_picture(path: Path) -> bool:
    # A hidden name such as ".png" has no suffix for pathlib, but it is a name like any other.
    return path.name.lower().endswith(tuple(PICTURES)) and path.is_file()


def _with_text_files(folder: Path, pictures: set[str]) -> Iterator[Record | Rejected]:
    for path in sorted(pictures):
        file = folder / path
        if not _is_text(path):
            yield Rejected(_shown(path), "its name is not UTF-8 text")
            continue
        text = file.with_suffix(".txt")
        try:
            caption = text.read_text("utf-8-sig").strip()
        except FileNotFoundError:
            yield Rejected(path, f"no caption: {text.name} is missing")
        except UnicodeDecodeError:
            yield Rejected(path, f"no caption: {text.name} is not UTF-8 text")
        except OSError as error:
            yield Rejected(path, f"no caption: {text.name}: {error.strerror}")
        else:
            yield Record(path, file, (caption,))


def _shown(path: str) -> str:
    """A file's name as text, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_empty(item: Record | Rejected) -> Record | Rejected:
    if isinstance(item, Record) and not all(item.captions):
        return Rejected(item.path, "its caption is empty")
    return item


def _listed(listing: Path) -> Iterator[Record | Rejected]:
    seen: set[str] = set()
    try:
        lines = listing.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{listing}: not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = _listed_one(listing, number, line)
        if item.path in seen:
            where = f"{listing.name}:{number}"
            item = Rejected(where, f"{item.path} is named a second time")
        seen.add(item.path)
        yield item


def _listed_one(listing: Path, number: int, line: str) -> Record | Rejected:
    where = f"{listing.name}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(where, f"not valid JSON: {error}")
    if not isinstance(row, dict):
        return Rejected(where, "not a JSON object")
    name, caption = _field(row, FILE_FIELDS), _field(row, TEXT_FIELDS)
    if not isinstance(name, str) or not name:
        return Rejected(where, f"names no picture: none of {', '.join(FILE_FIELDS)} is text")
    if not _is_text(name) or (isinstance(caption, str) and not _is_text(caption)):
        return Rejected(where, "its name or caption holds half a character (a lone surrogate)")
    root = Path(os.path.abspath(listing.parent))
    for file in (root / name, root / "images" / name):
        if os.path.isfile(file):  # False, where pathlib raises, of a name that is too long
            break
    else:
        return Rejected(name, f"{where}: no such file, nor in images/")
    file = Path(os.path.abspath(file))  # no detours: one picture, one name
    if not file.is_relative_to(root):
        return Rejected(name, f"{where}: lies outside the data set")
    path = file.relative_to(root).as_posix()
    if not isinstance(caption, str):
        return Rejected(path, f"{where}: no caption: none of {', '.join(TEXT_FIELDS)} is text")
    return Record(path, file, (caption.strip(),))


def _field(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)
