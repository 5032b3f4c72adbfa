"""The stage: prompts to pictures, by any number of processes; only what is missing is drawn."""

import json
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from infer.folder import PictureFolder
from infer.pictures import About, save_picture
from infer.plan import Drawing, plan_drawings
from infer.settings import GenerateSettings
from infer.studio import Studio
from infer.weights import Weights
from processes.crew import POLL_SECONDS, Crew
from sdxl.base import model_config
from sdxl.device import pick_device, pick_precision
from sdxl.fingerprint import config_digest
from sdxl.prompts import parse_prompt, read_prompts

NUM_WRITERS = 2  # threads: PNGs are packed while the next batch is drawn


@dataclass
class Report:
    num_drawn: int
    num_kept: int
    seconds: float  # of drawing, with loading
    sheet: Path


def generate(settings: GenerateSettings) -> Report | None:
    """Draw what is missing or was drawn with other settings. The main process plans and reports,
    and all draw; the others get None.

    Raises:
        ValueError: the prompts, the base, the weights or the folder cannot be used.
        FloatingPointError: a picture is not finite.
    """
    crew = Crew()
    if not crew.is_main:
        plan = json.loads(crew.hear("plan"))
        drawings = [Drawing(**one) for one in plan["drawings"]]
        _draw(settings, Weights(settings), drawings, plan["about"], crew)
        return None
    drawings = _plan(settings)
    _, dtype = _place(settings)
    weights = Weights(settings)
    folder = PictureFolder(settings.out, settings.format)
    with folder.open():
        about = _about(weights, drawings, dtype)
        wanted = folder.missing(drawings, about)
        told = {"drawings": [asdict(one) for one in wanted], "about": about}
        crew.tell("plan", json.dumps(told))
        start = time.perf_counter()
        if wanted:
            folder.listing.unlink(missing_ok=True)  # it would tell of pictures that change now
        _draw(settings, weights, wanted, about, crew)
        seconds = time.perf_counter() - start
        sheet = folder.finish(drawings)
    return Report(len(wanted), len(drawings) - len(wanted), seconds, sheet)


def _plan(settings: GenerateSettings) -> list[Drawing]:
    if settings.prompt is not None:
        prompts = [parse_prompt(settings.prompt)]
    else:
        assert settings.prompts is not None
        prompts = read_prompts(settings.prompts)
    _, unet_config = model_config(settings.base, "unet")
    return plan_drawings(settings, prompts, unet_config["sample_size"] * 8)


def _place(settings: GenerateSettings) -> tuple[torch.device, torch.dtype]:
    device = pick_device(settings.device)
    name = "fp16" if settings.precision == "auto" and device.type == "cuda" else settings.precision
    return device, pick_precision(name, device).dtype


def _about(weights: Weights, drawings: list[Drawing], dtype: torch.dtype) -> About:
    samplers: dict[str, Any] = {}
    for name in {one.sampler for one in drawings}:
        sampler = weights.sampler(name)
        config = config_digest(dict(sampler.config))
        samplers[name or ""] = {"name": type(sampler).__name__, "config": config}
    return {"weights": weights.digests(dtype), "samplers": samplers}


def _draw(
    settings: GenerateSettings, weights: Weights, drawings: list[Drawing], about: About, crew: Crew
) -> None:
    """This process's part, to the end of all; the main one shows how far all are."""
    folder = PictureFolder(settings.out, settings.format)
    device, dtype = _place(settings)
    pending: deque[Future[None]] = deque()
    quiet = not (crew.is_main and drawings)
    with (
        tqdm(total=len(drawings), unit="img", desc="draw", disable=quiet) as bar,
        ThreadPoolExecutor(NUM_WRITERS) as pool,
    ):

        def count() -> None:
            """One more picture is in its place."""
            pending.popleft().result()
            bar.update(crew.add("drawn", 1) - bar.n)

        def keep(drawing: Drawing, sides: list[torch.Tensor]) -> None:
            loras = weights.lora_names
            job = pool.submit(save_picture, folder.path(drawing), sides, drawing, about, loras)
            pending.append(job)
            while pending and (pending[0].done() or len(pending) > 2 * settings.batch_size):
                count()

        if drawings:
            Studio(settings, weights, dtype, device).draw(drawings, crew, keep)
        while pending:
            count()
        while crew.is_main and bar.n < len(drawings):
            time.sleep(POLL_SECONDS)
            bar.update(crew.add("drawn", 0) - bar.n)
    crew.gather("done", "")
