"""The measurements of ``benchmarks.gpu``, each run in a process of its own.

A cell takes the settings that it is named with and returns its figures. ``tiny`` is the miniature
on any device, to try the code; images are an eighth as wide then.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.caches import kind_for, random_samples, write_random
from benchmarks.report import timed
from benchmarks.train_step import ProductLoop
from infer.generate import generate
from infer.settings import GenerateSettings
from precompute.encode import encode
from precompute.settings import EncodeSettings
from sdxl.base import open_base
from sdxl.load import load_vae
from sdxl.text_encoders import TextEncoders
from shards.plan import Plan
from shards.reader import Cache
from tools.draw_images import draw_images
from train.config import TrainConfig
from train.cuda_graphs import WARM_UPS
from train.distributed import DistContext
from train.learner import build_learner
from train.option_values import CacheUse
from train.unet import compile_blocks

GIB = 2**30
SHRINK = 8  # of tiny images
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where cells run. ``base`` has the UNet, ``encoders`` all the rest."""

    base: str
    encoders: str
    work: Path
    device: torch.device
    tiny: bool = False

    def pixels(self, pixels: int) -> int:
        return pixels // SHRINK if self.tiny else pixels

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"


def ceiling(place: Place, side: int = 8192) -> Figures:
    """TFLOP/s of a bf16 matrix product: what the other cells are measured against."""
    side = 256 if place.tiny else side
    first, other = (
        torch.randn(side, side, dtype=torch.bfloat16, device=place.device) for _ in range(2)
    )
    best = math.inf
    for _ in range(10):
        best = min(best, timed(lambda: [first @ other for _ in range(10)], place.device) / 10)
    return {"tflops": 2 * side**3 / best / 1e12}


def _rate(work: Callable[[int], object], few: int, many: int) -> float:
    """Images a second of a whole stage, without its start: by the difference of two runs."""
    seconds = []
    for number in (few, many):
        start = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - start)
    return (many - few) / max(seconds[1] - seconds[0], 1e-9)


def encode_rate(place: Place, pixels: int, batch_size: int, few: int = 16) -> Figures:
    """Images a second of ``cli.py encode``: decoded, cut, encoded, hashed, written."""

    def work(number: int) -> None:
        data = place.work / f"images-{number}"
        draw_images(data, number, size=place.pixels(pixels))
        settings = EncodeSettings(
            dataset=data,
            base=place.encoders,
            out=place.work / f"encoded-{number}",
            resolution=place.pixels(pixels),
            square=True,
            batch_size=batch_size,
            device=str(place.device),
        )
        encode(settings)

    return {"images_per_second": _rate(work, few, 5 * few)} | peaks(place)


def encode_bare(place: Place, pixels: int, batch_size: int, num: int = 10) -> Figures:
    """Images a second of the VAE (fp32) and the text encoders alone, on tensors at hand."""
    side = place.pixels(pixels)
    base = open_base(place.encoders)
    vae: Any = load_vae(base.vae, torch.float32).to(place.device)
    dtype = torch.float16 if place.on_cuda else torch.float32
    encoders = TextEncoders(base, dtype, place.device)
    images = torch.rand(batch_size, 3, side, side, device=place.device) * 2 - 1

    @torch.inference_mode()
    def work() -> None:
        for _ in range(num):
            vae.encode(images).latent_dist.mean.cpu()
            encoders.encode(["a red circle on a white ground"] * batch_size, batch_size)

    timed(work, place.device)
    return {"images_per_second": num * batch_size / timed(work, place.device)} | peaks(place)


def generate_rate(
    place: Place, pixels: int, batch_size: int, num_steps: int, few: int = 4
) -> Figures:
    """Images a second of ``cli.py generate`` with guidance, from UNet to PNG."""

    def work(number: int) -> None:
        settings = GenerateSettings(
            base=place.encoders,
            unet=None if place.tiny else Path(place.base) / "unet",
            out=place.work / f"drawn-{number}",
            prompt="a red circle on a white ground",
            num_images=number,
            size=str(place.pixels(pixels)),
            num_steps=2 if place.tiny else num_steps,
            batch_size=batch_size,
            device=str(place.device),
        )
        generate(settings)

    few = max(few, batch_size)
    return {"images_per_second": _rate(work, few, 3 * few)} | peaks(place)


