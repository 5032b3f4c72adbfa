"""Writes files and folders so that they exist complete or not at all; renames, syncs, digests.

A file is written beside its name (``.partial``), synced, and renamed. What is replaced is first
renamed aside, and deleted only when the new one has its name: a kill at any point leaves the old
one or the new one, complete. JSON that a later run reads back carries a digest of its own, so that
a flipped bit is found and never believed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

PARTIAL = ".partial"
REPLACED = ".replaced" + PARTIAL  # what a new file or folder is about to replace
DIGEST = "digest"  # the field of our JSON files that vouches for the others
MAX_MARK_BYTES = 1_000_000
MAX_LISTED = 1_000_000  # names of a folder that are looked at
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path, still_good: str = "") -> Iterator[None]:
    """Name ``path`` in an error that the system or safetensors raises while it is written.

    ``still_good`` is a sentence about what is intact all the same.

    Raises:
        OSError: with a message of its own: the path, the reason, what is still good.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        has_message = isinstance(error, OSError) and error.errno is None and error.args
        if has_message or getattr(error, "names_file", False):
            raise  # it names its file: a message of our own, or of an inner ``writing``
        full = getattr(error, "errno", None) in FULL or "os error 28" in str(error)
        reason = "the disk is full" if full else (getattr(error, "strerror", None) or str(error))
        message = f"{path}: cannot be written: {reason}" + (f". {still_good}" if still_good else "")
        named = OSError(message)
        named.errno = errno.ENOSPC if full else getattr(error, "errno", None)
        named.names_file = True  # type: ignore[attr-defined]
        raise named from error


