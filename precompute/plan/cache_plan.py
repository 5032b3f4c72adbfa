"""Plans one output cache (train or val), prepares its folder, and finishes it."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precompute.dataset.hub import LocalDataset
from precompute.dataset.records import Memory, Rejected, Source
from precompute.dataset.sources import read_dataset
from precompute.encoders import Encoders
from precompute.imports.kohya import Imports, find_imports
from precompute.plan.duplicates import find_equal, num_across, reject_equal, shared_sizes
from precompute.plan.placement import Placement, PlannedSample, assign_shards
from precompute.plan.plan_file import ShardTask, read_places, read_plan_header, write_plan_file
from precompute.plan.reuse import (
    IMPORT,
    SETTING_CAUSES,
    Changes,
    Comparison,
    ExistingShard,
    compare,
    read_existing,
    recover_retirement,
    remove_replaced,
    remove_shard,
    retire,
    shard_names,
)
from precompute.plan.scan import Notes, add_digests, plan_images, remember_encoded
from precompute.prompts import (
    sync_prompts,
    text_shape,
    unconditional_is_complete,
    write_unconditional,
)
from precompute.recipe import read_recipe
from precompute.report import Report
from precompute.sanity import (
    Candidate,
    check_cache,
    check_drawings,
    choose_candidates,
    earlier_checks,
)
from precompute.settings import EncodeSettings
from runtime.files import PARTIAL, fsync_folder, remove_path, write_changed
from sdxl.base import Base
from sdxl.latent_rgb import LatentSums
from sdxl.prompt_files import Prompt
from shards.format import CacheError
from shards.index import Index
from shards.manifest import (
    ENCODE_FILES,
    MANIFEST,
    PLAN,
    REPLACED,
    SCAN,
    UNCONDITIONAL,
    read_manifest,
    write_manifest,
)

REJECTED = "rejected.jsonl"
MUCH_ENLARGED = 2  # times


@dataclass(eq=False)
class CachePlan:
    """What a run does to one cache: which shards it writes, retires and removes."""

    folder: Path
    recipe: dict[str, Any]
    planned: list[PlannedSample]  # all that it is to hold
    names: list[str]  # of all shards it will have
    shard_tasks: list[ShardTask]  # those to be written
    outdated: list[str]  # whole shards to be retired
    broken: list[str]  # what is left of shards that are not whole
    changes: Changes
    rejected: list[Rejected]  # before any image is decoded
    comparison: Comparison
    num_upscaled: int
    made_with: dict[str, Any]  # what made the shards that are there; empty if there are none
    check_candidates: list[Candidate]
    sanity: dict[str, Any]  # the checks that the present manifest records
    imports: Imports | None  # what is taken from another trainer's caches, if that is asked for
    dataset_revision: str = ""  # the commit of a dataset of the hub
    num_equal: int = 0  # images that equal an earlier one; known where they were looked for
    num_across: int = 0  # of those, the ones that equal an image of val

    @property
    def has_work(self) -> bool:
        return bool(self.shard_tasks or self.outdated or self.broken)


def check_out(folder: Path, dataset: Path) -> None:
    """Refuse to mix a cache with anything else.

    Raises:
        ValueError: the folder holds something else, or is none.
    """
    if folder.resolve() == dataset.resolve():
        raise ValueError(f"{folder}: is the dataset; give another --out")
    if any(part.exists() and not part.is_dir() for part in (folder, *folder.parents)):
        raise ValueError(f"{folder}: not a folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    cache_files = (UNCONDITIONAL, MANIFEST, PLAN)
    own_names = (*ENCODE_FILES, REPLACED)
    foreign = [name for name in names if name not in own_names and not name.endswith(PARTIAL)]
    if foreign and not any(name in names for name in cache_files) and not shard_names(folder):
        raise ValueError(
            f"{folder}: not empty and no cache (holds {min(foreign)}); give another --out"
        )


def plan_caches(
    settings: EncodeSettings, base: Base, notes: Notes, lock: Callable[[Path], object] | None
) -> list[CachePlan]:
    """Read the dataset and compare it with the existing caches.

    ``lock`` locks a cache's folder before it is read; None means a dry run, which writes nothing.
    Samples stay in their shard, or in that to which an interrupted run assigned them; with
    ``--repack`` they go where a fresh encode would put them.

    Raises:
        ValueError: the dataset, the base or the settings cannot be used.
    """
    memory = notes.memory
    sources = read_dataset(settings, memory)
    for name in sources:
        check_out(settings.out / name, settings.dataset / name)
    if "" not in sources and (settings.out / MANIFEST).exists():
        raise ValueError(f"{settings.out}: is one cache, not train/ and val/; give another --out")
    recipe = read_recipe(settings, base)
    drafts = []
    for name, source in sources.items():
        folder = settings.out / name
        if lock is not None:
            lock(folder)
            check_out(folder, settings.dataset / name)  # it may have changed before it was locked
            recover_retirement(folder)
        drafts.append(_Draft.of(folder, source, settings, base, memory))
    drops = settings.dedupe == "drop"
    sizes = set[int]()
    if drops or lock is None:  # an encode that keeps them counts them when all is hashed
        sizes = shared_sizes(sample for draft in drafts for sample in draft.planned)
    _add_digests(drafts, settings, memory, sizes)
    if sizes:
        _handle_equal(drafts, [*sources], drops)
    comparisons = [draft.assign_shards(settings) for draft in drafts]
    changes = compare(comparisons, recipe)
    return [
        draft.make_plan(comparison, recipe, *work_and_changes)
        for draft, comparison, work_and_changes in zip(drafts, comparisons, changes, strict=True)
    ]


@dataclass
class _Draft:
    """One cache of a run, while its plan is made. ``retired`` shards lie in ``replaced/``."""

    folder: Path
    planned: list[PlannedSample]
    rejected: list[Rejected]
    current: dict[str, ExistingShard]
    retired: dict[str, ExistingShard]
    imports: Imports | None
    num_equal: int = 0
    num_across: int = 0

    @classmethod
    def of(
        cls, folder: Path, source: Source, settings: EncodeSettings, base: Base, memory: Memory
    ) -> "_Draft":
        planned, unreadable = plan_images(source.records, settings, memory)
        imports, damaged = None, list[Rejected]()
        if settings.import_ is not None:
            planned, damaged, imports = find_imports(planned, settings, base, memory)
        current, retired = read_existing(folder), read_existing(folder / REPLACED)
        rejected = [*source.rejected, *unreadable, *damaged]
        return cls(folder, planned, rejected, current, retired, imports)

    @property
    def existing_keys(self) -> set[str]:
        return {
            key
            for existing in (*self.current.values(), *self.retired.values())
            for key in existing.fingerprints
        }

    @property
    def fingerprints(self) -> dict[str, list[Any]]:
        """The fingerprint of each existing sample, by key."""
        shards = (*self.retired.values(), *self.current.values())
        return {key: existing.fingerprints[key] for existing in shards for key in existing.rows}

    def assign_shards(self, settings: EncodeSettings) -> Comparison:
        before = {} if settings.repack else _places(self.folder, self.current)
        shards = assign_shards(self.planned, before, settings.shard_size)
        return Comparison(self.folder, shards, self.current, self.retired)

    def make_plan(
        self,
        comparison: Comparison,
        recipe: dict[str, Any],
        shard_tasks: list[ShardTask],
        changes: Changes,
    ) -> CachePlan:
        names = [shard.name for shard in comparison.shards]
        written = {shard_task.name for shard_task in shard_tasks}
        return CachePlan(
            folder=self.folder,
            recipe=recipe,
            planned=self.planned,
            names=names,
            shard_tasks=shard_tasks,
            outdated=[name for name in self.current if name in written or name not in names],
            broken=[name for name in shard_names(self.folder) if name not in self.current],
            changes=changes,
            rejected=self.rejected,
            comparison=comparison,
            num_upscaled=sum(planned.variants[0].is_upscaled for planned in self.planned),
            made_with=read_plan_header(self.folder).get("made_with")
            or _made_with([*self.current.values()]),
            check_candidates=choose_candidates(comparison.shards),
            sanity=earlier_checks(self.folder),
            imports=self.imports,
            num_equal=self.num_equal,
            num_across=self.num_across,
        )


def _add_digests(
    drafts: list[_Draft], settings: EncodeSettings, memory: Memory, sizes: set[int]
) -> None:
    """Hash the images that are compared with existing samples: those under an existing key, and,
    where samples would be removed, new ones too, since they may be the same under another name.
    Those of one of the ``sizes`` in bytes are compared with each other."""
    keys = [draft.existing_keys for draft in drafts]
    wanted = [{planned.record.key for planned in draft.planned} for draft in drafts]
    any_leaves = any(existing - planned for existing, planned in zip(keys, wanted, strict=True))
    for draft, existing in zip(drafts, keys, strict=True):

        def is_compared(planned: PlannedSample, existing: set[str] = existing) -> bool:
            is_existing = any_leaves or planned.record.key in existing
            return is_existing or planned.record.image.size in sizes

        draft.planned, unreadable = add_digests(
            draft.planned, is_compared, draft.fingerprints, settings, memory
        )
        draft.rejected += unreadable


def _handle_equal(drafts: list[_Draft], parts: list[str], drops: bool) -> None:
    """Count the images of each draft that equal an earlier one, and drop them if that is asked."""
    by_part = dict(zip(parts, drafts, strict=True))
    equal = find_equal({part: draft.planned for part, draft in by_part.items()})
    for part, draft in by_part.items():
        draft.num_equal, draft.num_across = len(equal[part]), num_across(part, equal[part])
        if drops:
            draft.planned, dropped = reject_equal(draft.planned, part, equal[part])
            draft.rejected += dropped


def _made_with(current: list[ExistingShard]) -> dict[str, Any]:
    all_settings = [
        run_settings for existing in current for run_settings in existing.index.header["made_with"]
    ]
    return dict(all_settings[-1]) if all_settings else {}


def _places(folder: Path, current: dict[str, ExistingShard]) -> dict[str, Placement]:
    """Each sample's shard: the one it is in, or the one that an interrupted run assigned it."""
    places = read_places(folder)
    moved = {key for planned_place in places.values() for key in planned_place.keys}
    for name, existing in current.items():
        if name not in places:
            kept = tuple(key for key in existing.placement.keys if key not in moved)
            places[name] = Placement(*existing.placement.group, kept)
    return places


