"""What a training run can be told. Imports no torch: ``--help`` is made from it."""

import math
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. ``num`` of steps are optimizer steps."""

    cache: Path
    base: str = field(metadata={"help": "SDXL base: a diffusers folder or a hub id."})
    out: Path = field(metadata={"help": "The run's folder."})
    val: Path | None = _option(None, "Validation cache; the default is CACHE/val, if there is one.")

    full: bool = _option(False, "Train the whole UNet instead of a LoRA.")
    rank: int = _option(8, "Rank of the LoRA.")
    alpha: float = _option(32.0, "Alpha of the LoRA: its strength is alpha / rank.")
    targets: Literal["attention", "attention-out", "all"] = _option(
        "attention", "What a LoRA adapts; all: every linear of the transformers, 722 in SDXL."
    )

    lr: float = _option(1e-4, "Peak learning rate.")
    lr_schedule: Literal["constant", "cosine"] = _option("constant", "After the warmup.")
    warmup_steps: int = _option(0, "Steps of linear warmup.")
    weight_decay: float = _option(1e-2, "Of AdamW.")
    steps: int | None = _option(None, "Length of the run in optimizer steps.")
    epochs: float | None = _option(None, "Length of the run in epochs.")
    batch_size: int = _option(1, "Samples per process and forward pass.")
    accumulate: int = _option(1, "Forward passes per optimizer step.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0: never.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = _option(
        None, "What the UNet predicts; the default is what the base's scheduler says."
    )
    seed: int = _option(0, "Of everything random.")

    device: str = _option("auto", "auto, cuda, mps or cpu.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _option(
        "auto", "auto: bf16 on CUDA, else fp32."
    )
    allow_cpu_bf16: bool = _option(False, "Keep a bf16 or fp16 --precision on a CPU too.")
    gradient_checkpointing: bool | None = _option(
        None, "Recompute activations to save memory; the default is on with CUDA."
    )
    reader_threads: int = _option(4, "Threads that read ahead.")

    eval_every: int = _option(
        0, "Eval at every so many steps; with a val cache always at the ends."
    )
    checkpoint_every: int = _option(0, "Write a checkpoint at every so many steps.")
    checkpoint_at: tuple[int, ...] = _option((), "And at these steps, e.g. 600,680,750.")
    log_every: int = _option(10, "Steps between writes of metrics; all steps are in them.")
    resume: bool = _option(False, "Go on from the run's newest whole checkpoint.")
    overwrite: bool = _option(False, "Delete what the run's folder holds.")
    wandb: Literal["disabled", "offline", "online"] = _option("disabled", "Weights & Biases.")
    wandb_project: str = _option("shardtune", "Its project.")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{flag(name)} must be at least {least}, not {value}")
        for name, most in (("lr", 1e6), ("alpha", 1e6), ("epochs", 1e6)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise ValueError(f"{flag(name)} must be above 0 and finite, not {value}")
        for name in ("weight_decay", "max_grad_norm"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{flag(name)} must be finite, not {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2**63, not {self.seed}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the length of the run: either --steps or --epochs")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")
        if any(step < 1 for step in self.checkpoint_at):
            raise ValueError(f"--checkpoint-at takes steps from 1 on, not {self.checkpoint_at}")


_LEAST = {
    "rank": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "steps": 1,
    "batch_size": 1,
    "accumulate": 1,
    "max_grad_norm": 0,
    "reader_threads": 1,
    "eval_every": 0,
    "checkpoint_every": 0,
    "log_every": 1,
    "seed": 0,
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_recipe(path: Path) -> dict[str, Any]:
    """Options from a TOML file, by their names with ``-`` or ``_``.

    Raises:
        ValueError: unreadable, or a key that is no option (the known ones are listed).
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    known = {one.name for one in fields(TrainConfig)}
    values = {key.replace("-", "_"): value for key, value in table.items()}
    if unknown := sorted(set(values) - known):
        names = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise ValueError(f"{path}: unknown option {unknown[0].replace('_', '-')} (known: {names})")
    return values
