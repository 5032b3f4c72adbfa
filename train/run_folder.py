"""The run's folder: whether it may be used, its lock, and the settings that it keeps."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.documents import MAX_JSON_BYTES, read_bounded
from runtime.files import DIGEST, PARTIAL, canonical_json, seal, unseal, write_durable, writing
from runtime.locks import locked
from sdxl.metadata import base_name
from shards.plan import Plan
from train.adapters import trainable
from train.checkpoint import STATE, numbered
from train.config import CacheUse, TrainConfig
from train.distributed import World
from train.learner import Learner
from train.overwrite import (
    CONFIG,
    ENTRIES,
    check_inputs,
    has_replaced_run,
    recover_with_warning,
    replacing_run,
)

LOCK = "train.lock"  # while a run is at work in the folder


def check_folder(config: TrainConfig) -> None:
    """Refuse a folder that holds anything but a run that may be resumed or overwritten.

    Raises:
        ValueError: says what is in the way.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a folder")
    if out.exists() and any(not _is_leftover(path) for path in out.iterdir()):
        if not _is_run(out):
            raise ValueError(f"{out}: not empty, and no run of shardtune; give another --out")
        if not (config.resume or config.overwrite):
            raise ValueError(f"{out}: not empty; --resume goes on there, --overwrite deletes it")
    if config.overwrite:
        check_inputs(config)


def _is_leftover(path: Path) -> bool:
    """Whether it is what a run leaves that is killed before its first file has its name."""
    name = path.name
    return name == LOCK or (name.endswith(PARTIAL) and name.removesuffix(PARTIAL) in ENTRIES)


def _is_run(folder: Path) -> bool:
    """By content: a ``config.json`` alone is the commonest of names, and one that is damaged must
    not hide the checkpoints beside it."""
    settings = read_own_json(folder / CONFIG)
    if settings is not None and "steps_per_epoch" in settings:
        return True
    states = (path / STATE for path in numbered(folder).values())
    return has_replaced_run(folder) or any(state.is_file() for state in states)


def read_own_json(path: Path) -> dict[str, Any] | None:
    """The fields of a JSON file that a run keeps in its folder; None where there is none, and with
    a warning where it is damaged. (Earlier versions wrote these files without a digest.)"""
    try:
        data = read_bounded(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path}: cannot be read ({error.strerror}); ignored", stacklevel=2)
        return None
    except ValueError as error:
        warnings.warn(f"{error}; ignored", stacklevel=2)
        return None
    try:
        value = json.loads(data)
        if isinstance(value, dict) and DIGEST not in value:
            return value
        return unseal(data)
    except (ValueError, RecursionError) as error:
        warnings.warn(f"{path}: {str(error)[:100]}; ignored, and written again", stacklevel=2)
        return None


def write_own_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file with a digest of its fields."""
    with writing(path):
        write_durable(path, canonical_json(seal(fields)).encode())


@contextmanager
def lock_folder(config: TrainConfig, world: World) -> Iterator[None]:
    """Hold this from before the folder is looked at: a second run there is refused.

    The look is repeated under the lock, because another run may have ended in between; and what a
    killed ``--overwrite`` left is put in order.
    """
    check_folder(config)
    world.wait()
    with locked(config.out / LOCK) if world.is_main else nullcontext():
        if world.is_main:
            check_folder(config)
            recover_with_warning(config.out)
        world.wait()  # all ranks read what the main one has put in order
        yield


@contextmanager
def begin_run(config: TrainConfig, world: World, settings: dict[str, Any]) -> Iterator[None]:
    """While entered, the run may write into its folder.

    The last thing before the first step: whatever can refuse the run has been asked, and only now
    does an older run make room.
    """
    world.wait()  # all ranks have looked before one writes
    replaces = config.overwrite and world.is_main
    with replacing_run(config.out) if replaces else nullcontext():
        if world.is_main:
            write_own_json(config.out / CONFIG, settings)
        world.wait()
        yield


def describe(config: TrainConfig, plan: Plan, learner: Learner, num_steps: int) -> dict[str, Any]:
    """The settings, and what followed from them. Plain JSON, without any path: run folders are
    shared, and where things lay on this machine is private."""
    settings = {name: _plain(value) for name, value in config.resolved().items()}
    return {
        **settings,
        "base": base_name(config.base),
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
    if isinstance(value, Path):
        return value.resolve().name
    if isinstance(value, CacheUse):
        return str(replace(value, folder=Path(value.folder.resolve().name)))
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