def warn_about_reencoding(plan: CachePlan) -> None:
    """Warn, before the start, of what a finished cache encodes again after damage or a setting."""
    if plan.broken and (plan.folder / MANIFEST).exists():
        warnings.warn(
            f"{plan.folder}: {len(plan.broken):,} shards are not whole, e.g. {plan.broken[0]}: "
            "what they held is encoded again, as if it were new",
            stacklevel=2,
        )
    setting_causes = SETTING_CAUSES | ({IMPORT} if plan.imports is None else set())
    causes = {c: n for c, n in plan.changes.causes.items() if c in setting_causes}
    if causes and (plan.folder / MANIFEST).exists():
        listed = ", ".join(f"{cause} ({number:,})" for cause, number in sorted(causes.items()))
        warnings.warn(
            f"{plan.folder}: settings changed, so what they touch in a finished cache is encoded "
            f"anew: {listed}",
            stacklevel=2,
        )


def warn_of_other_revision(folder: Path, dataset: LocalDataset) -> None:
    """Warn where the cache was encoded, or begun, from another commit of a dataset of the hub."""
    try:
        before = read_manifest(folder).get("dataset_revision")
    except CacheError:
        before = read_plan_header(folder).get("dataset_revision")
    if dataset.commit and isinstance(before, str) and before not in ("", dataset.commit):
        warnings.warn(
            f"{folder}: encoded from {dataset.name} at commit {before[:12]}, which is at "
            f"{dataset.commit[:12]} now; to stay, give {dataset.at(before)}",
            stacklevel=2,
        )


