"""Compares reading a cache with a bare copy, webdataset and npz: samples a second, warm.

Real SDXL sample sizes; all read the same samples in turns (A B C, B C A, ...), in processor time of
one thread, medians. Then the time to a first batch and the resident memory of large caches,
whose indexes are real and whose payloads are holes, and what a seek in a long epoch takes.

    python -m benchmarks.read [--quick] [--out benchmark-output]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import readers
from benchmarks.caches import KINDS, Kind, random_samples, write_random, write_sparse
from benchmarks.report import keep, machine, ratio, show, take_turns
from shards.plan import Group, Plan
from shards.reader import Cache

TARGETS = {"mmap copy": 0.8, "webdataset": 5.0, "npz": 10.0}
FIRST_BATCH_TARGET_SECONDS = 1.0


def compare(folder: Path, kind: Kind, count: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way to read: samples a second, and how ours compares with it."""
    samples = random_samples(kind, count)
    write_random(folder / "cache", kind, samples)
    readers.write_npz(folder / "npz", samples)
    cache = Cache(folder / "cache")
    works = {
        "mmap copy": readers.mmap_copy(cache),
        "hash, then copy": readers.hash_and_copy(cache),
        "ours": readers.shards_in_order(cache, kind),
        "ours, with draws": readers.training(cache),
        "webdataset": readers.stock_webdataset(cache),
        "npz": readers.npz(folder / "npz"),
    }
    seconds = take_turns(works, rounds)["processor"]
    return [
        {
            "reader": name,
            "samples/s": count / statistics.median(seconds[name]),
            "ms": 1e3 * statistics.median(seconds[name]) / count,
            "ours / it": ratio(seconds, "ours", name),
            "target": TARGETS.get(name),
        }
        for name in works
    ]


def open_large(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Medians over processes that each open the cache anew."""
    write_sparse(folder, KINDS["449 kB"], count)
    command = [sys.executable, "-m", "benchmarks.first_batch", str(folder)]
    results = []
    for _ in range(rounds):
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(run.stdout))
    medians = {name: statistics.median(item[name] for item in results) for name in results[0]}
    return {"samples": f"{count:,}", **medians}


def seek(num_samples: int) -> dict[str, Any]:
    """Milliseconds from nothing to the entries of a batch far into an epoch."""
    group = Group(cache=0, bucket=(1024, 1024), repeats=1, count=num_samples)
    taken = []
    for number in np.random.default_rng(0).integers(0, num_samples // 8, 50).tolist():
        start = time.process_time()
        Plan([group], 0, 8).batch(3, number)
        taken.append(time.process_time() - start)
    return {"samples": f"{num_samples:,}", "ms": 1e3 * statistics.median(taken)}


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes: less than a minute.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(quick: bool, rounds: int, out: Path) -> None:
    """Reading, opening and seeking."""
    torch.manual_seed(0)
    count = 128 if quick else 512
    sizes = (1_000, 20_000) if quick else (1_000, 100_000, 1_000_000)
    result: dict[str, Any] = {"machine": machine(), "quick": quick, "reading": {}, "opening": []}
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(Path(folder), kind, count, rounds)
        result["reading"][name] = rows
        show(f"{count} samples of {name}, warm page cache, one thread", rows)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            result["opening"].append(open_large(Path(folder) / "cache", size, 3))
    show(f"first batch (target: {FIRST_BATCH_TARGET_SECONDS} s at 1,000,000)", result["opening"])
    result["seek"] = seek(10_000_000)
    show("a seek", [result["seek"]])
    keep(out / "read.json", result)


if __name__ == "__main__":
    main()
