"""The index of a shard: where each sample and slice lies in the tar, and its digest."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shards import CacheError
from shards.durable import write_durable
from shards.sample import CAPTION_TENSORS, TENSORS, VARIANT_TENSORS, Layout

MAGIC = b"shardtune-index\n"
ALIGNMENT = 64
SHA_BYTES = 32

RECORD_DTYPE = np.dtype(
    [
        ("key", "S20"),
        ("num_variants", "<u2"),
        ("num_captions", "<u2"),
        ("weight", "<f4"),
        ("json_size", "<u4"),  # bytes
        ("json_offset", "<u8"),  # in the tar
        ("offset", "<u8"),  # of the safetensors member's data, in the tar
        ("size", "<u8"),  # of that member, bytes
        ("first_digest", "<u8"),  # row in the digest table
        ("header_size", "<u4"),  # bytes of the safetensors header, its own length included
        ("tensors", "<u4", (len(TENSORS),)),  # offset of each in the member; 0 = absent
        ("reserved", "<u4"),
    ]
)


@dataclass(frozen=True)
class Part:
    """A stretch of the tar with a digest of its own."""

    what: str
    offset: int
    size: int


def describe_payload(payload: bytes, digests: list[int]) -> dict[str, Any]:
    """Record fields of one safetensors member; appends the digests of its parts to ``digests``."""
    (length,) = struct.unpack("<Q", payload[:8])
    start = 8 + length
    header: dict[str, Any] = json.loads(payload[8:start])
    header.pop("__metadata__", None)
    view = memoryview(payload)
    digests.append(xxhash.xxh3_64_intdigest(view[:start]))
    offsets = [start + header[n]["data_offsets"][0] if n in header else 0 for n in TENSORS]
    counts = {}
    for names in (VARIANT_TENSORS, CAPTION_TENSORS):
        present = [name for name in names if name in header]
        count = counts[names] = header[present[0]]["shape"][0]
        for number in range(count):
            for name in present:
                begin, end = header[name]["data_offsets"]
                size = (end - begin) // count
                at = start + begin + number * size
                digests.append(xxhash.xxh3_64_intdigest(view[at : at + size]))
    return {
        "num_variants": counts[VARIANT_TENSORS],
        "num_captions": counts[CAPTION_TENSORS],
        "header_size": start,
        "size": len(payload),
        "tensors": offsets,
    }


def write_index(
    path: Path, header: dict[str, Any], records: npt.NDArray[np.void], digests: list[int]
) -> None:
    """Write the mark of a whole shard: from now on the shard exists."""
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % ALIGNMENT)
    body = MAGIC + struct.pack("<Q", len(text)) + text
    body += records.tobytes() + np.array(digests, dtype="<u8").tobytes()
    write_durable(path, body + hashlib.sha256(body).digest())


class Index:
    """A checked index file.

    ``header`` is the JSON, ``records`` a structured array of RECORD_DTYPE, ``digests`` [M] u64.

    Raises:
        CacheError: missing, damaged, or the index of another shard.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._data = path.read_bytes()
        except FileNotFoundError:
            raise CacheError(f"{path}: the index is missing") from None
        view = memoryview(self._data)
        if view[: len(MAGIC)] != MAGIC or len(view) < len(MAGIC) + 8 + SHA_BYTES:
            raise CacheError(f"{path}: not a shardtune index, or its first bytes are damaged")
        digest = hashlib.sha256(view[:-SHA_BYTES])
        if digest.digest() != view[-SHA_BYTES:]:
            raise CacheError(f"{path}: the index is damaged (sha256 differs)")
        digest.update(view[-SHA_BYTES:])
        self.sha256 = digest.hexdigest()
        (length,) = struct.unpack_from("<Q", view, len(MAGIC))
        start = len(MAGIC) + 8
        self.header: dict[str, Any] = json.loads(bytes(view[start : start + length]))
        if f"{self.header['shard']}.index" != path.name:
            raise CacheError(f"{path}: this is the index of another shard ({self.header['shard']})")
        start += length
        count = self.header["count"]
        self.records = np.frombuffer(self._data, RECORD_DTYPE, count, start)
        start += self.records.nbytes
        num_digests = (len(view) - SHA_BYTES - start) // 8
        self.digests = np.frombuffer(self._data, "<u8", num_digests, start)
        self.layout = Layout(
            dtype=self.header["dtype"],
            latent=tuple(self.header["latent"]),
            prompt=tuple(self.header["prompt"]),
            pooled=self.header["pooled"],
        )

    def __len__(self) -> int:
        return len(self.records)

    def key(self, row: int) -> str:
        return bytes(self.records[row]["key"]).decode()

    def slice(self, row: int, name: str, number: int) -> tuple[Part, int] | None:
        """Where slice ``number`` of a tensor lies, and its xxh3-64; None where it is absent."""
        record = self.records[row]
        tensors = record["tensors"]
        base = int(tensors[TENSORS.index(name)])
        if base == 0:
            return None
        variants = [n for n in VARIANT_TENSORS if tensors[TENSORS.index(n)]]
        digest = int(record["first_digest"]) + 2
        if name in VARIANT_TENSORS:
            digest += number * len(variants) + variants.index(name)
        else:
            digest += int(record["num_variants"]) * len(variants)
            digest += number * len(CAPTION_TENSORS) + CAPTION_TENSORS.index(name)
        size = self.layout.slice_bytes(name)
        part = Part(f"{name}[{number}]", int(record["offset"]) + base + number * size, size)
        return part, int(self.digests[digest])

    def parts(self, row: int) -> Iterator[tuple[Part, int]]:
        """Every part of a sample with its digest: JSON, header, then all slices."""
        record = self.records[row]
        first = int(record["first_digest"])
        about = Part("json", int(record["json_offset"]), int(record["json_size"]))
        header = Part("header", int(record["offset"]), int(record["header_size"]))
        yield about, int(self.digests[first])
        yield header, int(self.digests[first + 1])
        counts = {
            VARIANT_TENSORS: int(record["num_variants"]),
            CAPTION_TENSORS: int(record["num_captions"]),
        }
        for names, count in counts.items():
            for number in range(count):
                for name in names:
                    if (found := self.slice(row, name, number)) is not None:
                        yield found