def warn_about_enlarging(plan: CachePlan, resolution: int) -> None:
    """Warn of images that are much smaller than their bucket: what they teach is blur."""
    grown = [(sample.variants[0].enlargement, sample.record.path) for sample in plan.planned]
    grown = [(factor, path) for factor, path in grown if factor > MUCH_ENLARGED]
    if grown:
        factor, path = max(grown)
        warnings.warn(
            f"{plan.folder}: {len(grown):,} of {len(plan.planned):,} images are enlarged more than "
            f"{MUCH_ENLARGED} times (most: {path}, {factor:.1f} times), and blur is learned from "
            f"them; --min-size {resolution // MUCH_ENLARGED} leaves them out",
            stacklevel=2,
        )


def prepare(plan: CachePlan, encoders: Encoders, prompts: list[Prompt] | None) -> int:
    """Do what comes before the first shard; return the number of preview prompts.

    The encoders are tried first, so that what they cannot encode is refused before anything is
    removed.
    """
    folder, recipe = plan.folder, plan.recipe
    has_unconditional = unconditional_is_complete(folder, recipe)
    if plan.has_work or not has_unconditional:
        tasks = [task for shard_task in plan.shard_tasks for task in shard_task.tasks]
        if any(task.needs_vae for task in tasks):
            check_drawings(encoders)
        if not has_unconditional or any(task.needs_text_encoders for task in tasks):
            assert encoders.text
        header: dict[str, Any] = {"recipe": recipe, "made_with": encoders.made_with}
        if plan.dataset_revision:
            header["dataset_revision"] = plan.dataset_revision
        write_plan_file(folder, header, plan.shard_tasks)
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_folder(folder)
    for path in folder.glob("*" + PARTIAL):
        remove_path(path)
    for name in plan.broken:
        remove_shard(folder, name)
    retire(folder, plan.outdated)
    if not has_unconditional:
        write_unconditional(folder, encoders.text, encoders.batch_size, recipe)
    return sync_prompts(folder, prompts, encoders, recipe)


