"""Compares what a finished cache stores of a few images with what the VAE gives of their files.

Which images those are, and what is measured, follows from what the cache holds alone: not from
who encoded it, nor in how many runs.
"""

import heapq
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from precompute.encoders import Encoders
from precompute.plan.placement import PlannedSample, ShardPlan
from precompute.sanity import alarms_of_drawings, alarms_of_picture, measure_picture
from runtime.files import content_digest
from shards.format import CacheError
from shards.index import Index
from shards.manifest import read_manifest
from shards.reader import Shard

NUM_PICTURES = 3
NUM_CANDIDATES = 16  # some may have been rejected, or are of a kind that cannot be compared


@dataclass(frozen=True, eq=False)
class Candidate:
    """An image that may be checked, and the shard it is in."""

    shard: str
    planned: PlannedSample

    @property
    def key(self) -> str:
        return self.planned.record.key


def first_pictures(shards: Iterable[ShardPlan]) -> list[Candidate]:
    """The candidates of a cache, in key order."""
    members = (Candidate(shard.name, member) for shard in shards for member in shard.members)
    return heapq.nsmallest(NUM_CANDIDATES, members, key=lambda candidate: candidate.key)


def earlier_checks(folder: Path) -> dict[str, Any]:
    """What the manifest of a finished cache says of them."""
    try:
        return dict(read_manifest(folder).get("sanity", {}))
    except CacheError:
        return {}


def check_cache(
    folder: Path,
    recipe: dict[str, Any],
    candidates: list[Candidate],
    marks: dict[str, list[Any]],
    before: dict[str, Any],
    encoders: Encoders,
) -> dict[str, Any]:
    """``sanity`` of the manifest; warns of what is off.

    ``marks`` of each sample by key are what it was made from. The VAE is loaded if ``before`` is of
    other images, or made in another way.
    """
    parts = [recipe[name] for name in ("preprocessing", "vae", "storage")]
    digest = content_digest(
        [*parts, *([candidate.key, *marks[candidate.key][:3]] for candidate in candidates)]
    )
    if before.get("of") != digest:
        measured = (_check_picture(folder, candidate, encoders) for candidate in candidates)
        images = [*islice((image for image in measured if image is not None), NUM_PICTURES)]
        before = {"of": digest, "drawings": encoders.drawings, "pictures": images}
    warn_of_drawings(before["drawings"])
    _warn(line for image in before["pictures"] for line in alarms_of_picture(image))
    return before


def warn_of_drawings(measures: dict[str, Any]) -> None:
    _warn(alarms_of_drawings(measures))


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(f"DO NOT TRAIN ON THIS CACHE: {line}", stacklevel=1)


def _check_picture(folder: Path, candidate: Candidate, encoders: Encoders) -> dict[str, Any] | None:
    """None where it was rejected, or is of a kind that cannot be compared."""
    record = candidate.planned.record
    index = Index(folder / f"{candidate.shard}.index")
    row = int(np.searchsorted(index.records["key"], record.key.encode()))
    if row == len(index) or index.key(row) != record.key:
        return None
    if index.records["num_variants"][row] != len(candidate.planned.variants):
        return None  # which of them were dropped is not known here
    try:
        data = record.picture.read()
    except (OSError, ValueError):  # gone or changed since
        return None
    stored = torch.empty(index.layout.latent)
    Shard(folder, candidate.shard, index.sha256).read_into(stored, row, "latents.mean")
    geometry = candidate.planned.variants[0]
    return measure_picture(encoders.latents, record.path, data, geometry, stored)
