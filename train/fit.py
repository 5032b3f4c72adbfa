"""Chooses how a run computes, so that it fits into a given memory (``--fit 12GB``, ``--fit auto``).

A choice keeps what is learned: the global batch stays, and only how it is computed changes. What
changes no result comes first; what rounds weights (a quantized base, pure bf16) is taken where
nothing else fits. What the user has set to something else than its default is kept.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runtime.devices import has_bf16
from runtime.options import AUTO, parse_memory
from runtime.process import free_memory
from sdxl.base import Base
from shards.buckets import Size, bucket_name, largest_bucket
from shards.reader import Cache, groups_of
from train.config import TrainConfig, check_processes
from train.distributed import DistContext
from train.memory import FREE_SHARE, Estimator, size_text
from train.resume import with_init_lora

ROUNDINGS = frozenset({"base_quant", "pure_bf16"})  # how the weights of a run are kept


class Measure(NamedTuple):
    """Settings that take another amount of memory, and their price.

    ``rounding`` is 0 where only the order of sums changes. ``slowdown`` ranks the measures of one
    rounding; it is a rule of thumb, not a figure.
    """

    settings: dict[str, Any]
    rounding: int = 0
    slowdown: float = 1.0
    price: str = ""


@dataclass(frozen=True)
class Fitted:
    """Settings of a run with what they take and cost."""

    config: TrainConfig
    peak: int  # bytes of a process, estimated
    prices: tuple[str, ...]  # a line for each measure that costs something


def fit(
    config: TrainConfig,
    base: Base,
    caches: Sequence[Cache],
    world: DistContext,
    checkpoint: tuple[Path, dict[str, Any]] | None = None,
) -> Fitted | None:
    """The quickest settings that fit on every rank; None without ``--fit``. Every rank must ask.

    Raises:
        ValueError: nothing fits; says what the smallest would take.
    """
    if config.fit is None:
        return None
    budget = min(map(int, world.gather([str(budget_of(config.fit, world.device))])))
    return fit_run(budget, config, base, caches, (world.device, world.size), checkpoint)


def fit_run(
    budget: int,
    config: TrainConfig,
    base: Base,
    caches: Sequence[Cache],
    devices: tuple[torch.device, int],
    checkpoint: tuple[Path, dict[str, Any]] | None = None,
) -> Fitted:
    """The quickest settings of at most ``budget`` bytes on each of so many ``devices``.

    A run that goes on from a ``checkpoint`` keeps its global batch, and how its weights are kept.

    Raises:
        ValueError: as ``fit``.
    """
    device, num = devices
    check_processes(config, num)
    estimated, num_samples, may_round = config, config.batch_size * config.accumulate, ROUNDINGS
    if device.type == "cuda" and torch.cuda.is_available() and not has_bf16(device):
        may_round -= {"pure_bf16"}
    if checkpoint is not None:
        state, may_round = checkpoint[1], frozenset()
        # What was chosen when the run began; what the user has typed is left to the check of it.
        unset = [name for name in ROUNDINGS if getattr(config, name) in ("none", False)]
        config = replace(config, **{name: state["config"][name] for name in unset})
        estimated, _ = with_init_lora(config, *checkpoint)
        if state["global_batch"] % num == 0:
            num_samples = state["global_batch"] // num
    tokens = caches[0].manifest["text"]["tokens"]
    estimator = Estimator(base, tokens, device.type, num)
    bucket = largest_bucket(group.bucket for group in groups_of(caches))
    fitted = fit_into(budget, estimated, num_samples, estimator, bucket, may_round)
    return replace(fitted, config=replace(fitted.config, init_lora=config.init_lora))


def fit_into(
    budget: int,
    config: TrainConfig,
    num_samples: int,
    estimator: Estimator,
    bucket: Size,
    may_round: frozenset[str] = ROUNDINGS,
) -> Fitted:
    """The quickest settings of at most ``budget`` bytes, with ``num_samples`` in a process and
    step. ``may_round`` names the settings that round weights and may be chosen.

    Raises:
        ValueError: there are none.
    """
    least = None
    for fitted in ways_to_fit(config, num_samples, estimator, bucket, may_round):
        if fitted.peak <= budget:
            return fitted
        if least is None or fitted.peak < least.peak:
            least = fitted
    assert least is not None
    measures = f" with {_flags(least.config)}" if least.prices else ""
    hints = [text for text, _ in estimator.advice(least.config, bucket)]
    more = f"; more would be saved by {', '.join(hints)}" if hints else ""
    raise ValueError(
        f"--fit {config.fit}: the run does not fit into {size_text(budget)}; in its largest "
        f"bucket, {bucket_name(bucket)}, it takes at least {size_text(least.peak)}{measures}{more}"
    )


def ways_to_fit(
    config: TrainConfig,
    num_samples: int,
    estimator: Estimator,
    bucket: Size,
    may_round: frozenset[str] = ROUNDINGS,
) -> Iterator[Fitted]:
    """All that there are, the one to be preferred first."""
    by_price = sorted(
        product(*_measures(config, num_samples, estimator.on_cuda, may_round)),
        key=lambda measures: (
            max(measure.rounding for measure in measures),
            prod(measure.slowdown for measure in measures),
        ),
    )
    for measures in by_price:
        settings = {k: v for measure in measures for k, v in measure.settings.items()}
        try:
            changed = replace(config, **settings)
            check_processes(changed, estimator.num)
        except ValueError:
            continue  # it does not go with the other settings
        prices = tuple(measure.price for measure in measures if measure.price)
        yield Fitted(changed, estimator.estimate(changed, bucket).peak, prices)


def describe_fit(fitted: Fitted) -> list[str]:
    """What was chosen, and what each choice costs."""
    config = fitted.config
    peak = f"estimated peak {size_text(fitted.peak)}"
    return [f"--fit {config.fit}: {_flags(config)}; {peak}", *(f"  {p}" for p in fitted.prices)]


def _measures(
    config: TrainConfig, num_samples: int, on_cuda: bool, may_round: frozenset[str]
) -> Iterator[list[Measure]]:
    """For each thing that can be chosen, the ways to do it."""
    if config.gradient_checkpointing is None:
        yield [
            Measure({"gradient_checkpointing": False}),
            Measure(
                {"gradient_checkpointing": True},
                slowdown=1.33,
                price="--gradient-checkpointing: the forward pass is computed twice, a third more",
            ),
        ]
    yield [
        Measure(
            {"batch_size": size, "accumulate": num_samples // size},
            slowdown=1 + 0.2 / size,
            price=""
            if size == num_samples
            else f"--batch-size {size} --accumulate {num_samples // size}: the same steps from "
            "smaller batches, which use the device less well",
        )
        for size in range(num_samples, 0, -1)
        if num_samples % size == 0
    ]
    if config.ema and on_cuda and not config.ema_on_cpu:
        yield [
            Measure({"ema_on_cpu": False}),
            Measure(
                {"ema_on_cpu": True},
                slowdown=1.05,
                price="--ema-on-cpu: the average costs processor time in main memory",
            ),
        ]
    if config.full and "pure_bf16" in may_round and not config.pure_bf16 and on_cuda:
        yield [
            Measure({"pure_bf16": False}),
            Measure(
                {"pure_bf16": True},
                rounding=1,
                price="--pure-bf16: weights have 8 bits of precision, rounded stochastically",
            ),
        ]
    if not config.full and "base_quant" in may_round and config.base_quant == "none":
        yield [*_quantized_bases(on_cuda)]


def _quantized_bases(on_cuda: bool) -> Iterator[Measure]:
    yield Measure({"base_quant": "none"})
    yield Measure(
        {"base_quant": "int8"},
        rounding=1,
        slowdown=1.1,
        price="--base-quant int8: the frozen base's linear layers are rounded to 8 bits",
    )
    if on_cuda and importlib.util.find_spec("bitsandbytes") is not None:
        yield Measure(
            {"base_quant": "nf4"},
            rounding=2,
            slowdown=1.2,
            price="--base-quant nf4: the frozen base's linear layers are rounded to 4 bits",
        )


def _flags(config: TrainConfig) -> str:
    """The chosen settings as they would be typed."""
    parts = [f"--batch-size {config.batch_size}", f"--accumulate {config.accumulate}"]
    on = "" if config.gradient_checkpointing else "no-"
    parts.append(f"--{on}gradient-checkpointing")
    if config.base_quant != "none":
        parts.append(f"--base-quant {config.base_quant}")
    parts += ["--pure-bf16"] * config.pure_bf16 + ["--ema-on-cpu"] * config.ema_on_cpu
    return " ".join(parts)


def budget_of(fit: str, device: torch.device) -> int:
    """Bytes that an estimate may take.

    Raises:
        ValueError: ``auto``, and nobody knows what the device has free.
    """
    size = parse_memory(fit)
    if size is not None:
        return size
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--fit {AUTO} asks the card what it has free, and there is none; give a size "
                "(--fit 12GB), or --device cpu"
            )
        free, _ = torch.cuda.mem_get_info(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = free_memory()
    return int(FREE_SHARE * free)