def peaks(place: Place) -> Figures:
    """GB allocated and reserved at most since the last reset; empty on a CPU."""
    if not place.on_cuda:
        return {}
    return {
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


class Training:
    """The product's own steps over a cache of random samples."""

    def __init__(self, place: Place, pixels: int, batch_size: int, **settings: Any) -> None:
        self.place, self.pixels = place, place.pixels(pixels)
        compiles = settings.pop("compile", False)
        cache = self._cache()
        self.config = TrainConfig(
            caches=(CacheUse(cache),),
            base=place.base,
            out=place.work / "run",
            steps=10**6,
            batch_size=batch_size,
            device=str(place.device),
            **settings,
        )
        self.learner = build_learner(self.config, open_base(place.base), DistContext(place.device))
        self.opened = Cache(cache)
        self._start(batch_size)
        with FlopCounterMode(display=False) as counter:  # it cannot look into what is compiled
            self.loop.steps(1)
        self.flops = counter.get_total_flops()
        if compiles:
            compile_blocks(self.learner.unet)

    def _start(self, batch_size: int) -> None:
        plan = Plan(self.opened.groups(), 0, batch_size)
        config = TrainConfig(**{**vars(self.config), "batch_size": batch_size})
        self.loop = ProductLoop(config, self.learner, self.opened, plan)

    def stop(self) -> None:
        self.loop.batches.close()
        self.loop.log.close(failed=False)

    def restart(self, batch_size: int) -> None:
        """Go on with another batch size."""
        self.stop()
        self._start(batch_size)

    def _cache(self) -> Path:
        folder = self.place.work / f"cache-{self.pixels}"
        if not folder.exists():
            kind = kind_for(self.place.base, self.pixels)
            write_random(folder, kind, random_samples(kind, 64))
        return folder


def train_rate(
    place: Place, pixels: int, batch_size: int, num: int = 10, **settings: Any
) -> Figures:
    """Images and TFLOP a second of training, and its peaks; recomputation counts as work."""
    training = Training(place, pixels, batch_size, **settings)
    try:
        training.loop.steps(WARM_UPS)  # with the one counted before, a graph is recorded by then
        if place.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: training.loop.steps(num), place.device)
    finally:
        training.stop()
    return {
        "images_per_second": num * batch_size / seconds,
        "tflops": num * training.flops / seconds / 1e12,
        "tflop_per_image": training.flops / batch_size / 1e12,
        **peaks(place),
    }


def largest_batch(
    place: Place, pixels: int, gib: float, most: int = 256, **settings: Any
) -> Figures:
    """The largest batch whose steps fit in ``gib`` GiB that this process may allocate."""
    if place.on_cuda:
        total = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), place.device)
    try:
        training = Training(place, pixels, 1, **settings)
    except torch.OutOfMemoryError:
        return {"largest_batch": 0}

    def fits(batch_size: int) -> bool:
        training.restart(batch_size)
        try:
            training.loop.steps(2)
        except torch.OutOfMemoryError:
            training.learner.optimizer.zero_grad()
            return False
        finally:
            if place.on_cuda:
                torch.cuda.empty_cache()
        return True

    try:
        return {"largest_batch": largest(fits, 2 if place.tiny else most)} | peaks(place)
    finally:
        training.stop()


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in 0..most that fits, where all below one that fits do: by doubling, then
    by halving the gap."""
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


KINDS: dict[str, Callable[..., Figures]] = {
    "ceiling": ceiling,
    "encode": encode_rate,
    "encode bare": encode_bare,
    "train": train_rate,
    "largest batch": largest_batch,
    "generate": generate_rate,
}
