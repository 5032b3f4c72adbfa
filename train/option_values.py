"""Types and ranges of a run's options: caches with their weights, intervals. Imports no torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any

from runtime.options import parse_memory
from runtime.workers import check_gpus

MAX_COUNT = 2**31 - 1  # of steps, samples, threads: far beyond what can be trained
_MINIMA = {
    "rank": 1,
    "num_cycles": 1,
    "ema_every": 1,
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
# Options that mean something with another one alone, by that one.
DEPENDENTS = {
    "ema": ("ema_on_cpu", "ema_every"),
    "preview_every": ("preview_vae",),
    "loss": ("huber_delta",),
    "timesteps": ("logit_mean", "logit_std"),
    "lr_schedule": ("num_cycles",),
    "caption_dropout": ("unconditional",),
    "wandb": ("wandb_entity", "wandb_name", "wandb_group", "wandb_tags", "wandb_artifact"),
}
MAX_REPEATS = 1_000_000
MAX_EPOCHS = 1e6  # of an interval, and its inverse the least


def _digits(value: float) -> str:
    """All of them, so that it is the same number when read again."""
    return repr(float(value)).removesuffix(".0")


def part_of(cache: Path, part: str) -> Path:
    """A cache's folder: its ``train`` or ``val`` where it is split in two, else itself."""
    is_split = not (cache / "manifest.json").exists() and (cache / part).is_dir()
    return cache / part if is_split else cache


@dataclass(frozen=True)
class CacheUse:
    """A cache and how a run uses it: ``FOLDER[,weight=W][,repeats=N]``."""

    folder: Path
    weight: float = 1.0  # of its samples in the loss
    repeats: int = 1  # of each sample in an epoch

    @classmethod
    def parse(cls, text: str) -> "CacheUse":
        """Raises ValueError for anything else than that form."""
        folder, settings = text, {}
        while match := re.fullmatch(r"(.+),(weight|repeats)=([^,]*)", folder):
            folder, name, value = match.groups()
            if name in settings:
                raise ValueError(f"{text}: says {name} twice")
            try:
                settings[name] = float(value) if name == "weight" else int(value)
            except ValueError:
                raise ValueError(f"{text}: {name}={value} is no number") from None
        use = cls(Path(folder), **settings)  # type: ignore[arg-type]
        if not 0 < use.weight < math.inf:
            raise ValueError(f"{text}: weight must be a finite number above 0")
        if not 1 <= use.repeats <= MAX_REPEATS:
            raise ValueError(f"{text}: repeats must be from 1 to {MAX_REPEATS}")
        return use

    def __str__(self) -> str:
        weight = "" if self.weight == 1 else f",weight={_digits(self.weight)}"
        return f"{self.folder}{weight}" + ("" if self.repeats == 1 else f",repeats={self.repeats}")


@dataclass(frozen=True)
class CaptionShares:
    """How often captions of each role are drawn: ``tags=0.5,short=0.3``; empty is without roles."""

    shares: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "CaptionShares":
        """Raises ValueError for anything else than that form, and for shares that are none."""
        shares: dict[str, float] = {}
        for part in text.split(",") if text.strip() else ():
            role, separator, number = map(str.strip, part.rpartition("="))
            try:
                share = float(number)
            except ValueError:
                share = math.nan
            if not separator or not role or not 0 <= share < math.inf:
                raise ValueError(
                    f"{part.strip()[:50]!r} is no ROLE=SHARE with a share from 0 up, as in "
                    "tags=0.5,short=0.5"
                )
            if role in shares:
                raise ValueError(f"{text[:50]!r} says {role} twice")
            shares[role] = share
        if shares and not 0 < sum(shares.values()) < math.inf:
            raise ValueError(f"{text[:50]!r}: the shares must have a finite sum above 0")
        return cls(tuple(shares.items()))

    def __str__(self) -> str:
        return ",".join(f"{role}={_digits(share)}" for role, share in self.shares)

    def __bool__(self) -> bool:
        return bool(self.shares)


@dataclass(frozen=True)
class Every:
    """An interval: ``500`` optimizer steps, or ``2ep`` (epochs; ``0.5ep`` too). 0 is never."""

    amount: float = 0
    of_epochs: bool = False

    @classmethod
    def parse(cls, text: str) -> "Every":
        """Raises ValueError for anything else than those forms."""
        match = re.fullmatch(r"(\d+)|(\d+\.?\d*|\.\d+) ?ep", str(text).strip())
        if not match:
            raise ValueError(f"{text!r} is no interval: give steps (500) or epochs (2ep)")
        every = cls(float(match[2]), True) if match[2] else cls(int(match[1]))
        maximum, minimum = (MAX_EPOCHS, 1 / MAX_EPOCHS) if every.of_epochs else (MAX_COUNT, 1)
        if every and not minimum <= every.amount <= maximum:
            raise ValueError(f"{str(text)[:50]!r} is out of range for an interval")
        return every

    def __str__(self) -> str:
        return _digits(self.amount) + ("ep" if self.of_epochs else "")

    def __bool__(self) -> bool:
        return self.amount > 0

    def is_due(self, step: int, batches_done: int, num_batches: int) -> bool:
        """After optimizer step ``step``, the ``batches_done``-th global batch of the plan (which
        has ``num_batches`` an epoch)."""
        if not self:
            return False
        if not self.of_epochs:
            return step % int(self.amount) == 0
        length = self.amount * num_batches
        return floor(batches_done / length + 1e-9) > floor((batches_done - 1) / length + 1e-9)


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Each setting of a run against its own range; None is not checked.

    Raises:
        ValueError: names the option and the range.
    """
    for name, minimum in _MINIMA.items():
        value = settings[name]
        if value is not None and value < minimum:
            raise ValueError(f"{flag(name)} must be at least {minimum}, not {value}")
        if value is not None and name not in ("seed", *_FINITE) and not value <= MAX_COUNT:
            raise ValueError(f"{flag(name)} must be at most {MAX_COUNT}, not {value}")
    for name in _POSITIVE:
        value = settings[name]
        if value is not None and not 0 < value <= 1e6:
            raise ValueError(f"{flag(name)} must be above 0 and at most 1e6, not {value}")
    for name in _FINITE:
        if not math.isfinite(settings[name]):
            raise ValueError(f"{flag(name)} must be finite, not {settings[name]}")
    for name in _SHARES:
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{flag(name)} must be in 0..1, 1 excluded, not {settings[name]}")
    if settings["seed"] >= 2**63:
        raise ValueError(f"--seed must be below 2**63, not {settings['seed']}")
    if any(step < 1 for step in settings["checkpoint_at"]):
        raise ValueError(f"--checkpoint-at takes steps from 1 on, not {settings['checkpoint_at']}")
    if settings["timestep_range"]:
        low, high = (*settings["timestep_range"], -1, -1)[:2]
        if len(settings["timestep_range"]) != 2 or not 0 <= low < high:
            raise ValueError("--timestep-range takes LOW,HIGH, for instance 0,500")
    check_gpus(settings["gpus"])
    if settings["fit"] is not None:
        parse_memory(settings["fit"])


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
