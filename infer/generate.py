"""The stage: prompts to images, by any number of processes; only what is missing is drawn."""

import json
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infer.outputs import About, ImageFolder, save_image
from infer.pipeline import Pipeline
from infer.requests import ImageRequest, plan_requests
from infer.settings import GenerateSettings
from infer.weights import Weights
from runtime.devices import pick_device, pick_precision
from runtime.workers import POLL_SECONDS, WorkQueue
from sdxl.base import open_base
from sdxl.fingerprint import config_digest
from sdxl.prompts import Prompt, parse_prompt, read_prompts

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
NUM_WRITERS = 2  # threads: PNGs are packed while the next batch is drawn


@dataclass
class Report:
    num_drawn: int
    num_kept: int
    seconds: float  # of generating, with loading
    sheet: Path


def generate(settings: GenerateSettings, pipeline: Pipeline | None = None) -> Report | None:
    """Draw what is missing or was drawn with other settings. The main process plans and reports,
    and all draw; the others get None. ``pipeline`` is one of these settings that is loaded already.

    Raises:
        ValueError: the prompts, the base, the weights or the folder cannot be used.
        FloatingPointError: an image is not finite.
    """
    queue = WorkQueue()
    if not queue.is_main:
        plan = json.loads(queue.wait_for("plan"))
        requests = [ImageRequest(**fields) for fields in plan["requests"]]
        pipeline = make_pipeline(settings, plan["base"])
        _draw(settings, pipeline, requests, plan["about"], queue)
        return None
    prompts = _read_prompts(settings)
    pipeline = pipeline or make_pipeline(settings)
    base = pipeline.weights.base
    requests = plan_requests(settings, prompts, base.unet.config["sample_size"] * 8)
    folder = ImageFolder(settings.out, settings.format)
    with folder.open():
        provenance = _about(pipeline, requests)
        wanted = folder.missing(requests, provenance)
        told = {
            "base": base.pinned,  # of a hub id the same commit
            "requests": [asdict(request) for request in wanted],
            "about": provenance,
        }
        queue.publish("plan", json.dumps(told))
        start = time.perf_counter()
        _draw(settings, pipeline, wanted, provenance, queue)
        seconds = time.perf_counter() - start
        sheet = folder.finish(requests)
    return Report(len(wanted), len(requests) - len(wanted), seconds, sheet)


def _read_prompts(settings: GenerateSettings) -> list[Prompt]:
    if settings.prompt is not None:
        return [parse_prompt(settings.prompt)]
    assert settings.prompts is not None
    return read_prompts(settings.prompts)


def make_pipeline(
    settings: GenerateSettings, base: str | None = None, *, stays: bool = False
) -> Pipeline:
    """What draws with ``base``, or the settings'; nothing is loaded yet. ``stays``: its models are
    kept when all is drawn."""
    device = pick_device(settings.device)
    name = "fp16" if settings.precision == "auto" and device.type == "cuda" else settings.precision
    dtype = pick_precision(name, device).dtype
    opened = open_base(base or settings.base, vae=settings.vae, tokenizers=settings.tokenizers)
    return Pipeline(settings, Weights(settings, opened), dtype, device, stays)


def _about(pipeline: Pipeline, requests: list[ImageRequest]) -> About:
    samplers: dict[str, Any] = {}
    for name in {request.sampler for request in requests}:
        sampler = pipeline.weights.sampler(name)
        config = config_digest(dict(sampler.config))
        samplers[name or ""] = {"name": type(sampler).__name__, "config": config}
        if pipeline.settings.compare:
            plain = pipeline.weights.sampler(name, plain=True)
            samplers[name or ""]["config_without"] = config_digest(dict(plain.config))
    return {"weights": pipeline.weights.digests(pipeline.dtype), "samplers": samplers}


def _draw(
    settings: GenerateSettings,
    pipeline: Pipeline,
    requests: list[ImageRequest],
    provenance: About,
    queue: WorkQueue,
) -> None:
    """This process's part, to the end of all; the main one shows how far all are."""
    folder = ImageFolder(settings.out, settings.format)
    loras = pipeline.weights.lora_names
    pending: deque[Future[None]] = deque()
    quiet = not (queue.is_main and requests)
    with (
        tqdm(total=len(requests), unit="img", desc="draw", bar_format=BAR, disable=quiet) as bar,
        ThreadPoolExecutor(NUM_WRITERS) as pool,
    ):

        def count() -> None:
            """One more image is in its place."""
            pending.popleft().result()
            bar.update(queue.add("drawn", 1) - bar.n)

        def save(request: ImageRequest, sides: list[torch.Tensor]) -> None:
            folder.before_replacing(request)
            save_image(folder.path(request), sides, request, provenance, loras)

        def keep(request: ImageRequest, sides: list[torch.Tensor]) -> None:
            pending.append(pool.submit(save, request, sides))
            while pending and (pending[0].done() or len(pending) > 2 * settings.batch_size):
                count()

        if requests:
            pipeline.draw(requests, queue, keep)
        while pending:
            count()
        while queue.is_main and bar.n < len(requests):
            time.sleep(POLL_SECONDS)
            bar.update(queue.add("drawn", 0) - bar.n)
    queue.gather("done", "")
