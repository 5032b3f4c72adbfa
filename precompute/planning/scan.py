"""Headers of the pictures: what each is and becomes; and what is remembered of them.

``scan.json`` in the cache's folder remembers sizes, times and digests of the data set's files, so
that one that did not change is not opened again. It is of this machine, and no part of the cache:
if it is lost or damaged, the files are read again.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from precompute.dataset.records import Blob, Memory, Record, Rejected
from precompute.pictures.images import picture_size
from precompute.pictures.masks import check_mask_size
from precompute.pictures.refusals import PictureError, explain
from precompute.pictures.variants import plan_variants
from precompute.planning.placement import Planned
from precompute.settings import EncodeSettings
from precompute.threads import num_cores
from runtime.files import PARTIAL
from shards.buckets import Geometry, Size, bucket_sizes, cover, nearest_bucket, stretch
from shards.manifest import SCAN
from shards.reader import read_ahead

VERSION = 1  # of what is remembered, and of how a header is read

# What a picture's bytes are: their sha256, then its width and height, or why it is none.
Header = list[Any]


def read_memory(folder: Path, data_set: Path) -> Memory:
    """What the last scan for this cache found; nothing if that cannot be read, or was of another
    data set: there, a file of this name, size and time may hold something else."""
    try:
        held = json.loads((folder / SCAN).read_bytes())
        is_ours = (held["version"], held["data_set"]) == (VERSION, str(data_set.resolve()))
        return Memory(known=dict(held["files"])) if is_ours else Memory()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Memory()


def write_memory(folder: Path, data_set: Path, memory: Memory) -> None:
    """Keep what was seen; where that cannot be written, the next run is slower."""
    if memory.seen == memory.known:
        return
    partial = folder / (SCAN + PARTIAL)
    try:
        held = {"version": VERSION, "data_set": str(data_set.resolve()), "files": memory.seen}
        partial.write_text(json.dumps(held))
        os.replace(partial, folder / SCAN)
    except OSError:
        return


def plan_pictures(
    records: list[Record], settings: EncodeSettings, memory: Memory | None = None
) -> tuple[list[Planned], list[Rejected]]:
    """What each picture becomes, from its header; of one that is remembered nothing is read."""
    memory = memory or Memory()
    shape = _shaper(settings)
    planned: list[Planned] = []
    rejected: list[Rejected] = []
    for record, header in zip(records, _headers(records, memory), strict=True):
        try:
            if isinstance(header, Rejected) or len(header) == 2:
                reason = header.reason if isinstance(header, Rejected) else header[1]
                rejected.append(Rejected(record.path, reason))
            else:
                digest, width, height = header
                _check_size(width, height, settings.min_size)
                variants = plan_variants(shape((width, height)), settings, record.key)
                mask = _mask_digest(record, (width, height), memory)
                planned.append(Planned(record, digest, variants, mask))
        except ValueError as error:
            rejected.append(Rejected(record.path, str(error)))
    return planned, rejected


def _headers(records: list[Record], memory: Memory) -> list[Header | Rejected]:
    """Of each record the header; those not remembered are read by threads."""
    found: list[Any] = [memory.find(*_stamp(record.picture)) for record in records]
    missing = [number for number, header in enumerate(found) if header is None]
    threads = num_cores()
    reading = read_ahead(_read_header, (records[n] for n in missing), threads, 4 * threads)
    bar = tqdm(reading, total=len(missing), unit="img", desc="read headers", leave=False, delay=1)
    for number, header in zip(missing, bar, strict=True):
        found[number] = header
        if not isinstance(header, Rejected) and len(header) == 3:  # another Pillow may know it
            memory.keep(*_stamp(records[number].picture), header)
    return found


def _check_size(width: int, height: int, smallest: int) -> None:
    if min(width, height) < smallest:
        raise ValueError(
            f"{width} x {height} pixels: its shorter side has fewer than --min-size {smallest}"
        )


def _mask_digest(record: Record, original: Size, memory: Memory) -> str:
    """sha256 of the mask's bytes; empty of a picture that has none beside it.

    Raises:
        ValueError: it cannot be read, or cannot be of this picture.
    """
    mask = record.mask
    if mask is None:
        return ""

    def read() -> Header:
        try:
            data = mask.read()
        except ValueError as error:  # it changed
            raise PictureError(str(error)) from None
        return [hashlib.sha256(data).hexdigest(), *picture_size(data)]

    try:
        digest, width, height = memory.recall(*_stamp(mask, "mask"), read)
        check_mask_size((width, height), original)
    except Exception as error:  # Pillow raises anything of a bad file
        raise ValueError(f"its mask: {explain(error)}") from None
    return str(digest)


def _stamp(blob: Blob, what: str = "picture") -> tuple[str, int, int]:
    return f"{what} {blob.file}:{blob.offset}", blob.size, blob.mtime_ns


def _read_header(record: Record) -> Header | Rejected:
    """A file that cannot be read now is no property of the picture, and not remembered."""
    try:
        data = record.picture.read()
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return Rejected(record.path, explain(error))
    except ValueError as error:  # it changed
        return Rejected(record.path, str(error))
    digest = hashlib.sha256(data).hexdigest()
    try:
        return [digest, *picture_size(data)]
    except Exception as error:  # Pillow raises anything of a bad file
        return [digest, explain(error)]


def _shaper(settings: EncodeSettings) -> Callable[[Size], Geometry]:
    """What becomes of a picture of some size."""
    resolution = settings.resolution
    square = settings.square or settings.squash
    buckets = [] if square else bucket_sizes(resolution, settings.bucket_step)
    fit = stretch if settings.squash else cover

    @lru_cache(maxsize=65536)
    def shape(size: Size) -> Geometry:
        return fit(size, (resolution, resolution) if square else nearest_bucket(size, buckets))

    return shape
