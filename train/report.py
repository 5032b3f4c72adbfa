"""Describes a run: the plan that ``--dry-run`` prints, and the summary at the end."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.path_kinds import checkpoints_in
from runtime.workers import num_processes
from sdxl.base import open_base
from sdxl.user_interfaces import describe_weights
from shards.buckets import bucket_name, largest_bucket
from shards.plan import Plan
from shards.reader import groups_of
from train.caches import describe_roles, open_data
from train.checkpoint import best_checkpoint, newest_checkpoint
from train.config import TrainConfig, check_processes
from train.distributed import DistContext
from train.fit import budget_of, describe_fit, fit_run
from train.memory import CARDS, Estimate, Estimator, choose_checkpointing, size_text
from train.objective import objective_of
from train.resume import with_init_lora
from train.run_folder import check_folder


@dataclass(frozen=True)
class BucketRow:
    """One bucket's row: samples, batches and memory of an epoch."""

    bucket: str
    num_samples: int
    num_batches: int
    estimate: Estimate


def dry_run(config: TrainConfig) -> Iterator[str]:
    """The lines to show.

    The estimates are for a CUDA card, present or not, unless ``--device`` is another device.

    Raises:
        ValueError: what a run with these settings would be refused for.
    """
    device = "cuda" if config.device == "auto" else config.device
    base = open_base(config.base)
    caches, _ = open_data(config, base, DistContext(torch.device("cpu")))
    objective_of(config, base.scheduler_config)
    num = num_processes(config.gpus, config.device)
    check_processes(config, num)
    check_folder(config)
    checkpoint = newest_checkpoint(config.out) if config.resume else None
    if checkpoint is not None:
        config, _ = with_init_lora(config, *checkpoint)
    if config.fit is not None:
        devices = torch.device(device), num
        budget = budget_of(config.fit, devices[0])
        fitted = fit_run(budget, config, base, caches, devices, checkpoint)
        config = fitted.config
        yield from describe_fit(fitted)
    size = config.batch_size * config.accumulate * num
    plan = Plan(groups_of(caches), config.seed, size)
    tokens = caches[0].manifest["text"]["tokens"]
    if device.startswith("cuda") and torch.cuda.is_available():
        card = DistContext(torch.device(device))
        config = choose_checkpointing(config, base, largest_bucket(plan.buckets), tokens, card)
    estimator = Estimator(base, tokens, device, num)
    rows = list(_rows(config, plan, estimator))
    steps = config.num_steps(plan.num_batches)
    size = sum(shard["bytes"] for cache in caches for shard in cache.manifest["shards"])
    num_caches = f"{len(caches)} caches" if len(caches) > 1 else "a cache"
    kind = "the whole UNet" if config.full else f"{config.adapter}, {_adapter(config)}"
    yield f"trained parameters: {estimator.num_trained(config):,} ({kind})"
    yield (
        f"samples an epoch: {plan.num_entries:,}, from {num_caches} of {size_text(size)}; "
        f"global batch {plan.global_batch}; {plan.num_batches:,} steps an epoch"
    )
    if config.captions:
        yield describe_roles(caches, config.captions)
    yield f"steps: {steps:,} ({steps / plan.num_batches:.2f} epochs)"
    if device.startswith("cuda") and config.precision != "fp32":  # the cards' peaks are of bf16
        left = steps - (checkpoint[1]["step"] if checkpoint else 0)
        yield _hours(config, plan, left, estimator, num)
    each = f"each of {num} processes" if num > 1 else "the process"
    yield f"estimated peak memory of {each}, on {device}:"
    yield f"  {'bucket':>10} {'samples':>8} {'batches':>8} {'peak':>10}"
    for row in rows:
        yield (
            f"  {row.bucket:>10} {row.num_samples:8d} {row.num_batches:8d} "
            f"{size_text(row.estimate.peak):>10}"
        )
    bucket = largest_bucket(plan.buckets)
    top = estimator.estimate(config, bucket)
    parts = ("weights", "gradients", "optimizer", "average", "activations", "working")
    shown = [f"{name} {size_text(getattr(top, name))}" for name in parts if getattr(top, name)]
    yield f"in {bucket_name(bucket)}: {', '.join(shown)}"
    for text, saved in estimator.advice(config, bucket):
        yield f"  {text} would save about {size_text(saved)}"


def _hours(config: TrainConfig, plan: Plan, steps: int, estimator: Estimator, num: int) -> str:
    """How long the steps would take on some cards: counted work by the share of their peak that
    published runs reached. The work of a bucket is as its area."""
    largest = largest_bucket(plan.buckets)
    area = sum(
        group.count * group.repeats * group.bucket[0] * group.bucket[1] for group in plan.groups
    ) / sum(group.count * group.repeats for group in plan.groups)
    each = estimator.flops(config, largest) * area / (largest[0] * largest[1])
    total = each * steps * plan.global_batch / num
    times = {card: total / (peak * share) for card, (peak, share) in CARDS.items()}
    listed = ", ".join(f"{_duration(seconds)} on {card}" for card, seconds in times.items())
    cards = f"{num} cards" if num > 1 else "one card"
    return f"time with {cards}, counted and not measured: about {listed}"


def _duration(seconds: float) -> str:
    """``2.3 h``, ``12 min``; never less than a minute."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"


def _adapter(config: TrainConfig) -> str:
    if config.init_lora is not None:
        return f"from {config.init_lora}"
    conv = " and convolutions" if config.conv else ""
    return (
        f"rank {config.lora_rank}, alpha {config.lora_alpha:g}, "
        f"{config.targets or 'attention'}{conv}"
    )


def _rows(config: TrainConfig, plan: Plan, estimator: Estimator) -> Iterator[BucketRow]:
    for bucket in plan.buckets:
        members = [group for group in plan.groups if group.bucket == bucket]
        count = sum(group.count * group.repeats for group in members)
        batches = -(-count // plan.global_batch)
        yield BucketRow(bucket_name(bucket), count, batches, estimator.estimate(config, bucket))


def describe_result(config: TrainConfig, path: Path) -> list[str]:
    """The lines to print; ``path`` is the LoRA file or the UNet folder that was written."""
    how = f"--unet {path}" if config.full else f"--lora {path}"
    generate = f"python cli.py generate --base {config.base} {how} --prompt TEXT --out IMAGES"
    best = best_checkpoint(config.out)
    lowest = [f"lowest eval loss: {best[1]:.5f}, at {best[0]}"] if best else []
    if config.keep and (steps := [f"{step:,}" for step in checkpoints_in(config.out)]):
        lowest.append(
            f"checkpoints kept: {', '.join(steps)} (the newest {config.keep} of "
            "--checkpoint-every, the last, the best, and those of --checkpoint-at)"
        )
    return [
        *describe_weights(config.out, config.base, config.full),
        *lowest,
        f"next: {generate}",
    ]
