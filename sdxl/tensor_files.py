"""safetensors files that shardtune writes: sorted metadata, with a digest of the tensors.

safetensors writes several keys of metadata in an order of each process' own: equal content, other
bytes. Sorted by name, equal content is equal bytes.

``shardtune.digest`` is ``LAYOUT-DATA``: xxh3 over the names, dtypes and shapes of the tensors, and
over their bytes. It is of the tensors alone, so that other programs may edit the metadata. Where
LAYOUT differs, another program has changed the tensors and kept the metadata (a smaller rank,
another precision, embeddings added): such a file is accepted like any file without a digest.
"""

import functools
import json
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
import xxhash

from sdxl import BaseError
from sdxl.single_file import read_header


def sorted_metadata_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file of CPU tensors, with sorted metadata."""
    data = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata
    )
    (length,) = struct.unpack("<Q", data[:8])
    return data[:8] + _with_sorted_metadata(data[8 : 8 + length]) + data[8 + length :]


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: nothing else may read it yet."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = _with_sorted_metadata(file.read(length))
        file.seek(8)
        file.write(header)


def _with_sorted_metadata(header: bytes) -> bytes:
    """The same header, as long as it was, with its metadata sorted by name."""
    fields = json.loads(header)
    fields["__metadata__"] = dict(sorted(fields.get("__metadata__", {}).items()))
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= len(header), "a header that was not written by safetensors"
    return text.ljust(len(header))


# The digest of the tensors, kept in the file's own metadata: a flipped bit never makes an image.

KEY = "shardtune.digest"
METADATA_KEY = "shardtune.metadata_digest"  # of the other metadata, such as lora_alpha
DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorDigest:
    """Takes tensors one by one, in any order."""

    def __init__(self) -> None:
        self._layout: list[str] = []
        self._data: list[str] = []

    def add(self, name: str, dtype: str, shape: Iterable[int], data: memoryview) -> None:
        """One tensor; ``dtype`` is safetensors' name of it, ``data`` its bytes."""
        self._layout.append(f"{name} {dtype} {list(shape)}\n")
        self._data.append(f"{name} {xxhash.xxh3_128_hexdigest(data)}\n")

    @property
    def text(self) -> str:
        """The text for the metadata; it always has the same length."""
        layout, data = ("".join(sorted(lines)).encode() for lines in (self._layout, self._data))
        return f"{xxhash.xxh3_64_hexdigest(layout)}-{xxhash.xxh3_128_hexdigest(data)}"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor; of a contiguous one without a copy."""
    data: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def digest_metadata(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The metadata to write beside CPU ``tensors``: ``metadata``, with the digests of both. Without
    the first if a tensor has a dtype that is not in DTYPES, so that a rare dtype costs the digest
    and not the file."""
    with_digest = {**metadata, METADATA_KEY: metadata_digest(metadata, metadata)}
    if any(tensor.dtype not in DTYPES for tensor in tensors.values()):
        return with_digest
    digest = TensorDigest()
    for name, tensor in tensors.items():
        digest.add(name, DTYPES[tensor.dtype], tensor.shape, tensor_bytes(tensor))
    return {**with_digest, KEY: digest.text}


def metadata_digest(metadata: Mapping[str, str], names: Iterable[str]) -> str:
    """The digest of some entries, and their names: another program may add entries of its own."""
    entries = [[name, metadata.get(name)] for name in sorted(names)]
    hashed = xxhash.xxh3_128_hexdigest(json.dumps(entries).encode())
    return " ".join([hashed, *sorted(names)])


def check_digest(path: Path) -> None:
    """Refuse a file whose tensors or metadata are not those that its digests were made of. A file
    without digests, or one that is no safetensors file, is left to the caller.

    Raises:
        BaseError: names the file, and says what to do.
    """
    try:
        stat = path.stat()
    except OSError:
        return
    if not _digest_matches(path, stat.st_size, stat.st_mtime_ns):
        raise BaseError(
            f"{path}: damaged: its digest differs from the one that was written with it. Take "
            "another copy or checkpoint; if a program changed it on purpose, have that remove "
            f"{KEY} and {METADATA_KEY} from its metadata"
        )


def check_written(path: Path, out: Path) -> None:
    """``check_digest`` for a file just written as ``path``, which is to become ``out``.

    Raises:
        OSError: the disk gave back something else.
    """
    try:
        check_digest(path)
    except BaseError:
        raise OSError(
            f"{out}: what was read back is not what was written; nothing is kept"
        ) from None


@functools.lru_cache(maxsize=64)
def _digest_matches(path: Path, size: int, mtime_ns: int) -> bool:
    """Whether a file matches its digest, or has none. The file is mapped, so that no tensor is in
    memory. Size and mtime are keys of the cache, as a file may be read component by component."""
    try:
        tensors, metadata = read_header(path)
    except BaseError:
        return True
    stated_metadata = metadata.get(METADATA_KEY)
    if stated_metadata is not None:
        names = stated_metadata.split(" ")[1:]
        if stated_metadata != metadata_digest(metadata, names):
            return False
    if KEY not in metadata:
        return True
    if not re.fullmatch("[0-9a-f]{16}-[0-9a-f]{32}", metadata[KEY]):
        return False
    digest = TensorDigest()
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        for name, tensor in tensors.items():
            with data[tensor.begin : tensor.end] as part:
                digest.add(name, tensor.dtype, tensor.shape, part)
    stated, computed = metadata[KEY].partition("-"), digest.text.partition("-")
    return stated[0] != computed[0] or stated == computed
