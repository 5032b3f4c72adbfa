"""Reads the headers of images, plans the variants of each, and remembers what was read.

A header is read from the first bytes of a file where the format allows it. The digest of all bytes
is computed only where something is compared by it (``add_digests``); a new image is hashed when it
is encoded, for then it is read anyway.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from precompute.dataset.records import Blob, Memory, Rejected, SourceImage, short_digest
from precompute.images.decode import image_size, open_image
from precompute.images.masks import check_mask_size
from precompute.images.rejections import ImageError, explain
from precompute.images.variants import plan_variants
from precompute.plan.placement import PlannedSample
from precompute.settings import EncodeSettings
from runtime.devices import num_cores
from runtime.errors import is_quiet
from runtime.files import open_regular, read_checked, user_cache, write_checked
from shards.buckets import Geometry, Size, bucket_sizes, cover, nearest_bucket, stretch
from shards.reader import read_ahead

T = TypeVar("T")
VERSION = 3  # of what is remembered, and of how a header is read
HEAD_BYTES = 1 << 16
MAX_CHUNKS = 100_000  # of a PNG, before it is read whole instead
PNG_START = b"\x89PNG\r\n\x1a\n"

# [digest, width, height] of an image file; the digest is empty until all its bytes are read. For
# a file that cannot be used it is [digest, reason].
Header = list[Any]


class Notes:
    """What this machine remembers of a cache's dataset: sizes, times and digests of its files.

    ``dataset`` is the name by which it is known: its full path, or ``hf://OWNER/NAME``.

    It is kept in the user's own cache folder, because it has captions and the dataset's full path.
    If it is lost, damaged, or of another dataset, the files are read again.
    """

    def __init__(self, out: Path, dataset: str, rehash: bool = False) -> None:
        name = hashlib.sha256(str(out.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
        self._path = user_cache() / "datasets" / f"{name[:32]}.json"
        self._dataset = dataset
        self.other_dataset: str | None = None  # what the cache was made from, if not this one
        self.is_same_dataset = False  # whether it is remembered that this dataset made the cache
        self._stored = self._read()
        self.memory = Memory() if rehash else Memory(stored=self._stored)

    def _read(self) -> dict[str, Any]:
        try:
            notes = json.loads(read_checked(self._path))
            version, dataset, files = notes["version"], notes["dataset"], dict(notes["files"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}
        if version != VERSION:
            return {}
        self.is_same_dataset = dataset == self._dataset
        self.other_dataset = None if self.is_same_dataset else str(dataset)
        return files if self.is_same_dataset else {}

    def write(self) -> None:
        """Keep what was seen; where that cannot be written, the next run is slower."""
        if self.is_same_dataset and self.memory.seen == self._stored:
            return
        notes = {"version": VERSION, "dataset": self._dataset, "files": self.memory.seen}
        try:
            write_checked(self._path, json.dumps(notes).encode())
        except OSError:
            return
        self._stored, self.is_same_dataset = dict(self.memory.seen), True


def plan_images(
    records: list[SourceImage], settings: EncodeSettings, memory: Memory | None = None
) -> tuple[list[PlannedSample], list[Rejected]]:
    """Plan the variants of each image from its header; a file that is remembered is not read."""
    memory = memory or Memory()
    shape, stamp = _make_geometry_function(settings), _make_stamp_function(settings.dataset)
    planned: list[PlannedSample] = []
    rejected: list[Rejected] = []
    for record, header in zip(records, _headers(records, memory, stamp), strict=True):
        try:
            if isinstance(header, Rejected) or len(header) == 2:
                reason = header.reason if isinstance(header, Rejected) else header[1]
                rejected.append(Rejected(record.path, reason))
            else:
                digest, width, height = header
                _check_size(width, height, settings.min_size)
                variants = plan_variants(shape((width, height)), settings, record.key)
                mask = _mask_digest(record, (width, height), memory, stamp)
                planned.append(PlannedSample(record, digest, variants, mask))
        except ValueError as error:
            rejected.append(Rejected(record.path, str(error)))
    return planned, rejected


def add_digests(
    planned: list[PlannedSample],
    wanted: Callable[[PlannedSample], bool],
    before: Mapping[str, Sequence[Any]],
    settings: EncodeSettings,
    memory: Memory,
) -> tuple[list[PlannedSample], list[Rejected]]:
    """Return the samples with the image digests of those that are ``wanted``, which are read whole.

    ``before`` has the fingerprints of the samples in the cache, by key. Where the image or mask of
    such a sample has changed, it is decoded too: a sample is replaced only by what can be encoded.
    """
    stamp = _make_stamp_function(settings.dataset)

    def is_read(sample: PlannedSample) -> bool:
        return wanted(sample) if not sample.image_digest else _has_changed(sample, before)

    missing = [sample for sample in planned if is_read(sample)]
    threads = num_cores()
    reading = read_ahead(lambda sample: _digest(sample, before), missing, threads, 4 * threads)
    bar = _with_bar(reading, len(missing), "compare")
    results: dict[str, str | Rejected] = {}
    for sample, result in zip(missing, bar, strict=True):
        results[sample.record.key] = result
        if not isinstance(result, Rejected):
            remember_digest(memory, stamp(sample.record.image), result)
    rejected = [result for result in results.values() if isinstance(result, Rejected)]
    rejected_keys = {rejection.key for rejection in rejected}
    digests = {key: result for key, result in results.items() if not isinstance(result, Rejected)}
    return [
        replace(sample, image_digest=digests.get(sample.record.key, sample.image_digest))
        for sample in planned
        if sample.record.key not in rejected_keys
    ], rejected


def _has_changed(sample: PlannedSample, before: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the image or the mask of a sample that the cache has is another one now."""
    fingerprint = before.get(sample.record.key)
    return fingerprint is not None and (
        sample.image_digest != fingerprint[0]
        or bool(sample.mask_digest and sample.mask_digest != fingerprint[1])
    )


