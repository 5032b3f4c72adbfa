"""Finds where a run starts: at step 0, or exactly where an earlier run stopped."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.devices import pick_precision
from runtime.files import content_digest
from runtime.messages import pluralize
from sdxl.base import Base
from sdxl.fingerprint import file_digest, weights_digest
from sdxl.lora.names import LORA
from sdxl.lora.read import find_lora
from shards.plan import Plan, RankShare
from shards.reader import Cache, groups_of
from train.checkpoint import load_checkpoint
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import Learner
from train.objective import objective_of
from train.option_values import CaptionShares, flag
from train.saved_options import FIXED

# Settings that a resumed run may change; a change is reported, in case it is an accident.
NOTED = (
    "lr",
    "lr_schedule",
    "steps",
    "epochs",
    "num_cycles",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "min_snr_gamma",
    "noise_offset",
    "loss",
    "huber_delta",
    "timesteps",
    "logit_mean",
    "logit_std",
    "timestep_range",
    "masked_loss",
    "captions",
    "caption_dropout",
    "unconditional",
)
DATA = "cache"
INIT_LORA = "LoRA it began with"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts: after ``step`` optimizer steps and ``batches_done`` batches of the
    plan."""

    config: TrainConfig  # with which the run continues
    step: int = 0
    batches_done: int = 0
    skipped_in_a_row: int = 0
    path: Path | None = None  # the checkpoint
    state: dict[str, Any] = field(default_factory=dict)


def find_start(
    config: TrainConfig,
    base: Base,
    caches: Sequence[Cache],
    world: DistContext,
    checkpoint: tuple[Path, dict[str, Any]] | None,
) -> tuple[Start, Plan, RankShare, dict[str, Any]]:
    """The start of the run, the plan, this rank's share of it, and the run's identity.

    ``checkpoint`` is what the run resumes from, if it does.

    Raises:
        ValueError: the run in the folder cannot be resumed with these settings, data, base or
            processes.
    """
    share = RankShare(batch_size=config.batch_size, world=world.size, rank=world.rank)
    if checkpoint is None:
        identity = identity_of(config, base, caches, world)
        _agree(config, world, f"0 {content_digest(identity)}")
        if config.resume:
            _refuse_weights(config.out)
        if config.resume and world.is_main:
            warnings.warn(
                f"{config.out}: --resume found no whole checkpoint there; starts at step 0",
                stacklevel=2,
            )
        size = config.batch_size * world.size * config.accumulate
        plan = Plan(groups_of(caches), config.seed, size)
        return Start(config=config), plan, share, identity
    path, state = checkpoint
    config, lora = with_init_lora(config, path, state)
    identity = identity_of(config, base, caches, world) | {INIT_LORA: lora}
    _agree(config, world, f"{state['step']} {content_digest(identity)}")
    size = _global_batch(config, world, state["global_batch"])
    plan = Plan(groups_of(caches), config.seed, size)
    _check_settings(config, state)
    is_changed = _is_changed(config, identity, state)
    assert is_changed or state["plan"] == plan.digest, "same data and seed, and another plan"
    done = 0 if is_changed else state["batches_of_epoch"]
    start = Start(
        config=config,
        step=state["step"],
        batches_done=state["epoch"] * plan.num_batches + done,
        skipped_in_a_row=state["skipped_in_a_row"],
        path=path,
        state=state,
    )
    return start, plan, share, identity


def _refuse_weights(out: Path) -> None:
    """A run that cannot be resumed must not start again over what it has published."""
    for name in (LORA, "unet"):
        if (out / name).exists():
            raise ValueError(
                f"{out / name}: --resume found no undamaged checkpoint, and a run from step 0 "
                "would replace these weights; give another --out, or --overwrite, not --resume"
            )


def with_init_lora(
    config: TrainConfig, checkpoint: Path, state: dict[str, Any]
) -> tuple[TrainConfig, str | None]:
    """The settings, and the digest of the LoRA file that the run began with.

    A run that began with a LoRA file has all that it needs of it in its checkpoints: it is resumed
    from those, whether ``--init-lora`` is given again or not, and whether that file is still there.

    Raises:
        ValueError: ``--init-lora`` is another file than the run began with, or options of a new
            LoRA are given.
    """
    init_lora, lora = config.init_lora, state["identity"].get(INIT_LORA)
    if lora is None:
        return config, None if init_lora is None else file_digest(find_lora(init_lora))
    if init_lora is not None:
        try:
            # Of a checkpoint with an average, earlier versions took what was averaged.
            digests = [file_digest(find_lora(init_lora, average)) for average in (None, False)]
            lora = lora if lora in digests else digests[0]
        except (ValueError, OSError):
            warnings.warn(
                f"{init_lora}: cannot be read, and is not needed: the run goes on from "
                f"{checkpoint}",
                stacklevel=2,
            )
    try:
        return replace(config, init_lora=checkpoint / LORA), lora
    except ValueError as error:
        raise ValueError(f"{config.out}: the run began with --init-lora: {error}") from None


