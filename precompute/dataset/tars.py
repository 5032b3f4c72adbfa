"""Images in webdataset tars, read in place. A tar is read as a folder of its files would be.

A tar's headers may claim any size, offset or name. None is believed beyond the file's end or the
bounds below, so a tar with false headers is one rejected entry.
"""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from precompute.dataset.captions import MAX_TEXT_BYTES, decode_text
from precompute.dataset.file_roles import hidden_part, is_image, stem_of
from precompute.dataset.records import (
    JSON_FIELDS,
    MAX_IMAGE_BYTES,
    NO_ENTRY,
    Blob,
    Memory,
    MetadataEntry,
    Rejected,
    captions_of_object,
    parse_row,
    read_entry,
)
from runtime.files import format_bytes, open_regular

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXTS = (".txt", ".caption", ".json")
KEPT = (*JSON_FIELDS, "weight", "repeats", "split", "status", "error_message")  # of a JSON
END = bytes(tarfile.BLOCKSIZE)
CHUNK = 1 << 20
HEAD_BYTES = 32  # tell what format an image has
MAX_HEADER_BYTES = 1 << 16  # of a long name, or of all pax fields of a member
LONG_NUMBER = re.compile(rb"[0-9]{1000}")  # in a header: tarfile looks for one number in them all
MAX_MEMBERS = 1_000_000
MAX_TEXTS_BYTES = 1 << 28  # of one tar, in memory; hard links can repeat one text without end
MAX_MESSAGE = 200  # characters of an error that a downloader wrote down
# What tarfile raises for headers that make no sense.
TAR_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)


@dataclass(frozen=True)
class TarMembers:
    """The members of one tar: ``files`` has their offsets and sizes.

    ``texts`` has the text of each .txt or .caption and the object of each .json; ``unread`` says
    why one could not be read; ``hidden`` are the members that are system files.
    """

    path: str  # in the dataset
    file: Path
    mtime_ns: int
    files: dict[str, tuple[int, int]]
    texts: dict[str, Any]
    unread: dict[str, str]
    refused: dict[str, str]  # members that cannot be read in place, and why
    damage: str
    memory: Memory
    hidden: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    @property
    def irregular(self) -> dict[str, str]:
        return self.refused

    @cached_property
    def paths_by_lower_case(self) -> dict[str, list[str]]:
        """Paths of all members by their lower-case form."""
        by_lower: dict[str, list[str]] = {}
        for path in self.files:
            by_lower.setdefault(path.lower(), []).append(path)
        return by_lower

    @cached_property
    def stems(self) -> set[str]:
        """The paths of the images, without ending."""
        return {stem_of(path) for path in self.files if is_image(path)}

    def dataset_path(self, path: str) -> str:
        return f"{self.path}/{path}"

    def blob(self, path: str) -> Blob:
        """
        Raises:
            ValueError: it is larger than any image.
        """
        offset, size = self.files[path]
        self.used.add(path)
        if size > MAX_IMAGE_BYTES:
            raise ValueError(too_large(size, MAX_IMAGE_BYTES))
        return Blob(self.file, size, self.mtime_ns, offset)

    def head(self, path: str) -> bytes:
        """The first bytes of a member.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        offset, size = self.files[path]
        return Blob(self.file, min(size, HEAD_BYTES), self.mtime_ns, offset).read()

    def text(self, path: str) -> str:
        """The text of a member.

        Raises:
            ValueError: it has no text; the message continues a sentence after its name.
        """
        self.used.add(path)
        if path in self.unread:
            raise ValueError(self.unread[path])
        if path in self.texts:
            return str(self.texts[path])
        if path in self.refused:
            raise ValueError(f"is {self.refused[path]}")
        offset, size = self.files[path]  # an ending that only --caption-extension names
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"has {too_large(size, MAX_TEXT_BYTES)}")
        return decode_text(Blob(self.file, size, self.mtime_ns, offset).read())

    def row(self, path: str) -> MetadataEntry:
        """The entry in an image's .json member; img2dataset writes "caption" in it.

        Raises:
            ValueError: a field has a value that it cannot have.
        """
        self.used.add(path)
        if path in self.unread:
            raise ValueError(f"{path.rpartition('/')[2]}: {self.unread[path]}")
        row = self.texts.get(path)
        if not row:
            return NO_ENTRY
        entry = read_entry(row)
        if not any(entry.captions):
            with suppress(ValueError):  # another tool's fields of these names
                entry = replace(entry, captions=captions_of_object(row) or entry.captions)
        return entry

    def fields(self, path: str, names: tuple[str, ...]) -> dict[str, Any]:
        """The fields of these names in an image's .json member, those that it has."""
        row = self.texts.get(path)
        return {name: row[name] for name in names if name in row} if isinstance(row, dict) else {}

    def rejected(self, images: set[str]) -> Iterator[Rejected]:
        """Members that should be images and are not; ``images`` are stems of those that are."""
        for path, why in self.refused.items():
            yield Rejected(self.dataset_path(path), why)
        for path, row in self.texts.items():
            status = row.get("status", "success") if isinstance(row, dict) else "success"
            stem = path.rpartition(".")[0]
            if status != "success" and stem not in images:
                self.used.add(path)
                message = f"{status}: {row.get('error_message')}"
                yield Rejected(self.dataset_path(stem), message[:MAX_MESSAGE])
        if self.damage:
            yield Rejected(self.path, f"damaged tar: {self.damage}; what lies before it is read")


def too_large(num_bytes: int, limit: int) -> str:
    return f"{format_bytes(num_bytes)}, where at most {format_bytes(limit)} are read"


