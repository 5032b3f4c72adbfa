"""A folder of a dataset: its files by name, which of them are used, and how they are read."""

import errno
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from precompute.dataset.captions import (
    MAX_TEXT_BYTES,
    decode_text,
)
from precompute.dataset.file_roles import (
    TEXTS,
    is_hidden,
    is_ignored,
    is_image,
    stem_of,
)
from precompute.dataset.records import (
    MAX_IMAGE_BYTES,
    NO_ENTRY,
    Blob,
    Memory,
    MetadataEntry,
    parse_row,
)
from precompute.dataset.tars import HEAD_BYTES, too_large
from runtime.files import kind_of_file, open_regular

MAX_DEPTH = 100  # folders in each other; a link may lead to a tree without end
Stamp = tuple[int, int]  # size in bytes, mtime in nanoseconds


@dataclass
class Tree:
    """Every file below ``root`` that may be of the set, by its relative posix path."""

    root: Path
    memory: Memory
    prefix: str = ""  # the root's path within the dataset, for the memory: "train/"
    files: dict[str, Stamp] = field(default_factory=dict)
    irregular: dict[str, str] = field(
        default_factory=dict
    )  # files that are not regular, and what they are
    unread_folders: dict[str, str] = field(
        default_factory=dict
    )  # folders that are not read, and why
    hidden: list[str] = field(default_factory=list)  # system files; folders end with a slash
    ignore: tuple[str, ...] = ()  # patterns of what is left out
    ignored: list[str] = field(default_factory=list)  # by them; folders end with a slash
    used: set[str] = field(default_factory=set)  # files that were read, or taken as a mask or text
    named_columns: set[tuple[str, ...]] = field(default_factory=set)  # that were guessed, and said

    @cached_property
    def paths_by_lower_case(self) -> dict[str, list[str]]:
        """Paths of all files by their lower-case form."""
        by_lower: dict[str, list[str]] = {}
        for path in (*self.files, *self.irregular):
            by_lower.setdefault(path.lower(), []).append(path)
        return by_lower

    @cached_property
    def stems(self) -> set[str]:
        """The paths of the images, without ending."""
        return {stem_of(path) for path in self.files if is_image(path)}

    def dataset_path(self, path: str) -> str:
        return path

    def blob(self, path: str) -> Blob:
        """
        Raises:
            KeyError: no such file.
            ValueError: it is larger than any image.
        """
        size, mtime_ns = self.files[path]
        self.used.add(path)
        if size > MAX_IMAGE_BYTES:
            raise ValueError(too_large(size, MAX_IMAGE_BYTES))
        return Blob(self.root / path, size, mtime_ns)

    def head(self, path: str) -> bytes:
        """The first bytes of a file.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        size, mtime_ns = self.files[path]
        return Blob(self.root / path, min(size, HEAD_BYTES), mtime_ns).read()

    def text(self, path: str) -> str:
        """The text of a text file.

        Raises:
            ValueError: the file has no text; the message continues a sentence after its name.
        """

        def read() -> str:
            try:
                with open_regular(self.root / path) as file:
                    data = file.read(MAX_TEXT_BYTES + 1)
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from None
            if len(data) > MAX_TEXT_BYTES:
                raise ValueError(f"has {too_large(len(data), MAX_TEXT_BYTES)}")
            return decode_text(data)

        self.used.add(path)
        if path in self.irregular:
            raise ValueError(f"is {self.irregular[path]}")
        size, mtime_ns = self.files[path]
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"has {too_large(size, MAX_TEXT_BYTES)}")
        return str(self.memory.recall(self.prefix + path, size, mtime_ns, read))

    def row(self, path: str) -> MetadataEntry:
        """No entry: only tars have such entries. Of a JSON file in a folder the caption is read."""
        return NO_ENTRY

    def fields(self, path: str, names: tuple[str, ...]) -> dict[str, Any]:
        """The fields of these names in a JSON file beside an image, those that it has. It may be
        any tool's: what is no JSON object has none."""

        def read() -> dict[str, Any]:
            try:
                row = parse_row(decode_text(Blob(self.root / path, size, mtime_ns).read()))
                return {name: row[name] for name in names if name in row}
            except ValueError:
                return {}

        if path in self.irregular:
            return {}
        size, mtime_ns = self.files[path]
        if size > MAX_TEXT_BYTES:
            return {}
        role = f"fields {json.dumps(names)} "
        fields: dict[str, Any] = self.memory.recall(role + self.prefix + path, size, mtime_ns, read)
        if fields:
            self.used.add(path)
        return fields


def walk(
    root: Path,
    memory: Memory,
    prefix: str = "",
    skip: Path | None = None,
    ignore: tuple[str, ...] = (),
) -> Tree:
    """List all files below ``root``, in linked folders too, but not in ``skip``; no file is opened.

    Hidden and system folders, those to ``ignore``, those that cannot be listed and those that lie
    too deep are noted and not entered.

    Raises:
        OSError: ``root`` cannot be listed.
    """
    tree = Tree(root, memory, prefix, ignore=ignore)
    skipped = [] if skip is None or not skip.exists() else [skip.stat()]
    ancestors = tuple((status.st_dev, status.st_ino) for status in skipped)
    # A stack and no recursion: a path may have more folders than Python has frames.
    pending = [("", ancestors)]
    while pending:
        inside, ancestors = pending.pop()
        path = os.path.join(root, inside)
        try:
            status = os.stat(path)
            folder_id = (status.st_dev, status.st_ino)
            if folder_id in ancestors:
                continue  # a link to a folder it lies in
            if inside.count("/") > MAX_DEPTH:
                tree.unread_folders[inside] = f"a folder in more than {MAX_DEPTH} others: not read"
                continue
            with os.scandir(path) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            if error.errno != errno.ENOENT:  # else it was removed meanwhile
                tree.unread_folders[inside] = f"a folder that cannot be read: {error.strerror}"
            continue
        folders = [entry.name for entry in children if _is_folder(tree, inside, entry)]
        pending += [(f"{inside}{name}/", (*ancestors, folder_id)) for name in reversed(folders)]
    return tree


def _is_folder(tree: Tree, inside: str, entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder to enter; any other is noted in the tree."""
    name = inside + entry.name
    try:
        is_folder = entry.is_dir()
        if is_hidden(entry.name):
            tree.hidden.append(name + "/" * is_folder)
            return False
        if tree.ignore and is_ignored(tree.prefix + name, tree.ignore):
            tree.ignored.append(name + "/" * is_folder)
            return False
        status = entry.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            tree.irregular[name] = "a link that leads to itself"
        elif entry.is_symlink():
            tree.irregular[name] = "a link that leads nowhere"
        elif error.errno != errno.ENOENT:  # else it was removed meanwhile
            tree.irregular[name] = f"not readable: {error.strerror}"
        return False
    file_kind = kind_of_file(status.st_mode)
    if not file_kind:
        tree.files[name] = (status.st_size, status.st_mtime_ns)
    elif not is_folder or entry.name.lower().endswith(TEXTS):
        tree.irregular[name] = file_kind  # a folder x.txt too: x.jpg asks for it
    return is_folder