def remember_encoded(
    planned: Iterable[PlannedSample], digests: dict[str, str], dataset: Path, memory: Memory
) -> None:
    """Remember the digests of images that were hashed when they were encoded; they are by key."""
    stamp = _make_stamp_function(dataset)
    for sample in planned:
        if not sample.image_digest and (digest := digests.get(sample.record.key)):
            remember_digest(memory, stamp(sample.record.image), digest)


def remember_digest(memory: Memory, stamp: tuple[str, int, int], digest: str) -> None:
    header = memory.find(*stamp) or (memory.seen.get(stamp[0]) or [None] * 3)[2]
    if header is not None and len(header) == 3:
        memory.remember(*stamp, [digest, *header[1:]])


def _headers(
    records: list[SourceImage], memory: Memory, stamp: Callable[[Blob], tuple[str, int, int]]
) -> list[Header | Rejected]:
    """The header of each record's image; those not remembered are read by threads."""
    headers: list[Any] = [
        list(record.header) if record.header else memory.find(*stamp(record.image))
        for record in records
    ]
    missing = [number for number, header in enumerate(headers) if header is None]
    threads = num_cores()
    reading = read_ahead(_read_header, (records[n] for n in missing), threads, 4 * threads)
    bar = _with_bar(reading, len(missing), "read headers")
    for number, header in zip(missing, bar, strict=True):
        headers[number] = header
        if not isinstance(header, Rejected) and len(header) == 3:  # another Pillow may know it
            memory.remember(*stamp(records[number].image), header)
    return headers


def _check_size(width: int, height: int, smallest: int) -> None:
    if min(width, height) < smallest:
        raise ValueError(
            f"{width} x {height} pixels: its shorter side has fewer than --min-size {smallest}"
        )


def _mask_digest(
    record: SourceImage,
    original: Size,
    memory: Memory,
    stamp: Callable[[Blob, str], tuple[str, int, int]],
) -> str:
    """The short digest of the mask's bytes; empty where the image has no mask file.

    Raises:
        ValueError: the mask cannot be read, or does not fit this image.
    """
    mask = record.mask
    if mask is None:
        return ""

    def read() -> Header:
        try:
            data = mask.read()
        except ValueError as error:  # it changed
            raise ImageError(str(error)) from None
        return [short_digest(hashlib.sha256(data).hexdigest()), *image_size(data)]

    try:
        digest, width, height = memory.recall(*stamp(mask, "mask"), read)
        check_mask_size((width, height), original)
    except Exception as error:  # Pillow raises anything of a bad file
        raise ValueError(f"its mask: {explain(error)}") from None
    return str(digest)


