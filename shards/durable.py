"""Files that are there whole or not at all: ``.partial``, fsync, rename, fsync of the folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open ``path + .partial`` for writing; on a clean exit it becomes ``path``, on disk for good.

    On an exception the partial file is removed and ``path`` is what it was before.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_durable(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically."""
    with durable_file(path) as file:
        file.write(data)


def write_changed(path: Path, data: bytes) -> None:
    """``write_durable``, unless ``path`` holds this already: then it is not touched."""
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        pass
    write_durable(path, data)


def fsync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