@contextmanager
def durable_file(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """Open ``path + .partial`` for writing; on a clean exit it becomes ``path``, on disk for good.

    Where several processes may write one file at once, the same bytes, ``writer`` is a name that
    each has for itself (``writer_name``): the partial file is ``path + .WRITER.partial``.

    On an exception the partial file is removed and ``path`` is what it was before. An error of the
    system that names no file (a full disk, at a write) gets the name of this one.
    """
    partial = path.with_name(path.name + (f".{writer}" if writer else "") + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def writer_name() -> str:
    """A name of this process among those of all machines that share a folder."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())[:32]}.{os.getpid()}"


def write_durable(path: Path, data: bytes, writer: str = "") -> None:
    """Replace ``path`` by ``data`` atomically; ``writer`` as in ``durable_file``."""
    with durable_file(path, writer) as file:
        file.write(data)


def write_changed(path: Path, data: bytes) -> None:
    """``write_durable``, unless ``path`` holds this already: then it is not touched."""
    try:
        if path.read_bytes() == data:
            return
    except FileNotFoundError:
        pass
    write_durable(path, data)


def replace_path(new: Path, path: Path) -> None:
    """Give the file or folder ``new`` the name ``path``; what had that name is deleted afterwards.

    Both lie in one folder. After a kill, ``path`` or ``path + .replaced.partial`` is the old one,
    or ``path`` the new one: nothing is lost, and ``recover_replaced`` puts the old one back.
    """
    replace_together([(new, path)])


def replace_together(pairs: list[tuple[Path, Path]]) -> None:
    """``replace_path`` of several (new, path) that belong together, all in one folder.

    The last path is the mark: while it is missing, ``recover_replaced`` puts all the old ones back.
    """
    new, mark = pairs[-1]
    if len(pairs) > 1 or new.is_dir() or mark.is_dir():
        for _, path in reversed(pairs):  # the mark first: from here on the old is cut off
            remove_path(aside_of(path))
            if os.path.lexists(path):
                os.replace(path, aside_of(path))
    for new, path in pairs:  # of a single file this alone is atomic
        os.replace(new, path)
    fsync_folder(mark.parent)
    for _, path in pairs:
        remove_path(aside_of(path))


def recover_replaced(*paths: Path) -> None:
    """Undo a ``replace_path``, or a ``replace_together`` of ``paths``, that was cut off before the
    last new one had its name; else a no-op."""
    mark = paths[-1]
    cut_off = os.path.lexists(aside_of(mark)) and not os.path.lexists(mark)
    for path in paths:
        is_missing = os.path.lexists(aside_of(path)) and not os.path.lexists(path)
        if is_missing or (cut_off and os.path.lexists(aside_of(path))):
            remove_path(path)
            os.replace(aside_of(path), path)
        else:
            remove_path(aside_of(path))
    if cut_off:
        fsync_folder(mark.parent)


def aside_of(path: Path) -> Path:
    """The name that the old ``path`` has while it is being replaced."""
    return path.with_name(path.name + REPLACED)


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give the name of a new file or folder to write, beside ``path``; on a clean exit it is synced
    and replaces ``path``. On an exception it is removed, and ``path`` is what it was before.
    """
    partial = path.with_name(path.name + PARTIAL)
    recover_replaced(path)
    remove_path(partial)
    try:
        yield partial
        fsync_tree(partial)
        replace_path(partial, path)
    finally:
        remove_path(partial)


def fsync_tree(path: Path) -> None:
    """Put a file, or all files and folders of a folder, on the disk for good."""
    if path.is_dir():
        for part in sorted(path.iterdir()):
            fsync_tree(part)
        fsync_folder(path)
        return
    # Windows syncs only what is open for writing; elsewhere a file may be read-only.
    with open(path, "r+b" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def set_aside(path: Path, name: Path | None = None) -> None:
    """Rename what is about to be replaced (to ``aside_of(path)``); nothing where there is none."""
    with suppress(FileNotFoundError):
        os.replace(path, name or aside_of(path))


def move_into(folder: Path, paths: Iterable[Path]) -> None:
    """Rename each of ``paths`` into ``folder``, in this order, so that it survives a power cut.

    If it is stopped in between, some are in ``folder`` and the others still in their places.
    """
    left = set()
    for path in paths:
        os.replace(path, folder / path.name)
        left.add(path.parent)
    for changed in (folder, *sorted(left)):
        fsync_folder(changed)


def rename_folder(folder: Path, new: Path) -> None:
    """Give a folder another name beside its own, so that it survives a power cut."""
    os.replace(folder, new)
    fsync_folder(new.parent)


def discard_folder(folder: Path, temporary: Path) -> None:
    """Rename a folder to ``temporary``, then delete it: a kill in between leaves no half of it
    under its own name. What an earlier call left at ``temporary`` is deleted too."""
    remove_path(temporary)
    if folder.exists():
        os.replace(folder, temporary)
    remove_path(temporary)


def remove_path(path: Path) -> None:
    """Delete a file, a link or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Delete what is half written at ``path``, so that it does not fill the disk any longer."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove_path(path)
        raise


def write_mark(folder: Path, mark: str, **fields: Any) -> None:
    """Write the file ``mark`` into a folder that is complete: ``fields``, and the digests of all
    its files, by which ``check_own_folder`` knows them again."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    write_durable(folder / mark, canonical_json(seal({**fields, "files": digests})).encode())


def check_own_folder(out: Path, mark: str, writer: str) -> None:
    """Refuse to replace ``out`` where it has anything but the files, unchanged, that the command
    ``writer`` wrote there with ``write_mark``. What is not there, or empty, may be written.

    Raises:
        ValueError: names what is in the way.
        OSError: a file cannot be read.
    """
    remedy = "give another --out, or delete it yourself"
    if not os.path.lexists(out):
        return
    if not out.is_dir() or out.is_symlink():
        raise ValueError(f"--out {out}: is no folder that {writer} wrote; {remedy}")
    if not any(out.iterdir()):
        return
    try:
        with open_regular(out / mark) as file:
            digests = unseal(file.read(MAX_MARK_BYTES)).get("files")
    except (OSError, ValueError):
        digests = None
    if not isinstance(digests, dict):
        raise ValueError(f"--out {out}: holds something else than {writer} wrote; {remedy}")
    own_files = {*digests, mark}
    own_folders = {str(folder) for name in digests for folder in PurePosixPath(name).parents}
    folders = [out]
    while folders:
        for path in sorted(islice(folders.pop().iterdir(), MAX_LISTED)):
            name = path.relative_to(out).as_posix()
            is_folder = path.is_dir()
            own = own_folders if is_folder else own_files
            if path.is_symlink() or name not in own:
                raise ValueError(
                    f"--out {out}: holds {name}, which {writer} did not write; {remedy}"
                )
            if is_folder:
                folders.append(path)
            elif name != mark and not (path.is_file() and file_sha256(path) == digests[name]):
                raise ValueError(
                    f"--out {out}: {name} was changed since {writer} wrote it; {remedy}"
                )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies below it, links followed."""
    return path.resolve().is_relative_to(folder.resolve())


def fsync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def canonical_json(value: Any) -> str:
    """JSON with one spelling of each value: sorted keys, two spaces, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def content_digest(value: Any) -> str:
    """sha256 of a JSON value in its canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all its other fields in the field ``digest``."""
    fields = {name: field for name, field in value.items() if name != DIGEST}
    return {**fields, DIGEST: content_digest(fields)}


def unseal(data: bytes) -> dict[str, Any]:
    """The fields of a sealed JSON object, without its digest.

    Raises:
        ValueError: not JSON, not an object, without a digest, or changed since it was sealed.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {str(error)[:100]}") from None
    if not isinstance(value, dict) or DIGEST not in value:
        raise ValueError("not a file of shardtune: it carries no digest")
    digest = value.pop(DIGEST)
    try:
        if content_digest(value) == digest:
            return value
    except (ValueError, RecursionError):  # a lone surrogate, a number of too many digits
        pass
    raise ValueError("damaged: its digest differs")


def write_checked(path: Path, data: bytes) -> None:
    """Replace ``path`` by a line with the sha256 of ``data``, and ``data``; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durable(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def read_checked(path: Path) -> bytes:
    """What ``write_checked`` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: a byte of it has changed.
    """
    digest, _, data = path.read_bytes().partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise ValueError(f"{path}: damaged: its digest differs")
    return data


def user_cache() -> Path:
    """The folder for what may be remembered on this machine; it can be deleted, and is never
    shared.

    A user without a home folder gets one that cannot be made, so that nothing is remembered.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        root = Path(os.devnull)
    return Path(root) / "shardtune"


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of_file(mode: int) -> str:
    """The kind of a file by its ``st_mode``, such as "a named pipe"; empty for a regular file."""
    for is_kind, name in (
        (stat.S_ISREG, ""),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a device"


def open_regular(path: Path) -> BinaryIO:
    """Open a user's file for reading; never a pipe or a device, which may have no end.

    Raises:
        ValueError: "is a named pipe, not a file", to be put behind its name.
        OSError: it cannot be opened.
    """
    # A pipe would block until somebody writes to it, so it is opened without blocking, and its kind
    # is looked at afterwards.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    kind = kind_of_file(os.fstat(descriptor).st_mode)
    if kind:
        os.close(descriptor)
        raise ValueError(f"is {kind}, not a file")
    return os.fdopen(descriptor, "rb")


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk where ``folder`` lies or will lie."""
    existing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    return shutil.disk_usage(existing).free


def format_bytes(num_bytes: int) -> str:
    """``1.25 MB``, ``12.5 GB``."""
    value, unit = (num_bytes / 1e9, "GB") if num_bytes >= 1e9 else (num_bytes / 1e6, "MB")
    return f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"
