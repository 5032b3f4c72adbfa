"""Makes one shard: copies what is still valid, encodes the rest, writes it."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from precompute.dataset.records import short_digest
from precompute.encode_samples import (
    EncodedPart,
    Failed,
    join_captions,
    join_variants,
)
from precompute.encoders import Encoders
from precompute.images.masks import shows_anything
from precompute.imports.parts import IMPORTED, make_latents, make_texts
from precompute.plan.placement import UNMATCHED, PlannedSample
from precompute.plan.plan_file import CopySource, SampleTask, ShardTask
from precompute.plan.reuse import is_whole, remove_shard
from precompute.prompts import text_shape
from sdxl.latent_rgb import LatentSums
from shards.format import CAPTION_TENSORS, VARIANT_TENSORS, CacheError, Layout, Sample
from shards.index import Index
from shards.manifest import REPLACED
from shards.reader import MAX_OPEN_SHARDS, Shard
from shards.writer import write_shard


class Copies:
    """Reads latents and text from retired shards of a cache or, where a sample moved between train
    and val, of the other one. It returns None for what is damaged or gone, which is then encoded
    again."""

    def __init__(self, folder: Path) -> None:
        self._cache = folder
        self._open = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    def latents(self, stored: CopySource) -> EncodedPart | None:
        part = self._read(stored, VARIANT_TENSORS, "latents", ("picture", "mask"))
        masks = part.tensors.get("mask", ()) if part else ()
        if not all(shows_anything(mask, mask.dtype) for mask in masks):
            return None  # an earlier version wrote it, which did not drop such variants
        return part

    def text(self, stored: CopySource) -> EncodedPart | None:
        return self._read(stored, CAPTION_TENSORS, "text", ("captions",))

    def captions(self, stored: CopySource) -> tuple[str, ...]:
        """The texts whose embeddings can be copied; empty where that is damaged or gone."""
        try:
            shard = self._open(stored.shard, stored.cache)
            if stored.row >= len(shard.index) or shard.index.key(stored.row) != stored.key:
                return ()
            fields = shard.metadata(stored.row)
            is_imported = "imported" in fields["notes"]["text"]  # which no text here is the same as
            return () if is_imported else tuple(fields["captions"])
        except (CacheError, KeyError, TypeError):
            return ()

    def _read(
        self, stored: CopySource, names: tuple[str, ...], part: str, digested: tuple[str, ...]
    ) -> EncodedPart | None:
        try:
            shard = self._open(stored.shard, stored.cache)
            if stored.row >= len(shard.index) or shard.index.key(stored.row) != stored.key:
                return None  # it is another shard of that name
            members = shard.members(stored.row)
        except CacheError:
            return None
        try:
            tensors = safetensors.torch.load(members["safetensors"])
            fields = shard.metadata(stored.row)
            notes = fields["notes"][part]
            if part == "latents":
                LatentSums.from_json(notes["sums"])
        except (SafetensorError, ValueError, KeyError, TypeError):
            return None  # its digests are right, but encode did not write it
        kept = {name: tensors[name] for name in names if name in tensors}
        digests = {name: fields["digests"][name] for name in digested if name in fields["digests"]}
        return EncodedPart(kept, notes, shard.index.header["made_with"], digests)

    def _open_shard(self, name: str, cache: str) -> Shard:
        folder = (self._cache.parent / cache if cache else self._cache) / REPLACED
        return Shard(folder, name, Index(folder / f"{name}.index").sha256)


# The samples of one shard: latents and text are each copied where they are valid, else encoded.


@dataclass
class HeaderNotes:
    """What a shard's index header records of how its samples were made."""

    sums: LatentSums
    num_cut_captions: int = 0
    members: list[list[Any]] = field(default_factory=list)  # all that were assigned to it
    rejected: list[list[str]] = field(default_factory=list)
    dropped_variants: list[list[Any]] = field(default_factory=list)  # (path, how many of them)
    made_with: list[dict[str, Any]] = field(default_factory=list)
    num_imported: Counter[str] = field(default_factory=Counter)  # "latents" and "text"

    def to_json(self) -> dict[str, Any]:
        dropped = {"dropped_variants": self.dropped_variants} if self.dropped_variants else {}
        imported = {"imported": dict(self.num_imported)} if self.num_imported else {}
        return (
            imported
            | dropped
            | {
                "sums": self.sums.to_json(),
                "num_cut_captions": self.num_cut_captions,
                "members": self.members,
                "rejected": self.rejected,
                "made_with": sorted(
                    self.made_with, key=lambda run_settings: sorted(map(str, run_settings.items()))
                ),
            }
        )

    def add(self, planned: PlannedSample, latents: EncodedPart, text: EncodedPart) -> None:
        self.members.append([planned.record.key, *planned.fingerprint])
        if num_dropped := latents.notes.get("num_dropped_variants", 0):
            self.dropped_variants.append([planned.record.path, num_dropped])
        self.sums += LatentSums.from_json(latents.notes["sums"])
        self.num_cut_captions += text.notes["num_cut_captions"]
        self.num_imported.update(
            name for name, part in (("latents", latents), ("text", text)) if IMPORTED in part.notes
        )
        for run_settings in latents.made_with + text.made_with:
            if run_settings not in self.made_with:
                self.made_with.append(run_settings)

    def reject(self, planned: PlannedSample, failed: Failed) -> None:
        fingerprint = planned.fingerprint if failed.is_permanent else UNMATCHED
        self.members.append([planned.record.key, *fingerprint])
        self.rejected.append([planned.record.path, failed.reason])