def finish(plan: CachePlan, report: Report, encoders: Encoders, memory: Memory) -> None:
    """Write the rejected images and the manifest, and remove what only the run needed."""
    folder, rejected = plan.folder, plan.rejected.copy()
    fields: dict[str, Any] = {"recipe": plan.recipe, "text": text_shape(folder)}
    if plan.dataset_revision:
        fields["dataset_revision"] = plan.dataset_revision
    total: LatentSums | None = None
    indexes = [Index(folder / f"{name}.index") for name in plan.names]
    wanted = {planned.record.key for planned in plan.planned if not planned.image_digest}
    wanted |= {candidate.key for candidate in plan.check_candidates}
    fingerprints: dict[str, list[Any]] = {}
    for index in indexes:
        report.add(index)
        failed = [Rejected(*row) for row in index.header["rejected"]]
        report.add_images(index, {rejection.key for rejection in failed})
        rejected += failed
        fingerprints |= {key: row for key, *row in index.header["members"] if key in wanted}
        sums = LatentSums.from_json(index.header["sums"])
        total = sums if total is None else total + sums
    images = {key: row[0] for key, row in fingerprints.items()}
    remember_encoded(plan.planned, images, encoders.settings.dataset, memory)
    if total is not None and report.num_samples:
        fields["latents"] = {"channels": len(total.gram) - 1, **total.statistics()}
        fields["latent_rgb"] = total.fit()
        rejected_keys = {rejection.key for rejection in rejected}
        first = [
            candidate
            for candidate in plan.check_candidates
            if candidate.planned.record.key not in rejected_keys
        ]
        if plan.check_candidates:  # none where all latents are imported
            fields["sanity"] = check_cache(
                folder, plan.recipe, first, fingerprints, plan.sanity, encoders
            )
    if imported := sum((Counter(index.header.get("imported", {})) for index in indexes), Counter()):
        fields["imported"] = dict(imported)
    report.rejected = sorted(rejected, key=lambda rejection: rejection.key)
    if not report.num_samples:
        warnings.warn(f"{folder}: no image could be encoded; {REJECTED} says why", stacklevel=2)
    remove_replaced(folder)
    _write_rejected(folder, report.rejected)
    write_manifest(folder, fields, indexes)
    (folder / PLAN).unlink(missing_ok=True)
    (folder / SCAN).unlink(missing_ok=True)  # of earlier versions: it held captions and full paths


def _write_rejected(folder: Path, rejected: list[Rejected]) -> None:
    rows = [
        {"key": rejection.key, "path": rejection.path, "reason": rejection.reason}
        for rejection in rejected
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_changed(folder / REJECTED, "".join(lines).encode())
