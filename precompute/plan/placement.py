"""Assigns each image to a shard.

The assignment is fixed before any image is decoded: an image that fails later leaves a gap in its
shard and moves no other.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from precompute.dataset.records import DIGEST_DIGITS, ImportedFile, SourceImage
from shards.buckets import Geometry, Size
from shards.writer import shard_name

FINGERPRINT_FIELDS = ("picture", "mask", "geometry", "captions", "weight")
UNMATCHED = ["", "", "", "", 0.0]  # a fingerprint that no image has, so it is tried again next time


@dataclass(frozen=True, eq=False, slots=True)
class PlannedSample:
    """An image that is to be encoded, with the variants (crops, mirrored or not) made of it.

    The digests are short sha256 of the files' bytes. The image's is empty until its bytes are
    read, at the latest when it is encoded; the mask's is empty where there is no mask. Latents or
    text that are imported are not encoded.
    """

    record: SourceImage
    image_digest: str
    variants: tuple[Geometry, ...]  # all of one bucket
    mask_digest: str = ""
    latents_file: ImportedFile | None = None
    text_file: ImportedFile | None = None

    @property
    def bucket(self) -> Size:
        return self.variants[0].target

    @property
    def _captions(self) -> tuple[Any, ...]:
        record = self.record
        return (record.captions, record.roles) if record.roles else record.captions

    @property
    def fingerprint(self) -> list[Any]:
        """What its latents and embeddings depend on, in the order of FINGERPRINT_FIELDS. It is JSON
        and is kept in the index, so that a later run sees what changed."""
        return [
            self.image_digest,
            self.mask_digest,
            _with_file(geometry_digest(self.variants), self.latents_file),
            _with_file(_json_digest(self._captions), self.text_file),
            self.record.weight,
        ]


IMPORTED = "imported "  # how the part of a fingerprint begins that depends on an imported file


def _with_file(digest: str, file: ImportedFile | None) -> str:
    if file is None:
        return digest
    return IMPORTED + _json_digest([digest, file.digest, file.suffix])


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGEST_DIGITS]


@lru_cache(maxsize=4096)
def geometry_digest(variants: tuple[Geometry, ...]) -> str:
    """A short digest of the sizes and crops of an image's variants."""
    return _json_digest([astuple(geometry) for geometry in variants])


@dataclass(frozen=True, eq=False, slots=True)
class ShardPlan:
    name: str
    bucket: Size
    repeats: int
    members: tuple[PlannedSample, ...]  # in key order


@dataclass(frozen=True, slots=True)
class Placement:
    """The keys that an earlier run assigned to a shard, those of failed samples included."""

    bucket: Size
    repeats: int
    keys: tuple[str, ...]  # in order

    @property
    def group(self) -> tuple[Size, int]:
        return self.bucket, self.repeats


def assign_shards(
    planned: list[PlannedSample], before: Mapping[str, Placement], shard_size: int
) -> list[ShardPlan]:
    """Assign all samples to shards of one bucket and one number of repeats each, sorted by name.

    A sample that is in a shard of its own group stays there. The others, in key order, fill up the
    last shard of their group, then new shards, which take the lowest free numbers of their bucket.
    With an empty ``before`` this is what a fresh encode makes.
    """
    by_key = {member.record.key: member for member in planned}
    kept: dict[str, list[PlannedSample]] = {}
    last: dict[tuple[Size, int], str] = {}  # of each group that keeps any shard
    for name, previous in sorted(before.items()):
        samples = [by_key.get(key) for key in previous.keys]
        stay = [
            member for member in samples if member is not None and _group(member) == previous.group
        ]
        for member in stay:
            del by_key[member.record.key]
        if stay:
            kept[name] = stay
            last[previous.group] = name
    groups: dict[tuple[Size, int], list[PlannedSample]] = defaultdict(list)
    for key in sorted(by_key):
        groups[_group(by_key[key])].append(by_key[key])
    numbers: dict[Size, Iterator[int]] = defaultdict(count)
    shards = []
    for (bucket, repeats), members in sorted(groups.items()):
        if name := last.get((bucket, repeats), ""):
            num_free = max(0, shard_size - len(kept[name]))
            kept[name] += members[:num_free]
            members = members[num_free:]
        names = (shard_name(bucket, number) for number in numbers[bucket])
        for start in range(0, len(members), shard_size):
            name = next(name for name in names if name not in before)
            part = tuple(members[start : start + shard_size])
            shards.append(ShardPlan(name, bucket, repeats, part))
    for name, stay in kept.items():
        in_order = tuple(sorted(stay, key=lambda member: member.record.key))
        shards.append(ShardPlan(name, *before[name].group, in_order))
    return sorted(shards, key=lambda shard: shard.name)


def _group(planned: PlannedSample) -> tuple[Size, int]:
    return planned.bucket, planned.record.repeats
