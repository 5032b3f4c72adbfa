"""Compares the stored latents of a few images with those that the VAE gives for their files.

Which images are taken, and what is measured, follows from the cache's contents alone, whoever
encoded it and in however many runs.
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
from precompute.sanity import alarms_of_drawings, alarms_of_image, measure_image
from runtime.files import content_digest
from shards.format import CacheError
from shards.index import Index
from shards.manifest import read_manifest
from shards.reader import Shard

NUM_CHECKED = 3  # images
NUM_CANDIDATES = 16  # some may have been rejected, or cannot be compared


@dataclass(frozen=True, eq=False)
class Candidate:
    """An image that may be checked, and the shard it is in."""

    shard: str
    planned: PlannedSample

    @property
    def key(self) -> str:
        return self.planned.record.key


def choose_candidates(shards: Iterable[ShardPlan]) -> list[Candidate]:
    """The images of a cache that may be checked: the first ones in key order."""
    members = (Candidate(shard.name, member) for shard in shards for member in shard.members)
    return heapq.nsmallest(NUM_CANDIDATES, members, key=lambda candidate: candidate.key)


def earlier_checks(folder: Path) -> dict[str, Any]:
    """The checks that the manifest of a finished cache records; empty where there is none."""
    try:
        return dict(read_manifest(folder).get("sanity", {}))
    except CacheError:
        return {}


def check_cache(
    folder: Path,
    recipe: dict[str, Any],
    candidates: list[Candidate],
    fingerprints: dict[str, list[Any]],
    before: dict[str, Any],
    encoders: Encoders,
) -> dict[str, Any]:
    """The manifest's ``sanity`` entry; warns of measures out of bounds.

    ``fingerprints`` are by key. ``before`` is the entry of an earlier run: it is kept, and the VAE
    is not loaded, if it is of the same images and was made in the same way.
    """
    parts = [recipe[name] for name in ("preprocessing", "vae", "storage")]
    digest = content_digest(
        [*parts, *([candidate.key, *fingerprints[candidate.key][:3]] for candidate in candidates)]
    )
    if before.get("of") != digest:
        measured = (_check_image(folder, candidate, encoders) for candidate in candidates)
        images = [*islice((image for image in measured if image is not None), NUM_CHECKED)]
        before = {"of": digest, "drawings": encoders.drawings, "pictures": images}
    warn_of_drawings(before["drawings"])
    _warn(line for image in before["pictures"] for line in alarms_of_image(image))
    return before


def warn_of_drawings(measures: dict[str, Any]) -> None:
    _warn(alarms_of_drawings(measures))


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        warnings.warn(f"DO NOT TRAIN ON THIS CACHE: {line}", stacklevel=1)


def _check_image(folder: Path, candidate: Candidate, encoders: Encoders) -> dict[str, Any] | None:
    """Measure one image; None where it was rejected, or is of a kind that cannot be compared."""
    record = candidate.planned.record
    index = Index(folder / f"{candidate.shard}.index")
    row = int(np.searchsorted(index.records["key"], record.key.encode()))
    if row == len(index) or index.key(row) != record.key:
        return None
    if index.records["num_variants"][row] != len(candidate.planned.variants):
        return None  # which of them were dropped is not known here
    try:
        data = record.image.read()
    except (OSError, ValueError):  # gone or changed since
        return None
    stored = torch.empty(index.layout.latent)
    Shard(folder, candidate.shard, index.sha256).read_into(stored, row, "latents.mean")
    geometry = candidate.planned.variants[0]
    return measure_image(encoders.latents, record.path, data, geometry, stored)
