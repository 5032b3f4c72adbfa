"""The settings of a training run, and which exclude each other. No torch: ``--help`` reads them."""

from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Literal

from runtime.options import option
from runtime.path_kinds import BASE, CACHE, IMAGES, RUN, WEIGHTS, check_kind
from sdxl.base import BASE_HELP, check_base
from train.option_values import DEPENDENTS, CacheUse, CaptionShares, Every, check_ranges, flag

_LORA_ONLY = ("rank", "alpha", "targets", "conv", "init_lora")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. Steps are optimizer steps."""

    PANELS: ClassVar[dict[str, str]] = {
        "Essentials": "base out steps epochs lr batch_size",
        "Data": "val captions caption_dropout unconditional masked_loss",
        "Adapter": "rank alpha adapter targets conv init_lora full",
        "Objective": "prediction_type zero_terminal_snr min_snr_gamma noise_offset loss "
        "huber_delta timesteps logit_mean logit_std timestep_range",
        "Optimizer": "optimizer lr_schedule num_cycles warmup_steps accumulate "
        "weight_decay max_grad_norm max_skipped ema ema_on_cpu ema_every seed",
        "Memory and speed": "device gpus precision fit gradient_checkpointing base_quant pure_bf16 "
        "fused_backward compile cuda_graphs channels_last warm_up reader_threads "
        "allow_cpu_bf16",
        "Evaluation and previews": "eval_every preview_every preview_vae",
        "Checkpoints": "checkpoint_every checkpoint_at keep publish resume allow_changed_data "
        "overwrite",
        "Logging and the rest": "dry_run log_every tensorboard wandb wandb_project wandb_entity "
        "wandb_name wandb_group wandb_tags wandb_artifact",
    }

    caches: tuple[CacheUse, ...]
    base: str = option(
        MISSING, BASE_HELP, metavar="BASE", aliases="--pretrained-model-name-or-path"
    )
    out: Path = option(MISSING, "Folder of the run.", metavar="PATH", aliases="--output-dir")
    val: Path | None = option(
        None, "Validation cache. Default: CACHE/val, if there is one.", metavar="CACHE"
    )

    full: bool = option(False, "Train the whole UNet instead of a LoRA.")
    adapter: Literal["lora", "rslora", "dora"] = option(
        "lora",
        "Kind of LoRA. rslora scales by alpha / sqrt(rank); dora learns direction and length "
        "apart (user interfaces cannot apply it: give them what export --merge writes).",
    )
    rank: int | None = option(
        None, "Rank of the LoRA. Default: 8.", aliases="--lora-rank --network-dim"
    )
    alpha: float | None = option(
        None,
        "Alpha of the LoRA; its strength is alpha / rank. Default: 4 x rank.",
        aliases="--lora-alpha --network-alpha",
    )
    targets: str | None = option(
        None,
        "Layers that the LoRA adapts: attention (default), attention-out, all (every linear "
        "layer of the transformers, 722 in SDXL), or a regular expression over module names.",
        metavar="NAME|REGEX",
    )
    conv: bool = option(
        False, "Adapt the convolutions of the ResNets and samplers too (not conv_in and conv_out)."
    )
    init_lora: Path | None = option(
        None,
        "Start from this LoRA file, with its rank, alpha and targets.",
        metavar="FILE",
        aliases="--network-weights",
    )

    lr: float | None = option(
        None,
        "Peak learning rate. Default: 1e-4; 1 with prodigy; 1e-2 with adafactor, relative to "
        "the size of each weight.",
        aliases="--learning-rate --unet-lr",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = option(
        "adamw",
        "adamw8bit and prodigy need another package: pip install .[8bit] or .[prodigy].",
        aliases="--optimizer-type",
    )
    lr_schedule: Literal["constant", "linear", "cosine", "cosine-restarts"] = option(
        "constant", "Learning-rate schedule after the warmup.", aliases="--lr-scheduler"
    )
    num_cycles: int = option(1, "Number of cycles of --lr-schedule cosine-restarts.")
    warmup_steps: int = option(0, "Number of steps of linear warmup.", aliases="--lr-warmup-steps")
    weight_decay: float = option(
        1e-2, "Decoupled weight decay, as in AdamW.", aliases="--adam-weight-decay"
    )
    steps: int | None = option(
        None,
        "Length of the run in optimizer steps. Give this or --epochs.",
        aliases="--max-train-steps",
    )
    epochs: float | None = option(
        None,
        "Length of the run in epochs. Give this or --steps.",
        aliases="--num-train-epochs --max-train-epochs",
    )
    batch_size: int = option(
        1, "Samples per process and forward pass.", aliases="--train-batch-size"
    )
    accumulate: int = option(
        1,
        "Gradient accumulation: forward and backward passes per optimizer step.",
        aliases="--gradient-accumulation-steps",
    )
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; 0 disables clipping.")
    max_skipped: int = option(
        20,
        "Stop after N skipped steps in a row; a step is skipped when its loss or gradient is "
        "not finite.",
        metavar="N",
    )
    ema: float = option(
        0.0,
        "Decay of an exponential moving average of the weights, for example 0.9999; 0 keeps none.",
    )
    ema_on_cpu: bool = option(
        False,
        "Keep the moving average in CPU memory. --ema-every 10 then takes a tenth of the CPU time.",
    )
    ema_every: int = option(
        1, "Update the moving average at every Nth step, with the decay of N steps.", metavar="N"
    )
    seed: int = option(0, "Random seed.")

    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        None, "What the UNet predicts. Default: what the base's scheduler config says."
    )
    zero_terminal_snr: bool | None = option(
        None, "Rescale the noise schedule to end in pure noise. Default: what the base says."
    )
    min_snr_gamma: float | None = option(
        None, "Weigh the loss by min-SNR with this gamma, for example 5.", aliases="--snr-gamma"
    )
    noise_offset: float = option(
        0.0, "Strength of an added noise that is constant over each channel, for example 0.05."
    )
    loss: Literal["mse", "huber"] = option("mse", "Loss between prediction and target.")
    huber_delta: float = option(
        0.1, "Difference at which --loss huber turns from quadratic to linear."
    )
    timesteps: Literal["uniform", "logit-normal"] = option(
        "uniform", "Distribution from which timesteps are drawn."
    )
    logit_mean: float = option(
        0.0, "Mean of --timesteps logit-normal; above 0 favors noisier timesteps."
    )
    logit_std: float = option(1.0, "Standard deviation of --timesteps logit-normal.")
    timestep_range: tuple[int, ...] = option(
        (), "LOW,HIGH: train on timesteps from LOW up to, not including, HIGH.", metavar="LOW,HIGH"
    )
    masked_loss: bool = option(False, "Weigh the loss by the masks of the samples that have one.")
    captions: CaptionShares = option(
        CaptionShares(),
        "Share of each role among the captions that are drawn, for example tags=0.5,short=0.5, of "
        "a cache with roles. Default: every caption of an image is equally likely.",
    )
    caption_dropout: float = option(
        0.0, "Probability that a sample is trained without its caption."
    )
    unconditional: Literal["empty", "zeros"] = option(
        "empty", "Embedding of a dropped caption: the encoded empty prompt, or zeros."
    )

    device: str = option("auto", "Device to train on: auto, cuda, mps or cpu.", metavar="DEVICE")
    gpus: str | None = option(
        None,
        "Number of processes to start, one per GPU of this machine, or auto for all.",
        metavar="N|auto",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "Precision of the forward pass. auto is bf16 on CUDA (fp16 on a GPU without bf16), else "
        "fp32.",
        aliases="--mixed-precision",
    )
    allow_cpu_bf16: bool = option(
        False, "Compute in bf16 or fp16 on a CPU too, where --precision asks for it."
    )
    fit: str | None = option(
        None,
        "Choose batch size and accumulation (their product stays), gradient checkpointing, the "
        "average's place and, where it must be, a quantized base or pure bf16, so that the run "
        "fits into this memory, for example 12GB, or into what the device has free (auto).",
        metavar="SIZE|auto",
    )
    gradient_checkpointing: bool | None = option(
        None,
        "Recompute activations in the backward pass to save memory. Default: on where the card has "
        "no room for them all.",
    )
    base_quant: Literal["none", "int8", "nf4"] = option(
        "none", "Store the linear layers of a LoRA's frozen base in 8 or 4 bits."
    )
    pure_bf16: bool = option(
        False,
        "With --full: keep the weights in bf16 without an fp32 copy, with stochastic rounding.",
    )
    fused_backward: bool = option(
        False,
        "With --full: update each weight as soon as its gradient is there, so that gradients "
        "take no memory.",
    )
    compile: bool = option(False, "Compile the transformer and ResNet blocks with torch.compile.")
    cuda_graphs: bool = option(
        False,
        "On one CUDA GPU: replay forward and backward passes as CUDA graphs, one for each size of "
        "batches (16 at most). Takes the memory of two passes.",
    )
    channels_last: bool = option(False, "Use the channels-last memory layout.")
    warm_up: bool | None = option(
        None,
        "Try the largest bucket before the first step, so that a lack of memory shows at "
        "once. Default: on with CUDA.",
    )
    reader_threads: int = option(4, "Number of threads that read samples ahead.")

    eval_every: Every = option(
        Every(),
        "Evaluate every N steps (500) or epochs (2ep); 0: only before the first and after the last "
        "step.",
    )
    preview_every: Every = option(
        Every(),
        "Generate previews of the cache's preview prompts every N steps (500) or epochs "
        "(2ep), and before the first step; 0: never.",
    )
    preview_vae: bool = option(
        False, "Decode previews with the base's VAE instead of the cache's color map."
    )
    checkpoint_every: Every = option(
        Every(),
        "Save a checkpoint every N steps (500) or epochs (2ep); 0: only at the end.",
        aliases="--checkpointing-steps --save-every-n-steps",
    )
    checkpoint_at: tuple[int, ...] = option(
        (), "Save a checkpoint after these steps too, for example 600,680,750."
    )
    keep: int = option(
        0,
        "Keep the N most recent periodic checkpoints, plus the last one and the best "
        "evaluated one; 0 keeps all.",
        metavar="N",
        aliases="--checkpoints-total-limit",
    )
    publish: Literal["last", "best"] = option(
        "last",
        "Which weights the run ends with: those of its last step, or of the checkpoint with the "
        "lowest eval loss. Of a finished run: train --resume RUN --publish best.",
    )
    log_every: int = option(10, "Write metrics every N steps; every step is in them.")
    resume: bool = option(
        False,
        "Resume from the newest undamaged checkpoint in the run's folder; train --resume RUN needs "
        "nothing else.",
    )
    allow_changed_data: bool = option(
        False, "With --resume: accept other data than before; the epoch starts again."
    )
    overwrite: bool = option(
        False,
        "Replace the run in the folder; the old one is deleted when the new one has a checkpoint.",
    )
    dry_run: bool = option(False, "Print the plan and a memory estimate, then exit.")
    tensorboard: bool = option(
        False, "Log to TensorBoard, in RUN/tensorboard; needs pip install .[tensorboard]."
    )
    wandb: Literal["disabled", "offline", "online"] = option("disabled", "Log to Weights & Biases.")
    wandb_project: str = option("shardtune", "Project of --wandb.")
    wandb_entity: str | None = option(
        None, "User or team of --wandb. Default: that of the API key.", metavar="NAME"
    )
    wandb_name: str | None = option(
        None, "Name of the run in --wandb. Default: that of RUN's folder.", metavar="NAME"
    )
    wandb_group: str | None = option(None, "Group of runs in --wandb.", metavar="NAME")
    wandb_tags: str | None = option(
        None, "Tags of the run in --wandb, with commas between.", metavar="TAG,TAG"
    )
    wandb_artifact: Literal["none", "lora", "full"] | None = option(
        None,
        "Final weights to upload with --wandb: none, a LoRA, or the whole UNet of --full too. "
        "Default: weights of less than 1 GB.",
    )

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        check_choices(self)
        check_memory(self)

    def check_inputs(self) -> None:
        """Refuse a cache or a base that is something else, before anything is loaded.

        Raises:
            ValueError: says what it is.
        """
        remedies = {
            IMAGES: "encode them first: python cli.py encode {path} --base {base} --out CACHE",
            RUN: "give the cache that it was trained on; --resume --out {path} goes on with it",
            BASE: "give it as --base, and here a cache",
            WEIGHTS: "give a cache; --init-lora starts from a LoRA",
        }
        for folder in [use.folder for use in self.caches] + ([self.val] if self.val else []):
            names = {"path": folder, "base": self.base}
            check_kind(folder, CACHE, {k: text.format(**names) for k, text in remedies.items()})
        check_base(self.base)
        self.check_packages()

    def check_packages(self) -> None:
        """
        Raises:
            ValueError: names the extra that a setting needs and that is not installed.
        """
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs tensorboard: pip install '.[tensorboard]'")

    @staticmethod
    def saved_options(given: dict[str, Any]) -> dict[str, Any]:
        """What a run that is resumed has for the options that are not ``given``."""
        from train.saved_options import saved_options

        return saved_options(given) if given.get("resume") else {}

    def num_steps(self, batches_per_epoch: int) -> int:
        """The length of the run, where each step takes a global batch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, ceil(round(self.epochs * batches_per_epoch, 6)))

    @property
    def tags(self) -> tuple[str, ...]:
        """Those of ``--wandb-tags``."""
        tags = (tag.strip() for tag in (self.wandb_tags or "").split(","))
        return tuple(tag for tag in tags if tag)

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

    @property
    def special_imports(self) -> frozenset[str]:
        """Packages that ``skip_unused_imports`` must not skip in this run."""
        uses = {
            "bitsandbytes": self.optimizer == "adamw8bit"
            or self.base_quant == "nf4"
            or self.fit is not None,
            "torch._dynamo": self.compile,
        }
        return frozenset(name for name, used in uses.items() if used)

    def resolved(self) -> dict[str, Any]:
        """The settings by name, with their defaults where those depend on others."""
        settings = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        settings["lr"] = self.peak_lr
        if not self.full and self.init_lora is None:
            settings["rank"], settings["alpha"] = self.lora_rank, self.lora_alpha
            settings["targets"] = self.targets or "attention"
        return settings


def check_choices(config: "TrainConfig") -> None:
    """Refuse settings that exclude each other, or that another one makes meaningless."""
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
    for name, required, is_set in (
        ("ema_on_cpu", "--ema", config.ema > 0),
        ("ema_every", "--ema", config.ema > 0),
        ("preview_vae", "--preview-every", bool(config.preview_every)),
        ("huber_delta", "--loss huber", config.loss == "huber"),
        ("logit_mean", "--timesteps logit-normal", config.timesteps == "logit-normal"),
        ("logit_std", "--timesteps logit-normal", config.timesteps == "logit-normal"),
        ("num_cycles", "--lr-schedule cosine-restarts", config.lr_schedule == "cosine-restarts"),
        ("unconditional", "--caption-dropout", config.caption_dropout > 0),
        *((name, "--wandb", config.wandb != "disabled") for name in DEPENDENTS["wandb"]),
    ):
        default = config.__dataclass_fields__[name].default
        if getattr(config, name) != default and not is_set:
            raise ValueError(f"{flag(name)} does nothing without {required}")


def check_memory(config: "TrainConfig") -> None:
    """Refuse what the ways to save memory cannot be combined with."""
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
    """Refuse what ``num`` processes cannot do.

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
