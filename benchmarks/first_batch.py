"""Measures the time to a cache's first batch, and the memory used, in a process of its own.

python -m benchmarks.first_batch CACHE
"""

import json
import time
from pathlib import Path

import click
import torch

from benchmarks.report import resident_bytes
from shards.batches import Reader
from shards.plan import Plan, RankShare
from shards.reader import Cache

BATCH_SIZE = 8


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
def main(cache: Path) -> None:
    """One JSON object."""
    torch.empty(1)
    before, start, busy = resident_bytes(), time.perf_counter(), time.process_time()
    opened = Cache(cache)
    plan = Plan(opened.groups(), 0, BATCH_SIZE)
    reader = Reader([opened], plan, RankShare(batch_size=BATCH_SIZE, world=1, rank=0))
    stream = reader.epochs(threads=1)
    next(stream)
    first_seconds, busy = time.perf_counter() - start, time.process_time() - busy
    first = resident_bytes()
    stream.close()
    start = time.process_time()
    num_shards = sum(1 for _ in opened.shards())
    open_seconds = time.process_time() - start
    last = resident_bytes()
    result = {
        "first_batch_seconds": first_seconds,
        "of_processor": busy,
        "first_batch_mb": (first["RssAnon"] - before["RssAnon"]) / 1e6,
        "shards": num_shards,
        "ms_to_open_one": 1e3 * open_seconds / num_shards,
        "all_open_mb": (last["RssAnon"] - before["RssAnon"]) / 1e6,
        "all_open_mapped_mb": (last["RssFile"] - before["RssFile"]) / 1e6,
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
