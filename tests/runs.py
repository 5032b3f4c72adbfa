"""Training runs for the tests: start one, stop it, tell whether two are the same."""

import json
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import train.loop
from runtime.files import unseal
from runtime.path_kinds import checkpoints_in
from sdxl.contact_sheet import contact_sheet
from train.checkpoint import read_state
from train.config import TrainConfig
from train.evaluation import EVALS
from train.option_values import CacheUse
from train.preview import TILE, draw_previews

LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


def in_child(act: Callable[[], Any]) -> None:
    """Run ``act`` in a process of its own, forked from this one: its imports are done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child process ended with exit code {code}; its output stands above"


def config_of(caches: Path | tuple[CacheUse, ...], base: Path, out: Path, **more: Any) -> Any:
    """Settings for a small run on the CPU; ``caches`` is one folder, or all that a run uses."""
    settings: dict[str, Any] = {"lr": 1e-3, "batch_size": 2, "device": "cpu"}
    if not (more.get("full") or more.get("init_lora")):
        settings["targets"] = "all"
    uses = caches if isinstance(caches, tuple) else (CacheUse(caches),)
    return TrainConfig(caches=uses, base=str(base), out=out, **{**settings, **more})


def run(caches: Path | tuple[CacheUse, ...], base: Path, out: Path, **more: Any) -> Path:
    return train.loop.train(config_of(caches, base, out, **more))


class Died(Exception):
    """A run that ended without any farewell."""


def stop_by(number: int) -> Callable[[], None]:
    """A signal, as from outside: the run writes a checkpoint and leaves."""
    return lambda: signal.raise_signal(number)


def die() -> None:
    raise Died


@contextmanager
def at_step(number: int, act: Callable[[], None]) -> Iterator[None]:
    """``act`` as soon as optimizer step ``number`` (1, 2, ...) is through."""
    real = train.loop.train_step

    def train_step(learner: Any, batches: Any, done: int, lr: float) -> Any:
        step = real(learner, batches, done, lr)
        if done + 1 == number:
            act()
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "train_step", train_step)
        yield


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows(out) if "train/loss" in row]


def evals(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["eval/loss"]) for row in rows(out) if "eval/loss" in row]


def sample_losses(out: Path) -> dict[str, dict[str, Any]]:
    """What the run keeps of the losses of its validation samples, by file."""
    paths = sorted((out / EVALS).glob("*"))
    return {path.name: unseal(path.read_bytes()) for path in paths}


def last_state(out: Path) -> dict[str, Any]:
    """All that the newest checkpoint says, and digests of all that it holds."""
    return read_state(list(checkpoints_in(out).values())[-1])


def same_weights(left: Path, right: Path) -> bool:
    first, second = safetensors.torch.load_file(left), safetensors.torch.load_file(right)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def assert_same_run(left: Path, right: Path) -> None:
    """Equal losses, evals, published weights; and to the bit all that a checkpoint holds: weights,
    average, optimizer, scaler, place in the plan."""
    assert losses(left) == losses(right)
    assert evals(left) == evals(right)
    assert sample_losses(left) == sample_losses(right)
    first, second = last_state(left), last_state(right)
    assert first == second, [name for name in first if first[name] != second[name]]
    name = LORA if (left / LORA).exists() else UNET
    assert same_weights(left / name, right / name)


def draw_sheet(*arguments: Any, **settings: Any) -> Image.Image:
    """What ``draw_previews`` draws, on a sheet."""
    return contact_sheet(draw_previews(*arguments, **settings), TILE)
