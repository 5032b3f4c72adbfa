"""Parquet tables, read a few rows at a time by pyarrow, which is an extra: ``[tables]``.

A table is never in memory as a whole: rows come out of one row group after the other, in batches
that are the smaller the larger the row group is. Nothing that its footer claims is believed, and
whatever pyarrow raises of a file is one reason for it.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from runtime.files import open_regular
from runtime.messages import shortened

PARQUET = ".parquet"
MAX_BATCH_ROWS = 1024
BATCH_BYTES = 1 << 27  # a value may come again in each row: a batch has at most so many bytes
BUFFER_BYTES = 1 << 20  # read from the file at a time; without it, all of a column of a row group
MAX_MESSAGE = 200


def has_pyarrow() -> bool:
    return find_spec("pyarrow") is not None


def needs_pyarrow(form: str = "parquet") -> str:
    return f"{form} needs pyarrow: pip install '.[tables]'"


def read_columns(path: Path) -> dict[str, bool]:
    """The names of a table's columns, each with whether it holds bytes, as images are stored:
    binary values, or structs with a field ``bytes`` of them.

    Raises:
        ValueError: it is no table that can be read; the message follows the file's name.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        try:
            schema = _open(file).schema_arrow
            return {field.name: holds_bytes(field.type) for field in schema}
        except Exception as error:  # pyarrow has errors of its own for each thing that may be wrong
            raise unreadable(error) from None


def read_rows(
    path: Path, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """The rows of some columns, numbered from 0, or why a row cannot be read.

    Raises:
        ValueError: what follows cannot be read; the message follows the file's name.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        try:
            table, number = _open(file), 0
            if len({*columns} & {*table.schema_arrow.names}) < len(columns):
                raise ValueError(f"has no columns {', '.join(columns)}")
            for group in range(table.num_row_groups):
                for batch in _batches(table, group, columns):
                    arrays = [batch.column(name) for name in columns]
                    for place in range(batch.num_rows):
                        yield number, read_fields(columns, arrays, place)
                        number += 1
        except Exception as error:
            raise unreadable(error) from None


def read_cell(file: BinaryIO, column: str, row: int) -> bytes:
    """The bytes in one row of a column. The row group is read up to that row.

    Raises:
        ValueError: they cannot be read; the message follows the file's name.
    """
    try:
        table, first = _open(file), 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if first <= row < first + num_rows:
                for batch in _batches(table, group, [column]):
                    if row < first + batch.num_rows:
                        return bytes_of(batch.column(column)[row - first].as_py())
                    first += batch.num_rows
            first += num_rows
        raise ValueError(f"has no row {row}")
    except Exception as error:
        raise unreadable(error) from None


def bytes_of(value: Any) -> bytes:
    """The bytes of an image in a cell: binary, or ``{"bytes": ..., "path": ...}``.

    Raises:
        ValueError: it has none.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        has_path = isinstance(value, dict) and value.get("path")
        beside = f", only the path {shortened(value['path'])}" if has_path else ""
        raise ValueError(f"has no bytes of an image{beside}")
    return data


def _open(file: BinaryIO) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(needs_pyarrow()) from None
    return parquet.ParquetFile(file, buffer_size=BUFFER_BYTES)


def _batches(table: Any, group: int, columns: Sequence[str]) -> Iterator[Any]:
    num_bytes = table.metadata.row_group(group).total_byte_size
    size = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // max(1, num_bytes)))
    yield from table.iter_batches(
        batch_size=size, row_groups=[group], columns=[*columns], use_threads=False
    )


def read_fields(
    columns: Sequence[str], arrays: list[Any], place: int
) -> dict[str, Any] | ValueError:
    """The values in one row of some columns, or why they cannot be read."""
    row = {}
    for name, array in zip(columns, arrays, strict=True):
        try:
            row[name] = array[place].as_py()
        except Exception as error:  # text that is not UTF-8, a time that Python does not have
            return ValueError(f"its {name} cannot be read: {_message(error)}")
    return row


def holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds bytes, as images are stored."""
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_bytes(kind.field(index).type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def unreadable(error: Exception, form: str = "parquet table") -> Exception:
    """What is raised instead of an error of pyarrow's; our own ValueErrors stay as they are."""
    if type(error) is ValueError:
        return error
    return ValueError(f"is no {form} that can be read: {_message(error)}")


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