def make_samples(
    tasks: Sequence[SampleTask],
    encoders: Encoders,
    copies: Copies,
    notes: HeaderNotes,
    tick: Callable[[bool], None],
) -> Iterator[Sample]:
    """Yield the samples in key order, but for those that fail, which ``notes`` records.

    ``tick(failed)`` is called for each sample of which something was to be encoded.
    """
    parts = zip(
        tasks,
        _copy_or_encode_latents(tasks, copies, encoders),
        _copy_or_encode_texts(tasks, copies, encoders),
        strict=True,
    )
    for task, latents, text in parts:
        if task.is_encoded:
            tick(isinstance(latents, Failed) or isinstance(text, Failed))
        planned = _with_image_digest(task.planned, latents.digests)
        if isinstance(latents, Failed):
            notes.reject(planned, latents)
        elif isinstance(text, Failed):
            notes.reject(planned, text)
        else:
            notes.add(planned, latents, text)
            yield _join(planned, latents, text)


def _with_image_digest(planned: PlannedSample, digests: dict[str, str]) -> PlannedSample:
    """Fill in the image's digest where it was hashed only now, when it was encoded."""
    return replace(
        planned, image_digest=planned.image_digest or short_digest(digests.get("picture", ""))
    )


def _join(planned: PlannedSample, latents: EncodedPart, text: EncodedPart) -> Sample:
    return Sample(
        key=planned.record.key,
        path=planned.record.path,
        captions=planned.record.captions,
        tensors=latents.tensors | text.tensors,
        digests=latents.digests | text.digests,
        notes={"latents": latents.notes, "text": text.notes},
        weight=planned.record.weight,
        roles=planned.record.roles,
    )


