"""A list of images: captions.jsonl or metadata.jsonl, one JSON object a line, a .csv or a .parquet.

A list is read line by line, each within a bound, so that one bad line or one without an end is one
rejected entry, and the other lines are read.
"""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from precompute.dataset.captions import decode_text, detect_encoding, is_text, normalize_captions
from precompute.dataset.file_roles import TEXTS, is_image, stem_of
from precompute.dataset.folder import Tree
from precompute.dataset.parquet_files import NEEDS_PYARROW, has_pyarrow, read_columns, read_rows
from precompute.dataset.records import (
    FILE_FIELDS,
    TEXT_FIELDS,
    Blob,
    Columns,
    Rejected,
    SourceImage,
    captions_of_object,
    first_field,
    parse_row,
    read_entry,
)
from precompute.dataset.tars import too_large
from precompute.settings import EncodeSettings
from runtime.files import open_regular
from runtime.messages import shortened

LISTS = ("captions.jsonl", "metadata.jsonl")
TABLES = ("captions.csv", "metadata.csv")
PARQUETS = ("captions.parquet", "metadata.parquet")
# kohya's, which each step of its preparation writes anew, the last one first.
KOHYA = ("meta_lat.json", "meta_clean.json", "meta_cap_dd.json", "meta_cap.json")
MAX_KOHYA_BYTES = 1 << 28  # it is parsed in memory
OTHER_FIELDS = ("weight", "repeats", "mask", "split")
KOHYA_COLUMNS = Columns(("file_name",), ("text",), are_chosen=True)
MAX_LINE = 1 << 20  # characters
MAX_LIST_BYTES = 8 * 10**9
MAX_NAME = 4096  # characters; no file system has longer paths
HEAD_BYTES = 4096  # tell a list's encoding
OUTSIDE = "lies outside the dataset"


def is_list(path: str) -> bool:
    """Whether a file would be read as the list of its folder."""
    return path.rpartition("/")[2].lower() in (*LISTS, *TABLES, *PARQUETS, *KOHYA)


def find_image_list(tree: Tree) -> str | None:
    """The list directly in the folder, by any letter case; a .csv only where no image has a text,
    a .parquet where there is no .csv either, and kohya's metadata where there is none of these.

    Raises:
        ValueError: there are two.
    """
    top = [path for path in tree.files if "/" not in path and is_list(path)]
    lists = [name for name in top if name.lower() in LISTS]
    if not lists and top and not any(path.lower().endswith(TEXTS) for path in tree.files):
        by_name = {name.lower(): name for name in reversed(top)}
        kohya = [by_name[name] for name in KOHYA if name in by_name]
        tables, parquets = ([p for p in top if p.lower() in names] for names in (TABLES, PARQUETS))
        lists = tables or parquets or kohya[:1]
    if len(lists) > 1:
        raise ValueError(f"{tree.root}: both {lists[0]} and {lists[1]}; keep one")
    return lists[0] if lists else None


def read_image_list(
    tree: Tree, name: str, settings: EncodeSettings
) -> Iterator[SourceImage | Rejected]:
    """Read the image of each line of the list ``name``.

    Raises:
        OSError: the list cannot be read.
        ValueError: it is parquet, and there is no pyarrow.
    """
    tree.used.add(name)
    seen, guessed = set[str](), set[tuple[str, ...]]()
    columns, is_parquet = Columns.of(settings), name.lower() in PARQUETS
    if is_parquet and not has_pyarrow():
        raise ValueError(f"{tree.root / name}: {NEEDS_PYARROW}")
    if name.lower() in TABLES:
        columns = columns.lower()
        rows = _csv_rows(tree.root / name, columns)
    elif name.lower() in KOHYA:
        rows, columns = _kohya_rows(tree, name), KOHYA_COLUMNS
    else:
        rows = (_parquet_rows if is_parquet else _json_rows)(tree.root / name, columns)
    for number, row in rows:
        line_label = f"{name}:{number}"
        if isinstance(row, str):
            item: SourceImage | Rejected = Rejected(line_label, row)
        else:
            item = _read_item(tree, line_label, row, columns, settings)
            guessed.add(_guessed_fields(row, columns, is_parquet))
        if item.path in seen:
            item = Rejected(line_label, f"{item.path} is named a second time")
        seen.add(item.path)
        yield item
    for fields in sorted(filter(None, guessed)):
        warnings.warn(
            f"{tree.root / name}: images are named by its {fields[0]}, captions are from "
            f"{fields[1]}; --image-column and --caption-column choose",
            stacklevel=2,
        )


