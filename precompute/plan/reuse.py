"""Compares the planned samples with existing shards: what can be copied, what must be encoded, why.

A shard that is to be written anew is first retired, that is, moved to ``replaced/``: what is still
valid in it is copied from there, and no index ever stands beside another shard's tar.

A sample has two parts: latents (with mask and sizes) and text. Each depends on fields of the
sample's fingerprint (``placement.FINGERPRINT_FIELDS``) and on parts of the recipe. A sample is
looked for by its key first, then by the bytes of its image, so that one that was renamed, or moved
between train and val, is found again.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from precompute.plan.placement import (
    FINGERPRINT_FIELDS,
    IMPORTED,
    UNMATCHED,
    Placement,
    PlannedSample,
    ShardPlan,
    geometry_digest,
)
from precompute.plan.plan_file import CopySource, SampleTask, ShardTask
from runtime.files import move_into
from shards.format import CacheError, OtherFormat, sample_key
from shards.index import Index
from shards.manifest import REPLACED

SHARD_NAME = re.compile(r"\d+x\d+-\d{6}")
SUFFIXES = (".index", ".tar")  # the index goes first: a tar without an index is no shard


@dataclass(frozen=True, eq=False)
class ExistingShard:
    """A whole shard as it lies in ``folder``: the cache's, or its ``replaced/``."""

    folder: Path
    index: Index

    @property
    def name(self) -> str:
        return str(self.index.header["shard"])

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.index.header["recipe"])

    @cached_property
    def fingerprints(self) -> dict[str, list[Any]]:
        """The fingerprint of each member by key, including those that failed."""
        return {key: fingerprint for key, *fingerprint in self.index.header["members"]}

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why members have no sample, by key."""
        return {sample_key(path): reason for path, reason in self.index.header["rejected"]}

    @cached_property
    def rows(self) -> dict[str, int]:
        keys = (key for key in self.fingerprints if key not in self.reasons)
        return {key: row for row, key in enumerate(keys)}

    @property
    def placement(self) -> Placement:
        width, height = self.index.header["bucket"]
        return Placement((width, height), self.index.header["repeats"], tuple(self.fingerprints))


def read_existing(folder: Path) -> dict[str, ExistingShard]:
    """The whole shards in a folder, by name.

    Raises:
        CacheError: they are of another version of the format.
    """
    shards = {}
    for name in shard_names(folder):
        try:
            index = Index(folder / f"{name}.index")
            size = (folder / f"{name}.tar").stat().st_size
        except OtherFormat:
            raise
        except (CacheError, OSError):
            continue
        members = index.header.get("members")
        is_valid = isinstance(members, list) and all(
            len(row) == 1 + len(FINGERPRINT_FIELDS) for row in members
        )
        if is_valid and size == index.header["tar_bytes"]:
            shards[name] = ExistingShard(folder, index)
    return shards


def shard_names(folder: Path) -> list[str]:
    """The names of all shards of which the folder has an index, a tar or both."""
    if not folder.is_dir():
        return []
    stems = {path.stem for path in folder.iterdir() if path.suffix in SUFFIXES}
    return sorted(stem for stem in stems if SHARD_NAME.fullmatch(stem))


def is_whole(folder: Path, name: str) -> bool:
    """Whether a shard is written: its index comes last."""
    return (folder / f"{name}{SUFFIXES[0]}").exists()


def retire(folder: Path, names: list[str]) -> None:
    """Move shards to ``replaced/``, durably, in the place of any of the same name."""
    replaced = folder / REPLACED
    if not names:
        return
    replaced.mkdir(exist_ok=True)
    for name in names:
        remove_shard(replaced, name)
    move_into(replaced, [folder / (name + end) for name in names for end in SUFFIXES])


def recover_retirement(folder: Path) -> None:
    """Finish a ``retire`` that was interrupted between a shard's index and its tar."""
    replaced = folder / REPLACED
    for name in shard_names(replaced):
        moved = [end for end in SUFFIXES if (replaced / (name + end)).exists()]
        remaining = [end for end in SUFFIXES if (folder / (name + end)).exists()]
        if len(moved) == len(remaining) == 1 and moved != remaining:
            move_into(replaced, [folder / (name + remaining[0])])


def remove_shard(folder: Path, name: str) -> None:
    for end in SUFFIXES:
        (folder / (name + end)).unlink(missing_ok=True)