def _copy_or_encode_texts(
    tasks: Sequence[SampleTask], copies: Copies, encoders: Encoders
) -> Iterator[EncodedPart | Failed]:
    """The embeddings of each sample, in order: those of its captions that are stored under the same
    text are copied."""
    missing: list[tuple[str, ...]] = []
    for task in tasks:
        captions, source = task.planned.record.captions, task.text
        if task.reason is not None or (source is not None and not source.by_text):
            captions = ()
        elif source is not None and (stored_texts := {*copies.captions(source)}):
            captions = tuple(text for text in captions if text not in stored_texts)
        missing.append(captions)
    encoded = make_texts(
        [
            replace(task.planned, record=replace(task.planned.record, captions=captions, roles=()))
            for task, captions in zip(tasks, missing, strict=True)
            if captions
        ],
        encoders,
    )
    for task, captions in zip(tasks, missing, strict=True):
        if task.reason is not None:
            yield Failed(task.reason)
            continue
        wanted, source = task.planned.record.captions, task.text
        new = next(encoded) if captions else None
        if new is not None and (isinstance(new, Failed) or captions == wanted):
            yield new
            continue
        assert source is not None
        copied = copies.text(source)
        if copied is None:  # damaged since
            yield next(make_texts([task.planned], encoders))
        elif not source.by_text:
            yield copied
        else:
            stored = copies.captions(source), copied
            yield join_captions(wanted, stored, None if new is None else (captions, new), encoders)


def _copy_or_encode_latents(
    tasks: Sequence[SampleTask], copies: Copies, encoders: Encoders
) -> Iterator[EncodedPart | Failed]:
    """The latents of each sample, in order."""
    missing = [
        _without_copied(task.planned, task.latents)
        for task in tasks
        if task.reason is None and _is_encoded(task.latents)
    ]
    made = make_latents(missing, encoders)
    for task in tasks:
        stored = task.latents
        if task.reason is not None:
            yield Failed(task.reason)
            continue
        new = next(made) if _is_encoded(stored) else None
        if stored is None or (isinstance(new, Failed) and not new.is_hidden):
            assert new is not None
            yield new
            continue
        copied = copies.latents(stored)
        if copied is None or isinstance(new, Failed):  # damaged since, or all new ones are hidden
            yield next(make_latents([task.planned], encoders))
        else:
            yield copied if new is None else join_variants(copied, new)


def _is_encoded(stored: CopySource | None) -> bool:
    """Whether anything must be encoded, not only copied."""
    return stored is None or bool(stored.num_variants)


def _without_copied(planned: PlannedSample, stored: CopySource | None) -> PlannedSample:
    """The sample with the variants that are to be encoded: all, or those that no copy has."""
    return (
        planned
        if stored is None
        else replace(planned, variants=planned.variants[stored.num_variants :])
    )


# The shard: it is written, then the retired shards that it alone copied from are removed.


class _WrittenMeanwhile(Exception):
    """Another process has written the shard: a whole one is never replaced."""


def encode_shard(
    shard_task: ShardTask,
    folder: Path,
    encoders: Encoders,
    recipe: dict[str, Any],
    tick: Callable[[bool], None],
    *,
    check: Callable[[], None] = lambda: None,
    keeps_sources: bool = False,
) -> None:
    """Write a shard, tar and index, from copied and encoded samples.

    ``tick`` is called as ``make_samples`` says, and ``check`` before the shard gets its name.
    ``keeps_sources`` leaves the retired shards that it copied from to ``finish``: another process
    may be copying the same.

    Raises:
        OSError: a file could not be read or written; then there is no shard of that name.
    """
    text = text_shape(folder)
    layout = Layout(
        dtype=recipe["storage"]["dtype"],
        latent=(encoders.channels, shard_task.bucket[1] // 8, shard_task.bucket[0] // 8),
        prompt=(text["tokens"], text["depth"]),
        pooled=text["pooled"],
    )
    notes = HeaderNotes(LatentSums.empty(encoders.channels))
    header: dict[str, Any] = {
        "bucket": shard_task.bucket,
        "repeats": shard_task.repeats,
        "recipe": recipe,
    }
    copies = Copies(folder)

    def samples() -> Iterator[Sample]:
        yield from make_samples(shard_task.tasks, encoders, copies, notes, tick)
        header.update(notes.to_json())
        if is_whole(folder, shard_task.name):
            raise _WrittenMeanwhile
        check()

    try:
        write_shard(folder, shard_task.name, samples(), layout, header)
    except _WrittenMeanwhile:
        return
    if keeps_sources:
        return
    for name in shard_task.releases:
        remove_shard(folder / REPLACED, name)
