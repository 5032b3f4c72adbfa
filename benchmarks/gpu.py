"""Measures full-size SDXL with random weights on one CUDA card; nothing is downloaded.

Cells are independent, one process each, dearest last. Their figures go into one JSON as they come;
run again, it goes on with what is missing, and ``--budget-seconds`` starts no cell after that time.

    python -m benchmarks.gpu --work FOLDER [--budget-seconds 1500] [--only train]

``--tiny --device cpu`` runs every cell on the miniature, which tries the code and measures nothing.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks.estimates import FULL, LORA
from benchmarks.report import keep, machine, show

BASE, ENCODERS = "base", "encoders"  # folders in --work
TIMEOUT_SECONDS = 900  # of a cell
ANSWER = "figures: "  # begins a cell's last line


@dataclass(frozen=True)
class Cell:
    """One figure, by a unique name; ``target`` is what it ought to be."""

    name: str
    kind: str
    settings: dict[str, Any]
    target: str = ""


@dataclass
class Grid:
    """All cells, the cheap and telling ones first."""

    cells: list[Cell] = field(default_factory=list)

    def add(self, kind: str, name: str, target: str = "", **settings: Any) -> None:
        assert name not in {cell.name for cell in self.cells}, name
        self.cells.append(Cell(name, kind, settings, target))


PLAIN: dict[str, Any] = {"gradient_checkpointing": False}
PEAKS = {512: ("<= 5.8 GB", "<= 3.6 GB"), 1024: ("<= 6.5 GB", "<= 4.2 GB")}


def grid() -> list[Cell]:
    """What is measured, in the order in which it is."""
    result = Grid()
    result.add("ceiling", "matrix product bf16")
    for px in (512, 1024):
        peak, packed_peak = PEAKS[px]
        result.add("train", f"LoRA 4, {px}, b1", peak, pixels=px, batch_size=1, **LORA)
        for quant in ("int8", "nf4"):
            result.add(
                "train",
                f"LoRA 4, {px}, b1, {quant}",
                packed_peak,
                pixels=px,
                batch_size=1,
                base_quant=quant,
                **LORA,
            )
        result.add("train", f"LoRA 16, {px}, b1", pixels=px, batch_size=1, **{**LORA, "rank": 16})
        result.add("encode bare", f"encode bare, {px}", pixels=px, batch_size=4)
        result.add("encode", f"encode, {px}", pixels=px, batch_size=4)
    _add_throughput(result)
    for px in (512, 1024):
        result.add("generate", f"generate, {px}", pixels=px, batch_size=4, num_steps=30)
    for gib in (12, 16, 24):
        for px in (512, 1024):
            result.add(
                "largest batch", f"largest LoRA 4, {px}, {gib} GiB", pixels=px, gib=gib, **LORA
            )
        result.add("largest batch", f"largest full, 1024, {gib} GiB", pixels=1024, gib=gib, **FULL)
    return result.cells


def _add_throughput(actual: Grid) -> None:
    half = ">= 50 % of the ceiling"
    for px, batch in ((512, 16), (1024, 4)):
        at: dict[str, Any] = {"pixels": px, "batch_size": batch}
        actual.add("train", f"LoRA 4, {px}, b{batch}", **at, **LORA)
        lora, full = (half, half) if px == 1024 else ("", "")
        actual.add("train", f"LoRA 4, {px}, b{batch}, no ckpt", lora, **at, **{**LORA, **PLAIN})
        actual.add(
            "train",
            f"LoRA 4, {px}, b{batch}, no ckpt, compile",
            lora,
            **at,
            compile=True,
            **{**LORA, **PLAIN},
        )
        actual.add(
            "train",
            f"LoRA 4, {px}, b{batch}, no ckpt, graphs",
            lora,
            **at,
            cuda_graphs=True,
            **{**LORA, **PLAIN},
        )
        actual.add("train", f"full, {px}, b{batch}, no ckpt", full, **at, **{**FULL, **PLAIN})
        actual.add(
            "train",
            f"full, {px}, b{batch}, no ckpt, compile",
            full,
            **at,
            compile=True,
            **{**FULL, **PLAIN},
        )
    for px in (512, 1024):
        peak = "<= 9.5 GB" if px == 1024 else ""
        actual.add("train", f"full, {px}, b1, fused", peak, pixels=px, batch_size=1, **FULL)
        unfused = {**FULL, "fused_backward": False}
        actual.add("train", f"full, {px}, b1, not fused", pixels=px, batch_size=1, **unfused)


def run_cell(cell: Cell, options: list[str]) -> dict[str, Any]:
    """A cell's figures, or ``error``, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--cell", cell.name, *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TIMEOUT_SECONDS} s"}
    last = (run.stdout.splitlines() or [""])[-1]
    if run.returncode or not last.startswith(ANSWER):
        return {"error": (run.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    data: dict[str, Any] = json.loads(last.removeprefix(ANSWER))
    return data


def fill_in(
    cells: list[Cell], path: Path, options: list[str], budget_seconds: float
) -> dict[str, Any]:
    """Run what has no figures yet, until the time is up; all results by name."""
    start = time.perf_counter()
    results: dict[str, Any] = json.loads(path.read_text())["cells"] if path.exists() else {}
    metadata = machine()
    for cell in cells:
        if "error" not in results.get(cell.name, {"error": ""}):
            continue
        if time.perf_counter() - start > budget_seconds:
            click.echo(f"{budget_seconds:.0f} s are over; run again to go on with {cell.name!r}")
            break
        click.echo(cell.name)
        since = time.perf_counter()
        figures = run_cell(cell, options)
        results[cell.name] = {**figures, "cell_seconds": round(time.perf_counter() - since, 1)}
        keep(path, {"machine": metadata | figures.get("machine", {}), "cells": results})
    return results


def rows_of(cells: list[Cell], results: dict[str, Any]) -> list[dict[str, object]]:
    """The table: figures beside targets, and the share of the ceiling."""
    most = results.get("matrix product bf16", {}).get("tflops")
    rows: list[dict[str, object]] = []
    for cell in cells:
        result = results.get(cell.name, {"error": "not measured"})
        tflops = result.get("tflops")
        rows.append(
            {
                "cell": cell.name,
                "images/s": result.get("images_per_second"),
                "TFLOP/s": tflops,
                "of ceiling": tflops / most if tflops and most else None,
                "allocated GB": result.get("peak_allocated_gb"),
                "reserved GB": result.get("peak_reserved_gb"),
                "batch": result.get("largest_batch"),
                "target": cell.target,
                "error": result.get("error", ""),
            }
        )
    return rows


def measure(cell: Cell, work: Path, device: str, tiny: bool) -> dict[str, Any]:
    """A cell's figures, in this process."""
    from benchmarks.gpu_cells import KINDS, Place
    from runtime.devices import pick_device

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        place = Place(
            base="miniature" if tiny else str(work / BASE),
            encoders="miniature" if tiny else str(work / ENCODERS),
            work=Path(scratch),
            device=pick_device(device),
            tiny=tiny,
        )
        settings = dict(cell.settings)
        if tiny and cell.kind == "train":
            settings |= {"num": 2, "batch_size": min(2, settings["batch_size"])}
        if tiny and settings.get("pure_bf16"):
            settings |= {"precision": "bf16", "allow_cpu_bf16": True}
        figures = KINDS[cell.kind](place, **settings)
    return figures | {"machine": machine(device)}


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("benchmark-work"))
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
@click.option("--budget-seconds", default=math.inf, help="Start no cell after so long.")
@click.option("--only", default="", help="Cells whose name contains this.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="The miniature: tries the code, measures nothing.")
@click.option("--cell", "name", help="Measure this cell in this process (what this starts itself).")
def main(
    work: Path,
    out: Path,
    budget_seconds: float,
    only: str,
    device: str,
    tiny: bool,
    name: str | None,
) -> None:
    """Fill in gpu.json, and show it."""
    cells = [cell for cell in grid() if only in cell.name]
    work.mkdir(parents=True, exist_ok=True)
    if name is not None:
        (cell,) = [cell for cell in cells if cell.name == name]
        click.echo("\n" + ANSWER + json.dumps(measure(cell, work, device, tiny)))
        return
    if not tiny and not (work / ENCODERS / "model_index.json").exists():
        from benchmarks.full_base import write_encoders, write_unet

        write_unet(work / BASE)
        write_encoders(work / ENCODERS)
    options = ["--work", str(work), "--device", device, *(["--tiny"] if tiny else [])]
    results = fill_in(cells, out / "gpu.json", options, budget_seconds)
    show("one card; what is not measured says so", rows_of(cells, results))


if __name__ == "__main__":
    main()