def remove_replaced(folder: Path) -> None:
    """Delete the retired shards, when nothing is copied from them any more."""
    replaced = folder / REPLACED
    if replaced.is_dir():
        for name in shard_names(replaced):
            remove_shard(replaced, name)
        if not any(replaced.iterdir()):
            replaced.rmdir()


# The comparison of planned samples with existing shards.

# Preprocessing that a sample's geometry shows already; the rest changes pixels alone.
GEOMETRY = {"mode", "resolution", "bucket_step", "crops", "flip"}
LATENT_FIELDS = {"picture", "mask", "geometry"}
TEXT_FIELDS = {"captions"}
PREPROCESSING = "resolution or preprocessing"
SAMPLE_CAUSES = {name: name for name in FINGERPRINT_FIELDS} | {"geometry": PREPROCESSING}
# The names that messages give to parts of a recipe.
RECIPE_CAUSES = {
    "preprocessing": PREPROCESSING,
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder",
    "long_captions": "number of chunks",
}
STORAGE_CAUSES = {"dtype": "dtype", "mean_only": "mean-only"}
VAE_PRECISION = "VAE precision"  # of the same VAE
IMPORT, IMPORTED_FILE = "import", "imported file"  # it is not imported any more; from another file
SETTING_CAUSES = {*RECIPE_CAUSES.values(), *STORAGE_CAUSES.values(), VAE_PRECISION}


@dataclass
class Changes:
    """How many samples are new, renamed, changed (by cause; one may have several), removed or as
    they were."""

    num_new: int = 0
    num_renamed: int = 0
    num_removed: int = 0
    num_unchanged: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def are_none(self) -> bool:
        return not (self.num_new or self.num_renamed or self.num_removed or self.causes)


def latent_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parts of a recipe that decide latents, less what each sample's fingerprint shows."""
    pixels = {k: v for k, v in recipe["preprocessing"].items() if k not in GEOMETRY}
    vae = {k: v for k, v in recipe["vae"].items() if k != "of_base"}
    return {"preprocessing": pixels, "vae": vae, "storage": recipe["storage"]}


