"""Compares training from a cache with the ways of diffusers' scripts (``benchmarks.online``).

Those encode online, or once into memory at their start. Data, base, rank, batch, steps and
precision are the same; each run is a command in a process of its own, start and loading included,
and ``encode`` is counted in ours. From two lengths come seconds an epoch and seconds before the
first, and from these the epoch from which ours is ahead.

    OMP_NUM_THREADS=1 python -m benchmarks.peers [--quick] [--base BASE] [--device cpu]

(Threads that spin while they wait count as work, and diffusers' scripts let them.)
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.report import Used, keep, machine, measured, show
from tools.draw_images import draw_images

EPOCHS = (1, 4)
SHARDS = "ours, from shards"


class Peers:
    """The commands of both, with the same settings."""

    def __init__(self, folder: Path, base: str, resolution: int, device: str) -> None:
        self.folder, self.data, self.base = folder, folder / "data", base
        self.precision = "bf16" if device == "cuda" else "fp32"
        self.size = ["--resolution", str(resolution)]
        self.common = ["--base", base, "--device", device]
        self.training = ["--rank", "4", "--batch-size", "4", "--precision", self.precision]

    def encode(self) -> Used:
        command = [sys.executable, "cli.py", "encode", str(self.data), "--square"]
        out = ["--out", str(self.folder / "cache"), "--batch-size", "4"]
        return measured([*command, *out, *self.size, *self.common])

    def train_cached(self, epochs: int) -> tuple[Used, dict[str, Any]]:
        run = self.folder / "run"
        command = [sys.executable, "cli.py", "train", str(self.folder / "cache")]
        more = ["--out", str(run), "--overwrite", "--epochs", str(epochs)]
        used = measured([*command, *more, *self.training, *self.common])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [row for row in rows if "train/images_per_second" in row][-1]
        return used, {
            "images_per_second": last["train/images_per_second"],
            "peak_bytes": last["train/peak_memory_bytes"],
        }

    def script(self, epochs: int, *options: str) -> tuple[Used, dict[str, Any]]:
        command = [sys.executable, "-m", "benchmarks.online", str(self.data)]
        more = ["--epochs", str(epochs), *options, *self.size]
        used = measured([*command, *more, *self.training, *self.common])
        return used, json.loads(used.output.splitlines()[-1])


def line_of(walls: dict[int, float]) -> tuple[float, float]:
    """(seconds before the first epoch, seconds an epoch) by the shortest and the longest run."""
    shortest, longest = min(walls), max(walls)
    per_epoch = (walls[longest] - walls[shortest]) / (longest - shortest)
    return walls[shortest] - shortest * per_epoch, per_epoch


def compare(peers: Peers, epochs: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per way; processor and wall seconds of the whole runs by number of epochs."""
    encoding = peers.encode()
    ways: dict[str, Callable[[int], tuple[Used, dict[str, Any]]]] = {
        SHARDS: peers.train_cached,
        "online": peers.script,
        "cached in memory": lambda number: peers.script(number, "--cached"),
    }
    if peers.precision == "bf16":  # on a GPU; a CPU emulates it
        ways["online, VAE bf16"] = lambda number: peers.script(number, "--vae-dtype", "bf16")
    rows: list[dict[str, Any]] = [{"way": name} for name in ways]
    for number in epochs:  # in turns, for the noise of the machine
        for row, (name, run) in zip(rows, ways.items(), strict=True):
            used, measures = run(number)
            seconds = [used.cpu_seconds, used.wall_seconds]
            if name == SHARDS:
                seconds = [seconds[0] + encoding.cpu_seconds, seconds[1] + encoding.wall_seconds]
                row["encode s"] = encoding.cpu_seconds
            row[f"{number} ep s"], row[f"{number} ep wall s"] = seconds
            row["images/s"] = measures["images_per_second"]
            row["peak GB"] = measures["peak_bytes"] / 1e9
            click.echo(f"{name}, {number} epochs: {seconds[0]:.1f} s, wall {seconds[1]:.1f} s")
    _add_break_even(rows, epochs)
    return rows


def _add_break_even(rows: list[dict[str, Any]], epochs: tuple[int, ...]) -> None:
    """The epoch from which our run, encoding included, is ahead of each other one."""
    lines = [line_of({n: row[f"{n} ep s"] for n in epochs}) for row in rows]
    before, per_epoch = lines[0]
    for row, (their_before, their_per_epoch) in zip(rows[1:], lines[1:], strict=True):
        gain = their_per_epoch - per_epoch
        row["ahead from epoch"] = (before - their_before) / gain if gain > 0 else None
        row["s an epoch / ours"] = their_per_epoch / per_epoch


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes: about a minute and a half.")
@click.option("--base", default="miniature", show_default=True)
@click.option("--images", default=48, show_default=True)
@click.option("--resolution", default=128, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(quick: bool, base: str, images: int, resolution: int, device: str, out: Path) -> None:
    """From a cache, online, and cached in memory."""
    if quick:
        images, resolution = min(images, 16), min(resolution, 64)
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(Path(folder), base, resolution, device)
        draw_images(peers.data, images, size=resolution)
        rows = compare(peers, EPOCHS)
    names = ("way", "images/s", "peak GB", "encode s", *(f"{n} ep s" for n in EPOCHS))
    more = (*(f"{n} ep wall s" for n in EPOCHS), "s an epoch / ours", "ahead from epoch")
    shown = [{name: row.get(name) for name in (*names, *more)} for row in rows]
    show(
        f"LoRA of {base}, {images} images of {resolution} px, batch 4, {peers.precision}; "
        "processor and wall seconds of whole commands",
        shown,
    )
    keep(out / "peers.json", {"machine": machine(device), "rows": rows})


if __name__ == "__main__":
    main()
