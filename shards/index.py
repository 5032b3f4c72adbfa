"""The index of a shard: where each sample and slice lies in the tar, and the digests of parts."""

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from runtime.devices import DTYPES
from runtime.files import write_durable, writer_name
from runtime.schema import (
    BUCKET,
    DIGEST,
    REPEATS,
    SHARD,
    SIDE,
    each,
    fields,
    flag,
    integer,
    like,
    misfit,
    number,
    read_json,
    record,
    table,
    text,
)
from shards.format import (
    CAPTION_TENSORS,
    MASK_TENSORS,
    TENSORS,
    VARIANT_TENSORS,
    CacheError,
    Layout,
    OtherFormat,
    SampleLayout,
    make_sample_layout,
)

NAME = b"shardtune-index"
MAGIC = NAME + b"2"  # the version of the format; in the first it was a line's end
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
        ("roles", "<u4"),  # 1 + row in the header's caption_roles; 0 = its captions have none
    ]
)


_RECORD = struct.Struct("<20s4sfI4QI24sI")  # RECORD_DTYPE, read ten times as fast as by numpy
assert _RECORD.size == RECORD_DTYPE.itemsize


class HashedSpan(NamedTuple):
    """A span of bytes in the tar with a digest of its own."""

    label: str
    offset: int
    size: int


class IndexRecord(NamedTuple):
    """A sample's record in Python's own numbers; the fields are RECORD_DTYPE's, in their order.

    ``counts`` (of variants, of captions) and ``tensors`` stay packed: a ``SampleLayout`` looks into
    them.
    """

    key: bytes
    counts: bytes
    weight: float
    json_size: int
    json_offset: int
    offset: int
    size: int
    first_digest: int
    header_size: int
    tensors: bytes
    roles: int