def text_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parts that decide embeddings."""
    encoders = {name: recipe[name] for name in ("text_encoder", "text_encoder_2")}
    num_chunks = recipe.get("long_captions", 1)
    return {**encoders, "storage": recipe["storage"]["dtype"], "long_captions": num_chunks}


@dataclass(eq=False)
class Comparison:
    """The planned shards of one cache and the existing ones: ``current`` are whole shards in its
    ``folder``, ``retired`` those that an interrupted run moved to ``replaced/``."""

    folder: Path
    shards: list[ShardPlan]
    current: dict[str, ExistingShard]
    retired: dict[str, ExistingShard]

    def __post_init__(self) -> None:
        self.keys = {planned.record.key for shard in self.shards for planned in shard.members}

    @property
    def existing_shards(self) -> Iterator[ExistingShard]:
        yield from self.retired.values()
        yield from self.current.values()

    def orphans(self) -> Iterator[tuple[ExistingShard, str]]:
        """Existing samples, as shard and key, that are planned no more; a key that is both current
        and retired comes twice."""
        for existing in self.existing_shards:
            yield from ((existing, key) for key in existing.fingerprints if key not in self.keys)


def compare(
    comparisons: list[Comparison], recipe: dict[str, Any]
) -> list[tuple[list[ShardTask], Changes]]:
    """For each cache the shards that must be written, with the tasks of their samples, and what
    changed."""
    stale = [
        [
            shard
            for shard in comparison.shards
            if not _stays(shard, comparison.current.get(shard.name), recipe)
        ]
        for comparison in comparisons
    ]
    origins = [
        _origins(comparison, shards, recipe)
        for comparison, shards in zip(comparisons, stale, strict=True)
    ]
    by_image: dict[str, list[_Origin]] = defaultdict(list)
    for comparison, own_origins in zip(comparisons, origins, strict=True):
        for origin in own_origins:
            if origin.key not in comparison.keys and (
                digest := origin.source.shard.fingerprints[origin.key][0]
            ):
                by_image[digest].append(origin)
    results = [
        _compare(comparison, shards, own_origins, by_image)
        for comparison, shards, own_origins in zip(comparisons, stale, origins, strict=True)
    ]
    for comparison, (_, changes, _) in zip(comparisons, results, strict=True):
        moved = {
            origin.key
            for _, _, claimed in results
            for origin in claimed
            if origin.source.cache == comparison.folder.name
        }
        changes.num_removed = len({key for _, key in comparison.orphans()} - moved)
    shard_tasks = _with_releases([shard_tasks for shard_tasks, _, _ in results], comparisons)
    return [
        (shard_task, changes)
        for shard_task, (_, changes, _) in zip(shard_tasks, results, strict=True)
    ]


def _origins(
    comparison: Comparison, stale: list[ShardPlan], recipe: dict[str, Any]
) -> list["_Origin"]:
    """All samples that can be copied from when the shards of this cache are written.

    A shard that does not stay is retired first. It then replaces one of the same name that an
    interrupted run retired, so that one cannot be copied from.
    """
    staying = {shard.name for shard in comparison.shards} - {shard.name for shard in stale}
    leaving = {
        name: existing for name, existing in comparison.current.items() if name not in staying
    }
    retired = [existing for name, existing in comparison.retired.items() if name not in leaving]
    sources = [
        _Source(existing, recipe, comparison.folder.name)
        for existing in (*retired, *leaving.values())
    ]
    return [_Origin(source, key) for source in sources for key in source.shard.fingerprints]


def _compare(
    comparison: Comparison,
    stale: list[ShardPlan],
    origins: list["_Origin"],
    by_image: dict[str, list["_Origin"]],
) -> tuple[list[ShardTask], Changes, list["_Origin"]]:
    changes = Changes()
    by_key: dict[str, list[_Origin]] = defaultdict(list)
    for origin in origins:
        by_key[origin.key].append(origin)
    written = {shard.name for shard in stale}
    changes.num_unchanged = sum(
        len(comparison.current[shard.name].fingerprints)
        for shard in comparison.shards
        if shard.name not in written
    )
    claimed: list[_Origin] = []
    shard_tasks = []
    for shard in stale:
        tasks = []
        for planned in shard.members:
            if matches := by_key.get(planned.record.key):
                tasks.append(_task_for_same_key(planned, matches, changes))
            elif planned.image_digest and (matches := by_image.get(planned.image_digest)):
                task, origin = _task_for_same_image(
                    planned, matches, changes, comparison.folder.name
                )
                claimed.append(origin)
                tasks.append(task)
            else:
                changes.num_new += 1
                tasks.append(SampleTask(planned))
        shard_tasks.append(ShardTask(shard.name, shard.bucket, shard.repeats, tuple(tasks)))
    return shard_tasks, changes, claimed


def _stays(shard: ShardPlan, existing: ExistingShard | None, recipe: dict[str, Any]) -> bool:
    """Whether the shard is as it would be written."""
    if existing is None or existing.recipe != recipe:
        return False
    if (existing.placement.bucket, existing.placement.repeats) != (shard.bucket, shard.repeats):
        return False
    members = [[member.record.key, *member.fingerprint] for member in shard.members]
    return bool(existing.index.header["members"] == members)


class _Source:
    """A shard of ``cache`` to copy from; whether its latents and its text are of this recipe,
    and the causes where they are not."""

    def __init__(self, existing: ExistingShard, recipe: dict[str, Any], cache: str) -> None:
        self.shard, self.cache = existing, cache
        self.causes = set(_recipe_causes(existing.recipe, recipe))
        self.latents = latent_recipe(existing.recipe) == latent_recipe(recipe)
        self.text = text_recipe(existing.recipe) == text_recipe(recipe)


class _Origin(NamedTuple):
    """A sample to copy from."""

    source: _Source
    key: str

    def find(self, planned: PlannedSample, cache: str) -> tuple[SampleTask, set[str]]:
        """The task that copies what is valid for ``planned``, a sample of ``cache``, and the causes
        for which the rest is encoded."""
        source, existing, key = self.source, self.source.shard, self.key
        if existing.fingerprints[key] == UNMATCHED:
            return SampleTask(planned), {"picture"}
        old = dict(zip(FINGERPRINT_FIELDS, existing.fingerprints[key], strict=True))
        new = dict(zip(FINGERPRINT_FIELDS, planned.fingerprint, strict=True))
        changed = {name for name in FINGERPRINT_FIELDS if old[name] != new[name]}
        named = (
            changed - {"geometry"} if "picture" in changed else changed
        )  # another image has another size
        causes = source.causes | {_cause(name, old[name], new[name]) for name in named}
        if existing.placement.repeats != planned.record.repeats:
            causes |= {"repeats"}
        if key in existing.reasons:
            as_it_was = source.latents and source.text and not changed
            return SampleTask(planned, reason=existing.reasons[key] if as_it_was else None), causes
        other = "" if source.cache == cache else source.cache
        stored = CopySource(existing.name, existing.rows[key], key, other)
        latents = stored if source.latents and not changed & LATENT_FIELDS else None
        if source.latents and changed & LATENT_FIELDS == {"geometry"}:
            latents = _first_variants(planned, stored, existing, old["geometry"])
        text = None
        if source.text and not (changed & TEXT_FIELDS and planned.text_file):
            text = replace(stored, by_text=bool(changed & TEXT_FIELDS))
        return SampleTask(planned, latents, text), causes


def _cause(name: str, old: Any, new: Any) -> str:
    """Why the field ``name`` of a fingerprint changed."""
    if str(new).startswith(IMPORTED):
        return IMPORTED_FILE
    return IMPORT if str(old).startswith(IMPORTED) else SAMPLE_CAUSES[name]


def _first_variants(
    planned: PlannedSample, stored: CopySource, existing: ExistingShard, old_geometry: str
) -> CopySource | None:
    """A copy of the existing variants, if they are the first ones of the planned: then ``--flip``
    or more ``--crops`` were added, and only the others are encoded."""
    num = int(existing.index.records["num_variants"][stored.row])
    is_part = (
        not planned.latents_file
        and num < len(planned.variants)
        and geometry_digest(planned.variants[:num]) == old_geometry
    )
    return replace(stored, num_variants=num) if is_part else None


def _task_for_same_key(
    planned: PlannedSample, origins: list[_Origin], changes: Changes
) -> SampleTask:
    """The task of a sample that exists under its own key; of several origins the best match."""
    options = [origin.find(planned, origin.source.cache) for origin in origins]
    task, causes = min(options, key=lambda option: len(option[1]))
    changes.causes.update(causes)
    changes.num_unchanged += not causes
    return task


def _task_for_same_image(
    planned: PlannedSample, origins: list[_Origin], changes: Changes, cache: str
) -> tuple[SampleTask, _Origin]:
    """The task of a sample whose image exists under another key, and the origin it uses."""
    options = [(*origin.find(planned, cache), origin) for origin in origins]
    task, causes, origin = min(options, key=lambda option: len(option[1]))
    changes.num_renamed += 1
    changes.causes.update(causes)
    return task, origin


def _recipe_causes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """The changed parts of a recipe that decide tensors, by the names that messages use."""
    before, after = latent_recipe(old), latent_recipe(new)
    if before["preprocessing"] != after["preprocessing"]:
        yield RECIPE_CAUSES["preprocessing"]
    if before["vae"] != after["vae"]:
        is_another = before["vae"] | {"dtype": after["vae"]["dtype"]} != after["vae"]
        yield RECIPE_CAUSES["vae"] if is_another else VAE_PRECISION
    for name in ("text_encoder", "text_encoder_2"):
        if old[name] != new[name]:
            yield RECIPE_CAUSES[name]
    if old.get("long_captions") != new.get("long_captions"):
        yield RECIPE_CAUSES["long_captions"]
    for name, cause in STORAGE_CAUSES.items():
        if old["storage"][name] != new["storage"][name]:
            yield cause


def _with_releases(
    caches: list[list[ShardTask]], comparisons: Iterable[Comparison]
) -> list[list[ShardTask]]:
    """Give each shard the names of retired shards that no other shard copies from."""
    names = [comparison.folder.name for comparison in comparisons]
    users: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for cache, shard_tasks in zip(names, caches, strict=True):
        for shard_task in shard_tasks:
            for task in shard_task.tasks:
                for stored in (task.latents, task.text):
                    if stored is not None:
                        users[stored.cache or cache, stored.shard].add((cache, shard_task.name))
    alone: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (cache, old), copying in sorted(users.items()):
        if len(copying) == 1 and next(iter(copying))[0] == cache:
            alone[next(iter(copying))].append(old)
    return [
        [
            replace(shard_task, releases=tuple(alone.get((cache, shard_task.name), ())))
            for shard_task in shard_tasks
        ]
        for cache, shard_tasks in zip(names, caches, strict=True)
    ]