def _guessed_fields(row: dict[str, Any], columns: Columns, is_parquet: bool) -> tuple[str, ...]:
    """The fields of a row from which image and caption are taken, where both are guessed and not
    those that the documentation names; else empty."""
    names = [
        next((name for name in fields if row.get(name) is not None), "")
        for fields in (columns.image, columns.captions)
    ]
    is_usual = names[0] in FILE_FIELDS and names[1] in TEXT_FIELDS and not is_parquet
    return () if columns.are_chosen or is_usual or not all(names) else tuple(names)


Rows = Iterator[tuple[int, dict[str, Any] | str]]  # a line's number, and its row or why it has none


def _json_rows(path: Path, _: Columns) -> Rows:
    for number, line in _lines(path):
        if not isinstance(line, str):
            yield number, str(line)
        elif line.strip():
            try:
                yield number, parse_row(line)
            except ValueError as error:
                yield number, str(error)


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    """Rows of a parquet table, numbered from 0: the columns that may be used, and no others."""
    number = -1
    try:
        present = read_columns(path)
        names = [name for name in (*columns.image, *columns.captions) if name in present]
        if not {*names} & {*columns.image}:
            yield 0, f"none of its columns is {', '.join(columns.image)}"
            return
        names += [name for name in OTHER_FIELDS if name in present]
        for number, row in read_rows(path, [*dict.fromkeys(names)]):
            yield number, str(row) if isinstance(row, ValueError) else row
    except ValueError as error:
        yield number + 1, str(error)


def _kohya_rows(tree: Tree, listing: str) -> Rows:
    """The entries of kohya's metadata, numbered from 1: an object by the path of each image, which
    may be another machine's, or by its stem."""
    try:
        with open_regular(tree.root / listing) as file:
            data = file.read(MAX_KOHYA_BYTES + 1)
        if len(data) > MAX_KOHYA_BYTES:
            raise ValueError(too_large(len(data), MAX_KOHYA_BYTES))
        entries = parse_row(decode_text(data))
    except ValueError as error:
        yield 1, str(error)
        return
    by_stem: dict[str, list[str]] = {}
    for path in filter(is_image, tree.files):
        by_stem.setdefault(stem_of(path), []).append(path)
    for number, (key, entry) in enumerate(entries.items(), 1):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"{shortened(key)}: not a JSON object")
            captions = captions_of_object(entry, joined=True)
            name = _file_of_kohya(key, tree, by_stem)
            yield number, {"file_name": name, "text": [*captions] or None}
        except ValueError as error:
            yield number, str(error)


def _file_of_kohya(key: str, tree: Tree, by_stem: dict[str, list[str]]) -> str:
    """The image that a key means: the longest end of it that is a file or a stem in the dataset.

    Raises:
        ValueError: there are several of this stem.
    """
    parts = [part for part in key[:MAX_NAME].replace("\\", "/").split("/") if part]
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if end in tree.files:
            return end
        images = by_stem.get(end, [])
        if len(images) > 1:
            raise ValueError(f"{shortened(key)} is both {images[0]} and {images[1]}")
        if images:
            return images[0]
    return key


def _csv_rows(path: Path, names: Columns) -> Rows:
    """Rows of a table whose first line names its columns; weight and repeats become numbers."""
    number = 0

    def text_lines() -> Iterator[str]:
        nonlocal number
        for at, line in _lines(path):
            number = at
            if not isinstance(line, str):
                raise csv.Error(str(line))
            yield line + "\n"  # a quoted caption may go on behind it

    try:
        lines = text_lines()
        header = next(lines, "")
        separator = max(",;\t", key=header.count)  # Excel writes ";" where "," is for decimals
        columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator))]
        if not {*names.image} & {*columns}:
            yield 1, f"none of its columns is {', '.join(names.image)}"
            return
        for cells in csv.reader(lines, delimiter=separator, strict=True):
            if len(cells) > len(columns):
                yield (
                    number,
                    f"{len(cells)} fields in {len(columns)} columns: quote the caption",
                )
            elif cells:
                named = zip(columns, cells, strict=False)
                yield number, {name: _cell(name, text) for name, text in named}
    except csv.Error as error:
        yield number, f"not valid CSV, so that the rest is not read: {error}"


def _cell(name: str, text: str) -> Any:
    if name in ("weight", "repeats", "mask") and not text.strip():
        return None
    try:
        return {"weight": float, "repeats": int}.get(name, str)(text)
    except ValueError:
        return text  # refused by its field's name


