"""The generate stage: prompts to images, by any number of processes; only missing ones are made."""

import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infer.outputs import ImageFolder, Provenance, save_image
from infer.pipeline import Pipeline
from infer.requests import ImageRequest, make_requests
from infer.settings import GenerateSettings
from infer.weights import Weights
from runtime.devices import pick_device, pick_precision
from runtime.errors import is_quiet
from runtime.messages import pluralize
from runtime.work_queue import WorkQueue
from sdxl.base import open_base
from sdxl.fingerprint import config_digest
from sdxl.prompt_files import Prompt, parse_prompt, read_prompts

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
IDLE_SECONDS = 3600  # without a step by any process; on a CPU a step may take minutes
NUM_WRITERS = 2  # threads: PNGs are packed while the next batch is drawn


@dataclass
class Report:
    num_generated: int
    num_kept: int  # images that were up to date
    seconds: float  # of generating, with loading
    sheet: Path


def generate(settings: GenerateSettings, pipeline: Pipeline | None = None) -> Report | None:
    """Generate the images that are missing or were made with other settings.

    The main process plans and returns a report; all processes generate, and the others return None.
    ``pipeline`` is a loaded one for the same settings.

    Raises:
        ValueError: the prompts, the base, the weights or the folder cannot be used.
        FloatingPointError: an image is not finite.
    """
    with WorkQueue() as queue:
        prompts = read_settings_prompts(settings) if queue.is_main else []
        return draw(settings, queue, partial(make_requests, settings, prompts), pipeline)


def draw(
    settings: GenerateSettings,
    queue: WorkQueue,
    make: Callable[[int], list[ImageRequest]],
    pipeline: Pipeline | None = None,
) -> Report | None:
    """Generate those images of ``make(default side in pixels)`` that are missing in the folder."""
    queue.check_shared(settings.out)
    if not queue.is_main:
        job = json.loads(queue.wait_for("job"))
        requests = [ImageRequest(**fields) for fields in job["requests"]]
        pipeline = make_pipeline(settings, job["base"])
        _run_pipeline(settings, pipeline, requests, job["about"], queue)
        return None
    pipeline = pipeline or make_pipeline(settings)
    base = pipeline.weights.base
    requests = make(base.unet.config["sample_size"] * 8)
    folder = ImageFolder(settings.out, settings.format)
    with folder.open():
        provenance = _provenance(pipeline, requests)
        wanted = folder.missing(requests, provenance)
        job = {
            "base": base.pinned,  # of a hub id the same commit
            "requests": [asdict(request) for request in wanted],
            "about": provenance,
        }
        queue.publish("job", json.dumps(job))
        start = time.perf_counter()
        _run_pipeline(settings, pipeline, wanted, provenance, queue)
        seconds = time.perf_counter() - start
        sheet = folder.finish(requests, pipeline.weights.title)
    return Report(len(wanted), len(requests) - len(wanted), seconds, sheet)


def read_settings_prompts(settings: GenerateSettings) -> list[Prompt]:
    """The prompts of ``--prompts`` or ``--prompt``."""
    if settings.prompt is not None:
        return [parse_prompt(settings.prompt)]
    assert settings.prompts is not None
    return read_prompts(settings.prompts)


def make_pipeline(
    settings: GenerateSettings, base: str | None = None, *, keep_loaded: bool = False
) -> Pipeline:
    """The pipeline for ``base``, or the settings' base; models are loaded when they are first
    needed, and with ``keep_loaded`` they stay loaded after a run."""
    device = pick_device(settings.device)
    name = "fp16" if settings.precision == "auto" and device.type == "cuda" else settings.precision
    dtype = pick_precision(name, device).dtype
    opened = open_base(base or settings.base, vae=settings.vae, tokenizers=settings.tokenizers)
    return Pipeline(settings, Weights(settings, opened), dtype, device, keep_loaded)


def _provenance(pipeline: Pipeline, requests: list[ImageRequest]) -> Provenance:
    samplers: dict[str, Any] = {}
    for name in {request.sampler for request in requests}:
        sampler = pipeline.weights.sampler(name)
        config = config_digest(dict(sampler.config))
        samplers[name or ""] = {"name": type(sampler).__name__, "config": config}
        if pipeline.settings.compare:
            plain = pipeline.weights.sampler(name, plain=True)
            samplers[name or ""]["config_without"] = config_digest(dict(plain.config))
    return {
        "weights": pipeline.weights.digests(pipeline.dtype, pipeline.decodes_in_tf32),
        "samplers": samplers,
    }


def _run_pipeline(
    settings: GenerateSettings,
    pipeline: Pipeline,
    requests: list[ImageRequest],
    provenance: Provenance,
    queue: WorkQueue,
) -> None:
    """Generate this process's part and wait for the others; the main one shows the progress of
    all."""
    folder = ImageFolder(settings.out, settings.format)
    loras = pipeline.weights.lora_names
    pending: deque[Future[None]] = deque()
    quiet = is_quiet() or not (queue.is_main and requests)
    with (
        tqdm(total=len(requests), unit="img", desc="draw", bar_format=BAR, disable=quiet) as bar,
        ThreadPoolExecutor(NUM_WRITERS) as pool,
    ):

        def count() -> None:
            """Wait for the oldest pending image to be saved, and count it."""
            pending.popleft().result()
            bar.update(queue.add("drawn", 1) - bar.n)

        def save(request: ImageRequest, images: list[torch.Tensor]) -> None:
            folder.before_replacing(request)
            save_image(folder.path(request), images, request, provenance, loras)

        def save_later(request: ImageRequest, images: list[torch.Tensor]) -> None:
            pending.append(pool.submit(save, request, images))
            while pending and (pending[0].done() or len(pending) > 2 * settings.batch_size):
                count()

        if requests:
            pipeline.generate(requests, queue, save_later)
        while pending:
            count()

        def are_drawn() -> bool:
            bar.update((num_drawn := queue.add("drawn", 0)) - bar.n)
            return num_drawn >= len(requests)

        if queue.is_main and not queue.wait_until(are_drawn, IDLE_SECONDS):
            missing = pluralize(len(requests) - queue.add("drawn", 0), "image")
            raise ConnectionError(
                f"{settings.out}: other processes had claimed {missing}, and have not taken a step "
                f"for {IDLE_SECONDS // 60} minutes; the same command draws what is missing"
            )
    queue.leave()
