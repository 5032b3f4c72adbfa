"""Encodes for the tests: what they encode is counted, and caches are compared sample by sample."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import precompute.encode
import precompute.sanity
from precompute.encoders import LatentEncoder
from precompute.report import Report
from precompute.settings import EncodeSettings
from sdxl.text_encoders import TextEncoders
from shards.index import Index
from shards.manifest import SCAN, read_manifest
from shards.reader import Shard
from shards.verify import verify

LONG_AGO = 1_000_000_000  # seconds: a time of change that is remembered at once


@dataclass
class Count:
    images: int = 0
    captions: int = 0

    def __eq__(self, other: object) -> bool:
        return (self.images, self.captions) == other


@contextmanager
def counted() -> Iterator[Count]:
    """What the encoders are given from here on; not the empty prompt of every cache, nor the
    built-in drawings."""
    count, measure = Count(), precompute.sanity.measure_drawings
    latents, text = LatentEncoder.start, TextEncoders.start

    def start_latents(self: LatentEncoder, images: Any) -> Any:
        count.images += len(images)
        return latents(self, images)

    def start_text(self: TextEncoders, prompts: list[str], *more: Any) -> Any:
        count.captions += 0 if prompts == [""] else len(prompts)
        return text(self, prompts, *more)

    def measure_drawings(encoder: LatentEncoder) -> Any:
        before = count.images
        result = measure(encoder)
        count.images = before
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute.sanity, "measure_drawings", measure_drawings)
        patch.setattr(LatentEncoder, "start", start_latents)
        patch.setattr(TextEncoders, "start", start_text)
        yield count


def settings_of(data: Path, base: Path, out: Path, **settings: Any) -> EncodeSettings:
    defaults: dict[str, Any] = {
        "resolution": 64,
        "bucket_step": 16,
        "batch_size": 4,
        "threads": 1,
        "shard_size": 3,
        "device": "cpu",
    }
    return EncodeSettings(dataset=data, base=str(base), out=out, **{**defaults, **settings})


def encode(data: Path, base: Path, out: Path, **settings: Any) -> Report:
    (report,) = precompute.encode.encode(settings_of(data, base, out, **settings))
    return report


def copy_old(source: Path, target: Path) -> Path:
    """A copy of a dataset, none of whose files was changed of late."""
    shutil.copytree(source, target)
    make_old(target)
    return target


def make_old(folder: Path, seconds: int = LONG_AGO) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a cache; not what this machine remembers of its dataset."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != SCAN)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files there are, and when they were written."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """The tar members of each sample, by its path in the dataset, every byte checked."""
    results = {}
    for path in sorted(folder.glob("*.index")):
        shard = Shard(folder, path.stem, Index(path).sha256)
        for row in range(len(shard.index)):
            results[shard.metadata(row)["path"]] = shard.members(row)
    return results


def shards_of(folder: Path) -> dict[str, set[str]]:
    """The paths in each shard."""
    results = {}
    for path in sorted(folder.glob("*.index")):
        shard = Shard(folder, path.stem, Index(path).sha256)
        results[path.stem] = {shard.metadata(row)["path"] for row in range(len(shard.index))}
    return results


def again(work: Path, base: Path, **settings: Any) -> Report:
    """A rerun in what the fixture ``work`` gave."""
    return encode(work / "data", base, work / "cache", **settings)


def assert_as_fresh(work: Path, base: Path, **settings: Any) -> None:
    """The same samples as a fresh encode's; and once repacked, the same cache."""
    fresh = work / "fresh"
    encode(work / "data", base, fresh, **settings)
    assert samples_of(work / "cache") == samples_of(fresh)
    assert [fault for result in verify(fresh, read_manifest(fresh)) for fault in result] == []
    with counted() as count:
        again(work, base, repack=True, **settings)
    assert count == (0, 0)
    assert contents(work / "cache") == contents(fresh)
