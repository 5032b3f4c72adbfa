"""Compares ``cli.py encode`` with the bare work on a CPU; measures its memory and its rescan.

The bare work is what nobody can do without: read, decode, resize and crop each image, the VAE and
both text encoders of diffusers and transformers on batches of the same size. Both run in this
process in turns (A B, B A, ...), models loaded each time, by processor seconds, which other
processes disturb little.

    python -m benchmarks.encode [--base BASE] [--images 300] [--resolution 256] [--rounds 2]
"""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from PIL import Image

from benchmarks.report import (
    PROCESSOR,
    clocks,
    keep,
    machine,
    measured,
    rates,
    show,
    take_turns,
)
from precompute.dataset.sources import read_dataset
from precompute.encode import encode
from precompute.plan.scan import plan_images
from precompute.report import Report
from precompute.settings import EncodeSettings
from sdxl.base import open_base
from sdxl.load import load_text_encoders, load_tokenizers, load_vae
from shards.buckets import Geometry
from tools.draw_images import draw_images

BATCH_SIZE = 4


def settings_of(dataset: Path, base: str, out: Path, resolution: int) -> EncodeSettings:
    step = max(8, resolution // 4)
    return EncodeSettings(
        dataset=dataset,
        base=base,
        out=out,
        resolution=resolution,
        bucket_step=step,
        batch_size=BATCH_SIZE,
        threads=1,
        device="cpu",
    )


class BareWork:
    """The same images in the same batches, with the libraries alone. ``plan`` is not timed."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.base = open_base(settings.base)
        planned, _ = plan_images(read_dataset(settings)[""].records, settings)
        planned.sort(key=lambda sample: (sample.bucket, sample.record.key))
        self.jobs: dict[Any, list[tuple[Path, Geometry, str]]] = {}
        for sample in planned:
            job = (sample.record.image.file, sample.variants[0], sample.record.captions[0])
            self.jobs.setdefault(sample.bucket, []).append(job)

    @torch.inference_mode()
    def run(self) -> None:
        vae: Any = load_vae(self.base.vae, torch.float32)
        encoders, tokenizers = (
            load_text_encoders(self.base, torch.float32),
            load_tokenizers(self.base),
        )
        for jobs in self.jobs.values():
            for start in range(0, len(jobs), BATCH_SIZE):
                part = jobs[start : start + BATCH_SIZE]
                pixels = torch.stack([_pixels(file, geometry) for file, geometry, _ in part])
                captions = [caption for _, _, caption in part]
                encoded = vae.encode(pixels).latent_dist
                _ = (
                    encoded.mean * vae.config.scaling_factor,
                    encoded.std * vae.config.scaling_factor,
                )
                for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
                    ids = tokenizer(
                        captions, padding="max_length", truncation=True, return_tensors="pt"
                    ).input_ids
                    _ = encoder(ids, output_hidden_states=True).hidden_states[-2]


def _pixels(file: Path, geometry: Geometry) -> torch.Tensor:
    with Image.open(file) as image:
        resized = image.convert("RGB").resize(geometry.resized, Image.Resampling.LANCZOS)
    (left, top), (width, height) = geometry.crop, geometry.target
    cropped = resized.crop((left, top, left + width, top + height))
    data = torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8)
    return data.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


def quiet(work: Callable[[], object]) -> None:
    """Without its progress on the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        work()


def measure_cost(
    folder: Path, base: str, images: int, resolution: int, rounds: int
) -> list[dict[str, Any]]:
    dataset, numbers = folder / "images", count()
    draw_images(dataset, count=images, size=resolution * 3 // 2)
    settings = settings_of(dataset, base, folder, resolution)

    def encode_once() -> None:
        out = folder / f"cache-of-round-{next(numbers)}"
        quiet(lambda: encode(replace(settings, out=out)))

    works = {"ours": encode_once, "bare": BareWork(settings).run}
    (row,) = rates(take_turns(works, rounds, PROCESSOR), images, "images", target=1.05)
    return [{**row, "ratio": 1 / row["ratio"]}]  # of seconds


def peak_bytes(settings: EncodeSettings) -> int:
    """Most memory that one ``cli.py encode`` ever held."""
    command = [sys.executable, "cli.py", "encode", settings.dataset, "--base", settings.base]
    command += ["--out", settings.out, "--device", "cpu", "--threads", 1]
    for name in ("resolution", "bucket_step", "batch_size"):
        command += ["--" + name.replace("_", "-"), getattr(settings, name)]
    return measured([str(part) for part in command]).peak_bytes


def measure_growth(folder: Path, base: str, images: int) -> dict[str, Any]:
    """For small images: memory of a fresh encode, and the speed of one that has nothing to do.

    Its files are images and captions; the speed is that of one core that is not shared.
    """
    dataset = folder / f"many-{images}"
    draw_images(dataset, count=images, size=32)
    settings = settings_of(dataset, base, folder / f"cache-{images}", 32)
    peak = peak_bytes(settings)
    reports: list[Report] = []
    again = {"rescan": lambda: quiet(lambda: reports.extend(encode(settings)))}
    taken = take_turns(again, 3, clocks(torch.device("cpu")))
    report = reports[-1]
    if not report.changes.are_none or report.num_samples != images:
        raise RuntimeError(f"not all of it was as it was: {report}")
    num_files = sum(1 for _ in dataset.iterdir())
    speeds = {f"files/s, {c}": num_files / min(taken[c]["rescan"]) for c in taken}
    return {"images": images, "peak MB": peak / 1e6, "files": num_files, **speeds}


@click.command()
@click.option("--base", default="miniature", show_default=True)
@click.option("--images", default=300, show_default=True, help="Encoded in each round.")
@click.option("--resolution", default=256, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="Of each, in turns.")
@click.option("--memory", default="1000,10000", show_default=True, help="Numbers of images.")
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(base: str, images: int, resolution: int, rounds: int, memory: str, out: Path) -> None:
    """Processor seconds against the bare work, peak memory and rescan speed."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        growth = [measure_growth(Path(folder), base, int(n)) for n in memory.split(",") if n]
        show("a fresh encode of small images; a rescan with nothing to do (target 20,000)", growth)
        cost = measure_cost(Path(folder), base, images, resolution, rounds) if rounds else []
        show(f"{images} images of {resolution} px against the bare work", cost)
    keep(out / "encode.json", {"machine": machine(), "growth": growth, "cost": cost})


if __name__ == "__main__":
    main()
