"""One shard: copy what is still right, encode the rest, write it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from precompute.encode_samples import EncodedPart, Failed, encode_latents, encode_texts, joined
from precompute.encoders import Encoders
from precompute.images.masks import shows_anything
from precompute.plan.placement import CHANGING, PlannedSample, picture_mark
from precompute.plan.plan_file import CopySource, SampleTask, ShardTask
from precompute.plan.reuse import remove_shard
from precompute.text import text_shape
from sdxl.latent_rgb import LatentSums
from shards.format import CAPTION_TENSORS, VARIANT_TENSORS, CacheError, Layout, Sample
from shards.index import Index
from shards.manifest import REPLACED
from shards.reader import MAX_OPEN_SHARDS, Shard
from shards.writer import write_shard


class Copies:
    """Reads from ``replaced/`` of a cache and, of a sample that moved between train and val, of
    the other one. What is damaged or gone is None, and to be encoded again."""

    def __init__(self, folder: Path) -> None:
        self._cache = folder
        self._open = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    def latents(self, stored: CopySource) -> EncodedPart | None:
        half = self._half(stored, VARIANT_TENSORS, "latents", ("picture", "mask"))
        masks = half.tensors.get("mask", ()) if half else ()
        if not all(shows_anything(mask, mask.dtype) for mask in masks):
            return None  # of an earlier version, which did not drop such variants
        return half

    def text(self, stored: CopySource) -> EncodedPart | None:
        return self._half(stored, CAPTION_TENSORS, "text", ("captions",))

    def _half(
        self, stored: CopySource, names: tuple[str, ...], half: str, digested: tuple[str, ...]
    ) -> EncodedPart | None:
        try:
            shard = self._open(stored.shard, stored.cache)
            if stored.row >= len(shard.index) or shard.index.key(stored.row) != stored.key:
                return None  # another shard of that name
            members = shard.members(stored.row)
        except CacheError:
            return None
        try:
            tensors = safetensors.torch.load(members["safetensors"])
            fields = shard.about(stored.row)
            notes = fields["notes"][half]
            if half == "latents":
                LatentSums.from_json(notes["sums"])
        except (SafetensorError, ValueError, KeyError, TypeError):
            return None  # it has its digests, and is not what encode writes
        kept = {name: tensors[name] for name in names if name in tensors}
        digests = {name: fields["digests"][name] for name in digested if name in fields["digests"]}
        return EncodedPart(kept, notes, shard.index.header["made_with"], digests)

    def _open_shard(self, name: str, cache: str) -> Shard:
        folder = (self._cache.parent / cache if cache else self._cache) / REPLACED
        return Shard(folder, name, Index(folder / f"{name}.index").sha256)


# The samples of one shard: latents and text each copied where they are still right, else encoded.


@dataclass
class Notes:
    """What a shard's index tells of how its samples were made."""

    sums: LatentSums
    num_cut_captions: int = 0
    members: list[list[Any]] = field(default_factory=list)  # all that were to be in it
    rejected: list[list[str]] = field(default_factory=list)
    dropped_variants: list[list[Any]] = field(default_factory=list)  # (path, how many of them)
    made_with: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        dropped = {"dropped_variants": self.dropped_variants} if self.dropped_variants else {}
        return dropped | {
            "sums": self.sums.to_json(),
            "num_cut_captions": self.num_cut_captions,
            "members": self.members,
            "rejected": self.rejected,
            "made_with": sorted(
                self.made_with, key=lambda run_settings: sorted(map(str, run_settings.items()))
            ),
        }

    def add(self, planned: PlannedSample, latents: EncodedPart, text: EncodedPart) -> None:
        self.members.append([planned.record.key, *planned.marks])
        if num_dropped := latents.notes.get("num_dropped_variants", 0):
            self.dropped_variants.append([planned.record.path, num_dropped])
        self.sums += LatentSums.from_json(latents.notes["sums"])
        self.num_cut_captions += text.notes["num_cut_captions"]
        for run_settings in latents.made_with + text.made_with:
            if run_settings not in self.made_with:
                self.made_with.append(run_settings)

    def reject(self, planned: PlannedSample, failed: Failed) -> None:
        marks = planned.marks if failed.is_permanent else CHANGING
        self.members.append([planned.record.key, *marks])
        self.rejected.append([planned.record.path, failed.reason])