def restore(start: Start, learner: Learner, config: TrainConfig) -> None:
    """Put the checkpoint's state in place, if there is one."""
    if start.path is not None:
        load_checkpoint(start.path, learner, config.full, start.state)


def state_of(
    config: TrainConfig, plan: Plan, identity: dict[str, Any], batches_done: int
) -> dict[str, Any]:
    """The state that a checkpoint keeps for ``find_start``."""
    epoch, done = divmod(batches_done, plan.num_batches)
    return {
        "identity": identity,
        "plan": plan.digest,
        "global_batch": plan.global_batch,
        "epoch": epoch,
        "batches_of_epoch": done,
        "config": {name: _plain(config.resolved()[name]) for name in (*FIXED, *NOTED)},
    }


def identity_of(
    config: TrainConfig, base: Base, caches: Sequence[Cache], world: DistContext
) -> dict[str, Any]:
    """What must stay the same in a resumed run, by the names that messages use."""
    objective = objective_of(config, base.scheduler_config)
    precision = pick_precision(config.precision, world.device, config.allow_cpu_bf16, quiet=True)
    init = config.init_lora
    return {
        DATA: [[cache.data_digest, cache.weight, cache.repeats] for cache in caches],
        "base UNet": weights_digest(base.unet),
        INIT_LORA: None if init is None else file_digest(find_lora(init)),
        "prediction type": objective.prediction_type,
        "noise schedule": content_digest(objective.alphas_cumprod.tolist()),
        "precision": str(precision.dtype).removeprefix("torch."),
    }


def _agree(config: TrainConfig, world: DistContext, digest: str) -> None:
    """Refuse to start where the processes have found different checkpoints, data or bases."""
    if len(set(world.gather([digest]))) > 1:
        raise ValueError(
            f"{config.out}: the processes do not see the same run there; machines need a shared "
            "folder"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, CaptionShares):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _check_settings(config: TrainConfig, state: dict[str, Any]) -> None:
    # A run of an earlier version has no roles, and does not say so.
    settings, saved = config.resolved(), {"captions": ""} | state["config"]
    for name in FIXED:
        if name in saved and saved[name] != settings[name]:
            raise ValueError(
                f"{config.out}: cannot resume with {flag(name)} {settings[name]}: the run has "
                f"{saved[name]}"
            )
    for name in NOTED:
        if name in ("steps", "epochs") and config.lr_schedule == "constant":
            continue  # the length of the run shapes the other schedules alone
        if name in saved and saved[name] != _plain(settings[name]):
            warnings.warn(
                f"the run goes on with {flag(name)} {settings[name]}; it was {saved[name]}",
                stacklevel=2,
            )


def _is_changed(config: TrainConfig, identity: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether the run is resumed with other data, where that is allowed."""
    for name, value in identity.items():
        if state["identity"][name] == value or (name == DATA and config.allow_changed_data):
            continue
        remedy = "; --allow-changed-data starts its epoch again" if name == DATA else ""
        raise ValueError(
            f"{config.out}: cannot resume: the {name} is not the run's any more{remedy}"
        )
    return bool(state["identity"][DATA] != identity[DATA])


def _global_batch(config: TrainConfig, world: DistContext, size: int) -> int:
    """A resumed run keeps its global batch, whatever the number of processes."""
    at_once = config.batch_size * world.size
    if size == at_once * config.accumulate:
        return size
    if config.fused_backward and size != at_once:
        raise ValueError(
            f"--fused-backward cannot accumulate to the run's global batch of {size}; give "
            f"--batch-size {-(-size // world.size)}"
        )
    passes = -(-size // at_once)
    uneven = "" if size % at_once == 0 else ", the last one not by every process"
    warnings.warn(
        f"the run's global batch is {size} and stays so: {pluralize(passes, 'forward pass')} of "
        f"{world.size} x {config.batch_size} make a step{uneven}",
        stacklevel=2,
    )
    return size
