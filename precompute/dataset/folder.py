"""Pictures in a folder, or packed in a tar, each with a text beside it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from precompute.dataset.captions import is_text, settle, texts_of
from precompute.dataset.records import Blob, Memory, Record, Rejected
from precompute.dataset.rows import NO_ROW, Row
from precompute.dataset.tars import Pack
from precompute.settings import EncodeSettings

PICTURES = (
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
)
TEXTS = (".txt", ".caption")
MASKS = (".mask.png", "-masklabel.png")
Stamp = tuple[int, int]  # size in bytes, mtime in nanoseconds


@dataclass
class Tree:
    """Every file below ``root``, by its relative posix path."""

    root: Path
    memory: Memory
    prefix: str = ""  # of the root within the data set, for the memory: "train/"
    files: dict[str, Stamp] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # links that lead nowhere

    def label(self, path: str) -> str:
        return path

    def blob(self, path: str) -> Blob:
        """
        Raises:
            KeyError: no such file.
        """
        size, mtime_ns = self.files[path]
        return Blob(self.root / path, size, mtime_ns)

    def text(self, path: str) -> str:
        """What a text file holds.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
            OSError: it cannot be read.
        """

        def read() -> str:
            return (self.root / path).read_text("utf-8-sig")

        if path not in self.files:
            return read()  # raises why: missing, or a folder
        return str(self.memory.recall(self.prefix + path, *self.files[path], read))

    def row(self, path: str) -> Row:
        """Of tars only: a JSON file in a folder may be any tool's."""
        return NO_ROW


def is_picture(name: str) -> bool:
    # A hidden name such as ".png" has no suffix for pathlib, but it is a name like any other.
    return name.lower().endswith(PICTURES)


def walk(root: Path, memory: Memory, prefix: str = "", skip: Path | None = None) -> Tree:
    """Names, sizes and times of all files below, in linked folders too, but for ``skip``.

    Opens none.

    Raises:
        OSError: a folder that cannot be listed.
    """
    tree = Tree(root, memory, prefix)
    left_out = [] if skip is None or not skip.exists() else [skip.stat()]
    _walk(tree, os.fspath(root), "", tuple((stat.st_dev, stat.st_ino) for stat in left_out))
    return tree


def _walk(tree: Tree, folder: str, inside: str, above: tuple[tuple[int, int], ...]) -> None:
    stat = os.stat(folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return  # a link to a folder it lies in
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = inside + entry.name
        try:
            if entry.is_dir():
                _walk(tree, entry.path, name + "/", (*above, here))
            elif entry.is_file():
                stat = entry.stat()
                tree.files[name] = (stat.st_size, stat.st_mtime_ns)
            elif entry.is_symlink():
                tree.broken.append(name)
        except FileNotFoundError:
            continue  # it went while it was looked at


def read_pictures(place: Tree | Pack, settings: EncodeSettings) -> Iterator[Record | Rejected]:
    """Every picture with the text and the mask beside it, or why it is refused."""
    masks = find_masks(place)
    beside = {mask for names in masks.values() for mask in names}
    for path in place.files:
        if not is_picture(path) or path in beside:
            continue
        if not is_text(path):
            yield Rejected(place.label(path), "its name is not UTF-8 text")
            continue
        try:
            record, why = _with_caption(place, path, settings)
            record = replace(record, mask=mask_beside(place, path, masks))
        except ValueError as error:
            yield Rejected(place.label(path), str(error))
        else:
            yield settle(record, settings, why)


def _with_caption(place: Tree | Pack, path: str, settings: EncodeSettings) -> tuple[Record, str]:
    """The picture with the captions beside it; why there are none.

    Raises:
        ValueError: a text that cannot be read, or more than one.
    """
    stem = path.rpartition(".")[0]
    name = stem.rpartition("/")[2]
    texts = [ending for ending in TEXTS if stem + ending in place.files]
    if len(texts) > 1:
        raise ValueError(f"both {name}{texts[0]} and {name}{texts[1]}: which is its caption?")
    ending = texts[0] if texts else TEXTS[0]
    captions: tuple[str, ...] = ()
    try:
        captions = texts_of(place.text(stem + ending), settings)
    except FileNotFoundError:
        pass
    except UnicodeDecodeError:
        raise ValueError(f"no caption: {name}{ending} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"no caption: {name}{ending}: {error.strerror}") from None
    row = place.row(stem + ".json")
    if not any(captions):
        captions = row.captions or captions
    record = Record(place.label(path), place.blob(path), captions, row.weight, row.repeats)
    return record, f"no caption: {name}{ending} is missing"


def find_masks(place: Tree | Pack) -> dict[str, list[str]]:
    """Mask pictures, by the path without ending of the pictures they lie beside."""
    masks = [path for path in place.files if path.lower().endswith(MASKS)]
    stems = {path.rpartition(".")[0] for path in place.files if is_picture(path)} if masks else ()
    found: dict[str, list[str]] = {}
    for path in masks:
        stem = next(path[: -len(one)] for one in MASKS if path.lower().endswith(one))
        if stem in stems:
            found.setdefault(stem, []).append(path)
    return found


def mask_beside(place: Tree | Pack, path: str, masks: dict[str, list[str]]) -> Blob | None:
    found = masks.get(path.rpartition(".")[0], [])
    if len(found) > 1:
        names = [name.rpartition("/")[2] for name in found]
        raise ValueError(f"both {names[0]} and {names[1]}: which is its mask?")
    return place.blob(found[0]) if found else None
