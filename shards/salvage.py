"""The whole samples of a damaged shard, written into a new shard of the same name.

A sample is whole if each of its parts has the digest that the index names, whatever happened to
the tar around it. What is not stays among the shard's members, as one that failed for now: the
next encode makes it again, in its old place.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from runtime.files import writing
from shards import CacheError
from shards.index import Index
from shards.sample import sample_key
from shards.verify import read_part
from shards.writer import Members, write_members

OF_THE_WRITER = ("shard", "count", "tar_bytes", "tar_sha256", "dtype", "latent", "prompt", "pooled")
PATH = re.compile(rb'"path": ("(?:[^"\\]|\\.)*")')
# Of samples that have their digests, and are not what shardtune writes.
FORGED = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(RecursionError, OverflowError, struct.error, AssertionError),
)
AS_IT_WAS = "This shard is as it was; the same encode makes what was dropped of others."
REASON = "damaged in the cache, and dropped by verify --repair"


@dataclass(frozen=True)
class Salvage:
    """What was saved of a shard."""

    num_kept: int
    num_dropped: int
    is_as_before: bool  # the new index is the old one, byte for byte


def salvage(folder: Path, name: str, index_sha256: str, into: Path) -> Salvage | None:
    """Write ``name.tar`` and ``name.index`` in ``into``; None where nothing can be saved.

    Without its own index there are no digests to tell what is whole.

    Raises:
        OSError: the new shard cannot be written.
    """
    try:
        index = Index(folder / f"{name}.index")
        file = open(folder / f"{name}.tar", "rb")  # noqa: SIM115
    except (CacheError, OSError):
        return None
    with file:
        if index.sha256 != index_sha256 or not isinstance(index.header.get("members"), list):
            return None
        about = {key: v for key, v in index.header.items() if key not in OF_THE_WRITER}
        kept = _Kept(file, index, about)
        try:
            with writing(
                into / f"{name}.tar",
                AS_IT_WAS,
            ):
                write_members(into, name, kept.samples(), index.layout, about)
        except FORGED:
            return None
    if not kept.num_kept:
        return None
    is_as_before = Index(into / f"{name}.index").sha256 == index.sha256
    return Salvage(kept.num_kept, len(index) - kept.num_kept, is_as_before)


class _Kept:
    """The whole samples of a shard; when all are drawn, ``about`` tells of them alone."""

    def __init__(self, file: BinaryIO, index: Index, about: dict[str, Any]) -> None:
        self.file, self.index, self.about = file, index, about
        self.num_kept = 0

    def samples(self) -> Iterator[tuple[str, float, Members]]:
        dropped: dict[str, str | None] = {}  # key to path, None where that cannot be read any more
        sums: dict[str, Any] = {}
        num_cut = 0
        for row in range(len(self.index)):
            record = self.index.record(row)
            members = _read_members(self.file, self.index, row)
            key = record.key.decode()
            if not _is_whole(members, self.index, row):
                dropped[key] = _find_path(members["json"], key)
                continue
            self.num_kept += 1
            notes = json.loads(members["json"])["notes"]
            for name, matrix in notes["latents"]["sums"].items():
                sums[name] = sums.get(name, 0.0) + np.array(matrix)
            num_cut += notes["text"]["num_cut_captions"]
            yield key, record.weight, members
        if dropped:
            totals = {name: matrix.tolist() for name, matrix in sums.items()}
            self.about.update(_without(self.about, dropped), sums=totals, num_cut_captions=num_cut)


def _without(about: dict[str, Any], dropped: dict[str, str | None]) -> dict[str, Any]:
    """The lists of members without the samples that were dropped.

    One whose path is known stays a member, with marks that fit nothing, and counts as rejected.
    """
    members = []
    for key, *marks in about["members"]:
        if dropped.get(key) is not None:
            marks = [type(mark)() for mark in marks]
        if key not in dropped or dropped[key] is not None:
            members.append([key, *marks])
    rejected = [[path, REASON] for path in dropped.values() if path is not None]
    paths = {path for path, _ in rejected}
    lists: dict[str, Any] = {
        "members": members,
        "rejected": sorted(about["rejected"] + rejected, key=lambda one: sample_key(one[0])),
    }
    if "dropped_variants" in about:
        kept = [one for one in about["dropped_variants"] if one[0] not in paths]
        lists["dropped_variants"] = kept
    return lists


def _read_members(file: BinaryIO, index: Index, row: int) -> Members:
    """As they lie in the tar; short where it ends before, or the disk fails."""
    record = index.record(row)
    places = {
        "json": (record.json_offset, record.json_size),
        "safetensors": (record.offset, record.size),
    }
    found = {}
    for end, (offset, size) in places.items():
        try:
            found[end] = read_part(file, offset, size)
        except OSError:
            found[end] = b""
    return found


def _is_whole(members: Members, index: Index, row: int) -> bool:
    record = index.record(row)
    if len(members["safetensors"]) != record.size:
        return False
    for part, digest in index.parts(row):
        data, start = members["safetensors"], part.offset - record.offset
        if part.what == "json":
            data, start = members["json"], 0
        if xxhash.xxh3_64_intdigest(memoryview(data)[start : start + part.size]) != digest:
            return False
    return True


def _find_path(text: bytes, key: str) -> str | None:
    """The path in a sample's JSON, which may be damaged: the right one has this key."""
    for match in PATH.finditer(text):
        try:
            path = json.loads(match[1])
        except ValueError:
            continue
        if sample_key(path) == key:
            return str(path)
    return None
