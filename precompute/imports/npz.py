"""Reads numpy's .npz files that another program made: plain arrays only, and nothing unbounded.

An .npz is a zip of .npy files. What is wrong with one is a NpzError, whose message continues a
sentence after the name of the file. Objects in arrays are pickles, and are never loaded.
"""

import hashlib
import math
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from precompute.dataset.records import short_digest

MAX_FILE_BYTES = 1_000_000_000
MAX_ARRAY_BYTES = 256_000_000  # an alpha mask of 8192 x 8192 pixels in fp32
MAX_DIRECTORY_BYTES = 100_000  # a thousand arrays
MAX_HEADER_BYTES = 10_000
END = struct.Struct("<4s4H2LH")  # the end of a zip's directory, without a comment
ENDS_OF_HEADERS = {1: struct.Struct("<H"), 2: struct.Struct("<I"), 3: struct.Struct("<I")}
HEADER = re.compile(
    rb"\{'descr': '([\x20-\x7e]{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]{0,80})\),? *\}\s*"
)
NUMBERS = re.compile("[<>|=]?(f[248]|[iu][1248])")
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others can fill the memory


class NpzError(ValueError):
    """What is wrong with an .npz, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class ArrayHeader:
    """What the header of an .npy file says, and where its data begin in the file."""

    dtype: "np.dtype[np.generic]"
    shape: tuple[int, ...]
    is_fortran: bool
    start: int


class Npz:
    """An .npz that is open for reading.

    Raises:
        NpzError: it is none, or one that numpy's ``savez`` does not write.
        OSError: it cannot be read.
    """

    def __init__(self, file: BinaryIO) -> None:
        _check_directory(file)
        try:
            self._zip = zipfile.ZipFile(file)
        except OSError:
            raise
        except Exception as error:  # zipfile raises many
            raise NpzError(f"is damaged: {_one_line(error)}") from None
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in self._zip.infolist()
            if info.filename.endswith(".npy")
        }
        self._headers: dict[str, ArrayHeader] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        """The names of the arrays, sorted."""
        return sorted(self._members)

    @property
    def digest(self) -> str:
        """A short digest of what the directory says of the arrays: names, sizes and checksums."""
        rows = [(name, info.file_size, info.CRC) for name, info in sorted(self._members.items())]
        return short_digest(hashlib.sha256(repr(rows).encode()).hexdigest())

    def header(self, name: str) -> ArrayHeader:
        """
        Raises:
            NpzError: there is no such array, or not one of plain numbers.
        """
        if name not in self._headers:
            self._headers[name] = self._read_header(name)
        return self._headers[name]

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """An array, its checksum compared.

        Raises:
            NpzError: as ``header``; or it is damaged.
        """
        header = self.header(name)
        data = self._read(name, self._members[name].file_size)
        order = "F" if header.is_fortran else "C"
        flat = np.frombuffer(data, header.dtype, offset=header.start)
        return flat.reshape(header.shape, order=order)  # type: ignore[call-overload, no-any-return]

    def _read_header(self, name: str) -> ArrayHeader:
        info = self._members.get(name)
        if info is None:
            raise NpzError(f"has no {name}")
        if info.file_size > MAX_ARRAY_BYTES:
            raise NpzError(f"has {info.file_size:,} bytes of {name}, more than {MAX_ARRAY_BYTES:,}")
        header = _parse_header(self._read(name, MAX_HEADER_BYTES), name)
        num_bytes = math.prod(header.shape) * header.dtype.itemsize
        if info.file_size != header.start + num_bytes:
            raise NpzError(f"is damaged: {name} has another size than its header says")
        return header

    def _read(self, name: str, num_bytes: int) -> bytes:
        info = self._members[name]
        if info.compress_type not in COMPRESSIONS or info.flag_bits & 1:
            raise NpzError(f"has {name} in a compression that numpy does not write")
        try:
            with self._zip.open(info) as member:
                data = member.read(num_bytes)
                if len(data) < min(num_bytes, info.file_size):
                    raise NpzError(f"is damaged: {name} is cut off")
                return data
        except (NpzError, OSError):
            raise
        except Exception as error:  # zipfile and zlib raise many
            raise NpzError(f"is damaged: {_one_line(error)}") from None


def _check_directory(file: BinaryIO) -> None:
    """Refuse, before zipfile reads it, what could fill the memory: numpy writes a small directory
    at the very end."""
    size = file.seek(0, 2)
    if size > MAX_FILE_BYTES:
        raise NpzError(f"has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    if size < END.size:
        raise NpzError("is no .npz: cut off, or something else")
    file.seek(size - END.size)
    magic, *_, directory_bytes, start, comment = END.unpack(file.read(END.size))
    is_end = magic == b"PK\5\6" and not comment and start + directory_bytes <= size
    if not is_end:
        raise NpzError("is no .npz: cut off, or something else")
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise NpzError("has more arrays than a cache of an image")
    file.seek(0)


def _parse_header(data: bytes, name: str) -> ArrayHeader:
    """The header of an .npy: a magic, a length, and a literal of a dict."""
    length = ENDS_OF_HEADERS.get(data[6]) if len(data) > 12 else None
    if length is None or data[:6] != b"\x93NUMPY":
        raise NpzError(f"has {name} that is no array of numpy's")
    start = 8 + length.size
    end = start + int(length.unpack_from(data, 8)[0])
    if end > len(data):
        raise NpzError(f"is damaged: the header of {name} is cut off")
    match = HEADER.fullmatch(data[start:end])
    if match is None:
        raise NpzError(f"has {name} that is no array of plain numbers")
    kind, order, shape = (part.decode() for part in match.groups())
    if "O" in kind:
        raise NpzError(f"has objects in {name}, which are pickles: those are never loaded")
    if not NUMBERS.fullmatch(kind):
        raise NpzError(f"has {name} that is no array of plain numbers")
    sides = tuple(int(side) for side in shape.replace(" ", "").split(",") if side)
    return ArrayHeader(np.dtype(kind), sides, order == "True", end)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
