"""Generates a grid: each prompt with the same seed, over checkpoints, weights of a LoRA, guidance.

What UIs call an XYZ plot. Each combination of checkpoint and weight is a folder of its own in OUT,
as generate fills it, so that a grid that was interrupted or gets more values goes on.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from PIL import PngImagePlugin

from infer.generate import draw, read_settings_prompts
from infer.outputs import SETTINGS_KEY, ImageFolder, read_record
from infer.requests import ImageRequest, make_requests
from infer.settings import GenerateSettings, GridAxis, LoraUse, digits
from runtime.files import durable_file, writing
from runtime.path_kinds import CHECKPOINTS, checkpoints_in
from runtime.work_queue import WorkQueue
from sdxl.contact_sheet import GridBlock, grid_sheet
from sdxl.prompt_files import Prompt

SHEET = "grid.png"
MAX_IMAGES = 2_000
Values = tuple[float | None, ...]  # one of each axis, in the order of the axes


@dataclass(frozen=True)
class Grid:
    """Images by axes: the columns are the values of the first axis, the rows of the others."""

    columns: list[str]
    rows: list[str]
    blocks: list[GridBlock]  # one for each prompt and seed
    sheet: Path
    num_generated: int
    num_kept: int


def generate_grid(settings: GenerateSettings) -> Grid | None:
    """Generate what is missing of the grid, and its sheet; only the main process returns it.

    Raises:
        ValueError: the axes, prompts, weights or folders cannot be used.
        FloatingPointError: an image is not finite.
    """
    axes = [_with_checkpoints(axis, settings) for axis in settings.grid]
    sheet = settings.out / SHEET
    if sheet.exists() and read_record(sheet, to_the_end=False)[0] is None:
        raise ValueError(f"{sheet}: not drawn by shardtune; move it away, or give another --out")
    prompts = read_settings_prompts(settings)
    num_images = sum(prompt.num_images or 1 for prompt in prompts)
    for axis in axes:
        num_images *= len(axis.values)
    if num_images > MAX_IMAGES:
        raise ValueError(f"--grid: has {num_images:,} images; at most {MAX_IMAGES:,}")
    guidance = next((axis.values for axis in axes if axis.name == "guidance"), (None,))
    paths: dict[Values, list[Path]] = {}
    requests: list[ImageRequest] = []
    num_generated = num_kept = 0
    for number, (values, cell) in enumerate(_cells(settings, axes)):
        made: list[ImageRequest] = []
        make = partial(_make_requests, made, cell, prompts, guidance)
        with WorkQueue(f"grid {number}") as queue:
            report = draw(cell, queue, make)
        _free_memory()
        if report is None:
            continue
        num_generated += report.num_generated
        num_kept += report.num_kept
        folder, each = ImageFolder(cell.out, cell.format), len(made) // len(guidance)
        for turn, scale in enumerate(guidance):
            requests = made[turn * each : (turn + 1) * each]
            own = tuple(scale if a.name == "guidance" else values[a.name] for a in axes)
            paths[own] = [folder.path(request) for request in requests]
    if not paths:
        return None
    columns, *others = [[_label(axis, value) for value in axis.values] for axis in axes]
    rows = [", ".join(labels) for labels in product(*others)]
    first, *more = [axis.values for axis in axes]
    blocks = [
        GridBlock(
            f"{request.prompt}  (seed {request.seed})",
            [[paths[column, *row][index] for column in first] for row in product(*more)],
        )
        for index, request in enumerate(requests)
    ]
    info = PngImagePlugin.PngInfo()
    info.add_text(SETTINGS_KEY, "{}")
    with writing(sheet), durable_file(sheet) as file:
        image = grid_sheet(columns, rows, blocks)
        image.save(file, format="PNG", compress_level=1, pnginfo=info)
    return Grid(columns, rows, blocks, sheet, num_generated, num_kept)


def _make_requests(
    made: list[ImageRequest],
    settings: GenerateSettings,
    prompts: list[Prompt],
    guidance: tuple[float | None, ...],
    side: int,
) -> list[ImageRequest]:
    """Each prompt's images at each guidance, in this order, with the same seeds; also added to
    ``made``."""
    requests = make_requests(settings, prompts, side)
    for turn, scale in enumerate(guidance):
        made += [
            replace(
                request,
                number=turn * len(requests) + request.number,
                guidance_scale=request.guidance_scale if scale is None else scale,
            )
            for request in requests
        ]
    return made


def _cells(
    settings: GenerateSettings, axes: list[GridAxis]
) -> Iterator[tuple[dict[str, float], GenerateSettings]]:
    """Checkpoint and weight of each folder of images, and its settings."""
    of_weights = [axis for axis in axes if axis.name != "guidance"]
    for combination in product(*(axis.values for axis in of_weights)):
        values = dict(zip((axis.name for axis in of_weights), combination, strict=True))
        lora, unet = settings.lora, settings.unet
        if "checkpoint" in values:
            name = f"checkpoint-{int(values['checkpoint'])}"
            if unet is not None:
                unet = unet / CHECKPOINTS / name
            else:
                lora = (LoraUse(lora[0].path / CHECKPOINTS / name, lora[0].weight),)
        if "weight" in values:
            lora = (LoraUse(lora[0].path, values["weight"]),)
        folder = "_".join(f"{name}-{digits(value)}" for name, value in values.items()) or "images"
        yield values, replace(settings, grid=(), lora=lora, unet=unet, out=settings.out / folder)


def _with_checkpoints(axis: GridAxis, settings: GenerateSettings) -> GridAxis:
    """The axis with the steps of the run's checkpoints, where they are not listed."""
    if axis.name != "checkpoint":
        return axis
    run = settings.unet or settings.lora[0].path
    steps = [*checkpoints_in(run)]
    if not steps:
        raise ValueError(f"{run}: has no {CHECKPOINTS}; --grid checkpoint needs a run's folder")
    for value in axis.values:
        if value not in steps:
            raise ValueError(
                f"{run}: has no checkpoint-{value:g}; it has {', '.join(map(str, steps))}"
            )
    return replace(axis, values=axis.values or tuple(steps))


def _label(axis: GridAxis, value: float) -> str:
    return f"{axis.name} {digits(value)}" if axis.name != "checkpoint" else f"step {int(value):,}"


def _free_memory() -> None:
    """Between two sets of weights: the next is loaded when the one before is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
