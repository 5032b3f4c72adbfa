"""What an earlier run left, and what of each sample is still right, what is not, and why.

A shard that is to be written anew is first moved to ``replaced/``: what is still right in it is
copied from there, and no index ever stands beside a tar that is not its own.

A sample has two halves: latents (with mask and sizes) and text. Each is made from marks of its own
(``placement.MARKS``) by parts of the recipe. A sample is looked for by its key first, then by the
bytes of its image: so one that was renamed, or moved between train and val, is found again.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from precompute.plan.placement import (
    CHANGING,
    MARKS,
    Placement,
    PlannedSample,
    ShardPlan,
    geometry_mark,
)
from precompute.plan.plan_file import CopySource, SampleTask, ShardTask
from runtime.files import move_into
from shards.format import CacheError, OtherFormat, sample_key
from shards.index import Index
from shards.manifest import REPLACED

SHARD_NAME = re.compile(r"\d+x\d+-\d{6}")
ENDS = (".index", ".tar")  # the mark goes first: a tar without an index is nothing


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
    def marks(self) -> dict[str, list[Any]]:
        """Of each member by key, those that failed too, what it was made from."""
        return {key: marks for key, *marks in self.index.header["members"]}

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why members have no sample, by key."""
        return {sample_key(path): reason for path, reason in self.index.header["rejected"]}

    @cached_property
    def rows(self) -> dict[str, int]:
        keys = (key for key in self.marks if key not in self.reasons)
        return {key: row for row, key in enumerate(keys)}

    @property
    def place(self) -> Placement:
        width, height = self.index.header["bucket"]
        return Placement((width, height), self.index.header["repeats"], tuple(self.marks))


def read_held(folder: Path) -> dict[str, ExistingShard]:
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
        known = isinstance(members, list) and all(len(row) == 1 + len(MARKS) for row in members)
        if known and size == index.header["tar_bytes"]:
            shards[name] = ExistingShard(folder, index)
    return shards


def shard_names(folder: Path) -> list[str]:
    """Of all shards of which anything lies in the folder."""
    if not folder.is_dir():
        return []
    stems = {path.stem for path in folder.iterdir() if path.suffix in ENDS}
    return sorted(stem for stem in stems if SHARD_NAME.fullmatch(stem))


def retire(folder: Path, names: list[str]) -> None:
    """Move whole shards to ``replaced/``, durably."""
    aside = folder / REPLACED
    if not names:
        return
    aside.mkdir(exist_ok=True)
    for name in names:
        remove_shard(aside, name)
    move_into(aside, [folder / (name + end) for name in names for end in ENDS])


def recover_retirement(folder: Path) -> None:
    """Go on where ``retire`` was interrupted: half a shard there, and half still here."""
    aside = folder / REPLACED
    for name in shard_names(aside):
        moved = [end for end in ENDS if (aside / (name + end)).exists()]
        here = [end for end in ENDS if (folder / (name + end)).exists()]
        if len(moved) == len(here) == 1 and moved != here:
            move_into(aside, [folder / (name + here[0])])


def remove_shard(folder: Path, name: str) -> None:
    for end in ENDS:
        (folder / (name + end)).unlink(missing_ok=True)


def remove_replaced(folder: Path) -> None:
    """What was set aside, when nothing is copied from it any more."""
    aside = folder / REPLACED
    if aside.is_dir():
        for name in shard_names(aside):
            remove_shard(aside, name)
        if not any(aside.iterdir()):
            aside.rmdir()


# The comparison of what is planned with what an earlier run left.

# What the geometry of each sample tells already; the rest of a recipe's preprocessing is of pixels.
GEOMETRY = {"mode", "resolution", "bucket_step", "crops", "flip"}
LATENT_MARKS = {"picture", "mask", "geometry"}
TEXT_MARKS = {"captions"}
PREPROCESSING = "resolution or preprocessing"
SAMPLE_CAUSES = {name: name for name in MARKS} | {"geometry": PREPROCESSING}
# A recipe's parts as they are said to the user, by their names in it.
RECIPE_CAUSES = {
    "preprocessing": PREPROCESSING,
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "text encoder",
    "long_captions": "number of chunks",
}
STORAGE_CAUSES = {"dtype": "dtype", "mean_only": "mean-only"}
SETTING_CAUSES = {*RECIPE_CAUSES.values(), *STORAGE_CAUSES.values()}


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
    """The parts of a recipe that decide latents, less what each sample's marks tell."""
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
    """One cache as it is to be, and what lies there: ``here`` are whole shards in its ``folder``,
    ``aside`` those of an interrupted run."""

    folder: Path
    shards: list[ShardPlan]
    here: dict[str, ExistingShard]
    aside: dict[str, ExistingShard]

    def __post_init__(self) -> None:
        self.keys = {planned.record.key for shard in self.shards for planned in shard.members}

    @property
    def held(self) -> Iterator[ExistingShard]:
        yield from self.aside.values()
        yield from self.here.values()

    def orphans(self) -> Iterator[tuple[ExistingShard, str]]:
        """The samples there that are not to be any more, by their keys; of one that lies there
        twice, both."""
        for held in self.held:
            yield from ((held, key) for key in held.marks if key not in self.keys)


