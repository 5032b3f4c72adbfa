"""Headers of the images: what each is and becomes; and what is remembered of them.

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
from typing import Any

from tqdm import tqdm

from precompute.dataset.records import Blob, Memory, Rejected, SourceImage
from precompute.images.decode import open_picture, picture_size
from precompute.images.masks import check_mask_size
from precompute.images.rejections import PictureError, explain
from precompute.images.variants import plan_variants
from precompute.plan.placement import PlannedSample, picture_mark
from precompute.settings import EncodeSettings
from runtime.devices import num_cores
from runtime.files import open_regular, read_checked, user_cache, write_checked
from shards.buckets import Geometry, Size, bucket_sizes, cover, nearest_bucket, stretch
from shards.reader import read_ahead

VERSION = 3  # of what is remembered, and of how a header is read
HEAD_BYTES = 1 << 16
MOST_CHUNKS = 100_000  # of a PNG, before it is read whole instead
PNG_START = b"\x89PNG\r\n\x1a\n"

# What an image's bytes are: the mark of their digest, empty while nobody asked for it, then width
# and height; or that mark and why it is no image.
Header = list[Any]


class Notes:
    """What this machine remembers of the dataset of one cache: sizes, times and marks of its files.

    It lies in the user's own cache folder, for it holds captions and the dataset's full path. If
    it is lost, damaged, or of another dataset, the files are read again.
    """

    def __init__(self, out: Path, dataset: Path, rehash: bool = False) -> None:
        name = hashlib.sha256(str(out.resolve()).encode("utf-8", "surrogateescape")).hexdigest()
        self._path = user_cache() / "datasets" / f"{name[:32]}.json"
        self._dataset = str(dataset.resolve())
        self.other_dataset: str | None = None  # what the cache was made from, if not this one
        self.is_known = False  # whether it is remembered that this dataset made the cache
        self._held = self._read()
        self.memory = Memory() if rehash else Memory(known=self._held)

    def _read(self) -> dict[str, Any]:
        try:
            held = json.loads(read_checked(self._path))
            version, dataset, files = held["version"], held["dataset"], dict(held["files"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}
        if version != VERSION:
            return {}
        self.is_known = dataset == self._dataset
        self.other_dataset = None if self.is_known else str(dataset)
        return files if self.is_known else {}

    def write(self) -> None:
        """Keep what was seen; where that cannot be written, the next run is slower."""
        if self.is_known and self.memory.seen == self._held:
            return
        held = {"version": VERSION, "dataset": self._dataset, "files": self.memory.seen}
        try:
            write_checked(self._path, json.dumps(held).encode())
        except OSError:
            return
        self._held, self.is_known = dict(self.memory.seen), True


def plan_pictures(
    records: list[SourceImage], settings: EncodeSettings, memory: Memory | None = None
) -> tuple[list[PlannedSample], list[Rejected]]:
    """What each image becomes, from its header; of one that is remembered nothing is read."""
    memory = memory or Memory()
    shape, stamp = _shaper(settings), _stamper(settings.dataset)
    planned: list[PlannedSample] = []
    rejected: list[Rejected] = []
    for record, header in zip(records, _headers(records, memory, stamp), strict=True):
        try:
            if isinstance(header, Rejected) or len(header) == 2:
                reason = header.reason if isinstance(header, Rejected) else header[1]
                rejected.append(Rejected(record.path, reason))
            else:
                mark, width, height = header
                _check_size(width, height, settings.min_size)
                variants = plan_variants(shape((width, height)), settings, record.key)
                mask = _mask_mark(record, (width, height), memory, stamp)
                planned.append(PlannedSample(record, mark, variants, mask))
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
    """The same with the marks of those that are ``wanted``, which are read whole for it.

    ``before`` has by key the marks (image, mask, ...) of the samples in the cache. Where a file of
    such a sample has changed, it is decoded too: a sample is replaced only by what can be encoded.
    """
    stamp = _stamper(settings.dataset)

    def is_read(sample: PlannedSample) -> bool:
        return wanted(sample) if not sample.picture else _has_changed(sample, before)

    missing = [sample for sample in planned if is_read(sample)]
    threads = num_cores()
    reading = read_ahead(lambda sample: _digest(sample, before), missing, threads, 4 * threads)
    bar = tqdm(reading, total=len(missing), unit="img", desc="compare", leave=False, delay=1)
    marks: dict[str, str | Rejected] = {}
    for sample, mark in zip(missing, bar, strict=True):
        marks[sample.record.key] = mark
        if not isinstance(mark, Rejected):
            remember_digest(memory, stamp(sample.record.picture), mark)
    rejected = [mark for mark in marks.values() if isinstance(mark, Rejected)]
    gone = {rejection.key for rejection in rejected}
    known = {key: mark for key, mark in marks.items() if not isinstance(mark, Rejected)}
    return [
        replace(sample, picture=known.get(sample.record.key, sample.picture))
        for sample in planned
        if sample.record.key not in gone
    ], rejected


def _has_changed(sample: PlannedSample, before: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the image or the mask of a sample in the cache is another one now."""
    marks = before.get(sample.record.key)
    return marks is not None and (
        sample.picture != marks[0] or bool(sample.mask and sample.mask != marks[1])
    )


def remember_encoded(
    planned: Iterable[PlannedSample], marks: dict[str, str], dataset: Path, memory: Memory
) -> None:
    """Note the marks of images that were hashed when they were encoded; ``marks`` is by key."""
    stamp = _stamper(dataset)
    for sample in planned:
        if not sample.picture and (mark := marks.get(sample.record.key)):
            remember_digest(memory, stamp(sample.record.picture), mark)


