"""What of each sample is still right, what is not, and why.

A sample has two halves: latents (with mask and sizes) and text. Each is made from marks of its own
(``placement.MARKS``) by parts of the recipe.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from precompute.planning.held import Held
from precompute.planning.placement import CHANGING, MARKS, Planned, PlannedShard
from precompute.planning.work import Found, ShardWork, Task

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
    """How many samples are new, changed (by cause; one may have several), gone or as they were."""

    num_new: int = 0
    num_removed: int = 0
    num_unchanged: int = 0
    causes: Counter[str] = field(default_factory=Counter)


def latent_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parts of a recipe that decide latents, less what each sample's marks tell."""
    pixels = {k: v for k, v in recipe["preprocessing"].items() if k not in GEOMETRY}
    vae = {k: v for k, v in recipe["vae"].items() if k != "of_base"}
    return {"preprocessing": pixels, "vae": vae, "storage": recipe["storage"]}


def text_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parts that decide embeddings."""
    found = {name: recipe[name] for name in ("text_encoder", "text_encoder_2")}
    num_chunks = recipe.get("long_captions", 1)
    return {**found, "storage": recipe["storage"]["dtype"], "long_captions": num_chunks}


def compare(
    shards: list[PlannedShard],
    here: dict[str, Held],
    aside: dict[str, Held],
    recipe: dict[str, Any],
) -> tuple[list[ShardWork], Changes]:
    """The shards that must be written, with what is found of their samples; and what changed.

    ``here`` are whole shards in the cache's folder, ``aside`` those of an interrupted run.
    """
    changes = Changes()
    stale = [shard for shard in shards if not _stays(shard, here.get(shard.name), recipe)]
    staying = {shard.name for shard in shards} - {shard.name for shard in stale}
    sources = {**aside, **{name: held for name, held in here.items() if name not in staying}}
    by_key: dict[str, list[_Source]] = defaultdict(list)
    for held in sources.values():
        source = _Source(held, recipe)
        for key in held.marks:
            by_key[key].append(source)
    changes.num_unchanged = sum(len(here[name].marks) for name in staying)
    works = []
    for shard in stale:
        tasks = tuple(_task(one, by_key.get(one.record.key, []), changes) for one in shard.members)
        works.append(ShardWork(shard.name, shard.bucket, shard.repeats, tasks))
    keys = {one.record.key for shard in shards for one in shard.members}
    changes.num_removed = len(by_key.keys() - keys)
    return _with_frees(works), changes


def _stays(shard: PlannedShard, held: Held | None, recipe: dict[str, Any]) -> bool:
    """Whether the shard is as it would be written."""
    if held is None or held.recipe != recipe:
        return False
    if (held.place.bucket, held.place.repeats) != (shard.bucket, shard.repeats):
        return False
    members = [[one.record.key, *one.marks] for one in shard.members]
    return bool(held.index.header["members"] == members)


class _Source:
    """A shard to copy from, and which causes its recipe gives against that."""

    def __init__(self, held: Held, recipe: dict[str, Any]) -> None:
        self.held = held
        self.causes = set(_recipe_causes(held.recipe, recipe))
        self.latents = latent_recipe(held.recipe) == latent_recipe(recipe)
        self.text = text_recipe(held.recipe) == text_recipe(recipe)


def _task(planned: Planned, sources: list[_Source], changes: Changes) -> Task:
    """What there is of a sample; of several places that which has most."""
    if not sources:
        changes.num_new += 1
        return Task(planned)
    found = [_find(planned, source) for source in sources]
    task, causes = min(found, key=lambda one: len(one[1]))
    changes.causes.update(causes)
    changes.num_unchanged += not causes
    return task


def _find(planned: Planned, source: _Source) -> tuple[Task, set[str]]:
    """What one shard has of a sample, and why it has not all."""
    key, held = planned.record.key, source.held
    if held.marks[key] == CHANGING:
        return Task(planned), {"picture"}
    was = dict(zip(MARKS, held.marks[key], strict=True))
    now = dict(zip(MARKS, planned.marks, strict=True))
    changed = {name for name in MARKS if was[name] != now[name]}
    named = changed - {"geometry"} if "picture" in changed else changed  # it has another size
    causes = source.causes | {SAMPLE_CAUSES[name] for name in named}
    if held.place.repeats != planned.record.repeats:
        causes |= {"repeats"}
    if key in held.reasons:
        reason = held.reasons[key] if source.latents and source.text and not changed else None
        return Task(planned, reason=reason), causes
    there = Found(held.name, held.rows[key])
    latents = there if source.latents and not changed & LATENT_MARKS else None
    text = there if source.text and not changed & TEXT_MARKS else None
    return Task(planned, latents, text), causes


def _recipe_causes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The changed parts of a recipe that decide tensors, as they are said to the user."""
    for name in ("preprocessing", "vae"):
        if latent_recipe(was)[name] != latent_recipe(now)[name]:
            yield RECIPE_CAUSES[name]
    for name in ("text_encoder", "text_encoder_2"):
        if was[name] != now[name]:
            yield RECIPE_CAUSES[name]
    if was.get("long_captions") != now.get("long_captions"):
        yield RECIPE_CAUSES["long_captions"]
    for name, cause in STORAGE_CAUSES.items():
        if was["storage"][name] != now["storage"][name]:
            yield cause


def _with_frees(works: list[ShardWork]) -> list[ShardWork]:
    """Name for each shard the old ones that no other copies from."""
    users: dict[str, set[str]] = defaultdict(set)
    for work in works:
        for task in work.tasks:
            for found in (task.latents, task.text):
                if found is not None:
                    users[found.shard].add(work.name)
    alone = {old: next(iter(names)) for old, names in users.items() if len(names) == 1}
    return [
        replace(work, frees=tuple(old for old in sorted(alone) if alone[old] == work.name))
        for work in works
    ]
