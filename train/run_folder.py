"""The run's folder: whether it may be used, and what stands in it beside weights."""

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from processes.lock import locked
from runtime.files import write_durable
from shards.plan import Plan
from train.adapters import trainable
from train.config import TrainConfig
from train.distributed import World
from train.learner import Learner

CONFIG = "config.json"
LOCK = "train.lock"  # while a run is at work in the folder


def check_folder(config: TrainConfig) -> None:
    """Refuse a folder that holds anything but a run that may be resumed or overwritten."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a folder")
    if out.exists() and any(path.name != LOCK for path in out.iterdir()):
        if not _is_run(out):
            raise ValueError(f"{out}: not empty, and no run of shardtune; give another --out")
        if not (config.resume or config.overwrite):
            raise ValueError(f"{out}: not empty; --resume goes on there, --overwrite deletes it")


def _is_run(folder: Path) -> bool:
    """By content: a ``config.json`` alone is the commonest of names."""
    try:
        return "steps_per_epoch" in json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def make_folder(config: TrainConfig, world: World, about: dict[str, Any]) -> None:
    """The run's folder with its config.

    The last thing before the first step: what made it this far will hardly be refused, so only now
    may an older run be deleted.
    """
    world.wait()  # all ranks have looked before one writes
    if world.is_main:
        if config.overwrite:
            _clear(config.out)
        write_durable(config.out / CONFIG, (json.dumps(about, indent=2) + "\n").encode())
    world.wait()


def _clear(folder: Path) -> None:
    """Remove all that an older run left; the lock is this one's."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def lock_folder(config: TrainConfig, world: World) -> AbstractContextManager[None]:
    """Hold this while the folder is written to: a second run there is refused."""
    return locked(config.out / LOCK) if world.is_main else nullcontext()


def describe(config: TrainConfig, plan: Plan, learner: Learner, num_steps: int) -> dict[str, Any]:
    """The settings, and what followed from them. Plain JSON."""
    settings = {name: _plain(value) for name, value in config.resolved().items()}
    return {
        **settings,
        "num_steps": num_steps,
        "global_batch": plan.global_batch,
        "num_samples": plan.num_entries,
        "steps_per_epoch": plan.num_batches,
        "num_trained_parameters": sum(p.numel() for p in trainable(learner.unet).values()),
        "resolved_prediction_type": learner.objective.prediction_type,
        "resolved_dtype": str(learner.precision.dtype).removeprefix("torch."),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
