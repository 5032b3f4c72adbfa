"""Images whose bytes lie in the rows of parquet or arrow files, as Hugging Face has them.

A file is read as a folder of its rows would be: the image in row 12 of ``x.parquet`` has the path
``x.parquet/12``. All rows are read once, in their order, with the size of each image; what was
seen is remembered, so that a rerun does not open the file.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from precompute.dataset.arrow_files import (
    ARROW,
    SAVED,
    STATE,
    read_arrow_columns,
    read_arrow_rows,
    read_saved_files,
)
from precompute.dataset.captions import normalize_captions
from precompute.dataset.folder import Tree
from precompute.dataset.parquet_files import (
    PARQUET,
    bytes_of,
    has_pyarrow,
    needs_pyarrow,
    read_columns,
    read_rows,
)
from precompute.dataset.records import (
    MAX_IMAGE_BYTES,
    Blob,
    Columns,
    Memory,
    Rejected,
    SourceImage,
    read_entry,
    short_digest,
)
from precompute.dataset.tars import too_large
from precompute.images.decode import image_size
from precompute.settings import EncodeSettings
from runtime.messages import shortened

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
ENTRY_FIELDS = ("weight", "repeats", "split")
TABLE_ENDINGS = (PARQUET, ARROW)


def saved_files(tree: Tree) -> tuple[set[str], list[Rejected]]:
    """The arrow files that are not of the dataset which was saved into their folder, and those of
    it that are missing. What describes such a dataset counts as used."""
    folders = {path.rpartition("/")[0] for path in tree.files if path.lower().endswith(ARROW)}
    above = {folder.rpartition("/")[0] for folder in folders}
    for folder in folders | above:
        tree.used.update(
            path for name in SAVED if (path := f"{folder}/{name}".lstrip("/")) in tree.files
        )
    foreign: set[str] = set()
    missing = []
    for folder in sorted(folders):
        prefix = f"{folder}/" if folder else ""
        state = prefix + STATE
        names = read_saved_files(tree.root / state) if state in tree.files else None
        if names is None:
            continue
        listed = {prefix + name for name in names}
        missing += [
            Rejected(path, f"no such file, though {state} names it: the dataset is not whole")
            for path in sorted(listed - tree.files.keys())
        ]
        foreign |= {
            path
            for path in tree.files
            if path.lower().endswith(ARROW) and path.rpartition("/")[0] == folder
        } - listed
    return foreign, missing


def read_table_images(
    tree: Tree, path: str, settings: EncodeSettings
) -> Iterator[SourceImage | Rejected]:
    """The image of each row of the file ``path``. A table without images in it yields nothing,
    and is not used.

    Raises:
        ValueError: pyarrow is missing, and there are no images but in tables.
    """
    size, mtime_ns = tree.files[path]
    columns = Columns.of(settings)
    chosen = [*columns.image, "/", *columns.captions] if columns.are_chosen else []
    role = "table " + json.dumps(chosen) + " "
    try:
        scan = tree.memory.recall(
            role + tree.prefix + path,
            size,
            mtime_ns,
            lambda: _scan(tree.root / path, settings.image_column, columns),
        )
    except (OSError, ValueError) as error:
        if not has_pyarrow() and not tree.stems:
            form = path.lower().rpartition(".")[2]
            raise ValueError(f"{tree.root / path}: {needs_pyarrow(form)}") from None
        tree.used.add(path)
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        yield Rejected(path, why)
        return
    if not scan["image"]:
        return
    tree.used.add(path)
    captions = scan["captions"]
    if not columns.are_chosen and (scan["image"], *captions) not in tree.named_columns:
        tree.named_columns.add((scan["image"], *captions))  # a dataset has hundreds of such files
        warnings.warn(
            f"{tree.root / path}: images are taken from its column {scan['image']}, captions from "
            f"{captions[0] if captions else 'none'}; --image-column and --caption-column choose",
            stacklevel=2,
        )
    file = Blob(tree.root / path, size, mtime_ns)
    for number, row in enumerate(scan["rows"]):
        yield _read_row(file, tree.memory, path, number, row, scan, columns, settings)
    if scan["damage"]:
        yield Rejected(path, f"{scan['damage']}; what lies before it is read")


def _read_row(
    file: Blob,
    memory: Memory,
    path: str,
    number: int,
    row: Any,
    scan: dict[str, Any],
    columns: Columns,
    settings: EncodeSettings,
) -> SourceImage | Rejected:
    name = f"{path}/{number}"
    if isinstance(row, str):
        return Rejected(name, row)
    size, header, fields, *offset = row
    try:
        entry = read_entry(fields, tuple(scan["captions"]), columns.every_caption, columns.roles)
    except ValueError as error:
        return Rejected(name, str(error))
    place = (*offset, "") if offset else (number, scan["image"])
    blob = Blob(file.file, size, file.mtime_ns, *place)
    record = SourceImage(
        name,
        blob,
        entry.captions,
        entry.weight,
        entry.repeats,
        split=entry.split,
        header=header and tuple(header),
        roles=entry.roles,
    )
    named = " or ".join(scan["captions"]) or "no column of captions"
    return normalize_captions(record, settings, memory, f"no caption: {named} is empty in its row")


def _scan(file: Path, image_column: str, columns: Columns) -> dict[str, Any]:
    """What a file holds, as JSON for the memory: [size in bytes, header, fields] of each row, or
    why it has no image. The header is [digest, width, height], or None where Pillow fails. In an
    arrow file it is [size in bytes, None, fields, offset in the file]: no image is read.

    Raises:
        ValueError: it cannot be read at all, or lacks a column that was asked for.
        OSError: it cannot be opened.
    """
    is_arrow = file.name.lower().endswith(ARROW)
    kinds = (read_arrow_columns if is_arrow else read_columns)(file)
    scan: dict[str, Any] = {"image": "", "captions": [], "rows": [], "damage": ""}
    wanted = [image_column] if image_column else []
    wanted += columns.captions if columns.every_caption else []
    missing = [name for name in wanted if name not in kinds]
    images = [name for name in (image_column, *IMAGE_COLUMNS) if kinds.get(name)]
    images += [name for name, holds_bytes in kinds.items() if holds_bytes and name not in images]
    if not images:
        return scan
    if missing or (image_column and images[0] != image_column):
        name = missing[0] if missing else f"{image_column} with bytes of images"
        raise ValueError(f"has no column {name}; its columns are {shortened(', '.join(kinds))}")
    scan["image"] = images[0]
    scan["captions"] = [name for name in columns.captions if name in kinds and name != images[0]]
    if not columns.every_caption:
        scan["captions"] = scan["captions"][:1]
    fields = [*scan["captions"], *(name for name in ENTRY_FIELDS if name in kinds)]
    fields = [*dict.fromkeys(name for name in fields if name != images[0])]
    try:
        if is_arrow:
            for place, row in read_arrow_rows(file, images[0], fields):
                scan["rows"].append(_scan_place(place, row))
        else:
            for _, row in read_rows(file, [images[0], *fields]):
                scan["rows"].append(_scan_row(row, images[0]))
    except ValueError as error:
        scan["damage"] = str(error)
    return scan


def _scan_row(row: dict[str, Any] | ValueError, image_column: str) -> Any:
    if isinstance(row, ValueError):
        return str(row)
    try:
        data = bytes_of(row.pop(image_column))
    except ValueError as error:
        return str(error)
    if len(data) > MAX_IMAGE_BYTES:
        return too_large(len(data), MAX_IMAGE_BYTES)
    fields = {name: _as_json(value) for name, value in row.items()}
    try:
        header = [short_digest(hashlib.sha256(data).hexdigest()), *image_size(data)]
    except Exception:  # Pillow raises anything of a bad file; the scan reads it again and says why
        return [len(data), None, fields]
    return [len(data), header, fields]


def _scan_place(place: tuple[int, int] | None, row: dict[str, Any] | ValueError) -> Any:
    if isinstance(row, ValueError):
        return str(row)
    if place is None:
        return "has no bytes of an image"
    offset, size = place
    if size > MAX_IMAGE_BYTES:
        return too_large(size, MAX_IMAGE_BYTES)
    return [size, None, {name: _as_json(value) for name, value in row.items()}, offset]


def _as_json(value: Any) -> Any:
    """A value as JSON has it; one that JSON has not (a time, a decimal) becomes an object, which no
    field may be."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return {type(value).__name__: shortened(str(value))}
