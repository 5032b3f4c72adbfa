"""A folder of pictures, each with a text file beside it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from precompute.records import Blob, Memory, Record, Rejected

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
Stamp = tuple[int, int]  # size in bytes, mtime in nanoseconds


@dataclass
class Tree:
    """Every file below ``root``, by its relative posix path."""

    root: Path
    prefix: str = ""  # of the root within the data set, for the memory: "train/"
    files: dict[str, Stamp] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # links that lead nowhere

    def blob(self, path: str) -> Blob:
        """
        Raises:
            KeyError: no such file.
        """
        size, mtime_ns = self.files[path]
        return Blob(self.root / path, size, mtime_ns)

    def pictures(self) -> Iterator[str]:
        return (path for path in self.files if is_picture(path))

    def text(self, path: str, memory: Memory) -> str:
        """What a text file holds, stripped.

        Raises:
            UnicodeDecodeError, OSError: it cannot be read.
        """

        def read() -> str:
            return (self.root / path).read_text("utf-8-sig").strip()

        if path not in self.files:
            return read()  # raises why: missing, or a folder
        return str(memory.recall(self.prefix + path, *self.files[path], read))


def is_picture(name: str) -> bool:
    # A hidden name such as ".png" has no suffix for pathlib, but it is a name like any other.
    return name.lower().endswith(PICTURES)


def walk(root: Path, prefix: str = "") -> Tree:
    """Names, sizes and times of all files below, in folders that are linked too; opens none.

    Raises:
        OSError: a folder that cannot be listed.
    """
    tree = Tree(root, prefix)
    _walk(tree, os.fspath(root), "", ())
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


def with_text_files(tree: Tree, memory: Memory) -> Iterator[Record | Rejected]:
    """Every picture with the text beside it, or why it is refused."""
    for path in tree.pictures():
        if not is_text(path):
            yield Rejected(shown(path), "its name is not UTF-8 text")
            continue
        text = path.rpartition(".")[0] + ".txt"
        name = text.rpartition("/")[2]
        try:
            caption = tree.text(text, memory)
        except FileNotFoundError:
            yield Rejected(path, f"no caption: {name} is missing")
        except UnicodeDecodeError:
            yield Rejected(path, f"no caption: {name} is not UTF-8 text")
        except OSError as error:
            yield Rejected(path, f"no caption: {name}: {error.strerror}")
        else:
            yield Record(path, tree.blob(path), (caption,))


def shown(path: str) -> str:
    """A file's name as text, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
