"""The folder of a run: whether it may be used, its lock, its settings, what --overwrite replaces.

With ``--overwrite`` the old run stays on disk until a new one can replace it. The states of its
folder OUT, each made from the one before by renames:

    OUT/config.json, checkpoints/, ...                   the old run
    OUT/replaced-run.partial/ and the rest in OUT        its entries are being moved, there or back
    OUT/replaced-run/ and OUT/config.json, ...           the old run, and the new one's first steps
    OUT/config.json, checkpoints/checkpoint-100/, ...    the new run: it has a checkpoint

After a kill in any of them ``recover`` leaves the first or the last. What a run did not make (a
cache, notes, generated images) is never moved or deleted.
"""

import os
import re
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.files import (
    PARTIAL,
    canonical_json,
    discard_folder,
    fsync_folder,
    move_into,
    remove_path,
    rename_folder,
    seal,
    write_durable,
    writing,
)
from runtime.locks import locked
from runtime.path_kinds import CHECKPOINTS, checkpoints_in, is_own_page
from runtime.safe_parsing import read_sealed
from runtime.work_queue import is_file_seen, not_shared
from sdxl.base import Base, base_path
from sdxl.lora.names import KOHYA, LORA
from shards.plan import Plan
from train.checkpoint import STATE
from train.config import TrainConfig
from train.distributed import DistContext
from train.evaluation import EVAL_FILE, EVALS
from train.learner import Learner
from train.option_values import CacheUse
from train.saved_options import CONFIG, remember_private
from train.unet import trainable

METRICS = "metrics.jsonl"
WANDB_ID = "wandb.json"
TENSORBOARD = "tensorboard"
REPORT = "report.html"  # which the command writes after the run
# Everything that a run writes into its folder, and so everything that --overwrite may delete.
ENTRIES = frozenset(
    {CONFIG, METRICS, WANDB_ID, REPORT, CHECKPOINTS, LORA, KOHYA}
    | {"wandb", TENSORBOARD, "previews", EVALS, "unet", "scheduler"}
)
# The names that a run gives in its folders of many files, also half written.
_FILE_NAMES = {
    CHECKPOINTS: re.compile(r"checkpoint-\d+(\.replaced)?(\.partial)?"),
    "previews": re.compile(r"step-\d+\.png(\.partial)?"),
    EVALS: re.compile(rf"{EVAL_FILE.pattern}(\.partial)?"),
    TENSORBOARD: re.compile(r"events\.out\.tfevents\.[\w.-]+"),
}
_PRIVATE = ("wandb_entity",)  # settings that name the user
REPLACED_RUN = "replaced-run"
_MOVING = REPLACED_RUN + PARTIAL
_DISCARDED = REPLACED_RUN + ".discarded" + PARTIAL


def run_entries(out: Path) -> list[Path]:
    """Files and folders that a run made in its folder, complete or cut off."""
    paths = sorted(out.iterdir()) if out.is_dir() else []
    names = {path: path.name.removesuffix(PARTIAL).removesuffix(".replaced") for path in paths}
    return [
        path
        for path, name in names.items()
        if name in ENTRIES and (path.name != REPORT or (path.is_file() and is_own_page(path)))
    ]


def has_replaced_run(out: Path) -> bool:
    """Whether a run that was to be replaced, or a part of it, still lies in the folder."""
    return (out / REPLACED_RUN).exists() or (out / _MOVING).exists()


def check_input(path: Path, out: Path) -> None:
    """Refuse an input that ``--overwrite`` would delete, by its own path or where links lead.

    Raises:
        ValueError: names the input.
    """
    to_delete = run_entries(out) + [p for p in (out / REPLACED_RUN, out / _MOVING) if p.exists()]
    is_out = bool(to_delete) and path.resolve() == out.resolve()
    if is_out or any(_is_inside(part, entry) for part in _with_links(path) for entry in to_delete):
        raise ValueError(
            f"{path}: --overwrite would delete it, because it lies in the run that {out} holds; "
            "move it elsewhere, or give another --out"
        )


def check_inputs(config: TrainConfig) -> None:
    """Refuse to delete inputs of the new run, or files that no run has written."""
    for folder, name in _FILE_NAMES.items():
        for path in sorted((config.out / folder).glob("*")):
            if not name.fullmatch(path.name):
                raise ValueError(
                    f"{path}: --overwrite would delete it, and no run wrote it; move it elsewhere, "
                    "or give another --out"
                )
    paths = [use.folder for use in config.caches]
    paths += [path for path in (config.val, config.init_lora) if path is not None]
    for path in (*paths, base_path(config.base)):
        check_input(path, config.out)


def _with_links(path: Path) -> Iterator[Path]:
    """``path``, and the links in it, as deep as the files of a base or a cache lie."""
    yield path
    if path.is_dir():
        yield from (
            part for depth in ("*", "*/*") for part in path.glob(depth) if part.is_symlink()
        )


def _is_inside(path: Path, entry: Path) -> bool:
    named, real = Path(os.path.abspath(path)), path.resolve()
    return named.is_relative_to(os.path.abspath(entry)) or real.is_relative_to(entry.resolve())


