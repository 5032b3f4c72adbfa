"""Which settings of a run are refused, alone and together. Imports no torch."""

import math
from typing import TYPE_CHECKING

from runtime.workers import check_gpus

if TYPE_CHECKING:
    from train.config import TrainConfig

MAX_COUNT = 2**31 - 1  # of steps, samples, threads: far beyond what can be trained
_LEAST = {
    "rank": 1,
    "num_cycles": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "max_grad_norm": 0,
    "max_skipped": 1,
    "noise_offset": 0,
    "reader_threads": 1,
    "keep": 0,
    "log_every": 1,
    "seed": 0,
}
_POSITIVE = ("lr", "alpha", "epochs", "min_snr_gamma", "huber_delta", "logit_std")
_FINITE = ("weight_decay", "max_grad_norm", "noise_offset", "logit_mean")
_SHARES = ("ema", "caption_dropout")
_LORA_ONLY = ("rank", "alpha", "targets", "conv", "init_lora")


def check_ranges(config: "TrainConfig") -> None:
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{flag(name)} must be at least {least}, not {value}")
        if value is not None and name not in ("seed", *_FINITE) and not value <= MAX_COUNT:
            raise ValueError(f"{flag(name)} must be at most {MAX_COUNT}, not {value}")
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1e6:
            raise ValueError(f"{flag(name)} must be above 0 and finite, not {value}")
    for name in _FINITE:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{flag(name)} must be finite, not {getattr(config, name)}")
    for name in _SHARES:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(
                f"{flag(name)} must be in 0..1, 1 excluded, not {getattr(config, name)}"
            )
    if config.seed >= 2**63:
        raise ValueError(f"--seed must be below 2**63, not {config.seed}")
    if any(step < 1 for step in config.checkpoint_at):
        raise ValueError(f"--checkpoint-at takes steps from 1 on, not {config.checkpoint_at}")
    if config.timestep_range:
        low, high = (*config.timestep_range, -1, -1)[:2]
        if len(config.timestep_range) != 2 or not 0 <= low < high:
            raise ValueError("--timestep-range takes LOW,HIGH, for instance 0,500")
    check_gpus(config.gpus)


def check_choices(config: "TrainConfig") -> None:
    """Settings that exclude each other, or that another one makes meaningless."""
    if not config.caches:
        raise ValueError("name at least one cache to train on")
    if (config.steps is None) == (config.epochs is None):
        raise ValueError("give the length of the run: either --steps or --epochs, not both")
    if config.resume and config.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if config.allow_changed_data and not config.resume:
        raise ValueError("--allow-changed-data says how to --resume; give that too")
    if config.full:
        for name in _LORA_ONLY:
            if getattr(config, name) not in (None, False):
                raise ValueError(f"{flag(name)} is of a LoRA, and --full trains none")
    if config.full and config.adapter != "lora":
        raise ValueError(f"--adapter {config.adapter} is of a LoRA, and --full trains none")
    if config.init_lora is not None:
        for name in ("rank", "alpha", "targets", "conv"):
            if getattr(config, name) not in (None, False):
                raise ValueError(f"--init-lora brings its own {name}; leave {flag(name)} out")
        if config.adapter != "lora":
            raise ValueError("--init-lora brings its own kind of adapter; leave --adapter out")
    if config.compile and config.adapter == "dora":
        raise ValueError("--compile: DoRA cannot be compiled; leave --compile out")
    for name, needed, is_there in (
        ("ema_on_cpu", "--ema", config.ema > 0),
        ("preview_vae", "--preview-every", bool(config.preview_every)),
        ("huber_delta", "--loss huber", config.loss == "huber"),
        ("logit_mean", "--timesteps logit-normal", config.timesteps == "logit-normal"),
        ("logit_std", "--timesteps logit-normal", config.timesteps == "logit-normal"),
        ("num_cycles", "--lr-schedule cosine-restarts", config.lr_schedule == "cosine-restarts"),
        ("unconditional", "--caption-dropout", config.caption_dropout > 0),
    ):
        default = config.__dataclass_fields__[name].default
        if getattr(config, name) != default and not is_there:
            raise ValueError(f"{flag(name)} does nothing without {needed}")


def check_memory(config: "TrainConfig") -> None:
    """What the ways to save memory can be combined with."""
    if config.base_quant != "none" and config.full:
        raise ValueError("--base-quant is for a frozen base, and --full trains all of it")
    if config.pure_bf16:
        if not config.full:
            raise ValueError("--pure-bf16 is for --full: a LoRA's weights are always fp32")
        if config.precision not in ("auto", "bf16"):
            raise ValueError(f"--pure-bf16 computes in bf16, and not in {config.precision}")
        if config.optimizer == "prodigy":
            raise ValueError("--pure-bf16: prodigy nearly stalls in bf16; take another --optimizer")
    if config.fused_backward:
        if config.accumulate > 1:
            raise ValueError("--fused-backward keeps no gradients, so it cannot --accumulate")
        if config.precision == "fp16":
            raise ValueError("--fused-backward steps before fp16's scale is known; take bf16")
        if config.optimizer == "prodigy":
            raise ValueError("--fused-backward: prodigy needs all gradients at once")
        if config.gpus not in (None, "1", "auto"):
            raise ValueError("--fused-backward is for one process")


def check_processes(config: "TrainConfig", num: int) -> None:
    """What cannot be had in ``num`` processes.

    Raises:
        ValueError: names the option.
    """
    if num == 1:
        return
    if config.fused_backward:
        raise ValueError("--fused-backward is for one process")
    if not config.full:
        return
    if config.optimizer != "adamw":
        raise ValueError(
            f"--full over several processes is sharded, which --optimizer {config.optimizer} does "
            "not know; take adamw"
        )
    for name, is_on in (
        ("--precision fp16", config.precision == "fp16"),
        ("--pure-bf16", config.pure_bf16),
        ("--compile", config.compile),
        ("--channels-last", config.channels_last),
    ):
        if is_on:
            raise ValueError(f"{name} is for one process with --full; leave it out")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
