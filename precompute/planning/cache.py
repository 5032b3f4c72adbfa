"""One cache of a run: what is there, what is to be written, and how it is finished."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precompute.dataset.records import Memory, Rejected, Source
from precompute.encoders import Encoders
from precompute.planning.changes import SETTING_CAUSES, Changes, compare
from precompute.planning.held import (
    Held,
    finish_moves,
    read_held,
    remove_replaced,
    remove_shard,
    set_aside,
    shard_names,
)
from precompute.planning.placement import Place, place
from precompute.planning.scan import plan_pictures
from precompute.planning.work import ShardWork, read_about, read_places, write_work
from precompute.prompts import settle_prompts
from precompute.report import Report
from precompute.settings import EncodeSettings
from precompute.spot_checks import (
    Candidate,
    check_cache,
    earlier_checks,
    first_pictures,
    warn_of_drawings,
)
from precompute.text import text_shape, unconditional_is_whole, write_unconditional
from runtime.files import PARTIAL, fsync_folder, write_changed
from sdxl.latent_rgb import LatentSums
from sdxl.prompts import Prompt
from shards.index import Index
from shards.manifest import MANIFEST, OWN, PLAN, REPLACED, UNCONDITIONAL, write_manifest

REJECTED = "rejected.jsonl"


@dataclass(eq=False)
class CachePlan:
    """What a run does to one cache."""

    folder: Path
    recipe: dict[str, Any]
    names: list[str]  # of all shards it will have
    works: list[ShardWork]  # those to be written
    outdated: list[str]  # whole shards to be set aside
    broken: list[str]  # what is left of shards that are not whole
    changes: Changes
    rejected: list[Rejected]  # before any picture is decoded
    num_upscaled: int
    made_with: dict[str, Any]  # what made the shards that are there; empty if there are none
    first_pictures: list[Candidate]
    sanity: dict[str, Any]  # what the manifest says now

    @property
    def has_work(self) -> bool:
        return bool(self.works or self.outdated or self.broken)


def check_out(folder: Path, data_set: Path) -> None:
    """Refuse to mix a cache with anything else.

    Raises:
        ValueError: the folder holds something else, or is none.
    """
    if folder.resolve() == data_set.resolve():
        raise ValueError(f"{folder}: is the data set; give another --out")
    if any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise ValueError(f"{folder}: not a folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    ours = (UNCONDITIONAL, MANIFEST, PLAN)
    known = (*OWN, REPLACED)
    foreign = [name for name in names if name not in known and not name.endswith(PARTIAL)]
    if foreign and not any(name in names for name in ours) and not shard_names(folder):
        raise ValueError(
            f"{folder}: not empty and no cache (holds {min(foreign)}); give another --out"
        )


def make_plan(
    source: Source, folder: Path, settings: EncodeSettings, recipe: dict[str, Any], memory: Memory
) -> CachePlan:
    """Compare the data set with what is there; nothing is changed but an interrupted move.

    Samples stay where they are, or were to go when a run was interrupted; with ``repack`` they go
    where a fresh encode would put them.
    """
    planned, unreadable = plan_pictures(source.records, settings, memory)
    finish_moves(folder)
    here, aside = read_held(folder), read_held(folder / REPLACED)
    before = {} if settings.repack else _places(folder, here)
    shards = place(planned, before, settings.shard_size)
    works, changes = compare(shards, here, aside, recipe)
    names = [shard.name for shard in shards]
    written = {work.name for work in works}
    return CachePlan(
        folder=folder,
        recipe=recipe,
        names=names,
        works=works,
        outdated=[name for name in here if name in written or name not in names],
        broken=[name for name in shard_names(folder) if name not in here],
        changes=changes,
        rejected=[*source.rejected, *unreadable],
        num_upscaled=sum(one.variants[0].is_upscaled for one in planned),
        made_with=read_about(folder).get("made_with") or _made_with([*here.values()]),
        first_pictures=first_pictures(shards),
        sanity=earlier_checks(folder),
    )


def _made_with(here: list[Held]) -> dict[str, Any]:
    found = [one for held in here for one in held.index.header["made_with"]]
    return dict(found[-1]) if found else {}


def _places(folder: Path, here: dict[str, Held]) -> dict[str, Place]:
    """Where each sample is, or was to go when a run was interrupted."""
    places = read_places(folder)
    moved = {key for one in places.values() for key in one.keys}
    for name, held in here.items():
        if name not in places:
            kept = tuple(key for key in held.place.keys if key not in moved)
            places[name] = Place(*held.place.group, kept)
    return places


def warn_of_surprises(plan: CachePlan) -> None:
    """What a finished cache loses to a setting or to damage is said before it starts."""
    if plan.broken and (plan.folder / MANIFEST).exists():
        warnings.warn(
            f"{plan.folder}: {len(plan.broken):,} shards are not whole, e.g. {plan.broken[0]}: "
            "what they held is encoded again, as if it were new",
            stacklevel=2,
        )
    causes = {c: n for c, n in plan.changes.causes.items() if c in SETTING_CAUSES}
    if causes and (plan.folder / MANIFEST).exists():
        said = ", ".join(f"{cause} ({number:,})" for cause, number in sorted(causes.items()))
        warnings.warn(
            f"{plan.folder}: settings changed, so pictures of a finished cache are encoded again: "
            f"{said}",
            stacklevel=2,
        )


def prepare(plan: CachePlan, encoders: Encoders, prompts: list[Prompt] | None) -> int:
    """All that comes before the first shard; returns the number of preview prompts.

    What cannot be encoded is refused before anything is removed.
    """
    folder, recipe = plan.folder, plan.recipe
    text_is_whole = unconditional_is_whole(folder, recipe)
    if plan.has_work or not text_is_whole:
        tasks = [task for work in plan.works for task in work.tasks if task.is_encoded]
        if any(task.latents is None for task in tasks):
            warn_of_drawings(encoders.drawings)
        if not text_is_whole or any(task.text is None for task in tasks):
            assert encoders.text
        write_work(folder, {"recipe": recipe, "made_with": encoders.made_with}, plan.works)
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_folder(folder)
    for path in folder.glob("*" + PARTIAL):
        path.unlink()
    for name in plan.broken:
        remove_shard(folder, name)
    set_aside(folder, plan.outdated)
    if not text_is_whole:
        write_unconditional(folder, encoders.text, encoders.batch_size, recipe)
    return settle_prompts(folder, prompts, encoders, recipe)


def finish(plan: CachePlan, report: Report, encoders: Encoders) -> None:
    """Rejected pictures, the manifest, and nothing left of what the run needed."""
    folder, rejected = plan.folder, plan.rejected.copy()
    about: dict[str, Any] = {"recipe": plan.recipe, "text": text_shape(folder)}
    total: LatentSums | None = None
    indexes = [Index(folder / f"{name}.index") for name in plan.names]
    for index in indexes:
        report.add(index)
        rejected += [Rejected(*row) for row in index.header["rejected"]]
        sums = LatentSums.from_json(index.header["sums"])
        total = sums if total is None else total + sums
    if total is not None and report.num_samples:
        about["latents"] = {"channels": len(total.gram) - 1, **total.statistics()}
        about["latent_rgb"] = total.fit()
        gone = {one.key for one in rejected}
        pictures = [one for one in plan.first_pictures if one.planned.record.key not in gone]
        about["sanity"] = check_cache(folder, plan.recipe, pictures, plan.sanity, encoders)
    report.rejected = sorted(rejected, key=lambda one: one.key)
    if not report.num_samples:
        warnings.warn(f"{folder}: no picture could be encoded; {REJECTED} says why", stacklevel=2)
    remove_replaced(folder)
    _write_rejected(folder, report.rejected)
    write_manifest(folder, about, indexes)
    (folder / PLAN).unlink(missing_ok=True)


def _write_rejected(folder: Path, rejected: list[Rejected]) -> None:
    rows = [{"key": one.key, "path": one.path, "reason": one.reason} for one in rejected]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_changed(folder / REJECTED, "".join(lines).encode())
