"""Describes a cache: buckets, captions, recipe, statistics, rejected images."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime import schema
from runtime.messages import pluralize
from runtime.schema import misfit, read_json
from shards.buckets import bucket_name
from shards.format import TENSORS, CacheError
from shards.manifest import read_side_file
from shards.reader import Cache, Shard

REJECTED = "rejected.jsonl"
REJECTED_FIELDS = {"path": schema.text, "reason": schema.text}
MAX_SHOWN = 5  # of the most frequent
BAR = 30  # characters of the fullest bucket's bar
Counts = Counter[Any]


@dataclass
class Contents:
    """Counts over the samples of a cache."""

    buckets: Counts = field(default_factory=Counter)
    bucket_bytes: Counts = field(default_factory=Counter)
    variants: Counts = field(default_factory=Counter)  # samples by their number of variants
    captions_each: Counts = field(default_factory=Counter)  # samples by their number of captions
    weights: Counts = field(default_factory=Counter)
    repeats: Counts = field(default_factory=Counter)
    num_masks: int = 0
    captions: Counts = field(default_factory=Counter)  # by text
    roles: Counts = field(default_factory=Counter)  # captions by role, "" for those without
    role_samples: Counts = field(default_factory=Counter)  # samples by each role that they have
    folders: Counts = field(default_factory=Counter)  # by the first part of the image's path
    rejected: Counts = field(default_factory=Counter)  # by reason, its numbers left out
    images: Counts = field(default_factory=Counter)  # by the digest of the file, if known

    @property
    def num_equal(self) -> int:
        """Images that equal another one byte for byte, the first of each not counted."""
        return self.images.total() - len(self.images)


def read_contents(cache: Cache) -> Iterator[Contents]:
    """Count shard by shard, for a progress bar; yields the same object each time.

    Raises:
        CacheError: something in it is damaged.
    """
    # Without the names of other images, and without numbers.
    reasons = (re.sub(r"^(equal image);.*", r"\1", row["reason"]) for row in read_rejected(cache))
    reasons = (re.sub(r"\d+", "N", reason) for reason in reasons)
    contents = Contents(rejected=Counter(reasons))
    for shard in cache.shards():
        _count(contents, shard)
        yield contents
    if not contents.buckets:
        yield contents


def describe_contents(cache: Cache, contents: Contents) -> list[str]:
    """The lines that ``cli.py inspect`` prints."""
    manifest = cache.manifest
    num_bytes = sum(shard["bytes"] for shard in manifest["shards"])
    return [
        f"{cache.folder}: {pluralize(manifest['num_samples'], 'sample')} in "
        f"{pluralize(len(manifest['shards']), 'shard')}, "
        f"{num_bytes / 1e6:.1f} MB; cache format {manifest['version']}, "
        f"digest {manifest['digest'][:12]}",
        *_describe_buckets(contents),
        *_describe_captions(contents),
        *_describe_samples(contents),
        *([f"dataset: commit {commit}"] if (commit := manifest.get("dataset_revision")) else []),
        *_describe_recipe(manifest.get("recipe", {})),
        *_describe_latents(manifest),
        *_describe_imported(manifest),
        *_top("rejected", contents.rejected),
    ]


def _count(contents: Contents, shard: Shard) -> None:
    records, header = shard.index.records, shard.index.header
    bucket = bucket_name(header["bucket"])
    contents.buckets[bucket] += len(records)
    contents.bucket_bytes[bucket] += header["tar_bytes"]
    contents.repeats[header["repeats"]] += len(records)
    for counts, name in (
        (contents.variants, "num_variants"),
        (contents.captions_each, "num_captions"),
        (contents.weights, "weight"),
    ):
        values, numbers = np.unique(records[name], return_counts=True)
        counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    contents.num_masks += int((records["tensors"][:, TENSORS.index("mask")] > 0).sum())
    for row in range(len(records)):
        fields = shard.metadata(row)
        contents.captions.update(fields["captions"])
        if digest := fields.get("digests", {}).get("picture"):
            contents.images[digest] += 1
        roles = fields.get("roles", len(fields["captions"]) * [""])
        contents.roles.update(roles)
        contents.role_samples.update({*roles})
        folder, slash, _ = fields["path"].partition("/")
        contents.folders[folder + slash if slash else "./"] += 1


def read_rejected(cache: Cache) -> list[dict[str, Any]]:
    """``path`` and ``reason`` of each image that was not encoded.

    Raises:
        CacheError: the list of them is damaged.
    """
    if REJECTED not in cache.manifest["side_files"]:
        return []
    data = read_side_file(cache.folder, cache.manifest, REJECTED, "encode the dataset again")
    try:
        rows = [read_json(line) for line in data.split(b"\n") if line]
    except ValueError as error:
        raise CacheError(f"{cache.folder / REJECTED}: damaged ({str(error)[:80]})") from None
    if not all(misfit(row, REJECTED_FIELDS) is None for row in rows):
        raise CacheError(f"{cache.folder / REJECTED}: damaged (not what encode writes)")
    return rows


def _describe_buckets(contents: Contents) -> Iterator[str]:
    largest = max(contents.buckets.values(), default=1)
    for bucket, count in sorted(contents.buckets.items()):
        size = contents.bucket_bytes[bucket] / 1e6
        bar = "#" * max(1, round(BAR * count / largest))
        yield f"  {bucket:>9}  {count:7d}  {size:9.1f} MB  {bar}"


def _describe_captions(contents: Contents) -> Iterator[str]:
    if not contents.captions:
        return
    lengths = sorted(len(text) for text in contents.captions.elements())
    num = len(lengths)
    yield (
        f"captions: {num} ({_spread(contents.captions_each)} a sample), {len(contents.captions)} "
        f"different; {lengths[0]} to {lengths[-1]} characters, median "
        f"{statistics.median_low(lengths)}"
    )
    for text, count in contents.captions.most_common(MAX_SHOWN):
        yield f"  {count:7d}  {_short(text) or '(empty)'}"
    if roles := describe_roles(contents):
        yield f"roles of captions: {', '.join(roles)}"


def describe_roles(contents: Contents) -> list[str]:
    """``tags 24 (of 12 samples)`` for each role; empty where no caption has one."""
    if not any(contents.roles):
        return []
    return [
        f"{role or '(none)'} {num} (of {pluralize(contents.role_samples[role], 'sample')})"
        for role, num in sorted(contents.roles.items())
    ]


def _describe_samples(contents: Contents) -> Iterator[str]:
    yield (
        f"variants a sample: {_spread(contents.variants)}; masks: {contents.num_masks or 'none'}; "
        f"weight of a sample: {_spread(contents.weights)}; repeats: {_spread(contents.repeats)}"
    )
    if contents.num_equal:
        yield f"equal images: {contents.num_equal:,} equal another one byte for byte"
    if len(contents.folders) > 1:
        yield from _top("folders", contents.folders)


def _describe_recipe(recipe: dict[str, Any]) -> Iterator[str]:
    for cause, parts in sorted(recipe.items()):
        items = parts.items() if isinstance(parts, dict) else [("", parts)]
        values = (f"{name} {_shown(value)}".strip() for name, value in items if value is not None)
        yield f"{cause}: {', '.join(values)}"


def _describe_imported(manifest: dict[str, Any]) -> list[str]:
    counts = [f"{name} of {number:,}" for name, number in manifest.get("imported", {}).items()]
    return [f"imported from another trainer, not checked: {', '.join(counts)}"] if counts else []


def _describe_latents(manifest: dict[str, Any]) -> Iterator[str]:
    latents = manifest.get("latents", {})
    for name in ("mean", "std"):
        if name in latents:
            yield f"latents, {name} of each channel: {_numbers(latents[name])}"
    if drawings := manifest.get("sanity", {}).get("drawings"):
        images = manifest["sanity"]["pictures"]
        line = f"decoded back: built-in drawings {drawings['psnr']:.1f} dB"
        if images:
            mean = sum(image["psnr"] for image in images) / len(images)
            line += f", {len(images)} of the images {mean:.1f} dB"
        yield line


def _top(title: str, counts: Counts) -> Iterator[str]:
    yield f"{title}: {counts.total() or 'none'}"
    for text, count in counts.most_common(MAX_SHOWN):
        yield f"  {count:7d}  {_short(text)}"
    if (rest := len(counts) - MAX_SHOWN) > 0:
        yield f"           and {rest} more"


def _spread(counts: Counts) -> str:
    """``1``, or ``1 to 3``."""
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else line[:87] + "..."


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
