"""Checkpoints: weights in their final format, the rest as safetensors and one JSON.

``RUN/checkpoints/checkpoint-STEP/`` appears by a rename, after all its files are on disk; the JSON
holds their digests. A folder of that name is whole, or damaged and named.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from runtime import schema
from runtime.documents import MAX_JSON_BYTES, read_bounded
from runtime.files import (
    PARTIAL,
    discard_folder,
    fsync_folder,
    fsync_tree,
    remove_path,
    removed_on_error,
    replace_path,
    seal,
    unseal,
    writing,
)
from sdxl.base import find_weights
from train.config import TrainConfig
from train.learner import Learner
from train.memory import state_bytes
from train.weights import (
    WeightsFormat,
    check_space,
    distribute_like,
    read_weights,
    tensors_bytes,
    weights_bytes,
    write_tensors,
    write_weights,
)

CHECKPOINTS = "checkpoints"

OPTIMIZER = "optimizer"
EMA = "ema"
STATE = "state.json"
BLOCK_BYTES = 1 << 24
_FIELDS = {  # of the JSON: a digest tells that it is as it was written, and not who wrote it
    "step": schema.whole(),
    "epoch": schema.whole(),
    "batches_of_epoch": schema.whole(),
    "global_batch": schema.whole(1),
    "skipped_in_a_row": schema.whole(),
    "kind": schema.text,
    "plan": schema.text,
    "eval_loss": schema.maybe(lambda value: isinstance(value, float)),  # nan too
    "files": schema.table(schema.like(r"(\w[\w.-]*/)*\w[\w.-]*"), schema.like("[0-9a-f]{32}")),
    **dict.fromkeys(("identity", "config", "optimizer", "scaler"), schema.record),
}


def warn_of_space(config: TrainConfig, step: int, learner: Learner, kind: WeightsFormat) -> None:
    """Before the first step, warn where the disk has no room for even one checkpoint."""
    shapes = (parameter.shape for parameter in learner.optimizer.parameters.values())
    size = _weights_bytes(learner, kind) + state_bytes(config.optimizer, shapes)
    try:
        check_space(config.out / CHECKPOINTS / f"checkpoint-{step}", size)
    except OSError as error:
        warnings.warn(f"{error}; make room for it", stacklevel=2)


def _weights_bytes(learner: Learner, kind: WeightsFormat) -> int:
    return weights_bytes(learner.unet, kind) * (1 if learner.ema is None else 2)


def write_checkpoint(
    run: Path, step: int, learner: Learner, kind: WeightsFormat, state: dict[str, Any]
) -> Path:
    """Write checkpoint-STEP; ``state`` is plain JSON. The main rank does, all must take part."""
    world = learner.world
    final = run / CHECKPOINTS / f"checkpoint-{step}"
    partial = final.with_name(final.name + PARTIAL)
    tensors, numbers = learner.optimizer.state()
    if world.is_main:
        for left in final.parent.glob("*" + PARTIAL):  # by a run that was killed
            remove_path(left)
        check_space(final, _weights_bytes(learner, kind) + tensors_bytes(tensors))
    with writing(final), removed_on_error(partial):
        if world.is_main:
            (partial / OPTIMIZER).mkdir(parents=True)
        write_weights(learner.unet, kind, partial, world, None, steps=step)
        if learner.ema is not None:
            write_weights(learner.unet, kind, partial / EMA, world, learner.ema, steps=step)
        write_tensors(partial / OPTIMIZER, "model", tensors, world)
        if world.is_main:
            record = seal({"step": step, **state, "optimizer": numbers, "files": _digests(partial)})
            (partial / STATE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
            fsync_tree(partial)
            replace_path(partial, final)  # there is one if the run was resumed from before it
            fsync_folder(run)  # the first time the folder of checkpoints is new as well
    world.wait()  # a rank that ends before the checkpoint is written would end them all
    return final


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_xxh3(path) for path in files}


def numbered(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, in order, whole or not."""
    folders = (run / CHECKPOINTS).glob("checkpoint-*")
    steps = {int(path.name[11:]): path for path in folders if path.name[11:].isdecimal()}
    return dict(sorted(steps.items()))


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; warns of those it passes over, and why."""
    for path in reversed(numbered(run).values()):
        try:
            return path, read_state(path)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    return None


def rotate(run: Path, keep: int, newest: int) -> None:
    """Delete those of ``--checkpoint-every`` (and those of a stop) but the last ``keep`` up to step
    ``newest`` and the one with the lowest eval loss. Nothing goes unless ``newest``, which was just
    written, is whole. (Of later steps there are damaged ones alone: the run was resumed from before
    them, and will write them again.)

    Raises:
        ValueError: the newest is damaged: nothing was deleted.
    """
    paths = {step: path for step, path in numbered(run).items() if step <= newest}
    states = {newest: read_state(paths[newest])}
    for step, path in paths.items():
        if step != newest:
            try:
                states[step] = _unsealed(path)
            except ValueError:
                continue  # damaged: not ours to judge
    turning = [step for step, state in states.items() if state.get("kind") in ("every", "stop")]
    evals = {step: states[step].get("eval_loss") for step in turning}
    known = {n: loss for n, loss in evals.items() if loss is not None and math.isfinite(loss)}
    best = min(known, key=lambda step: known[step]) if known else None
    for step in sorted(turning)[:-keep]:
        if step != best:
            discard_folder(paths[step], paths[step].with_name(paths[step].name + PARTIAL))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint all of whose files are as they were written.

    Raises:
        ValueError: names the file that is missing or damaged.
    """
    state = _unsealed(checkpoint)
    for name, digest in state["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if file_xxh3(path) != digest:
            raise ValueError(f"{path}: damaged (xxh3 differs)")
    return state


def _unsealed(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    try:
        state = unseal(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise ValueError(f"{path}: missing, or cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if wrong := schema.misfit(state, _FIELDS):
        raise ValueError(f"{path}: {wrong}")
    return state


def load_checkpoint(checkpoint: Path, learner: Learner, full: bool, state: dict[str, Any]) -> None:
    """Weights, average, optimizer and scaler, bit for bit as they were."""
    read_weights(learner.unet, full, checkpoint, None)
    if learner.ema is not None:
        read_weights(learner.unet, full, checkpoint / EMA, learner.ema)
    parameters = learner.optimizer.parameters
    tensors: dict[str, torch.Tensor] = {}
    for path in find_weights(checkpoint / OPTIMIZER).files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = distribute_like(
                    parameters[key.rsplit("|", 1)[0]], file.get_tensor(key)
                )
    learner.optimizer.load(tensors, state["optimizer"])
    if state["scaler"]:  # empty where the run had none
        learner.scaler.load_state_dict(state["scaler"])


def file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
