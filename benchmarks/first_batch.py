"""Time to the first batch of a cache, and what it keeps in memory; in a process of its own.

python -m benchmarks.first_batch CACHE
"""

import json
import time
from pathlib import Path

import click
import torch

from shards.batches import Reader
from shards.plan import Plan, Share
from shards.reader import Cache

BATCH_SIZE = 8


def resident() -> dict[str, float]:
    """MB of this process's own memory, and of mapped files' pages that it has looked at (Linux)."""
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line
    )
    return {n: int(lines[n].split()[0]) / 1024 for n in ("RssAnon", "RssFile")}


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
def main(cache: Path) -> None:
    """One JSON object."""
    torch.empty(1)
    before, start = resident(), time.perf_counter()
    opened = Cache(cache)
    plan = Plan(opened.groups(), 0, BATCH_SIZE)
    reader = Reader([opened], plan, Share(batch_size=BATCH_SIZE, world=1, rank=0))
    stream = reader.epochs(threads=1)
    next(stream)
    first_seconds = time.perf_counter() - start
    first = resident()
    stream.close()
    start = time.process_time()
    num_shards = sum(1 for _ in opened.shards())
    open_seconds = time.process_time() - start
    last = resident()
    result = {
        "first_batch_seconds": first_seconds,
        "first_batch_mb": first["RssAnon"] - before["RssAnon"],
        "shards": num_shards,
        "ms_to_open_one": 1e3 * open_seconds / num_shards,
        "all_open_mb": last["RssAnon"] - before["RssAnon"],
        "all_open_mapped_mb": last["RssFile"] - before["RssFile"],
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
