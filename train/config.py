"""What a training run can be told. Imports no torch: ``--help`` is made from it."""

import math
import re
from dataclasses import dataclass, field, fields
from math import ceil, floor
from pathlib import Path
from typing import Any, Literal

from sdxl.base import BASE_HELP
from train.checks import MAX_COUNT, check_choices, check_memory, check_ranges

MAX_REPEATS = 1_000_000
MAX_EPOCHS = 1e6  # of an interval, and its inverse the least


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _digits(value: float) -> str:
    """All of them, so that it is the same number when read again."""
    return repr(float(value)).removesuffix(".0")


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
        while found := re.fullmatch(r"(.+),(weight|repeats)=([^,]*)", folder):
            folder, name, value = found.groups()
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
class Every:
    """An interval: ``500`` optimizer steps, or ``2ep`` (epochs; ``0.5ep`` too). 0 is never."""

    amount: float = 0
    of_epochs: bool = False

    @classmethod
    def parse(cls, text: str) -> "Every":
        """Raises ValueError for anything else than those forms."""
        found = re.fullmatch(r"(\d+)|(\d+\.?\d*|\.\d+) ?ep", str(text).strip())
        if not found:
            raise ValueError(f"{text!r} is no interval: give steps (500) or epochs (2ep)")
        every = cls(float(found[2]), True) if found[2] else cls(int(found[1]))
        most, least = (MAX_EPOCHS, 1 / MAX_EPOCHS) if every.of_epochs else (MAX_COUNT, 1)
        if every and not least <= every.amount <= most:
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


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. ``num`` of steps are optimizer steps."""

    caches: tuple[CacheUse, ...]
    base: str = field(metadata={"help": BASE_HELP})
    out: Path = field(metadata={"help": "The run's folder."})
    val: Path | None = _option(None, "Validation cache; the default is CACHE/val, if there is one.")

    full: bool = _option(False, "Train the whole UNet instead of a LoRA.")
    adapter: Literal["lora", "rslora", "dora"] = _option(
        "lora",
        "rslora: scaled by alpha / sqrt(rank); dora: direction and length apart (UIs cannot apply "
        "it: they read what export --merge writes).",
    )
    rank: int | None = _option(None, "Rank of the LoRA (default 8).")
    alpha: float | None = _option(
        None, "Alpha of the LoRA: its strength is alpha / rank (default 4 x rank)."
    )
    targets: str | None = _option(
        None,
        "What a LoRA adapts: attention (default), attention-out, all (every linear of the "
        "transformers, 722 in SDXL), or a regex over module names.",
    )
    conv: bool = _option(
        False, "Adapt the convolutions of the ResNets and samplers too, not conv_in and conv_out."
    )
    init_lora: Path | None = _option(
        None, "Go on from this LoRA file; rank, alpha and targets are its own."
    )

    lr: float | None = _option(
        None,
        "Peak learning rate (default 1e-4; prodigy 1; adafactor 1e-2, relative to the size of "
        "each weight).",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = _option(
        "adamw", "adamw8bit and prodigy need a package more: pip install .[8bit] or .[prodigy]."
    )
    lr_schedule: Literal["constant", "linear", "cosine", "cosine-restarts"] = _option(
        "constant", "After the warmup."
    )
    num_cycles: int = _option(1, "Of cosine-restarts.")
    warmup_steps: int = _option(0, "Steps of linear warmup.")
    weight_decay: float = _option(1e-2, "Decoupled, as in AdamW.")
    steps: int | None = _option(None, "Length of the run in optimizer steps.")
    epochs: float | None = _option(None, "Length of the run in epochs.")
    batch_size: int = _option(1, "Samples per process and forward pass.")
    accumulate: int = _option(1, "Forward passes per optimizer step.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0: never.")
    max_skipped: int = _option(
        20, "Stop after so many steps in a row whose loss or gradient was not finite."
    )
    ema: float = _option(0.0, "Decay of an average of the weights, e.g. 0.9999; 0: none.")
    ema_on_cpu: bool = _option(False, "Keep the average in the CPU's memory.")
    seed: int = _option(0, "Of everything random.")

    prediction_type: Literal["epsilon", "v_prediction"] | None = _option(
        None, "What the UNet predicts; the default is what the base's scheduler says."
    )
    zero_terminal_snr: bool | None = _option(
        None, "Rescale the schedule to end in pure noise; the default is what the base says."
    )
    min_snr_gamma: float | None = _option(None, "Min-SNR loss weights, e.g. 5.")
    noise_offset: float = _option(0.0, "Strength of noise that is one value a channel, e.g. 0.05.")
    loss: Literal["mse", "huber"] = _option("mse", "Of predicted against target.")
    huber_delta: float = _option(0.1, "Where huber turns from square to linear.")
    timesteps: Literal["uniform", "logit-normal"] = _option("uniform", "How they are drawn.")
    logit_mean: float = _option(0.0, "Of logit-normal; above 0: more noise.")
    logit_std: float = _option(1.0, "Of logit-normal.")
    timestep_range: tuple[int, ...] = _option((), "LOW,HIGH: train on these only, HIGH excluded.")
    masked_loss: bool = _option(False, "Weigh the loss by the samples' masks, where they have one.")
    caption_dropout: float = _option(0.0, "Chance that a sample is trained without its caption.")
    unconditional: Literal["empty", "zeros"] = _option(
        "empty", "What stands for a dropped caption: the encoded empty prompt, or zeros."
    )

    device: str = _option("auto", "auto, cuda, mps or cpu.")
    gpus: str | None = _option(None, "Processes to start, one a GPU: a number, or auto.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _option(
        "auto", "auto: bf16 on CUDA, else fp32."
    )
    allow_cpu_bf16: bool = _option(False, "Keep a bf16 or fp16 --precision on a CPU too.")
    gradient_checkpointing: bool | None = _option(
        None, "Recompute activations to save memory; the default is on with CUDA."
    )
    base_quant: Literal["none", "int8", "nf4"] = _option(
        "none", "Keep the linears of a LoRA's frozen base in 8 or 4 bits."
    )
    pure_bf16: bool = _option(
        False, "--full: weights in bf16 without an fp32 copy, rounded stochastically."
    )
    fused_backward: bool = _option(
        False, "Step each weight as its gradient arrives, so that gradients take no memory."
    )
    compile: bool = _option(False, "Compile the transformer blocks.")
    channels_last: bool = _option(False, "Lay tensors out for convolutions.")
    warm_up: bool | None = _option(
        None, "Try the largest bucket first, so that out-of-memory shows now; default: on CUDA."
    )
    reader_threads: int = _option(4, "Threads that read ahead.")

    eval_every: Every = _option(
        Every(), "Eval at every so many steps (500) or epochs (2ep); always at the ends."
    )
    preview_every: Every = _option(
        Every(), "Draw the cache's preview prompts as often, the first time before step 1."
    )
    preview_vae: bool = _option(False, "Decode previews with the base's VAE.")
    checkpoint_every: Every = _option(Every(), "Write a checkpoint as often.")
    checkpoint_at: tuple[int, ...] = _option((), "And at these steps, e.g. 600,680,750.")
    keep: int = _option(
        0,
        "Keep so many of --checkpoint-every, the last one, and the best of those that were "
        "evaluated at their step; 0: all.",
    )
    log_every: int = _option(10, "Steps between writes of metrics; all steps are in them.")
    resume: bool = _option(False, "Go on from the run's newest whole checkpoint.")
    allow_changed_data: bool = _option(
        False, "--resume with other data: the epoch starts again with what there is."
    )
    overwrite: bool = _option(False, "Delete what the run's folder holds.")
    dry_run: bool = _option(False, "Say what would be trained, and in how much memory; train not.")
    wandb: Literal["disabled", "offline", "online"] = _option("disabled", "Weights & Biases.")
    wandb_project: str = _option("shardtune", "Its project.")

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choices(self)
        check_memory(self)

    def num_steps(self, batches_per_epoch: int) -> int:
        """The length of the run, where each step takes a global batch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, ceil(round(self.epochs * batches_per_epoch, 6)))

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return {"prodigy": 1.0, "adafactor": 1e-2}.get(self.optimizer, 1e-4)

    @property
    def lora_rank(self) -> int:
        return self.rank or 8

    @property
    def lora_alpha(self) -> float:
        return 4.0 * self.lora_rank if self.alpha is None else self.alpha

    def resolved(self) -> dict[str, Any]:
        """The settings by name, with their defaults where those depend on others."""
        settings = {one.name: getattr(self, one.name) for one in fields(self)}
        settings["lr"] = self.peak_lr
        if not self.full and self.init_lora is None:
            settings["rank"], settings["alpha"] = self.lora_rank, self.lora_alpha
            settings["targets"] = self.targets or "attention"
        return settings
