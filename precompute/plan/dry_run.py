"""Reports what an encode would do (``--dry-run``), without loading a model or writing a byte."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from precompute.dataset.hub import locate_dataset
from precompute.dataset.records import Rejected
from precompute.plan.cache_plan import (
    CachePlan,
    plan_caches,
    warn_about_enlarging,
    warn_of_other_revision,
)
from precompute.plan.disk_space import Sizer, check_disk_space
from precompute.plan.placement import PlannedSample
from precompute.plan.removals import refuse_losses
from precompute.plan.scan import Notes
from precompute.report import summarize, variants_label
from precompute.settings import EncodeSettings
from runtime.devices import pick_device
from runtime.files import format_bytes, free_bytes
from sdxl.base import open_base
from sdxl.load import load_tokenizers
from sdxl.prompt_files import read_prompts
from sdxl.text_encoders import max_text_tokens
from shards.buckets import bucket_name

NUM_WORST = 3  # files named of each kind
MAX_REJECTED = 20
CAPTIONS_AT_ONCE = 1000


def dry_run(settings: EncodeSettings) -> Iterator[str]:
    """Lines that describe what encode would do.

    Raises:
        ValueError: encode would refuse: the dataset, the base, the settings, or what it would lose.
        OSError: the disk has too little room.
    """
    if settings.preview_prompts is not None:
        read_prompts(settings.preview_prompts)
    pick_device(settings.device)
    local = locate_dataset(settings)
    notes = Notes(settings.out, local.name, settings.rehash)
    base = open_base(settings.base, vae=settings.vae, tokenizers=settings.tokenizers)
    sizer = Sizer.of(settings, base)
    tokenizer, _ = load_tokenizers(base)
    plans = plan_caches(local.settings, base, notes, None)
    for plan in plans:
        warn_of_other_revision(plan.folder, local)
        yield from _describe_plan(plan, settings)
        warn_about_enlarging(plan, settings.resolution)
        yield from _describe_cropping(plan.planned)
        yield from _describe_captions(plan.planned, tokenizer, settings.long_captions)
        yield f"  about {format_bytes(sum(map(sizer.bytes_of, plan.planned)))}"
        yield from _describe_equal(plan, settings.dedupe == "drop")
        yield from _describe_rejected(plan.rejected)
    yield f"{format_bytes(free_bytes(settings.out))} are free on the disk of {settings.out}"
    refuse_losses(plans, settings, notes)
    check_disk_space(settings.out, {plan.folder: plan.shard_tasks for plan in plans}, sizer)
    yield "nothing was encoded or written (--dry-run)"


def _describe_plan(plan: CachePlan, settings: EncodeSettings) -> Iterator[str]:
    planned = plan.planned
    yield (
        f"{plan.folder}: {len(planned):,} images, {len(plan.rejected):,} rejected: "
        f"{summarize(plan.changes)}" + ("" if plan.has_work else ", so nothing is to be encoded")
    )
    buckets = Counter(bucket_name(sample.bucket) for sample in planned)
    for bucket, count in sorted(buckets.items()):
        yield f"  {bucket:>9}  {count:6d}  {'#' * round(40 * count / len(planned))}"
    variants = sum(len(sample.variants) for sample in planned)
    taken = sum(sample.record.repeats for sample in planned)
    masks = sum(sample.record.mask is not None for sample in planned)
    for number, usual, label in (
        (
            variants,
            -1 if settings.crops else len(planned),
            variants_label(variants, len(planned), settings),
        ),
        (taken, len(planned), "images an epoch, with repeats"),
        (masks, 0, "mask images"),
    ):
        if number != usual:
            yield f"  {number:,} {label}"
    if plan.imports is not None:
        yield from plan.imports.describe()


def _describe_cropping(planned: Sequence[PlannedSample]) -> Iterator[str]:
    """The share of the images that is cropped, and the images that are enlarged."""
    cuts = [(sample.variants[0].cut_share, sample.record.path) for sample in planned]
    if cuts:
        worst = [f"{path} {share:.0%}" for share, path in _worst(cuts) if share >= 0.005]
        mean = sum(share for share, _ in cuts) / len(cuts)
        yield f"  cropped: {mean:.1%} of the area on average" + _worst_suffix(worst)
    grown = [
        (sample.variants[0].enlargement, sample.record.path)
        for sample in planned
        if sample.variants[0].is_upscaled
    ]
    if grown:
        worst = [f"{path} {factor:.2f} times" for factor, path in _worst(grown)]
        yield f"  upscaled: {len(grown):,} smaller than their bucket" + _worst_suffix(worst)


def _describe_captions(
    planned: Sequence[PlannedSample], tokenizer: Any, num_chunks: int
) -> Iterator[str]:
    captions = [(text, sample.record.path) for sample in planned for text in sample.record.captions]
    lengths: list[int] = []
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        texts = [text for text, _ in captions[start : start + CAPTIONS_AT_ONCE]]
        lengths += map(len, tokenizer(texts, add_special_tokens=False).input_ids)
    max_tokens = max_text_tokens(tokenizer) * num_chunks
    limit = f"{num_chunks} chunks of 77 tokens" if num_chunks > 1 else "77 tokens"
    pairs = zip(lengths, captions, strict=True)
    long = [(length, path) for length, (_, path) in pairs if length > max_tokens]
    empty = sum(not text for text, _ in captions)
    yield f"  captions: {len(captions):,}" + (f", {empty:,} of them empty" if empty else "")
    if long:
        worst = [f"{path} {length}" for length, path in _worst(long)]
        yield (
            f"  cut: {len(long):,} captions longer than {limit} ({max_tokens} of the text's)"
            + _worst_suffix(worst)
        )
        needed = -(-max(lengths) // max_text_tokens(tokenizer))
        yield f"  --long-captions {needed} would hold them all"


def _describe_equal(plan: CachePlan, drops: bool) -> Iterator[str]:
    if plan.num_equal:
        across = f", {plan.num_across:,} of them one of val" if plan.num_across else ""
        fate = "dropped" if drops else "kept; --dedupe drop drops them"
        yield f"  equal: {plan.num_equal:,} images equal another one byte for byte{across}: {fate}"


def _describe_rejected(rejected: Sequence[Rejected]) -> Iterator[str]:
    for rejection in sorted(rejected, key=lambda rejection: rejection.path)[:MAX_REJECTED]:
        yield f"  rejected: {rejection.path}: {rejection.reason}"
    if len(rejected) > MAX_REJECTED:
        yield f"  rejected: {len(rejected) - MAX_REJECTED:,} more"


def _worst(pairs: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:NUM_WORST]


def _worst_suffix(worst: Sequence[str]) -> str:
    return f"; most: {', '.join(worst)}" if worst else ""
