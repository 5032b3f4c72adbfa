"""Measures the processor seconds of each command's imports, in a process of its own.

They are measured with and without the imports that ``runtime/imports.py`` skips. (A whole command
imports a little more later.)

    python -m benchmarks.startup [--rounds 3]
"""

import subprocess
import sys
from pathlib import Path
from statistics import median

import click

from benchmarks.report import keep, machine, show

DRIVERS = {"encode": "precompute.encode", "train": "train.loop", "generate": "infer.generate"}
SKIP = "from runtime.imports import skip_unused_imports; skip_unused_imports(alone=True); "
USED = (
    "; import resource; r = resource.getrusage(resource.RUSAGE_SELF); "
    "print(r.ru_utime + r.ru_stime)"
)


def cpu_seconds(code: str) -> float:
    """Processor seconds of a new interpreter that runs ``code``."""
    command = [sys.executable, "-c", code + USED]
    done = subprocess.run(command, check=True, text=True, capture_output=True)
    return float(done.stdout.splitlines()[-1])


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(rounds: int, out: Path) -> None:
    """Processor seconds of the imports of each command."""
    rows = []
    for name, module in DRIVERS.items():
        pairs = [
            (cpu_seconds(f"{SKIP}import {module}"), cpu_seconds(f"import {module}"))
            for _ in range(rounds)
        ]
        actual, everything = (median(times) for times in zip(*pairs, strict=True))
        rows.append({"command": name, "imports s": actual, "with all s": everything})
    rows.append({"command": "torch alone", "imports s": cpu_seconds("import torch")})
    show("Processor seconds of imports", rows)
    keep(out / "startup.json", {"machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
