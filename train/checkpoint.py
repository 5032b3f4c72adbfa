"""Checkpoints: weights in their final format, the rest as safetensors and one JSON.

``RUN/checkpoints/checkpoint-STEP/`` appears by a rename, after all its files are on disk; the JSON
holds their digests. A folder of that name is whole, or damaged and named.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash

from shards.durable import PARTIAL, fsync_folder
from train.adapters import trainable
from train.weights import read_weights, sync_files, write_weights

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
BLOCK_BYTES = 1 << 24


def write_checkpoint(
    run: Path,
    step: int,
    unet: Any,
    full: bool,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write checkpoint-STEP; ``state`` is plain JSON."""
    final = run / "checkpoints" / f"checkpoint-{step}"
    for left in final.parent.glob("*" + PARTIAL):  # by a run that was killed
        shutil.rmtree(left)
    partial = final.with_name(final.name + PARTIAL)
    partial.mkdir(parents=True)
    write_weights(unet, full, partial)
    safetensors.torch.save_file(optimizer_tensors(unet, optimizer), partial / OPTIMIZER)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    digests = {path.relative_to(partial).as_posix(): file_xxh3(path) for path in files}
    about = {"step": step, **state, "files": digests}
    (partial / STATE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    sync_files(partial)
    replaced = final.with_name(f"{final.name}.replaced{PARTIAL}")
    if final.exists():  # an earlier run went this far, and was resumed from before
        os.replace(final, replaced)
    os.replace(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    fsync_folder(final.parent)
    return final


def optimizer_tensors(unet: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state by ``parameter|field``, on the CPU."""
    state = optimizer.state_dict()["state"]
    return {
        f"{name}|{field}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, name in enumerate(trainable(unet))
        for field, value in state.get(number, {}).items()
    }


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; warns of those it passes over, and why."""
    found = (run / "checkpoints").glob("checkpoint-*")
    numbered = {int(path.name[11:]): path for path in found if path.name[11:].isdecimal()}
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            return path, read_state(path)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint all of whose files are as they were written.

    Raises:
        ValueError: names the file that is missing or damaged.
    """
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
        digests = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{checkpoint / STATE}: missing or damaged") from None
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if file_xxh3(path) != digest:
            raise ValueError(f"{path}: damaged (xxh3 differs)")
    return dict(state)


def load_checkpoint(
    checkpoint: Path, unet: Any, full: bool, optimizer: torch.optim.Optimizer
) -> None:
    """Weights and optimizer state, bit for bit as they were."""
    read_weights(unet, full, checkpoint)
    tensors = safetensors.torch.load_file(checkpoint / OPTIMIZER)
    state: dict[int, dict[str, torch.Tensor]] = {}
    numbers = {name: number for number, name in enumerate(trainable(unet))}
    for key, tensor in tensors.items():
        name, field = key.rsplit("|", 1)
        state.setdefault(numbers[name], {})[field] = tensor
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
