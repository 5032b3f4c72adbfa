"""Compares ``cli.py generate`` with the bare loop over diffusers' own pipeline: images a second.

Both draw the same prompts and seeds at the same batch size and write PNGs, in this process, in
turns (A B, B A, ...), so that a noisy machine disturbs both alike. Models are loaded before. Then
each draws alone in a process of its own, loading included, for its peak memory: that of the GPU,
and of the process.

    python -m benchmarks.generate [--base BASE] [--side 192] [--batch-size 4] [--rounds 7]
"""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from benchmarks.report import clocks, keep, machine, rates, show, take_turns
from infer.generate import generate, make_pipeline
from infer.pipeline import Pipeline
from infer.settings import GenerateSettings
from runtime.devices import pick_device
from sdxl.base import base_path

COLORS = ("red", "blue", "green", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
GUIDANCE = 5.0


def prompts_of(num: int) -> list[str]:
    """Different ones: a bare loop encodes equal prompts again and again."""
    return [
        f"a {COLORS[n % 4]} {SHAPES[n // 4 % 4]} on a white ground, number {n}" for n in range(num)
    ]


def settings_of(options: dict[str, Any], out: Path) -> GenerateSettings:
    """``out`` gets the prompt file as well."""
    file = out.with_suffix(".txt")
    file.write_text("\n".join(prompts_of(options["num_images"])))
    return GenerateSettings(
        base=options["base"],
        prompts=file,
        out=out,
        size=str(options["side"]) if options["side"] else None,
        num_steps=options["steps"],
        guidance_scale=GUIDANCE,
        batch_size=options["batch_size"],
        device=options["device"],
        gpus=None,
    )


def product(options: dict[str, Any], folder: Path, keep_loaded: bool) -> Callable[[int], None]:
    """The product: plan, digests, windows, PNGs with their settings, captions, contact sheet."""
    pipeline: Pipeline = make_pipeline(
        settings_of(options, folder / "ours"), keep_loaded=keep_loaded
    )
    return lambda number: _check(
        generate(settings_of(options, folder / f"ours-{number}"), pipeline), options
    )


def _check(report: Any, options: dict[str, Any]) -> None:
    assert report.num_generated == options["num_images"]


def bare(options: dict[str, Any], folder: Path) -> Callable[[int], None]:
    """diffusers' pipeline, batch by batch, and ``image.save``."""
    from diffusers import StableDiffusionXLPipeline

    device = pick_device(options["device"])
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    path = str(base_path(options["base"]))
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(path, torch_dtype=dtype)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts, size = prompts_of(options["num_images"]), options["batch_size"]

    def loop(number: int) -> None:
        out = folder / f"bare-{number}"
        out.mkdir()
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            generators = [torch.Generator().manual_seed(start + n) for n in range(len(some))]
            result = pipeline(
                some,
                generator=generators,
                num_inference_steps=options["steps"],
                height=options["side"] or None,
                width=options["side"] or None,
                guidance_scale=GUIDANCE,
            )
            for offset, image in enumerate(result.images):
                image.save(out / f"{start + offset:06d}.png")

    return loop


def peak_of(which: str, options: dict[str, Any]) -> dict[str, float]:
    """Peak memory in GB of one alone, in a process of its own."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.generate", *arguments, f"--alone={which}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def draw_alone(which: str, options: dict[str, Any], folder: Path) -> dict[str, float]:
    """Load and draw once, and say the peaks."""
    work = product(options, folder, keep_loaded=False) if which == "ours" else bare(options, folder)
    work(0)
    # Not getrusage: of a process just started it tells the peak of the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peaks = {"process_gb": int(status["VmHWM"].split()[0]) * 1024 / 1e9}
    if torch.cuda.is_available():
        peaks["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: round(value, 3) for name, value in peaks.items()}


def compare(options: dict[str, Any], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row per clock."""
    works = {"ours": product(options, folder, keep_loaded=True), "bare": bare(options, folder)}
    numbers = count()  # each draws into a folder of its own
    turns = {name: lambda work=work: work(next(numbers)) for name, work in works.items()}
    seconds = take_turns(turns, rounds, clocks(pick_device(options["device"])))
    return rates(seconds, options["num_images"], "images", target=0.97)


@click.command()
@click.option("--base", default="miniature", show_default=True)
@click.option("--num-images", default=16, show_default=True, help="Of a round.")
@click.option("--steps", default=20, show_default=True, help="Of denoising.")
@click.option("--side", default=0, help="Of the images, in pixels; 0: the base's own.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Of each, in turns.")
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
@click.option("--alone", type=click.Choice(["ours", "bare"]), hidden=True)
def main(rounds: int, out: Path, alone: str | None, **options: Any) -> None:
    """Images/s of the product and of the bare pipeline loop, their ratio, and peak memory."""
    with TemporaryDirectory() as folder:
        if alone is not None:
            click.echo(json.dumps(draw_alone(alone, options, Path(folder))))
            return
        rows = compare(options, rounds, Path(folder))
    peaks = [{"way": name, **peak_of(name, options)} for name in ("ours", "bare")]
    show(f"{options['base']}, batch {options['batch_size']}, {rounds} rounds", rows)
    show("peak memory", peaks)
    metadata = {
        "machine": machine(str(pick_device(options["device"]))),
        **options,
        "rounds": rounds,
    }
    keep(out / "generate.json", {**metadata, "rows": rows, "peaks": peaks})


if __name__ == "__main__":
    main()