def _lines(path: Path) -> Iterator[tuple[int, str | ValueError]]:
    """Numbered lines of a text in UTF-8 or UTF-16, without line ends; an error for a bad one."""
    with open_regular(path) as file:
        try:
            encoding = detect_encoding(file.read(HEAD_BYTES))
        except ValueError as error:
            yield 1, error
            return
        file.seek(0)
        # Only \n, \r and \r\n end lines here; str.splitlines would cut a caption at U+2028. What is
        # not UTF-8 becomes surrogates, which no line of UTF-8 has: the line is named, not the list.
        text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=None)
        number = 0
        try:
            while line := text.readline(MAX_LINE):
                number += 1
                full_line = line
                while len(line) == MAX_LINE and not line.endswith("\n"):
                    line = text.readline(MAX_LINE)
                    full_line = ""
                if not full_line:
                    yield number, ValueError(f"a line of more than {MAX_LINE:,} characters")
                elif not is_text(full_line):
                    yield number, ValueError("not UTF-8 text")
                else:
                    yield number, full_line.removesuffix("\n")
        except UnicodeDecodeError:
            name = encoding.upper()
            yield number + 1, ValueError(f"not {name} text, so that the rest is not read")


def _read_item(
    tree: Tree, line_label: str, row: dict[str, Any], columns: Columns, settings: EncodeSettings
) -> SourceImage | Rejected:
    name = first_field(row, columns.image)
    if not isinstance(name, str) or not name:
        return Rejected(line_label, f"names no image: none of {', '.join(columns.image)} is text")
    if name.lower().startswith(("http://", "https://")):
        return Rejected(line_label, "names a URL: download its image first, encode never does")
    if not is_text(name):
        return Rejected(line_label, "its name holds half a character (a lone surrogate)")
    if len(name) > MAX_NAME:
        return Rejected(line_label, f"names no image: {shortened(name)} is no file's name")
    path = name
    try:
        path, image = _find_file(tree, name)
        entry = read_entry(row, columns.captions, columns.every_caption)
        mask = None if row.get("mask") is None else _find_mask(tree, row["mask"])
    except ValueError as error:
        return Rejected(path, f"{line_label}: {error}")
    record = SourceImage(
        path, image, entry.captions, entry.weight, entry.repeats, mask, split=entry.split
    )
    return normalize_captions(
        record, settings, f"{line_label}: no caption: none of {', '.join(columns.captions)} is text"
    )


def _find_mask(tree: Tree, name: object) -> Blob:
    if not isinstance(name, str) or not is_text(name) or len(name) > MAX_NAME:
        raise ValueError(f"its mask must be a file's name, not {shortened(name)}")
    try:
        return _find_file(tree, name)[1]
    except ValueError as error:
        raise ValueError(f"its mask {name}: {error}") from None


def _find_file(tree: Tree, name: str) -> tuple[str, Blob]:
    """The path and the bytes of the file that a line names.

    Raises:
        ValueError: there is no such file, or it lies outside the dataset.
    """
    for path in (name, f"images/{name}"):
        if path in tree.files:
            return path, tree.blob(path)
        if path in tree.irregular:
            tree.used.add(path)
            raise ValueError(f"is {tree.irregular[path]}")
        # A detour, an absolute name, or a hidden one: one image, one name.
        if os.path.isfile(tree.root / path):  # False, where pathlib raises, of one too long
            return _find_by_real_path(tree, path)
    raise ValueError("no such file, nor in images/")


def _find_by_real_path(tree: Tree, path: str) -> tuple[str, Blob]:
    """The file ``path``, which is named with ``..``, absolutely or as hidden, by its plain path.

    Raises:
        ValueError: it lies outside the dataset, also by a link and then ``..``.
    """
    root = Path(os.path.abspath(tree.root))
    plain = Path(os.path.abspath(root / path))
    if not plain.is_relative_to(root):
        raise ValueError(OUTSIDE)
    inside = plain.relative_to(root).as_posix()
    try:
        # Behind a link, ".." leads to where the link's folder lies, and not back.
        if not os.path.samefile(plain, tree.root / path):
            raise ValueError(OUTSIDE)
        if inside in tree.files:
            return inside, tree.blob(inside)
        if not Path(os.path.realpath(plain)).is_relative_to(os.path.realpath(root)):
            raise ValueError(OUTSIDE)
        tree.used.add(inside)
        return inside, Blob.of(plain)
    except OSError:
        raise ValueError(OUTSIDE) from None


def unlisted_images(
    tree: Tree, items: Iterable[SourceImage | Rejected], listing: str
) -> Iterator[Rejected]:
    """Reject the images that the list does not name."""
    named = {item.path for item in items}
    for path in tree.files:
        if is_image(path) and path not in named and path not in tree.used:
            tree.used.add(path)
            yield Rejected(path, f"not named in {listing}, so it has no caption")
