"""Measures the time and memory in which tables of images, parquet and arrow, are planned.

    python -m benchmarks.plan_tables [--rows 1000000] [--form parquet]

Rows are tiny PNGs of a few sizes with a caption each, so that what is measured is the planning of a
sample and not the reading of its bytes. Each figure is of a process of its own, which does what
encode does up to its plan, without a model; the second one has what the first one remembered.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.report import keep, machine, show

FORMS = ("parquet", "arrow")
SIZES = ((64, 64), (48, 80), (80, 48), (96, 64))
ROWS_A_GROUP = 1000


@click.command()
@click.option("--rows", default=20_000, show_default=True, help="Rows of each table.")
@click.option("--form", type=click.Choice(FORMS), multiple=True, default=FORMS)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(rows: int, form: tuple[str, ...], out: Path) -> None:
    """Time and memory to plan a table of images."""
    results = []
    for name in form:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "set"
            _write_table(root, name, rows)
            for which in ("first", "remembered"):
                result = _plan_apart(root, Path(folder) / "xdg")
                assert result["planned"] == rows, result
                num_bytes = result["peak_bytes"] - result["before_bytes"]
                results.append(
                    {
                        "table": name,
                        "time": which,
                        "rows": rows,
                        "processor s": result["seconds"],
                        "peak MB": result["peak_bytes"] / 1e6,
                        "bytes a row": num_bytes / rows,
                    }
                )
    show("Planning of tables", results)
    keep(out / "plan_tables.json", {"machine": machine("cpu"), "rows": results})


def _images() -> list[bytes]:
    from PIL import Image

    images = []
    for size in SIZES:
        file = io.BytesIO()
        Image.new("RGB", size, "red").save(file, "PNG")
        images.append(file.getvalue())
    return images


def _write_table(root: Path, form: str, num_rows: int) -> None:
    """A file of ``num_rows`` rows, each with bytes of its own, written a row group at a time."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir()
    path = root / f"train-00000-of-00001.{form}"
    images = _images()

    def batches() -> Iterator[Any]:
        for start in range(0, num_rows, ROWS_A_GROUP):
            numbers = range(start, min(num_rows, start + ROWS_A_GROUP))
            data = [images[n % len(images)] + n.to_bytes(4) for n in numbers]
            cells = [{"bytes": content, "path": None} for content in data]
            texts = [f"a photograph of thing {n} on a wooden table" for n in numbers]
            yield pyarrow.record_batch({"image": pyarrow.array(cells), "text": texts})

    first = next(batches())
    if form == "parquet":
        with parquet.ParquetWriter(path, first.schema) as writer:
            for batch in batches():
                writer.write_batch(batch, row_group_size=ROWS_A_GROUP)
    else:
        with pyarrow.ipc.new_stream(path, first.schema) as writer:
            for batch in batches():
                writer.write_batch(batch)
    os.utime(path, (1_000_000_000, 1_000_000_000))  # else it may change unnoticed


def _plan_apart(root: Path, home: Path) -> dict[str, Any]:
    code = "import sys, json; from pathlib import Path; from benchmarks.plan_tables import _plan; "
    code += "print(json.dumps(_plan(Path(sys.argv[1]))))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(run.stdout))


def _plan(root: Path) -> dict[str, Any]:
    from precompute.dataset.sources import read_dataset
    from precompute.plan.placement import assign_shards
    from precompute.plan.scan import Notes, plan_images
    from precompute.settings import EncodeSettings

    warnings.simplefilter("ignore")
    before, start = _peak_bytes(), time.process_time()
    settings = EncodeSettings(
        dataset=root, base="", out=root.parent / "cache", resolution=64, bucket_step=16
    )
    notes = Notes(settings.out, str(root))
    (source,) = read_dataset(settings, notes.memory).values()
    planned, rejected = plan_images(source.records, settings, notes.memory)
    shards = assign_shards(planned, {}, settings.shard_size)
    notes.write()
    assert shards and not rejected
    return {
        "planned": len(planned),
        "seconds": time.process_time() - start,
        "before_bytes": before,
        "peak_bytes": _peak_bytes(),
    }


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
