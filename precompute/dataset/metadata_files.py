"""Lists of images: captions.jsonl or metadata.jsonl, one JSON object a line, a .csv or a .parquet.

Each folder may have one, which names what lies in it and below, as Hugging Face's imagefolder has
them. A list is read line by line, each within a bound, so that one bad line or one without an end
is one rejected entry, and the other lines are read.
"""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precompute.dataset.annotation_files import (
    ANNOTATION_COLUMNS,
    KOHYA,
    MAX_NAME,
    coco_rows,
    has_coco_captions,
    is_coco_name,
    kohya_rows,
)
from precompute.dataset.captions import detect_encoding, is_text, normalize_captions
from precompute.dataset.file_roles import TEXTS, is_image, stem_of
from precompute.dataset.folder import Tree
from precompute.dataset.parquet_files import has_pyarrow, needs_pyarrow, read_columns, read_rows
from precompute.dataset.records import (
    FILE_FIELDS,
    TEXT_FIELDS,
    Blob,
    Columns,
    Rejected,
    SourceImage,
    first_field,
    parse_row,
    read_entry,
)
from precompute.settings import EncodeSettings
from runtime.files import open_regular
from runtime.messages import shortened

LISTS = ("captions.jsonl", "metadata.jsonl")
TABLES = ("captions.csv", "metadata.csv")
PARQUETS = ("captions.parquet", "metadata.parquet")
MASK_FIELDS = ("mask", "mask_file_name")
OTHER_FIELDS = ("weight", "repeats", *MASK_FIELDS, "split")
MAX_LINE = 1 << 20  # characters
MAX_LIST_BYTES = 8 * 10**9
HEAD_BYTES = 4096  # tell a list's encoding
OUTSIDE = "lies outside the dataset"


@dataclass(frozen=True)
class ImageList:
    """A list, and the folder whose images it names: empty, or a path that ends with a slash."""

    path: str
    folder: str


def is_list(path: str) -> bool:
    """Whether a file could be read as the list of a folder."""
    name = path.rpartition("/")[2].lower()
    return name in (*LISTS, *TABLES, *PARQUETS, *KOHYA) or is_coco_name(name)


def find_image_lists(tree: Tree) -> list[ImageList]:
    """The list of each folder, by any letter case; one that lies below another list's folder does
    not count. A .csv counts only where no image in the folder has a text, a .parquet where there
    is no .csv either, kohya's metadata where there is none of these, and then COCO's captions, of
    which there may be several.

    Raises:
        ValueError: a folder has two.
    """
    by_folder: dict[str, list[str]] = {}
    for path in filter(is_list, tree.files):
        folder, _, name = path.rpartition("/")
        if is_coco_name(name.lower()) and folder.rpartition("/")[2].lower() == "annotations":
            folder = folder.rpartition("/")[0]  # as COCO's own archives are unpacked
        by_folder.setdefault(f"{folder}/" if folder else "", []).append(path)
    texts = _folders_with_texts(tree) if by_folder else set()
    lists: list[ImageList] = []
    for folder in sorted(by_folder, key=lambda folder: folder.count("/")):
        if not any(folder.startswith(above.folder) for above in lists):
            lists += [
                ImageList(path, folder)
                for path in _choose_lists(tree, by_folder[folder], folder in texts)
            ]
    return lists


def _folders_with_texts(tree: Tree) -> set[str]:
    """The folders in which, or below which, an image has a text beside it."""
    stems = {stem.lower() for stem in tree.stems}
    folders: set[str] = set()
    for path in tree.files:
        stem = stem_of(path).lower()
        if path.lower().endswith(TEXTS) and (stem in stems or stem_of(stem) in stems):
            folder = path.rpartition("/")[0]
            while folder and f"{folder}/" not in folders:
                folders.add(f"{folder}/")
                folder = folder.rpartition("/")[0]
            folders.add("")
    return folders


def _choose_lists(tree: Tree, paths: list[str], has_texts: bool) -> list[str]:
    """Those of a folder's lists that are read."""
    names = {path: path.rpartition("/")[2].lower() for path in paths}
    lists = [path for path in paths if names[path] in LISTS]
    if not lists and not has_texts:
        by_name = {names[path]: path for path in reversed(paths)}
        tables, parquets = ([p for p in paths if names[p] in each] for each in (TABLES, PARQUETS))
        lists = tables or parquets or [by_name[name] for name in KOHYA if name in by_name][:1]
        if not lists:
            return [path for path in paths if has_coco_captions(tree, path)]
    if len(lists) > 1:
        raise ValueError(f"{tree.root}: both {lists[0]} and {lists[1]}; keep one")
    return lists