def open_tar(
    root: Path,
    path: str,
    stamp: tuple[int, int],
    memory: Memory,
    prefix: str,
    sources: tuple[str, ...] = (),
) -> TarMembers:
    """The tar ``path`` of the dataset's folder ``root``; not opened if it is remembered.

    ``sources`` are those of captions with roles: further fields of JSON, and endings of texts.

    Raises:
        ValueError: it is no regular file any more.
        OSError: it cannot be read.
    """
    file, (size, mtime_ns) = root / path, stamp
    role = f"roles {json.dumps(sources)} " if sources else "members "
    scan = memory.recall(role + prefix + path, size, mtime_ns, lambda: _scan(file, sources))
    hidden = {name: part for name in scan["files"] if (part := hidden_part(name))}
    files = {
        name: (offset, size) for name, (offset, size) in scan["files"].items() if name not in hidden
    }
    texts = {name: text for name, text in scan["texts"].items() if name not in hidden}
    refused = {name: why for name, why in scan["refused"].items() if not hidden_part(name)}
    return TarMembers(
        path=path,
        file=file,
        mtime_ns=mtime_ns,
        files=files,
        texts=texts,
        unread=scan["unread"],
        refused=refused,
        damage=scan["damage"],
        memory=memory,
        hidden=sorted({*hidden.values()}),
    )


class _BoundedReader:
    """A tar file for ``tarfile`` to read, with bounds on the sizes that headers may claim."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.size = os.fstat(raw.fileno()).st_size

    def read(self, num_bytes: int = -1) -> bytes:
        if not 0 <= num_bytes <= MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header claims a size that no header has")
        data = self._raw.read(num_bytes)
        if LONG_NUMBER.search(data):
            raise tarfile.ReadError("a header holds a number without end")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and not 0 <= offset <= self.size:
            raise tarfile.ReadError("a header claims more bytes than the file has")
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()


class _TarScan:
    """Lists all members of a tar, as JSON for the memory; captions are read, images are not."""

    def __init__(self, raw: BinaryIO, sources: tuple[str, ...]) -> None:
        self.raw = raw
        self.endings = (*TEXTS, *(name for name in sources if name[0] == "."))
        self.fields = (*KEPT, *(name for name in sources if name[0] != "."))
        self.text_bytes = 0
        self.result: dict[str, Any] = {
            "files": {},
            "texts": {},
            "unread": {},
            "refused": {},
            "damage": "",
        }

    def run(self) -> dict[str, Any]:
        bounded: Any = _BoundedReader(self.raw)
        try:
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                self.add_all(archive, bounded.size)
                self.result["damage"] = _check_end(self.raw, archive.offset)
        except TAR_ERRORS as error:
            endless = isinstance(error, RecursionError)
            why = "long names without end" if endless else str(error)[:MAX_MESSAGE]
            self.result["damage"] = f"{why} (at byte {self.raw.tell()} of {bounded.size})"
        return self.result

    def add_all(self, archive: tarfile.TarFile, file_size: int) -> None:
        num_members, end = 0, -1
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep all
            num_members += 1
            if num_members > MAX_MEMBERS:
                raise tarfile.ReadError(f"more than {MAX_MEMBERS:,} members")
            # A size below zero would lead back, and round and round.
            if member.size < 0 or archive.offset <= end:
                raise tarfile.ReadError("a header claims a size below zero")
            end = archive.offset
            self.add(member, file_size)

    def add(self, member: tarfile.TarInfo, file_size: int) -> None:
        files, refused = self.result["files"], self.result["refused"]
        name = posixpath.normpath(member.name)
        if member.isdir():
            return
        if member.islnk():  # GNU tar's for a file it has already
            place = files.get(posixpath.normpath(member.linkname))
        else:
            place = [member.offset_data, member.size]
            place = place if member.isreg() and not member.issparse() else None
        if place is not None and sum(place) > file_size:
            raise tarfile.ReadError(f"{name[:MAX_MESSAGE]} claims {format_bytes(place[1])}")
        if place is None:
            refused[name] = "not a plain file: pack it with --dereference, and not --sparse"
        elif name in files:
            refused[name] = "in its tar a second time"
        else:
            files[name] = place
            if name.lower().endswith(self.endings):
                self.add_text(name, *place)

    def add_text(self, name: str, offset: int, size: int) -> None:
        self.text_bytes += size
        try:
            if size > MAX_TEXT_BYTES:
                raise ValueError(f"has {too_large(size, MAX_TEXT_BYTES)}")
            if self.text_bytes > MAX_TEXTS_BYTES:
                many = too_large(self.text_bytes, MAX_TEXTS_BYTES)
                raise ValueError(f"is not read: the texts of its tar have {many}")
            self.raw.seek(offset)
            self.result["texts"][name] = _read_text(name, self.raw.read(size), self.fields)
        except ValueError as error:
            self.result["unread"][name] = str(error)


def _scan(file: Path, sources: tuple[str, ...]) -> dict[str, Any]:
    with open_regular(file) as raw:
        return _TarScan(raw, sources).run()


def _read_text(name: str, data: bytes, fields: tuple[str, ...]) -> Any:
    """The text of a member, or those ``fields`` that its JSON has.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    if not name.lower().endswith(".json"):
        return decode_text(data)
    row = parse_row(decode_text(data))
    return {field: row[field] for field in fields if field in row}


def _check_end(raw: BinaryIO, offset: int) -> str:
    """What is wrong after the last member, else empty: tarfile takes any bytes for the end."""
    raw.seek(offset)
    block = raw.read(tarfile.BLOCKSIZE)
    if block != END:
        return f"cut off at byte {offset}" if len(block) < len(END) else f"no tar at byte {offset}"
    while chunk := raw.read(CHUNK):
        if chunk.strip(b"\0"):
            return f"more bytes follow its end at byte {offset}"
    return ""
