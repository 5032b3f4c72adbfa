"""Training on several processes without their seconds of imports: forked from one that has them."""

import json
import multiprocessing
import os
import socket
import sys
from collections import Counter
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import train.distributed
import train.loop
import train.unet
import train.weights
from train.config import TrainConfig

_context = multiprocessing.get_context("forkserver")  # not fork: this process may have used a GPU
_context.set_forkserver_preload(["train.loop"])


def start(
    config: TrainConfig, world: int = 1, max_file_bytes: int = 0, step_seconds: float = 0
) -> list[BaseProcess]:
    """Start the ranks of a run; ``max_file_bytes`` is of the files of weights, ``step_seconds`` the
    time in which the ranks must answer in a step."""
    return start_each([config] * world, max_file_bytes, step_seconds)


def start_each(
    configs: list[TrainConfig], max_file_bytes: int = 0, step_seconds: float = 0
) -> list[BaseProcess]:
    """The same, each rank with settings of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for config in configs:
        config.out.mkdir(parents=True, exist_ok=True)
    ranks: list[BaseProcess] = [
        _context.Process(
            target=_rank,
            args=(rank, len(configs), port, config, max_file_bytes, step_seconds),
            daemon=True,
        )
        for rank, config in enumerate(configs)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def train_on(config: TrainConfig, world: int, max_file_bytes: int = 0) -> None:
    """A whole run on ``world`` processes."""
    ranks = start(config, world, max_file_bytes)
    for rank in ranks:
        rank.join(120)
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * world, (codes, output_of(config.out))


def output_of(out: Path) -> str:
    """What the ranks of the run in ``out`` wrote to stdout and stderr."""
    return _output(out).read_text()


def _output(out: Path) -> Path:
    return out.with_name(out.name + ".output")


def _rank(
    rank: int,
    world: int,
    port: int,
    config: TrainConfig,
    max_file_bytes: int,
    step_seconds: float,
) -> None:
    torch.set_num_threads(1)
    with open(_output(config.out), "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, **address}
    os.environ.update({name: str(value) for name, value in environment.items()})
    if max_file_bytes:
        train.weights.MAX_FILE_BYTES = max_file_bytes
    if step_seconds:
        train.distributed.STEP_TIMEOUT = timedelta(seconds=step_seconds)
        train.loop.STEP_TIMEOUT = timedelta(seconds=step_seconds)
    save_file = safetensors.torch.save_file

    def note_file(tensors: Any, path: Path, **more: Any) -> None:
        save_file(tensors, path, **more)
        with open(_written(config.out, rank), "a") as names:
            names.write(f"{path}\n")

    safetensors.torch.save_file = note_file
    load_unet = train.unet.load_unet

    def note_load(*arguments: Any) -> Any:
        _loaded(config.out, rank).touch()
        return load_unet(*arguments)

    train.unet.load_unet = note_load
    real = train.loop.train_step
    with open(_seen(config.out, rank), "a") as file:

        def note(batch: Any) -> Any:
            file.write(json.dumps([batch.epoch, batch.number, batch.keys]) + "\n")
            return batch

        train.loop.train_step = lambda learner, batches, *more: real(
            learner, map(note, batches), *more
        )
        train.loop.train(config)


def _written(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.written-{rank}")


def written(out: Path, rank: int) -> list[str]:
    """The files of tensors that one rank of the run in ``out`` wrote."""
    path = _written(out, rank)
    return path.read_text().splitlines() if path.exists() else []


def _loaded(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.loaded-{rank}")


def has_loaded_base(out: Path, rank: int) -> bool:
    """Whether this rank of the run in ``out`` read the base's weights itself."""
    return _loaded(out, rank).exists()


def _seen(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.seen-{rank}")


def seen(out: Path) -> dict[tuple[int, int], Counter[str]]:
    """The keys of the samples in each global batch (epoch, number), of all ranks that were."""
    results: dict[tuple[int, int], Counter[str]] = {}
    for path in out.parent.glob(f"{out.name}.seen-*"):
        for line in path.read_text().splitlines():
            epoch, number, keys = json.loads(line)
            results.setdefault((epoch, number), Counter()).update(keys)
    return results
