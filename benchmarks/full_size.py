"""Measures two full-size LoRA steps at 512 px on a CPU, with and without encoders in memory.

    python -m benchmarks.full_size [--work FOLDER] [--out benchmark-output]

Once through ``cli.py train``, which holds the UNet alone, and once by the same loop in a process
that has the VAE (fp32) and the text encoders (bf16) in memory, as one must to encode while one
trains. Weights are random, in bf16. Wants 7 GB of disk and 9 GB of memory. The pages of the mapped
weights' file count apart: they are dropped when others want them.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.caches import Kind, random_samples, write_random
from benchmarks.full_base import write_encoders, write_unet
from benchmarks.report import keep, machine, measured, show

NUM_STEPS = 2
ALONE, BESIDE = "shards alone", "encoders in memory"
CHECKPOINTED = "shards alone, checkpointing"  # as it is the default on a card
SETTINGS = ["--precision", "bf16", "--allow-cpu-bf16", "--device", "cpu", "--batch-size", "1"]
SETTINGS += ["--steps", str(NUM_STEPS), "--log-every", "1", "--overwrite"]


def train_beside_encoders(arguments: list[str], encoders: str) -> None:
    """``cli.py train``, with the encoders in memory."""
    import torch

    from cli import commands
    from sdxl.base import open_base
    from sdxl.load import load_text_encoders, load_vae

    base = open_base(encoders)
    models = load_vae(base.vae, torch.float32), *load_text_encoders(base, torch.bfloat16)
    commands.main(["train", *arguments], standalone_mode=False)
    assert len(models) == 3


@click.command()
@click.option("--work", type=click.Path(path_type=Path), help="Kept; default: a temporary folder.")
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
@click.option("--encoders", help="Train with these in memory (what this starts itself).")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(work: Path | None, out: Path, encoders: str | None, arguments: tuple[str, ...]) -> None:
    """Peak resident memory and seconds of both."""
    if encoders is not None:
        train_beside_encoders([*arguments], encoders)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        if not (folder / "base").exists():
            write_unet(folder / "base")
            write_encoders(folder / "encoders")
        if not (folder / "cache").exists():
            kind = Kind(pixels=512)
            write_random(folder / "cache", kind, random_samples(kind, 4))
        rows = [_run(name, folder) for name in (ALONE, CHECKPOINTED, BESIDE)]
    show(f"{NUM_STEPS} LoRA steps of the real UNet at 512 px, batch 1, bf16", rows)
    keep(out / "full_size.json", {"machine": machine(), "rows": rows})


def _run(name: str, folder: Path) -> dict[str, Any]:
    run = folder / "run"
    arguments = [str(folder / "cache"), "--base", str(folder / "base"), "--out", str(run)]
    command = [sys.executable, "cli.py", "train"]
    if name == CHECKPOINTED:
        arguments.append("--gradient-checkpointing")
    if name == BESIDE:
        command = [sys.executable, "-m", "benchmarks.full_size"]
        command += ["--encoders", str(folder / "encoders"), "--"]
    used = measured([*command, *arguments, *SETTINGS])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == NUM_STEPS and all(row["train/loss"] is not None for row in steps)
    return {
        "what": name,
        "own GB": used.anonymous_bytes / 1e9,
        "with mapped files GB": used.peak_bytes / 1e9,
        "wall s": used.wall_seconds,
        "processor s": used.cpu_seconds,
        "s/step": 1 / steps[-1]["train/images_per_second"],
        "loss": steps[-1]["train/loss"],
    }


if __name__ == "__main__":
    main()
