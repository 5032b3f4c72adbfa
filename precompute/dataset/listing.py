"""A list of pictures: captions.jsonl or metadata.jsonl, one JSON object a line."""

import os
from collections.abc import Iterator
from pathlib import Path

from precompute.dataset.captions import is_text, settle
from precompute.dataset.folder import Tree
from precompute.dataset.records import Blob, Record, Rejected
from precompute.dataset.rows import TEXT_FIELDS, first_field, load_row, read_row
from precompute.settings import EncodeSettings

LISTS = ("captions.jsonl", "metadata.jsonl")
FILE_FIELDS = ("file_name", "file", "image")


def read_list(tree: Tree, name: str, settings: EncodeSettings) -> Iterator[Record | Rejected]:
    """What each line of the list ``name`` comes to.

    Raises:
        ValueError: the list is not UTF-8 text.
    """
    listing, seen = tree.root / name, set[str]()
    try:
        lines = listing.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{listing}: not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = _read_line(tree, f"{name}:{number}", line, settings)
        if item.path in seen:
            item = Rejected(f"{name}:{number}", f"{item.path} is named a second time")
        seen.add(item.path)
        yield item


def _read_line(tree: Tree, where: str, line: str, settings: EncodeSettings) -> Record | Rejected:
    try:
        row = load_row(line)
    except ValueError as error:
        return Rejected(where, str(error))
    name = first_field(row, FILE_FIELDS)
    if not isinstance(name, str) or not name:
        return Rejected(where, f"names no picture: none of {', '.join(FILE_FIELDS)} is text")
    if not is_text(name):
        return Rejected(where, "its name holds half a character (a lone surrogate)")
    path = name
    try:
        path, picture = _find(tree, name)
        told = read_row(row)
        mask = None if row.get("mask") is None else _find_mask(tree, row["mask"])
    except ValueError as error:
        return Rejected(path, f"{where}: {error}")
    record = Record(path, picture, told.captions, told.weight, told.repeats, mask)
    return settle(
        record, settings, f"{where}: no caption: none of {', '.join(TEXT_FIELDS)} is text"
    )


def _find_mask(tree: Tree, name: object) -> Blob:
    if not isinstance(name, str) or not is_text(name):
        raise ValueError(f"its mask must be a file's name, not {name!r}")
    try:
        return _find(tree, name)[1]
    except ValueError as error:
        raise ValueError(f"its mask {name}: {error}") from None


def _find(tree: Tree, name: str) -> tuple[str, Blob]:
    """Path and bytes of the file that a line names.

    Raises:
        ValueError: there is none, or it lies outside.
    """
    for path in (name, f"images/{name}"):
        if path in tree.files:
            return path, tree.blob(path)
        # A detour, or an absolute name: one picture, one name.
        if os.path.isfile(tree.root / path):  # False, where pathlib raises, of one too long
            root = Path(os.path.abspath(tree.root))
            file = Path(os.path.abspath(root / path))
            if not file.is_relative_to(root):
                raise ValueError("lies outside the data set")
            inside = file.relative_to(root).as_posix()
            return inside, tree.blob(inside) if inside in tree.files else Blob.of(file)
    raise ValueError("no such file, nor in images/")
