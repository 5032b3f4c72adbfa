"""The index of a shard: where each sample and slice lies in the tar, and its digest."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from shards import CacheError
from shards.durable import write_durable
from shards.sample import CAPTION_TENSORS, TENSORS, VARIANT_TENSORS, Layout

MAGIC = b"shardtune-index\n"
ALIGNMENT = 64
SHA_BYTES = 32
DIGEST_BYTES = 8

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


_RECORD = struct.Struct("<20s2HfI4QI6II")  # RECORD_DTYPE, read ten times as fast as by numpy
assert _RECORD.size == RECORD_DTYPE.itemsize


class Part(NamedTuple):
    """A stretch of the tar with a digest of its own."""

    what: str
    offset: int
    size: int


class Record(NamedTuple):
    """A sample's record in Python's own numbers; the fields are RECORD_DTYPE's."""

    key: bytes
    num_variants: int
    num_captions: int
    weight: float
    json_size: int
    json_offset: int
    offset: int
    size: int
    first_digest: int
    header_size: int
    tensors: tuple[int, ...]


class Slot(NamedTuple):
    """Where a slice lies in its safetensors member, and its digest among the sample's."""

    start: int
    stop: int
    digest: int


Slice = tuple[str, int]  # tensor, and number of the variant or caption


class Form(NamedTuple):
    """How a sample is laid out; most of a shard are alike."""

    slots: dict[Slice, Slot]  # of every slice that it has, in the order of the digests
    digests: struct.Struct  # of all its parts


def map_file(path: Path) -> memoryview:
    """A file's bytes, mapped: pages come when looked at, are shared among processes, and no file
    stays open.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size == 0:
        return memoryview(b"")
    try:
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None
    return mapped.numpy().data.toreadonly()


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

    ``header`` is the JSON.

    Raises:
        CacheError: missing, damaged, or the index of another shard.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._data = view = map_file(path)
        except FileNotFoundError:
            raise CacheError(f"{path}: the index is missing") from None
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
        self._first_record = start + length
        self._count = int(self.header["count"])
        self._first_digest = self._first_record + self._count * _RECORD.size
        self.layout = Layout(
            dtype=self.header["dtype"],
            latent=tuple(self.header["latent"]),
            prompt=tuple(self.header["prompt"]),
            pooled=self.header["pooled"],
        )
        self._forms: dict[tuple[int, int, tuple[int, ...]], Form] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def records(self) -> npt.NDArray[np.void]:
        """All records at once."""
        return np.frombuffer(self._data, RECORD_DTYPE, self._count, self._first_record)

    def record(self, row: int) -> Record:
        """Sample ``row``, 0..len-1."""
        if not 0 <= row < self._count:
            raise IndexError(row)
        values = _RECORD.unpack_from(self._data, self._first_record + row * _RECORD.size)
        return Record._make((*values[:10], values[10:-1]))

    def key(self, row: int) -> str:
        return self.record(row).key.decode()

    def form(self, record: Record) -> Form:
        """How a sample is laid out."""
        shape = record.num_variants, record.num_captions, record.tensors
        form = self._forms.get(shape)
        if form is None:
            slots = dict(_slots(*shape, self.layout))
            form = self._forms[shape] = Form(slots, struct.Struct(f"<{2 + len(slots)}Q"))
        return form

    def digests(self, record: Record, form: Form) -> tuple[int, ...]:
        """xxh3-64 of each part of a sample."""
        at = self._first_digest + DIGEST_BYTES * record.first_digest
        return form.digests.unpack_from(self._data, at)

    def parts(self, row: int) -> Iterator[tuple[Part, int]]:
        """Every part of a sample with its digest: JSON, header, then all slices."""
        record = self.record(row)
        form = self.form(record)
        parts = [
            Part("json", record.json_offset, record.json_size),
            Part("header", record.offset, record.header_size),
        ]
        for (name, number), slot in form.slots.items():
            offset, size = record.offset + slot.start, slot.stop - slot.start
            parts.append(Part(f"{name}[{number}]", offset, size))
        yield from zip(parts, self.digests(record, form), strict=True)


def _slots(
    num_variants: int, num_captions: int, tensors: tuple[int, ...], layout: Layout
) -> Iterator[tuple[Slice, Slot]]:
    digest = 2  # after those of the JSON and the header
    for names, count in ((VARIANT_TENSORS, num_variants), (CAPTION_TENSORS, num_captions)):
        present = [name for name in names if tensors[TENSORS.index(name)]]
        for number in range(count):
            for name in present:
                size = layout.slice_bytes(name)
                start = tensors[TENSORS.index(name)] + number * size
                yield (name, number), Slot(start, start + size, digest)
                digest += 1
