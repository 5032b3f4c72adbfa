"""What ``cli.py encode`` costs beside the bare work, on a CPU; how its memory and its rescan grow.

The bare work is what nobody can do without: read, decode, resize and crop each picture, the VAE and
both text encoders of diffusers and transformers on batches of the same size. Both run in this
process in turns (A B A B ...), models loaded each time; the ratio is that of the medians of
processor seconds, which other processes disturb little.

    python -m benchmarks.encode [--base BASE] [--pictures 300] [--resolution 256] [--rounds 2]
"""

import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from precompute.dataset.sources import read_data_set
from precompute.encode import encode
from precompute.planning.scan import plan_pictures
from precompute.settings import EncodeSettings
from sdxl.load import load_text_encoders, load_tokenizers, load_vae
from shards.buckets import Geometry
from tools.draw_pictures import draw_pictures

ROOT = Path(__file__).parent.parent
BATCH_SIZE = 4


def settings_of(data_set: Path, base: str, out: Path, resolution: int) -> EncodeSettings:
    step = max(8, resolution // 4)
    return EncodeSettings(
        dataset=data_set,
        base=base,
        out=out,
        resolution=resolution,
        bucket_step=step,
        batch_size=BATCH_SIZE,
        threads=1,
        device="cpu",
    )


class BareWork:
    """The same pictures in the same batches, with the libraries alone. ``plan`` is not timed."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.base = settings.base
        planned, _ = plan_pictures(read_data_set(settings)[""].records, settings)
        planned.sort(key=lambda one: (one.bucket, one.record.key))
        self.jobs: dict[Any, list[tuple[Path, Geometry, str]]] = {}
        for one in planned:
            job = (one.record.picture.file, one.variants[0], one.record.captions[0])
            self.jobs.setdefault(one.bucket, []).append(job)

    @torch.inference_mode()
    def run(self) -> None:
        vae: Any = load_vae(self.base, torch.float32)
        encoders, tokenizers = (
            load_text_encoders(self.base, torch.float32),
            load_tokenizers(self.base),
        )
        for jobs in self.jobs.values():
            for start in range(0, len(jobs), BATCH_SIZE):
                part = jobs[start : start + BATCH_SIZE]
                pixels = torch.stack([_pixels(file, geometry) for file, geometry, _ in part])
                captions = [caption for _, _, caption in part]
                found = vae.encode(pixels).latent_dist
                _ = found.mean * vae.config.scaling_factor, found.std * vae.config.scaling_factor
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


def processor_seconds(work: Callable[[], Any]) -> float:
    """Of this process, all its threads."""
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        work()
    return time.process_time() - start


def measure_cost(folder: Path, base: str, pictures: int, resolution: int, rounds: int) -> Any:
    data_set, out = folder / "pictures", folder / "cache"
    draw_pictures(data_set, count=pictures, size=resolution * 3 // 2)
    settings = settings_of(data_set, base, out, resolution)
    bare, seconds = BareWork(settings), {"ours": list[float](), "bare": list[float]()}

    def ours() -> None:
        encode(settings)

    for number in range(rounds + 1):  # the first one warms up
        shutil.rmtree(out, ignore_errors=True)
        for name, work in (("ours", ours), ("bare", bare.run)):
            taken = processor_seconds(work)
            if number:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "pictures": pictures,
        "resolution": resolution,
        "rounds": rounds,
        "ours_seconds": round(medians["ours"], 2),
        "bare_seconds": round(medians["bare"], 2),
        "ratio": round(medians["ours"] / medians["bare"], 4),
    }


def peak_bytes(settings: EncodeSettings) -> int:
    """Most memory that one ``cli.py encode`` ever held."""
    command = [sys.executable, "cli.py", "encode", settings.dataset, "--base", settings.base]
    command += ["--out", settings.out, "--device", "cpu", "--threads", 1]
    for name in ("resolution", "bucket_step", "batch_size"):
        command += ["--" + name.replace("_", "-"), getattr(settings, name)]
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"encode ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_growth(folder: Path, base: str, pictures: int) -> dict[str, Any]:
    """Of small pictures: memory of a fresh encode, and the speed of one that has nothing to do.

    Its files are pictures and captions; the speed is that of one core that is not shared.
    """
    data_set = folder / f"many-{pictures}"
    draw_pictures(data_set, count=pictures, size=32)
    settings = settings_of(data_set, base, folder / f"cache-{pictures}", 32)
    peak = peak_bytes(settings)
    reports = []
    taken = [processor_seconds(lambda: reports.extend(encode(settings))) for _ in range(3)]
    report = reports[-1]
    if not report.is_as_it_was or report.num_samples != pictures:
        raise RuntimeError(f"not all of it was as it was: {report}")
    num_files = sum(1 for _ in data_set.iterdir())
    return {
        "pictures": pictures,
        "peak_mb": round(peak / 1e6, 1),
        "files": num_files,
        "rescan_files_per_processor_second": round(num_files / min(taken)),
    }


@click.command()
@click.option("--base", default="miniature", show_default=True)
@click.option("--pictures", default=300, show_default=True, help="Encoded in each round.")
@click.option("--resolution", default=256, show_default=True)
@click.option("--rounds", default=2, show_default=True, help="Of each, in turns.")
@click.option("--memory", default="1000,10000", show_default=True, help="Numbers of pictures.")
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(base: str, pictures: int, resolution: int, rounds: int, memory: str, out: Path) -> None:
    """Processor seconds against the bare work, peak memory and rescan speed."""
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "growth": [measure_growth(out, base, int(n)) for n in memory.split(",") if n],
    }
    if rounds:
        result["cost"] = measure_cost(out, base, pictures, resolution, rounds)
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
