"""Images for the tests: as ``generate`` draws them, and as diffusers' own pipeline does."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from infer.generate import generate
from infer.settings import GenerateSettings

PROMPTS = ["a red circle", "a blue square on a white ground", "a green triangle"]
Images = list[np.ndarray]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["infer.generate"])


def settings_of(base: Path, out: Path, prompts: list[str], **settings: Any) -> GenerateSettings:
    """64 pixels, 5 steps, seeds from 11 on."""
    file = out.with_suffix(".txt")
    file.write_text("\n".join(prompts), encoding="utf-8")
    defaults: dict[str, Any] = {"num_steps": 5, "size": "64", "seed": 11, "batch_size": 3}
    return GenerateSettings(
        base=str(base), out=out, prompts=file, device="cpu", **{**defaults, **settings}
    )


def draw(base: Path, out: Path, prompts: list[str], **settings: Any) -> Images:
    generate(settings_of(base, out, prompts, **settings))
    return images_in(out)


def images_in(folder: Path) -> Images:
    return [load(path) for path in sorted(folder.glob("0*.png"))]


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def reference(base: Path, prompts: list[str], change: Any = None, **call: Any) -> Images:
    """What the pipeline draws when it is called directly."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    pipeline.set_progress_bar_config(disable=True)
    if change is not None:
        change(pipeline)
    return drawn_by(pipeline, prompts, **call)


def drawn_by(pipeline: Any, prompts: list[str], seed: int = 11, **call: Any) -> Images:
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    defaults = {"num_inference_steps": 5, "height": 64, "width": 64, "guidance_scale": 5.0}
    images = pipeline(prompts, generator=generators, **{**defaults, **call}).images
    return [np.asarray(image).astype(int) for image in images]


def check_equal(actual: Images, expected: Images) -> None:
    """To the rounding of a few values: batches differ."""
    assert len(actual) == len(expected) > 0
    for first, second in zip(actual, expected, strict=True):
        assert first.shape == second.shape
        assert np.abs(first - second).max() <= 1 and np.mean(first != second) < 0.01


def check_same(actual: Images, expected: Images) -> None:
    """To the last bit: batches are the same."""
    assert len(actual) == len(expected) > 0
    for first, second in zip(actual, expected, strict=True):
        assert np.array_equal(first, second)


def differ(actual: Images, expected: Images) -> float:
    """The mean difference, in levels, where it is largest."""
    return max(
        float(np.abs(first - second).mean()) for first, second in zip(actual, expected, strict=True)
    )


def start(
    settings: GenerateSettings, world: int, act: Callable[[GenerateSettings], Any] = generate
) -> list[BaseProcess]:
    """Draw on several processes, without their seconds of imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[BaseProcess] = [
        _context.Process(target=_rank, args=(rank, world, port, settings, act), daemon=True)
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def draw_on(
    settings: GenerateSettings, world: int, act: Callable[[GenerateSettings], Any] = generate
) -> None:
    ranks = start(settings, world, act)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * world


def _rank(
    rank: int,
    world: int,
    port: int,
    settings: GenerateSettings,
    act: Callable[[GenerateSettings], Any],
) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, **address}
    os.environ.update({name: str(value) for name, value in environment.items()})
    act(settings)