def remember_digest(memory: Memory, stamp: tuple[str, int, int], mark: str) -> None:
    header = memory.find(*stamp) or (memory.seen.get(stamp[0]) or [None] * 3)[2]
    if header is not None and len(header) == 3:
        memory.keep(*stamp, [mark, *header[1:]])


def _headers(
    records: list[SourceImage], memory: Memory, stamp: Callable[[Blob], tuple[str, int, int]]
) -> list[Header | Rejected]:
    """Of each record the header; those not remembered are read by threads."""
    headers: list[Any] = [memory.find(*stamp(record.picture)) for record in records]
    missing = [number for number, header in enumerate(headers) if header is None]
    threads = num_cores()
    reading = read_ahead(_read_header, (records[n] for n in missing), threads, 4 * threads)
    bar = tqdm(reading, total=len(missing), unit="img", desc="read headers", leave=False, delay=1)
    for number, header in zip(missing, bar, strict=True):
        headers[number] = header
        if not isinstance(header, Rejected) and len(header) == 3:  # another Pillow may know it
            memory.keep(*stamp(records[number].picture), header)
    return headers


def _check_size(width: int, height: int, smallest: int) -> None:
    if min(width, height) < smallest:
        raise ValueError(
            f"{width} x {height} pixels: its shorter side has fewer than --min-size {smallest}"
        )


def _mask_mark(
    record: SourceImage,
    original: Size,
    memory: Memory,
    stamp: Callable[[Blob, str], tuple[str, int, int]],
) -> str:
    """The mark of the mask's bytes; empty of an image that has none beside it.

    Raises:
        ValueError: it cannot be read, or cannot be of this image.
    """
    mask = record.mask
    if mask is None:
        return ""

    def read() -> Header:
        try:
            data = mask.read()
        except ValueError as error:  # it changed
            raise PictureError(str(error)) from None
        return [picture_mark(hashlib.sha256(data).hexdigest()), *picture_size(data)]

    try:
        digest, width, height = memory.recall(*stamp(mask, "mask"), read)
        check_mask_size((width, height), original)
    except Exception as error:  # Pillow raises anything of a bad file
        raise ValueError(f"its mask: {explain(error)}") from None
    return str(digest)


def _stamper(dataset: Path) -> Callable[..., tuple[str, int, int]]:
    """What a file is remembered by: its path inside the dataset, size and time."""
    root = f"{dataset}/"

    def stamp(blob: Blob, role: str = "picture") -> tuple[str, int, int]:
        inside = str(blob.file).removeprefix(root)
        return f"{role} {inside}:{blob.offset}", blob.size, blob.mtime_ns

    return stamp


def _digest(sample: PlannedSample, before: Mapping[str, Sequence[Any]]) -> str | Rejected:
    record = sample.record
    data = _read(record)
    if isinstance(data, Rejected):
        return data
    mark = picture_mark(hashlib.sha256(data).hexdigest())
    if _has_changed(replace(sample, picture=mark), before):
        try:
            open_picture(data)
        except Exception as error:  # Pillow raises anything of a bad file
            return Rejected(record.path, explain(error))
        try:
            if record.mask is not None:
                open_picture(record.mask.read())
        except Exception as error:
            return Rejected(record.path, f"its mask: {explain(error)}")
    return mark


def _read(record: SourceImage, head: bool = False) -> Any:
    """A file that cannot be read now is no property of the image, and not remembered."""
    try:
        return _head(record.picture) if head else record.picture.read()
    except OSError as error:
        return Rejected(record.path, explain(error))
    except ValueError as error:  # it changed
        return Rejected(record.path, str(error))


def _read_header(record: SourceImage) -> Header | Rejected:
    head = _read(record, head=True)
    if isinstance(head, bytes):
        try:
            return ["", *picture_size(head)]
        except Exception:  # the first bytes do not tell: all of them will
            pass
    elif isinstance(head, Rejected):
        return head
    data = _read(record)
    if isinstance(data, Rejected):
        return data
    mark = picture_mark(hashlib.sha256(data).hexdigest())
    try:
        return [mark, *picture_size(data)]
    except Exception as error:  # Pillow raises anything of a bad file
        return [mark, explain(error)]


def _head(blob: Blob) -> bytes | None:
    """The first bytes, where these tell the size and orientation of the whole; else None.

    They do in a JPEG, whose marks come before its data. A PNG may have EXIF behind its data: its
    chunks are walked to see that there is none. In other formats anything may come last.
    """
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
        for _ in range(MOST_CHUNKS):
            if place + 8 > blob.size:
                return head if kinds <= {b"IDAT", b"IEND"} else None
            file.seek(blob.offset + place)
            chunk = file.read(8)
            if chunk[4:] == b"IDAT":
                kinds.clear()  # what stands before is in the head, or makes that fail
            kinds.add(chunk[4:])
            place += 12 + int.from_bytes(chunk[:4])
    return None


def _shaper(settings: EncodeSettings) -> Callable[[Size], Geometry]:
    """What becomes of an image of some size."""
    resolution = settings.resolution
    square = settings.square or settings.squash
    buckets = [] if square else bucket_sizes(resolution, settings.bucket_step)
    fit = stretch if settings.squash else cover

    @lru_cache(maxsize=65536)
    def shape(size: Size) -> Geometry:
        return fit(size, (resolution, resolution) if square else nearest_bucket(size, buckets))

    return shape
