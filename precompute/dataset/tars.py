"""Pictures packed in webdataset tars, read where they lie. A tar is what its files would be."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from precompute.dataset.records import Blob, Memory, Rejected
from precompute.dataset.rows import NO_ROW, Row, load_row, read_row

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TEXTS = (".txt", ".caption", ".json")
KEPT = ("text", "caption", "weight", "repeats", "status", "error_message")  # of a JSON
END = bytes(tarfile.BLOCKSIZE)
CHUNK = 1 << 20


@dataclass(frozen=True)
class Pack:
    """The members of one tar: ``files`` has their offsets and sizes, ``texts`` what small ones say.

    ``texts`` has the text of a .txt or .caption (null: not UTF-8) and the object of a .json, or why
    it is none.
    """

    path: str  # in the data set
    file: Path
    mtime_ns: int
    files: dict[str, tuple[int, int]]
    texts: dict[str, Any]
    refused: dict[str, str]  # members that cannot be read in place, and why
    damage: str

    def label(self, path: str) -> str:
        return f"{self.path}/{path}"

    def blob(self, path: str) -> Blob:
        offset, size = self.files[path]
        return Blob(self.file, size, self.mtime_ns, offset)

    def text(self, path: str) -> str:
        """
        Raises:
            FileNotFoundError: no such member.
            UnicodeDecodeError: it is not UTF-8.
        """
        if path not in self.texts:
            raise FileNotFoundError(path)
        text = self.texts[path]
        if text is None:
            raise UnicodeDecodeError("utf-8", b"", 0, 0, "")
        return str(text)

    def row(self, path: str) -> Row:
        """What a picture's .json tells; img2dataset writes "caption" there.

        Raises:
            ValueError: it cannot be meant so.
        """
        row = self.texts.get(path, {})
        if isinstance(row, str):
            raise ValueError(f"{path.rpartition('/')[2]}: {row}")
        return read_row(row) if row else NO_ROW

    def rejected(self, pictures: set[str]) -> Iterator[Rejected]:
        """What is no picture and should be one; ``pictures`` are paths without ending."""
        for path, why in self.refused.items():
            yield Rejected(self.label(path), why)
        for path, row in self.texts.items():
            status = row.get("status", "success") if isinstance(row, dict) else "success"
            stem = path.rpartition(".")[0]
            if status != "success" and stem not in pictures:
                yield Rejected(self.label(stem), f"{status}: {row.get('error_message')}")
        if self.damage:
            yield Rejected(self.path, f"damaged tar: {self.damage}; what lies before it is read")


def open_pack(root: Path, path: str, stamp: tuple[int, int], memory: Memory, prefix: str) -> Pack:
    """The tar ``path`` of the data set's folder ``root``; not opened if it is remembered."""
    file, (size, mtime_ns) = root / path, stamp
    held = memory.recall(prefix + path, size, mtime_ns, lambda: _scan(file))
    files = {name: (offset, size) for name, (offset, size) in held["files"].items()}
    return Pack(path, file, mtime_ns, files, held["texts"], held["refused"], held["damage"])


def _scan(file: Path) -> dict[str, Any]:
    """All members of a tar, as JSON; captions are read, pictures are not."""
    found: dict[str, Any] = {"files": {}, "texts": {}, "refused": {}, "damage": ""}
    with open(file, "rb") as raw:
        try:
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                for member in archive:
                    _add(found, member, raw)
                found["damage"] = _check_end(raw, archive.offset)
        except (tarfile.TarError, ValueError) as error:
            found["damage"] = f"{error} (at byte {raw.tell()} of {os.fstat(raw.fileno()).st_size})"
    return found


def _add(found: dict[str, Any], member: tarfile.TarInfo, raw: BinaryIO) -> None:
    name = posixpath.normpath(member.name)
    if member.isdir():
        return
    if member.islnk():  # GNU tar's for a file it has already
        place = found["files"].get(posixpath.normpath(member.linkname))
    else:
        place = [member.offset_data, member.size]
        place = place if member.isreg() and not member.issparse() else None
    if place is None:
        found["refused"][name] = "not a plain file: pack it with --dereference, and not --sparse"
    elif name in found["files"]:
        found["refused"][name] = "in its tar a second time"
    else:
        found["files"][name] = place
        if name.lower().endswith(TEXTS):
            raw.seek(place[0])
            found["texts"][name] = _read_text(name, raw.read(place[1]))


def _read_text(name: str, data: bytes) -> Any:
    if name.lower().endswith(".json"):
        try:
            row = load_row(data)
        except ValueError as error:
            return str(error)
        return {field: row[field] for field in KEPT if field in row}
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _check_end(raw: BinaryIO, offset: int) -> str:
    """What is wrong after the last member: tarfile takes any bytes for the end."""
    raw.seek(offset)
    block = raw.read(tarfile.BLOCKSIZE)
    if block != END:
        return f"cut off at byte {offset}" if len(block) < len(END) else f"no tar at byte {offset}"
    while chunk := raw.read(CHUNK):
        if chunk.strip(b"\0"):
            return f"more bytes follow its end at byte {offset}"
    return ""
