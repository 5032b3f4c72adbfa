"""A list of pictures: captions.jsonl or metadata.jsonl, one JSON object a line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precompute.folder import Tree, is_text
from precompute.records import Blob, Record, Rejected

LISTS = ("captions.jsonl", "metadata.jsonl")
FILE_FIELDS = ("file_name", "file", "image")
TEXT_FIELDS = ("text", "caption")


def listed(tree: Tree, name: str) -> Iterator[Record | Rejected]:
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
        item = _listed_one(tree, f"{name}:{number}", line)
        if item.path in seen:
            item = Rejected(f"{name}:{number}", f"{item.path} is named a second time")
        seen.add(item.path)
        yield item


def _listed_one(tree: Tree, where: str, line: str) -> Record | Rejected:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(where, f"not valid JSON: {error}")
    if not isinstance(row, dict):
        return Rejected(where, "not a JSON object")
    name, caption = _field(row, FILE_FIELDS), _field(row, TEXT_FIELDS)
    if not isinstance(name, str) or not name:
        return Rejected(where, f"names no picture: none of {', '.join(FILE_FIELDS)} is text")
    if not is_text(name) or (isinstance(caption, str) and not is_text(caption)):
        return Rejected(where, "its name or caption holds half a character (a lone surrogate)")
    found = _find(tree, name)
    if found is None:
        return Rejected(name, f"{where}: no such file, nor in images/")
    path, picture = found
    if picture is None:
        return Rejected(name, f"{where}: lies outside the data set")
    if not isinstance(caption, str):
        return Rejected(path, f"{where}: no caption: none of {', '.join(TEXT_FIELDS)} is text")
    return Record(path, picture, (caption.strip(),))


def _find(tree: Tree, name: str) -> tuple[str, Blob | None] | None:
    """Path and bytes of the file that a line names; no bytes if it lies outside."""
    for path in (name, f"images/{name}"):
        if path in tree.files and os.path.normpath(path) == path:
            return path, tree.blob(path)
        # A detour, or an absolute name: one picture, one name.
        if os.path.isfile(tree.root / path):  # False, where pathlib raises, of one too long
            root = Path(os.path.abspath(tree.root))
            file = Path(os.path.abspath(root / path))
            if not file.is_relative_to(root):
                return name, None
            inside = file.relative_to(root).as_posix()
            return inside, tree.blob(inside) if inside in tree.files else Blob.of(file)
    return None


def _field(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)