def map_file(path: Path) -> memoryview:
    """A file's bytes, mapped: pages are loaded on access, are shared among processes, and no file
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


def describe_payload(payload: bytes, layout: Layout, digests: list[int]) -> dict[str, Any]:
    """Record fields of one safetensors member; appends the digests of its parts to ``digests``."""
    (length,) = struct.unpack("<Q", payload[:8])
    start = 8 + length
    header: dict[str, Any] = json.loads(payload[8:start])
    offsets = [start + header[n]["data_offsets"][0] if n in header else 0 for n in TENSORS]
    counts = []
    for names in (VARIANT_TENSORS, CAPTION_TENSORS):
        (count,) = {header[name]["shape"][0] for name in names if name in header}
        counts.append(count)
    view = memoryview(payload)
    digests.append(xxhash.xxh3_64_intdigest(view[:start]))
    sample_layout = make_sample_layout(counts, offsets, layout)
    covered = start + sum(span.stop - span.start for span in sample_layout.spans())
    if covered != len(payload):
        raise ValueError(f"the tensors of a sample are not as its shard's layout: {layout}")
    digests += [xxhash.xxh3_64_intdigest(view[s.start : s.stop]) for s in sample_layout.spans()]
    return {
        "num_variants": counts[0],
        "num_captions": counts[1],
        "header_size": start,
        "size": len(payload),
        "tensors": offsets,
    }


def write_index(
    path: Path, header: dict[str, Any], records: npt.NDArray[np.void], digests: list[int]
) -> None:
    """Write a shard's index, durably: from now on the shard exists."""
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % ALIGNMENT)
    body = MAGIC + struct.pack("<Q", len(text)) + text
    body += records.tobytes() + np.array(digests, dtype="<u8").tobytes()
    write_durable(path, body + hashlib.sha256(body).digest(), writer_name())


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
        if view[: len(NAME)] != NAME or len(view) < len(MAGIC) + 8 + SHA_BYTES:
            raise CacheError(f"{path}: not a shardtune index, or its first bytes are damaged")
        digest = hashlib.sha256(view[:-SHA_BYTES])
        if digest.digest() != view[-SHA_BYTES:]:
            raise CacheError(f"{path}: the index is damaged (sha256 differs)")
        if view[: len(MAGIC)] != MAGIC:
            version = bytes(view[len(NAME) : len(MAGIC)]).decode("ascii", "replace")
            raise OtherFormat.version(path, {"\n": "1"}.get(version, version))
        digest.update(view[-SHA_BYTES:])
        self.sha256 = digest.hexdigest()
        self.path = path
        self.header = self._read_header()
        if f"{self.header['shard']}.index" != path.name:
            raise CacheError(f"{path}: this is the index of another shard ({self.header['shard']})")
        self.layout = Layout(
            dtype=self.header["dtype"],
            latent=tuple(self.header["latent"]),
            prompt=tuple(self.header["prompt"]),
            pooled=self.header["pooled"],
        )
        self._caption_roles: tuple[tuple[str, ...], ...] = (
            (),
            *map(tuple, self.header.get("caption_roles", ())),
        )
        self._sample_layouts: dict[tuple[bytes, bytes], SampleLayout] = {}
        self._check_records()

    def _read_header(self) -> dict[str, Any]:
        view = self._data
        (length,) = struct.unpack_from("<Q", view, len(MAGIC))
        start = len(MAGIC) + 8
        try:
            header = read_json(bytes(view[start : start + length]))
        except ValueError as error:
            raise self._forged(f"its header is not JSON: {str(error)[:80]}") from None
        if problem := misfit_of_header(header):
            raise self._forged(problem)
        self._count = int(header["count"])
        self._first_record = start + length
        self._first_digest = self._first_record + self._count * _RECORD.size
        return dict(header)

    def _check_records(self) -> None:
        table_bytes = len(self._data) - SHA_BYTES - self._first_digest
        if table_bytes < 0 or table_bytes % DIGEST_BYTES:
            raise self._forged("it is shorter or longer than it says")
        num_digests, tar_bytes = table_bytes // DIGEST_BYTES, self.header["tar_bytes"]
        if problem := misfit_of_records(self.records, self.layout, tar_bytes, num_digests):
            raise self._forged(problem)
        numbers = np.array([len(roles) for roles in self._caption_roles])
        rows = self.records["roles"]
        if (rows >= len(numbers)).any() or (
            numbers[rows[rows > 0]] != self.records["num_captions"][rows > 0]
        ).any():
            raise self._forged("its roles are not as many as its captions")

    def _forged(self, problem: str) -> CacheError:
        return CacheError(f"{self.path}: not an index that shardtune writes: {problem}")

    def __len__(self) -> int:
        return self._count

    @property
    def records(self) -> npt.NDArray[np.void]:
        """All records at once."""
        return np.frombuffer(self._data, RECORD_DTYPE, self._count, self._first_record)

    def record(self, row: int) -> IndexRecord:
        """Sample ``row``, 0..len-1."""
        if not 0 <= row < self._count:
            raise IndexError(row)
        at = self._first_record + row * _RECORD.size
        return IndexRecord._make(_RECORD.unpack_from(self._data, at))

    def key(self, row: int) -> str:
        return self.record(row).key.decode()

    def caption_roles(self, record: IndexRecord) -> tuple[str, ...]:
        """The role of each caption of a sample, "" for one without; empty if none has any."""
        return self._caption_roles[record.roles]

    def count_roles(self) -> Counter[tuple[str, ...]]:
        """The number of samples by the roles of their captions."""
        rows, counts = np.unique(self.records["roles"], return_counts=True)
        roles = (self._caption_roles[row] for row in rows)
        return Counter(dict(zip(roles, counts.tolist(), strict=True)))

    def sample_layout(self, record: IndexRecord) -> SampleLayout:
        """Where the slices of a sample are."""
        packed = record.counts, record.tensors
        sample_layout = self._sample_layouts.get(packed)
        if sample_layout is None:
            counts = struct.unpack("<2H", record.counts)
            offsets = struct.unpack(f"<{len(TENSORS)}I", record.tensors)
            sample_layout = self._sample_layouts[packed] = make_sample_layout(
                counts, offsets, self.layout
            )
        return sample_layout

    def digests(self, record: IndexRecord, sample_layout: SampleLayout) -> tuple[int, ...]:
        """xxh3-64 of each part of a sample."""
        at = self._first_digest + DIGEST_BYTES * record.first_digest
        if at + sample_layout.digests.size > len(self._data) - SHA_BYTES:
            raise self._forged(f"sample {record.key.decode()} has no digests")
        return sample_layout.digests.unpack_from(self._data, at)

    def parts(self, row: int) -> Iterator[tuple[HashedSpan, int]]:
        """Every part of a sample with its digest: JSON, header, then all spans."""
        record = self.record(row)
        sample_layout = self.sample_layout(record)
        parts = [
            HashedSpan("json", record.json_offset, record.json_size),
            HashedSpan("header", record.offset, record.header_size),
        ]
        for span in sample_layout.spans():
            parts.append(HashedSpan(span.label, record.offset + span.start, span.stop - span.start))
        yield from zip(parts, self.digests(record, sample_layout), strict=True)


# What an index must contain to be readable, whoever wrote it: see ``runtime.schema``.

MAX_SLICE_BYTES = 2**40
REQUIRED_TENSORS = ("latents.mean", "sizes", *CAPTION_TENSORS)
HEADER = {
    "shard": SHARD,
    "count": integer(),
    "tar_bytes": integer(),
    "tar_sha256": DIGEST,
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "latent": each(SIDE, 3),
    "prompt": each(SIDE, 2),
    "pooled": SIDE,
}
KEY = like("[0-9a-f]{20}")