def _make_stamp_function(dataset: Path) -> Callable[..., tuple[str, int, int]]:
    """A function from a file to what it is remembered by: path inside the dataset, size, time."""

    def stamp(blob: Blob, role: str = "picture") -> tuple[str, int, int]:
        return f"{role} {blob.place_in(dataset)}", blob.size, blob.mtime_ns

    return stamp


def _digest(sample: PlannedSample, before: Mapping[str, Sequence[Any]]) -> str | Rejected:
    record = sample.record
    data = _read(record)
    if isinstance(data, Rejected):
        return data
    digest = short_digest(hashlib.sha256(data).hexdigest())
    if _has_changed(replace(sample, image_digest=digest), before):
        try:
            open_image(data)
        except Exception as error:  # Pillow raises anything of a bad file
            return Rejected(record.path, explain(error))
        try:
            if record.mask is not None:
                open_image(record.mask.read())
        except Exception as error:
            return Rejected(record.path, f"its mask: {explain(error)}")
    return digest


def _read(record: SourceImage, head: bool = False) -> Any:
    """The bytes of an image file (with ``head`` the first ones, see ``_head``), or why it cannot be
    read. That may be so only now, so it is not remembered."""
    try:
        return _head(record.image) if head else record.image.read()
    except OSError as error:
        return Rejected(record.path, explain(error))
    except ValueError as error:  # it changed
        return Rejected(record.path, str(error))


def _read_header(record: SourceImage) -> Header | Rejected:
    head = _read(record, head=True)
    if isinstance(head, bytes):
        try:
            return ["", *image_size(head)]
        except Exception:  # the first bytes do not tell: all of them will
            pass
    elif isinstance(head, Rejected):
        return head
    data = _read(record)
    if isinstance(data, Rejected):
        return data
    digest = short_digest(hashlib.sha256(data).hexdigest())
    try:
        return [digest, *image_size(data)]
    except Exception as error:  # Pillow raises anything of a bad file
        return [digest, explain(error)]


def _head(blob: Blob) -> bytes | None:
    """The first bytes of an image file, if its size and orientation follow from them; else None.

    They do in a JPEG, whose segments come before its data. A PNG may have EXIF behind its data: its
    chunks are walked to see that there is none. In other formats anything may come last.
    """
    if blob.column:
        return None
    with open_regular(blob.file) as file:
        file.seek(blob.offset)
        head = file.read(min(HEAD_BYTES, blob.size))
        if len(head) == blob.size:
            return None
        if head.startswith(b"\xff\xd8\xff"):
            return head
        place = len(PNG_START)
        if not head.startswith(PNG_START):
            return None
        kinds = set[bytes]()
        for _ in range(MAX_CHUNKS):
            if place + 8 > blob.size:
                return head if kinds <= {b"IDAT", b"IEND"} else None
            file.seek(blob.offset + place)
            chunk = file.read(8)
            if chunk[4:] == b"IDAT":
                kinds.clear()  # what stands before is in the head, or makes that fail
            kinds.add(chunk[4:])
            place += 12 + int.from_bytes(chunk[:4])
    return None


def _make_geometry_function(settings: EncodeSettings) -> Callable[[Size], Geometry]:
    """A function from an image's size to its geometry in its bucket."""
    resolution = settings.resolution
    square = settings.square or settings.squash
    buckets = [] if square else bucket_sizes(resolution, settings.bucket_step)
    fit = stretch if settings.squash else cover

    @lru_cache(maxsize=65536)
    def shape(size: Size) -> Geometry:
        return fit(size, (resolution, resolution) if square else nearest_bucket(size, buckets))

    return shape


def _with_bar(reading: Iterable[T], total: int, name: str) -> Iterable[T]:
    """What is read, with a bar where that takes more than a second."""
    bar: Iterable[T] = tqdm(
        reading, total=total, unit="img", desc=name, leave=False, delay=1, disable=is_quiet()
    )
    return bar