def read_image_list(
    tree: Tree, image_list: ImageList, settings: EncodeSettings
) -> Iterator[SourceImage | Rejected]:
    """Read the image of each line of a list.

    Raises:
        OSError: the list cannot be read.
        ValueError: it is parquet, and there is no pyarrow.
    """
    path, folder = image_list.path, image_list.folder
    name = path.rpartition("/")[2].lower()
    tree.used.add(path)
    seen, guessed = set[str](), set[tuple[str, ...]]()
    columns, is_parquet = Columns.of(settings), name in PARQUETS
    if is_parquet and not has_pyarrow():
        raise ValueError(f"{tree.root / path}: {needs_pyarrow()}")
    if name in TABLES:
        columns = columns.lower()
        rows = _csv_rows(tree.root / path, columns)
    elif name in KOHYA or is_coco_name(name):
        read = kohya_rows if name in KOHYA else coco_rows
        rows, columns, folder = read(tree, path, folder), ANNOTATION_COLUMNS, ""
    else:
        rows = (_parquet_rows if is_parquet else _json_rows)(tree.root / path, columns)
    for number, row in rows:
        line_label = f"{path}:{number}"
        if isinstance(row, str):
            item: SourceImage | Rejected = Rejected(line_label, row)
        else:
            item = _read_item(tree, folder, line_label, row, columns, settings)
            guessed.add(_guessed_fields(row, columns, is_parquet))
        if item.path in seen:
            item = Rejected(line_label, f"{item.path} is named a second time")
        seen.add(item.path)
        yield item
    for fields in sorted(filter(None, guessed)):
        warnings.warn(
            f"{tree.root / path}: images are named by its {fields[0]}, captions are from "
            f"{fields[1]}; --image-column and --caption-column choose",
            stacklevel=2,
        )


def _guessed_fields(row: dict[str, Any], columns: Columns, is_parquet: bool) -> tuple[str, ...]:
    """The fields of a row from which image and caption are taken, where both are guessed and not
    those that the documentation names; else empty."""
    names = [
        next((name for name in fields if row.get(name) is not None), "")
        for fields in (columns.image_fields(row), columns.captions)
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
        images = columns.image_fields(present)
        names = [name for name in (*images, *columns.captions) if name in present]
        if not {*names} & {*images}:
            yield 0, f"none of its columns is {', '.join(columns.image)}"
            return
        names += [name for name in OTHER_FIELDS if name in present]
        for number, row in read_rows(path, [*dict.fromkeys(names)]):
            yield number, str(row) if isinstance(row, ValueError) else row
    except ValueError as error:
        yield number + 1, str(error)


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
        if not {*names.image_fields(columns)} & {*columns}:
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
    if name in ("weight", "repeats", *MASK_FIELDS) and not text.strip():
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
    tree: Tree,
    folder: str,
    line_label: str,
    row: dict[str, Any],
    columns: Columns,
    settings: EncodeSettings,
) -> SourceImage | Rejected:
    name = first_field(row, columns.image_fields(row))
    if not isinstance(name, str) or not name:
        return Rejected(line_label, f"names no image: none of {', '.join(columns.image)} is text")
    if name.lower().startswith(("http://", "https://")):
        return Rejected(line_label, "names a URL: download its image first, encode never does")
    if not is_text(name):
        return Rejected(line_label, "its name holds half a character (a lone surrogate)")
    if len(name) > MAX_NAME:
        return Rejected(line_label, f"names no image: {shortened(name)} is no file's name")
    path = folder + name
    try:
        path, image = _find_file(tree, folder, name)
        entry = read_entry(row, columns.captions, columns.every_caption, columns.roles)
        mask_name = first_field(row, MASK_FIELDS)
        mask = None if mask_name is None else _find_mask(tree, folder, mask_name)
    except ValueError as error:
        return Rejected(path, f"{line_label}: {error}")
    record = SourceImage(
        path,
        image,
        entry.captions,
        entry.weight,
        entry.repeats,
        mask,
        split=entry.split,
        roles=entry.roles,
    )
    return normalize_captions(
        record,
        settings,
        tree.memory,
        f"{line_label}: no caption: none of {', '.join(columns.captions)} is text",
    )


def _find_mask(tree: Tree, folder: str, name: object) -> Blob:
    if not isinstance(name, str) or not is_text(name) or len(name) > MAX_NAME:
        raise ValueError(f"its mask must be a file's name, not {shortened(name)}")
    try:
        return _find_file(tree, folder, name)[1]
    except ValueError as error:
        raise ValueError(f"its mask {name}: {error}") from None


def _find_file(tree: Tree, folder: str, name: str) -> tuple[str, Blob]:
    """The path and the bytes of the file that a line of the list in ``folder`` names.

    Raises:
        ValueError: there is no such file, or it lies outside the dataset.
    """
    if folder and os.path.isabs(name):
        folder = ""  # the dataset's own root may be meant, wherever the list lies
    for path in (folder + name, f"{folder}images/{name}"):
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
    tree: Tree, lists: Iterable[ImageList], named: Iterable[str]
) -> Iterator[Rejected]:
    """Reject the images in the folders of lists that no list names."""
    by_folder = {image_list.folder: image_list.path for image_list in lists}
    named = {*named}
    for path in filter(is_image, tree.files):
        if path in named or path in tree.used:
            continue
        for folder, list_path in by_folder.items():
            if path.startswith(folder):
                tree.used.add(path)
                yield Rejected(path, f"not named in {list_path}, so it has no caption")
                break
