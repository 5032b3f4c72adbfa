"""The samples of a run's validation cache by their loss: the highest, and those that got worse.

Losses are of the run's folder; captions and images are of the cache, where it is at hand.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pages.images import Embedded
from pages.run_files import MAX_NUMBER, RunFiles
from runtime import schema
from runtime.files import unseal
from runtime.messages import pluralize
from runtime.safe_parsing import MAX_JSON_BYTES, read_bounded

if TYPE_CHECKING:
    from shards.reader import Cache

NUM_HIGHEST, NUM_WORSE = 24, 12
SIDE = 160  # pixels of an image
MAX_CAPTION = 400  # characters
_FIELDS = {
    "step": schema.integer(),
    "val": schema.text,
    "num_samples": schema.integer(1),
    "losses": schema.table(schema.text, schema.maybe(schema.number)),
}


@dataclass(frozen=True)
class Evaluation:
    """The losses of the samples at one evaluation, by key; infinite where they were not finite."""

    step: int
    data: str  # digest of the validation cache
    num_samples: int  # of which ``losses`` may have a part
    losses: dict[str, float]


@dataclass(frozen=True)
class ValSample:
    """A sample as it is shown; what comes from the cache is empty where that is not at hand."""

    key: str
    loss: float  # at the last evaluation
    first: float | None  # at the first one; None where it was not in it, or that is the same
    path: str = ""
    caption: str = ""
    num_more_captions: int = 0
    image: Embedded | None = None


@dataclass
class ValSamples:
    """The section of the page; ``absent`` says why there is none."""

    absent: str = ""
    step: int = 0
    first_step: int = 0
    num_samples: int = 0
    highest: list[ValSample] = field(default_factory=list)
    worse: list[ValSample] = field(default_factory=list)  # those that got worse most
    notes: list[str] = field(default_factory=list)


def rank_samples(run: RunFiles, val: Path | None) -> ValSamples:
    """The samples of highest loss of a run; ``val`` is its validation cache, if that is known."""
    if not run.evals:
        was_evaluated = len(run.series("eval/loss")) > 0
        return ValSamples(
            absent="The losses of single samples were not kept: the run is of an earlier version."
            if was_evaluated
            else "The run has no validation cache, or was not evaluated yet."
        )
    section = ValSamples()
    steps = [*run.evals]
    last = _first_readable(run, reversed(steps), section.notes)
    if last is None:
        return replace(section, absent="The losses of single samples cannot be read.")
    first = _first_readable(run, (step for step in steps if step < last.step), section.notes)
    section.step, section.num_samples = last.step, last.num_samples
    if last.num_samples > len(last.losses):
        section.notes.append(
            f"The losses of {len(last.losses):,} of {last.num_samples:,} samples are kept."
        )
    earlier = first.losses if first is not None else {}
    samples = [ValSample(key, loss, earlier.get(key)) for key, loss in last.losses.items()]
    highest = sorted(samples, key=lambda each: (-each.loss, each.key))[:NUM_HIGHEST]
    worse = [each for each in samples if each.first is not None and each.loss > each.first]
    worse.sort(key=lambda each: (_rise(each), each.key))
    worse = worse[:NUM_WORSE]
    if first is not None:
        section.first_step = first.step
        if first.data != last.data:
            section.notes.append("The validation cache changed between the two evaluations.")
    shown = _with_contents([*highest, *worse], val, last.data, section.notes)
    section.highest, section.worse = shown[: len(highest)], shown[len(highest) :]
    return section


def _rise(sample: ValSample) -> float:
    assert sample.first is not None
    return sample.first - sample.loss


def _first_readable(run: RunFiles, steps: Iterable[int], notes: list[str]) -> Evaluation | None:
    """The first evaluation that is not damaged; notes on those before it."""
    for step in steps:
        path = run.evals[step]
        try:
            return _read(path)
        except (OSError, ValueError):
            note = f"{path.parent.name}/{path.name} is damaged, and is left out."
            if note not in notes:
                notes.append(note)
    return None


def _read(path: Path) -> Evaluation:
    """
    Raises:
        ValueError: damaged, or not what train writes.
        OSError: it cannot be read.
    """
    value: Any = unseal(read_bounded(path, MAX_JSON_BYTES))
    if problem := schema.misfit(value, _FIELDS):
        raise ValueError(problem)
    losses = {
        key: loss if loss is not None and abs(loss) <= MAX_NUMBER else math.inf
        for key, loss in value["losses"].items()
    }
    return Evaluation(value["step"], value["val"], value["num_samples"], losses)


def _with_contents(
    samples: list[ValSample], val: Path | None, data: str, notes: list[str]
) -> list[ValSample]:
    """The samples with what the cache holds of them, as far as it can be read."""
    cache = _open(val, data, notes)
    if cache is None:
        return samples
    from pages.cache import draw_sample  # imports torch, which a page needs for nothing else
    from shards.format import CacheError

    wanted, shown = {each.key for each in samples}, {}
    colors = cache.manifest.get("latent_rgb")
    num_damaged = 0
    try:
        places = [
            (key, shard, row)
            for shard in cache.shards()
            for row in range(len(shard.index))
            if (key := shard.index.key(row)) in wanted
        ]
    except CacheError:
        places = []
        notes.append("The validation cache is damaged; `python cli.py verify` names what is.")
    for key, shard, row in places:
        try:
            fields = shard.metadata(row)
            image = None if colors is None else draw_sample(shard, row, colors, SIDE)
        except CacheError:
            num_damaged += 1
            continue
        captions = fields["captions"]
        text = captions[0] if captions else ""
        shown[key] = {
            "path": fields["path"],
            "caption": text if len(text) <= MAX_CAPTION else f"{text[:MAX_CAPTION]}…",
            "num_more_captions": max(0, len(captions) - 1),
            "image": image,
        }
    if num_damaged:
        notes.append(
            f"{pluralize(num_damaged, 'sample')} of the validation cache cannot be read; "
            "`python cli.py verify` names what is damaged."
        )
    return [replace(each, **shown.get(each.key, {})) for each in samples]


def _open(val: Path | None, data: str, notes: list[str]) -> "Cache | None":
    """The validation cache; None with a note where there is none. Notes name no path."""
    if val is None or not val.is_dir():
        is_gone = "is not known on this machine" if val is None else "is not where it was"
        notes.append(
            f"The validation cache {is_gone}, so samples stand by their keys; `report --val CACHE` "
            "shows their images and captions."
        )
        return None
    from shards.reader import Cache

    try:
        cache = Cache(val)
    except (OSError, ValueError):
        notes.append("The validation cache cannot be read, so samples stand by their keys.")
        return None
    if cache.data_digest != data:
        notes.append(
            "The validation cache has changed since the last evaluation: images and captions are "
            "those of today."
        )
    return cache
