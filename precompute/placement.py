"""Where each picture goes: its bucket, from its header alone, and its shard.

Membership is fixed before any picture is decoded: one that fails later leaves a hole, and moves
nothing.
"""

import hashlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

from precompute.images import picture_size
from precompute.records import Record, Rejected
from precompute.settings import EncodeSettings
from shards.buckets import Geometry, Size, bucket_sizes, cover, nearest_bucket, stretch
from shards.manifest import content_digest
from shards.reader import read_ahead
from shards.writer import shard_name


@dataclass(frozen=True, eq=False)
class Planned:
    """A picture with its place: what it was when its header was read, and what it becomes."""

    record: Record
    digest: str  # sha256 of the picture's bytes
    geometry: Geometry

    @property
    def digests(self) -> dict[str, str]:
        captions = content_digest(list(self.record.captions))
        return {"picture": self.digest, "captions": captions}

    @property
    def mark(self) -> list[str]:
        return [self.record.key, self.record.path, *self.digests.values()]


@dataclass(frozen=True, eq=False)
class PlannedShard:
    name: str
    bucket: Size
    members: tuple[Planned, ...]

    @property
    def digest(self) -> str:
        """Changes when a member joins, leaves, or changes its picture or captions."""
        return content_digest([planned.mark for planned in self.members])


def plan_pictures(
    records: list[Record], settings: EncodeSettings
) -> tuple[list[Planned], list[Rejected]]:
    """Where each picture goes, from its header; membership is fixed before any is decoded."""
    resolution = settings.resolution
    square = settings.square or settings.squash
    buckets = [] if square else bucket_sizes(resolution, settings.bucket_step)
    fit = stretch if settings.squash else cover

    def plan_one(record: Record) -> Planned | Rejected:
        try:
            data = record.picture.read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, ValueError) as error:
            return Rejected(record.path, describe(error))
        try:
            size = picture_size(data)
            target = (resolution, resolution) if square else nearest_bucket(size, buckets)
            return Planned(record, hashlib.sha256(data).hexdigest(), fit(size, target))
        except Exception as error:  # Pillow raises anything of a bad file
            return Rejected(record.path, describe(error))

    threads = torch.get_num_threads()
    reading = read_ahead(plan_one, records, threads, ahead=4 * threads)
    found = [*tqdm(reading, total=len(records), unit="img", desc="read headers", leave=False)]
    return (
        [item for item in found if isinstance(item, Planned)],
        [item for item in found if isinstance(item, Rejected)],
    )


def describe(error: Exception) -> str:
    """One line that says why a picture was not taken."""
    text = " ".join(str(error).split())
    if "cannot identify image file" in text:
        return "not a picture that Pillow can read"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place(planned: list[Planned], shard_size: int) -> list[PlannedShard]:
    """Shards of one bucket each, members in key order."""
    by_bucket: dict[Size, list[Planned]] = {}
    for one in sorted(planned, key=lambda one: one.record.key):
        by_bucket.setdefault(one.geometry.target, []).append(one)
    return [
        PlannedShard(shard_name(bucket, number), bucket, tuple(members[start : start + shard_size]))
        for bucket, members in sorted(by_bucket.items())
        for number, start in enumerate(range(0, len(members), shard_size))
    ]
