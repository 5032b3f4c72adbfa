"""Which shard each image goes to. Membership is fixed before any image is decoded: one that
fails later leaves a hole, and moves nothing.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from precompute.dataset.records import SourceImage
from shards.buckets import Geometry, Size
from shards.writer import shard_name

MARK_DIGITS = 20  # of a sha256 in hex, as a key has
MARKS = ("picture", "mask", "geometry", "captions", "weight")
CHANGING = ["", "", "", "", 0.0]  # marks that fit no image: it is tried again the next time


@dataclass(frozen=True, eq=False, slots=True)
class PlannedSample:
    """An image with its place: what it was when its header was read, and what it becomes.

    ``picture`` and ``mask`` are marks of their bytes; that of an image is empty while its bytes
    were not asked for: then it is hashed when it is encoded.
    """

    record: SourceImage
    picture: str
    variants: tuple[Geometry, ...]  # all of one bucket
    mask: str = ""

    @property
    def bucket(self) -> Size:
        return self.variants[0].target

    @property
    def marks(self) -> list[Any]:
        """What its halves are made from, in the order of MARKS: JSON, kept in the index."""
        return [
            self.picture,
            self.mask,
            geometry_mark(self.variants),
            _mark(self.record.captions),
            self.record.weight,
        ]


def picture_mark(sha256: str) -> str:
    """What stands for a digest (in hex) of an image's or a mask's bytes."""
    return sha256[:MARK_DIGITS]


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:MARK_DIGITS]


@lru_cache(maxsize=4096)
def geometry_mark(variants: tuple[Geometry, ...]) -> str:
    """What stands for the sizes and crops of an image's variants."""
    return _mark([astuple(geometry) for geometry in variants])


@dataclass(frozen=True, eq=False, slots=True)
class ShardPlan:
    name: str
    bucket: Size
    repeats: int
    members: tuple[PlannedSample, ...]  # in key order


@dataclass(frozen=True, slots=True)
class Placement:
    """A shard of an earlier placement: what it holds, or was to hold, holes included."""

    bucket: Size
    repeats: int
    keys: tuple[str, ...]  # in order

    @property
    def group(self) -> tuple[Size, int]:
        return self.bucket, self.repeats


def place(
    planned: list[PlannedSample], before: Mapping[str, Placement], shard_size: int
) -> list[ShardPlan]:
    """The shards of one bucket and one number of repeats each; by name.

    Who was in a shard of its group stays there. The others, in key order, first fill the last shard
    of their group, if that has room, then new shards, with the lowest numbers of their bucket that
    are free. With nothing before, it is what a fresh encode makes.
    """
    by_key = {member.record.key: member for member in planned}
    kept: dict[str, list[PlannedSample]] = {}
    last: dict[tuple[Size, int], str] = {}  # of each group that keeps any shard
    for name, was in sorted(before.items()):
        here = [by_key.get(key) for key in was.keys]
        stay = [member for member in here if member is not None and _group(member) == was.group]
        for member in stay:
            del by_key[member.record.key]
        if stay:
            kept[name] = stay
            last[was.group] = name
    groups: dict[tuple[Size, int], list[PlannedSample]] = defaultdict(list)
    for key in sorted(by_key):
        groups[_group(by_key[key])].append(by_key[key])
    numbers: dict[Size, Iterator[int]] = defaultdict(count)
    shards = []
    for (bucket, repeats), members in sorted(groups.items()):
        if name := last.get((bucket, repeats), ""):
            room = max(0, shard_size - len(kept[name]))
            kept[name] += members[:room]
            members = members[room:]
        free = (shard_name(bucket, number) for number in numbers[bucket])
        for start in range(0, len(members), shard_size):
            name = next(name for name in free if name not in before)
            part = tuple(members[start : start + shard_size])
            shards.append(ShardPlan(name, bucket, repeats, part))
    for name, stay in kept.items():
        in_order = tuple(sorted(stay, key=lambda member: member.record.key))
        shards.append(ShardPlan(name, *before[name].group, in_order))
    return sorted(shards, key=lambda shard: shard.name)


def _group(planned: PlannedSample) -> tuple[Size, int]:
    return planned.bucket, planned.record.repeats