def make_samples(
    tasks: Sequence[SampleTask],
    encoders: Encoders,
    copies: Copies,
    notes: Notes,
    tick: Callable[[bool], None],
) -> Iterator[Sample]:
    """Samples in key order, less those that fail, which ``notes`` names.

    ``tick`` hears of each sample of which something was to be encoded, and whether it failed.
    """
    halves = zip(
        tasks,
        _halves(tasks, lambda task: task.latents, encode_latents, copies.latents, encoders),
        _halves(tasks, lambda task: task.text, encode_texts, copies.text, encoders),
        strict=True,
    )
    for task, latents, text in halves:
        if task.is_encoded:
            tick(isinstance(latents, Failed) or isinstance(text, Failed))
        planned = _with_marks(task.planned, latents.digests)
        if isinstance(latents, Failed):
            notes.reject(planned, latents)
        elif isinstance(text, Failed):
            notes.reject(planned, text)
        else:
            notes.add(planned, latents, text)
            yield _join(planned, latents, text)


def _with_marks(planned: PlannedSample, digests: dict[str, str]) -> PlannedSample:
    """The image is known by what was read of it, where it was not hashed before."""
    return replace(planned, picture=planned.picture or picture_mark(digests.get("picture", "")))


def _join(planned: PlannedSample, latents: EncodedPart, text: EncodedPart) -> Sample:
    return Sample(
        key=planned.record.key,
        path=planned.record.path,
        captions=planned.record.captions,
        tensors=latents.tensors | text.tensors,
        digests=latents.digests | text.digests,
        notes={"latents": latents.notes, "text": text.notes},
        weight=planned.record.weight,
    )


def _halves(
    tasks: Sequence[SampleTask],
    place: Callable[[SampleTask], CopySource | None],
    encode: Callable[[Sequence[PlannedSample], Encoders], Iterator[EncodedPart | Failed]],
    copy: Callable[[CopySource], EncodedPart | None],
    encoders: Encoders,
) -> Iterator[EncodedPart | Failed]:
    """One half of each sample, in order."""
    missing = [
        _missing_part(task.planned, place(task))
        for task in tasks
        if task.reason is None and _is_missing(place(task))
    ]
    encoded = encode(missing, encoders)
    for task in tasks:
        stored = place(task)
        if task.reason is not None:
            yield Failed(task.reason)
            continue
        made = next(encoded) if _is_missing(stored) else None
        if stored is None or (isinstance(made, Failed) and not made.is_hidden):
            assert made is not None
            yield made
            continue
        half = copy(stored)
        if half is None or isinstance(made, Failed):  # damaged since; masks hide all that joins
            yield next(encode([task.planned], encoders))
        else:
            yield half if made is None else joined(half, made)


def _is_missing(stored: CopySource | None) -> bool:
    """Whether something of a half is to be encoded."""
    return stored is None or bool(stored.num_variants)


def _missing_part(planned: PlannedSample, stored: CopySource | None) -> PlannedSample:
    return (
        planned
        if stored is None
        else replace(planned, variants=planned.variants[stored.num_variants :])
    )


# The shard: written whole, and then what it alone copied from is removed.


def write_work_shard(
    work: ShardTask,
    folder: Path,
    encoders: Encoders,
    recipe: dict[str, Any],
    tick: Callable[[bool], None],
) -> None:
    """Encode and copy, write and mark; see ``make_samples`` for ``tick``.

    Raises:
        OSError: a file could not be read or written; the shard is not there then.
    """
    text = text_shape(folder)
    layout = Layout(
        dtype=recipe["storage"]["dtype"],
        latent=(encoders.channels, work.bucket[1] // 8, work.bucket[0] // 8),
        prompt=(text["tokens"], text["depth"]),
        pooled=text["pooled"],
    )
    notes = Notes(LatentSums.empty(encoders.channels))
    header: dict[str, Any] = {"bucket": work.bucket, "repeats": work.repeats, "recipe": recipe}
    copies = Copies(folder)

    def samples() -> Iterator[Sample]:
        yield from make_samples(work.tasks, encoders, copies, notes, tick)
        header.update(notes.to_json())

    write_shard(folder, work.name, samples(), layout, header)
    for name in work.frees:
        remove_shard(folder / REPLACED, name)