def compare(
    comparisons: list[Comparison], recipe: dict[str, Any]
) -> list[tuple[list[ShardTask], Changes]]:
    """Of each cache the shards that must be written, with what is found of their samples, and what
    changed."""
    stale = [
        [
            shard
            for shard in comparison.shards
            if not _stays(shard, comparison.here.get(shard.name), recipe)
        ]
        for comparison in comparisons
    ]
    origins = [
        _origins(comparison, shards, recipe)
        for comparison, shards in zip(comparisons, stale, strict=True)
    ]
    by_picture: dict[str, list[_Origin]] = defaultdict(list)
    for comparison, own_origins in zip(comparisons, origins, strict=True):
        for origin in own_origins:
            if origin.key not in comparison.keys and (
                mark := origin.source.held.marks[origin.key][0]
            ):
                by_picture[mark].append(origin)
    results = [
        _compare(comparison, shards, own_origins, by_picture)
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
    works = _with_frees([works for works, _, _ in results], comparisons)
    return [(work, changes) for work, (_, changes, _) in zip(works, results, strict=True)]


def _origins(
    comparison: Comparison, stale: list[ShardPlan], recipe: dict[str, Any]
) -> list["_Origin"]:
    """All samples that can be copied from when the shards of this cache are written.

    A shard that is not to stay is set aside first. One that an interrupted run set aside under the
    same name makes room for it then, so it is none of these: its rows are others.
    """
    staying = {shard.name for shard in comparison.shards} - {shard.name for shard in stale}
    leaving = {name: held for name, held in comparison.here.items() if name not in staying}
    aside = [held for name, held in comparison.aside.items() if name not in leaving]
    sources = [
        _Source(held, recipe, comparison.folder.name) for held in (*aside, *leaving.values())
    ]
    return [_Origin(source, key) for source in sources for key in source.held.marks]


def _compare(
    comparison: Comparison,
    stale: list[ShardPlan],
    origins: list["_Origin"],
    by_picture: dict[str, list["_Origin"]],
) -> tuple[list[ShardTask], Changes, list["_Origin"]]:
    changes = Changes()
    by_key: dict[str, list[_Origin]] = defaultdict(list)
    for origin in origins:
        by_key[origin.key].append(origin)
    written = {shard.name for shard in stale}
    changes.num_unchanged = sum(
        len(comparison.here[shard.name].marks)
        for shard in comparison.shards
        if shard.name not in written
    )
    claimed: list[_Origin] = []
    works = []
    for shard in stale:
        tasks = []
        for planned in shard.members:
            if matches := by_key.get(planned.record.key):
                tasks.append(_same_key(planned, matches, changes))
            elif planned.picture and (matches := by_picture.get(planned.picture)):
                task, origin = _same_picture(planned, matches, changes, comparison.folder.name)
                claimed.append(origin)
                tasks.append(task)
            else:
                changes.num_new += 1
                tasks.append(SampleTask(planned))
        works.append(ShardTask(shard.name, shard.bucket, shard.repeats, tuple(tasks)))
    return works, changes, claimed


def _stays(shard: ShardPlan, held: ExistingShard | None, recipe: dict[str, Any]) -> bool:
    """Whether the shard is as it would be written."""
    if held is None or held.recipe != recipe:
        return False
    if (held.place.bucket, held.place.repeats) != (shard.bucket, shard.repeats):
        return False
    members = [[member.record.key, *member.marks] for member in shard.members]
    return bool(held.index.header["members"] == members)


class _Source:
    """A shard of ``cache`` to copy from, and which causes its recipe gives against that."""

    def __init__(self, held: ExistingShard, recipe: dict[str, Any], cache: str) -> None:
        self.held, self.cache = held, cache
        self.causes = set(_recipe_causes(held.recipe, recipe))
        self.latents = latent_recipe(held.recipe) == latent_recipe(recipe)
        self.text = text_recipe(held.recipe) == text_recipe(recipe)


class _Origin(NamedTuple):
    """A sample to copy from."""

    source: _Source
    key: str

    def find(self, planned: PlannedSample, cache: str) -> tuple[SampleTask, set[str]]:
        """What there is of ``planned``, a sample of ``cache``, and why it is not all."""
        source, held, key = self.source, self.source.held, self.key
        if held.marks[key] == CHANGING:
            return SampleTask(planned), {"picture"}
        old_marks = dict(zip(MARKS, held.marks[key], strict=True))
        new_marks = dict(zip(MARKS, planned.marks, strict=True))
        changed = {name for name in MARKS if old_marks[name] != new_marks[name]}
        named = changed - {"geometry"} if "picture" in changed else changed  # it has another size
        causes = source.causes | {SAMPLE_CAUSES[name] for name in named}
        if held.place.repeats != planned.record.repeats:
            causes |= {"repeats"}
        if key in held.reasons:
            as_it_was = source.latents and source.text and not changed
            return SampleTask(planned, reason=held.reasons[key] if as_it_was else None), causes
        other = "" if source.cache == cache else source.cache
        stored = CopySource(held.name, held.rows[key], key, other)
        latents = stored if source.latents and not changed & LATENT_MARKS else None
        if source.latents and changed & LATENT_MARKS == {"geometry"}:
            latents = _first_variants(planned, stored, held, old_marks["geometry"])
        text = stored if source.text and not changed & TEXT_MARKS else None
        return SampleTask(planned, latents, text), causes


def _first_variants(
    planned: PlannedSample, stored: CopySource, held: ExistingShard, mark: str
) -> CopySource | None:
    """The sample there, if what it has are the first variants of the planned: then ``--flip`` or
    more ``--crops`` joined, and only the others are to be encoded."""
    num = int(held.index.records["num_variants"][stored.row])
    is_part = num < len(planned.variants) and geometry_mark(planned.variants[:num]) == mark
    return replace(stored, num_variants=num) if is_part else None


def _same_key(planned: PlannedSample, origins: list[_Origin], changes: Changes) -> SampleTask:
    """What there is of a sample under its own key; of several places that which has most."""
    options = [origin.find(planned, origin.source.cache) for origin in origins]
    task, causes = min(options, key=lambda option: len(option[1]))
    changes.causes.update(causes)
    changes.num_unchanged += not causes
    return task


def _same_picture(
    planned: PlannedSample, origins: list[_Origin], changes: Changes, cache: str
) -> tuple[SampleTask, _Origin]:
    """What there is of a sample whose image lay there under another key."""
    options = [(*origin.find(planned, cache), origin) for origin in origins]
    task, causes, origin = min(options, key=lambda option: len(option[1]))
    changes.num_renamed += 1
    changes.causes.update(causes)
    return task, origin


def _recipe_causes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """The changed parts of a recipe that decide tensors, as they are said to the user."""
    for name in ("preprocessing", "vae"):
        if latent_recipe(old)[name] != latent_recipe(new)[name]:
            yield RECIPE_CAUSES[name]
    for name in ("text_encoder", "text_encoder_2"):
        if old[name] != new[name]:
            yield RECIPE_CAUSES[name]
    if old.get("long_captions") != new.get("long_captions"):
        yield RECIPE_CAUSES["long_captions"]
    for name, cause in STORAGE_CAUSES.items():
        if old["storage"][name] != new["storage"][name]:
            yield cause


def _with_frees(
    caches: list[list[ShardTask]], comparisons: Iterable[Comparison]
) -> list[list[ShardTask]]:
    """Name for each shard the old ones that no other copies from."""
    names = [comparison.folder.name for comparison in comparisons]
    users: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for cache, works in zip(names, caches, strict=True):
        for work in works:
            for task in work.tasks:
                for stored in (task.latents, task.text):
                    if stored is not None:
                        users[stored.cache or cache, stored.shard].add((cache, work.name))
    alone: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (cache, old), copying in sorted(users.items()):
        if len(copying) == 1 and next(iter(copying))[0] == cache:
            alone[next(iter(copying))].append(old)
    return [
        [replace(work, frees=tuple(alone.get((cache, work.name), ()))) for work in works]
        for cache, works in zip(names, caches, strict=True)
    ]
