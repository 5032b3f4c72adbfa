"""Arrow files, as ``save_to_disk`` of Hugging Face's datasets writes them, read by pyarrow.

A file is memory-mapped: of the images only their places are read here, and each is later read from
its place, as the member of a tar is. Nothing in a file is believed before it is validated, and
whatever pyarrow raises of it is one reason for the file.
"""

import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from precompute.dataset.parquet_files import holds_bytes, needs_pyarrow, read_fields, unreadable
from runtime.files import open_regular
from runtime.messages import shortened

ARROW = ".arrow"
STATE = "state.json"  # of a saved dataset: the files that it consists of
SAVED = (STATE, "dataset_info.json", "dataset_dict.json")
FILE_MARK = b"ARROW1"  # of the format with a table of contents; datasets writes streams
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
KIND = "arrow file"
MAX_STATE_BYTES = 1 << 24
MAX_NAME = 255  # characters of a file's name


def read_arrow_columns(path: Path) -> dict[str, bool]:
    """The names of a file's columns, each with whether it holds bytes, as images are stored:
    binary values, or structs with a field ``bytes`` of them.

    Raises:
        ValueError: it is no arrow file that can be read; the message follows the file's name.
        OSError: it cannot be opened.
    """
    try:
        with _mapped(path) as (data, source):
            schema = _open(data, source, None).schema
            return {field.name: holds_bytes(field.type) for field in schema}
    except Exception as error:  # pyarrow has errors of its own for each thing that may be wrong
        raise unreadable(error, KIND) from None


Place = tuple[int, int] | None  # an image's first byte in the file, and their number; None: none


def read_arrow_rows(
    path: Path, image_column: str, fields: Sequence[str]
) -> Iterator[tuple[Place, dict[str, Any] | ValueError]]:
    """The place of the image in each row, and the row's other fields, or why it cannot be read.

    Raises:
        ValueError: what follows cannot be read; the message follows the file's name.
        OSError: it cannot be opened.
    """
    try:
        with _mapped(path) as (data, source):
            reader = _open(data, source, [image_column, *fields])
            for batch in _batches(reader):
                images = batch.column(batch.schema.get_field_index(image_column))
                places = _places(data, images)
                arrays = [batch.column(batch.schema.get_field_index(name)) for name in fields]
                for array in arrays:
                    _as_bytes(array).validate(full=True)
                for row, place in enumerate(places):
                    yield place, read_fields(fields, arrays, row)
            if not hasattr(reader, "num_record_batches"):
                _check_end(data, source.tell())
    except Exception as error:
        raise unreadable(error, KIND) from None


def _as_bytes(array: Any) -> Any:
    """A column of text as one of bytes: what is not UTF-8 is one row that cannot be read."""
    import pyarrow

    views = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return array.view(views[array.type]) if array.type in views else array


@contextmanager
def _mapped(path: Path) -> Iterator[tuple[Any, Any]]:
    """The bytes of a file as a buffer of pyarrow's, and a reader of them."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(needs_pyarrow("arrow")) from None
    with open_regular(path) as file:
        if not file.seek(0, 2):
            raise ValueError("is empty")
        data = pyarrow.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    with pyarrow.BufferReader(data) as source:
        yield data, source


def _open(data: Any, source: Any, columns: Sequence[str] | None) -> Any:
    from pyarrow import ipc

    is_file = data[: len(FILE_MARK)].to_pybytes() == FILE_MARK
    opener = ipc.open_file if is_file else ipc.open_stream
    if columns is None:
        return opener(source)
    schema = opener(data).schema
    chosen = [schema.get_field_index(name) for name in columns]  # -1: not there, or there twice
    if min(chosen) < 0:
        raise ValueError(f"has no columns {', '.join(columns)}, or has one of them twice")
    if is_file:  # with some fields alone it would copy them
        return opener(source)
    options = ipc.IpcReadOptions(included_fields=sorted({*chosen}), use_threads=False)
    return opener(source, options=options)


def _batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        yield from map(reader.get_batch, range(reader.num_record_batches))
    else:
        yield from reader


def _places(data: Any, images: Any) -> list[Place]:
    """The place of each image's bytes in the file.

    Raises:
        ValueError: they do not lie there as they are.
    """
    from pyarrow import types

    images.validate(full=True)
    valid = images.is_valid().to_numpy(zero_copy_only=False)
    while types.is_struct(images.type):
        images = images.field(images.type.get_field_index("bytes"))
        valid = valid & images.is_valid().to_numpy(zero_copy_only=False)
    _, offsets, content = images.buffers()
    if offsets is None or not len(images):
        return [None] * len(images)
    width = np.int64 if types.is_large_binary(images.type) else np.int32
    ends = np.frombuffer(offsets, width)[images.offset : images.offset + len(images) + 1]
    start = 0 if content is None else content.address - data.address
    if ends[-1] > ends[0] and not 0 <= start <= data.size - int(ends[-1]):
        raise ValueError("holds compressed images: save it without compression")
    firsts, sizes = ends[:-1].tolist(), np.diff(ends).tolist()
    return [
        (start + first if size else 0, size) if is_there else None
        for first, size, is_there in zip(firsts, sizes, valid.tolist(), strict=True)
    ]


def _check_end(data: Any, end: int) -> None:
    """
    Raises:
        ValueError: the stream ends without the mark of its end, or something follows it.
    """
    if end < data.size:
        raise ValueError(f"more bytes follow the end of its rows at byte {end}")
    if data[max(0, end - len(STREAM_END)) : end].to_pybytes() != STREAM_END:
        raise ValueError("ends without the mark of an end: it may be cut off")


def read_saved_files(path: Path) -> list[str] | None:
    """The names of the files that a ``state.json`` lists; None if it is not of a saved dataset."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(MAX_STATE_BYTES))
        names = [entry["filename"] for entry in content["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    is_name = [isinstance(name, str) and len(name) < MAX_NAME for name in names]
    return [
        name if is_one else shortened(name) for name, is_one in zip(names, is_name, strict=True)
    ]