def _is_member_row(value: Any) -> bool:
    """Whether a row is a key and then a fingerprint: texts and numbers."""
    is_row = isinstance(value, list) and len(value) > 0 and KEY(value[0])
    return is_row and all(text(item) or number(item) for item in value[1:])


IMPORTED = table(lambda name: name in ("latents", "text"), integer())
ENCODE_FIELDS = {  # what encode adds; a shard that another program wrote may lack it
    "bucket": BUCKET,
    "repeats": REPEATS,
    "recipe": fields(
        {
            **dict.fromkeys(("preprocessing", "vae", "text_encoder", "text_encoder_2"), record),
            "storage": fields({"dtype": text, "mean_only": flag}),
        },
        {"long_captions": integer(1, 1000)},
    ),
    "members": each(_is_member_row),
    "rejected": each(each(text, 2)),
    "made_with": each(record),
    "sums": fields(
        dict.fromkeys(("gram", "cross"), each(each(number))),
        {"moments": each(number), "products": each(each(number, 3))},  # since the quadratic map
    ),
    "num_cut_captions": integer(),
    "imported": IMPORTED,
    "caption_roles": each(each(text)),
    "dropped_variants": each(
        lambda value: (
            isinstance(value, list) and len(value) == 2 and text(value[0]) and integer()(value[1])
        )
    ),
}


def misfit_of_header(header: Any) -> str | None:
    """What is wrong with the JSON of an index; None if nothing is."""
    problem = misfit(header, HEADER, ENCODE_FIELDS)
    if problem is None and "bucket" in header:
        width, height = header["bucket"]
        if header["latent"][1:] != [height // 8, width // 8]:
            return "its latents are not of its bucket"
    if problem is None and "sums" in header:
        size = header["latent"][0] + 1
        for name, width in (("gram", size), ("cross", 3)):
            if [len(row) for row in header["sums"][name]] != size * [width]:
                return f"its sums are not of {size - 1} channels"
        num_products, sums = size * (size - 1) // 2, header["sums"]
        num_moments = comb(size + 1, 3) + comb(size + 2, 4)
        lengths = [len(sums[name]) for name in ("products", "moments") if name in sums]
        if lengths not in ([], [num_products, num_moments]):
            return f"its sums are not of {size - 1} channels"
    return problem


def misfit_of_records(
    records: npt.NDArray[np.void], layout: Layout, tar_bytes: int, num_digests: int
) -> str | None:
    """What is wrong with the records: each must lie in the tar, and hold just its tensors."""
    if not len(records):
        return None
    keys = np.frombuffer(records["key"].tobytes(), np.uint8).reshape(len(records), 20)
    if not ((keys >= 48) & (keys <= 57) | (keys >= 97) & (keys <= 102)).all():
        return "a key is not 20 hex digits"
    if not (records["key"][1:] > records["key"][:-1]).all():
        return "its keys are not in order"
    if not (np.isfinite(records["weight"]) & (records["weight"] >= 0)).all():
        return "a weight is not a number from 0 on"
    for offset, size in (("json_offset", "json_size"), ("offset", "size")):
        if not _fits(records[offset], records[size], tar_bytes).all():
            return "a sample lies outside the tar"
    if not (records["first_digest"] <= num_digests).all():
        return "a sample has no digests"
    return _misfit_of_tensors(records, layout)


def _misfit_of_tensors(records: npt.NDArray[np.void], layout: Layout) -> str | None:
    size, covered = records["size"], records["header_size"].astype(np.uint64)
    if not (records["num_variants"].all() and records["num_captions"].all()):
        return "a sample has no variant or no caption"
    for place, name in enumerate(TENSORS):
        offsets = records["tensors"][:, place]
        is_present = offsets > 0
        if name in REQUIRED_TENSORS and not is_present.all():
            return f"a sample has no {name}"
        slice_bytes = layout.slice_bytes(name)
        if slice_bytes > MAX_SLICE_BYTES:
            return f"its {name} is larger than any"
        counter = "num_variants" if name in VARIANT_TENSORS + MASK_TENSORS else "num_captions"
        total = records[counter].astype(np.uint64) * np.uint64(slice_bytes)
        covered = covered + np.where(is_present, total, np.uint64(0))
        starts_late = offsets >= records["header_size"]
        if not (~is_present | starts_late & _fits(offsets, total, size)).all():
            return f"the {name} of a sample lies outside it"
    return None if (covered == size).all() else "a sample holds more than its tensors"


def _fits(offset: Any, size: Any, limit: Any) -> npt.NDArray[np.bool_]:
    """Whether [offset, offset + size) lies in [0, most), in numbers that cannot overflow."""
    offset, size = offset.astype(np.uint64), size.astype(np.uint64)
    limit = np.broadcast_to(np.asarray(limit, np.uint64), offset.shape)
    inside = offset <= limit
    fits: npt.NDArray[np.bool_] = inside & (size <= limit - np.where(inside, offset, np.uint64(0)))
    return fits
