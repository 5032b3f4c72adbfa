"""safetensors with metadata in a settled order.

The library writes several keys of metadata in an order of each process' own: equal content, other
bytes. Sorted by name, equal content is equal bytes.
"""

import json
import struct
from pathlib import Path

import safetensors.torch
import torch


def settled_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file of CPU tensors."""
    data = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata
    )
    (length,) = struct.unpack("<Q", data[:8])
    return data[:8] + _settled(data[8 : 8 + length]) + data[8 + length :]


def settle(path: Path) -> None:
    """Sort the metadata of a safetensors file in place: one that nobody reads yet."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = _settled(file.read(length))
        file.seek(8)
        file.write(header)


def _settled(header: bytes) -> bytes:
    """The same header, as long as it was, with its metadata sorted by name."""
    about = json.loads(header)
    about["__metadata__"] = dict(sorted(about.get("__metadata__", {}).items()))
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= len(header), "a header that was not written by safetensors"
    return text.ljust(len(header))