@contextmanager
def replacing_run(out: Path) -> Iterator[None]:
    """While entered, the run in ``out`` is set aside for a new one; it is put back if that one
    fails before it has a checkpoint."""
    try:
        _set_aside(out)
        yield
    except BaseException as error:
        try:
            if recover(out):
                error.add_note(f"The run that was in {out} before is back in its place.")
        except OSError:
            error.add_note(
                f"The run that was in {out} before lies in {out / REPLACED_RUN}, and the next "
                "command with --overwrite or --resume puts it back."
            )
        raise
    discard_replaced_run(out)


def _set_aside(out: Path) -> None:
    entries = run_entries(out)
    if not entries:
        return
    (out / _MOVING).mkdir()
    fsync_folder(out)
    move_into(out / _MOVING, entries)
    rename_folder(out / _MOVING, out / REPLACED_RUN)


def discard_replaced_run(out: Path) -> None:
    """Delete the old run, if there is one: the new one has a checkpoint on disk."""
    discard_folder(out / REPLACED_RUN, out / _DISCARDED)


def recover(out: Path) -> bool:
    """After a kill, finish replacing the old run, or put it back; return whether it was put
    back."""
    if (out / REPLACED_RUN).exists() and not checkpoints_in(out):
        for path in run_entries(out):  # of the new run, which cannot be resumed
            remove_path(path)
        rename_folder(out / REPLACED_RUN, out / _MOVING)
    is_back = (out / _MOVING).exists()
    if is_back:
        move_into(out, sorted((out / _MOVING).iterdir()))
        (out / _MOVING).rmdir()
    discard_replaced_run(out)
    return is_back


def recover_with_warning(out: Path) -> None:
    """``recover``, with a warning if the old run is back."""
    if recover(out):
        warnings.warn(
            f"{out}: a command with --overwrite ended before its run had a checkpoint; the run "
            "that was there before is back in its place",
            stacklevel=2,
        )


# A run's folder: whether it may be used, its lock, and the settings that it keeps.

NONCE = "ranks.nonce"  # while the ranks ask whether they see the same folder
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
    """Whether it is the leftover of a run that was killed while it wrote its first file."""
    name = path.name
    return name in (LOCK, NONCE) or (
        name.endswith(PARTIAL) and name.removesuffix(PARTIAL) in ENTRIES
    )


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run, by content: ``config.json`` is a common name, and a damaged one
    must not hide the checkpoints beside it."""
    settings = read_own_json(folder / CONFIG)
    if settings is not None and "steps_per_epoch" in settings:
        return True
    states = (path / STATE for path in checkpoints_in(folder).values())
    return has_replaced_run(folder) or any(state.is_file() for state in states)


def read_own_json(path: Path) -> dict[str, Any] | None:
    """The fields of a JSON file that a run keeps in its folder; None where there is none, and with
    a warning where it is damaged. (Earlier versions wrote these files without a digest.)"""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path}: cannot be read ({error.strerror}); ignored", stacklevel=2)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")[:100]
        warnings.warn(f"{path}: {reason}; ignored, and written again", stacklevel=2)
    return None


def write_own_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file with a digest of its fields."""
    with writing(path):
        write_durable(path, canonical_json(seal(fields)).encode())


@contextmanager
def lock_folder(config: TrainConfig, world: DistContext) -> Iterator[None]:
    """While entered, a second run in the folder is refused. To be entered before the folder is
    read.

    The folder is checked again under the lock, because another run may have ended in between; and
    what a killed ``--overwrite`` left is recovered.
    """
    check_folder(config)
    world.wait()
    with locked(config.out / LOCK) if world.is_main else nullcontext():
        if world.is_main:
            check_folder(config)
            recover_with_warning(config.out)
        _check_shared(config.out, world)  # and all ranks read what the main one has put in order
        yield


def _check_shared(out: Path, world: DistContext) -> None:
    """Each rank writes and reads files there: refuse where one sees another folder.

    Raises:
        ValueError: the folder is not shared.
    """
    if world.size == 1:
        return
    nonce = world.share(secrets.token_hex(16))
    path = out / NONCE
    if world.is_main:
        path.write_text(nonce)
    world.wait()
    seen = path.read_text() if is_file_seen(path) else ""
    all_see_it = set(world.gather([seen])) == {nonce}
    if world.is_main:
        path.unlink()
    if not all_see_it:
        raise ValueError(not_shared(out))


@contextmanager
def begin_run(config: TrainConfig, world: DistContext, settings: dict[str, Any]) -> Iterator[None]:
    """While entered, the run may write into its folder.

    This comes last before the first step: every check has passed, and only now is an older run set
    aside.
    """
    world.wait()  # all ranks have looked before one writes
    replaces = config.overwrite and world.is_main
    with replacing_run(config.out) if replaces else nullcontext():
        if world.is_main:
            write_own_json(config.out / CONFIG, settings)
            remember_private(config, settings)
        world.wait()
        yield


def describe(
    config: TrainConfig,
    base: Base,
    plan: Plan,
    learner: Learner,
    num_steps: int,
    *,
    decided_checkpointing: bool,
) -> dict[str, Any]:
    """The settings, and the values that follow from them, as plain JSON without any path or
    account: run folders are shared, and the paths of this machine are private."""
    resolved = config.resolved().items()
    settings = {name: _plain(value) for name, value in resolved if name not in _PRIVATE}
    return {
        **settings,
        "base": base.name,
        "decided_checkpointing": decided_checkpointing,  # by the memory that was free
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
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.resolve().name
    if isinstance(value, CacheUse):
        return str(replace(value, folder=Path(value.folder.resolve().name)))
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)
