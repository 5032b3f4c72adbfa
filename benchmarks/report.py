"""Shared by all benchmarks: rounds in turns, the machine's description, tables, JSON files."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from runtime.files import write_durable

LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "peft", "webdataset", "xxhash")
Clock = Callable[[], float]


PROCESSOR = {"processor": time.process_time}


def clocks(device: torch.device) -> dict[str, Clock]:
    """On a GPU wall-clock time, after its queued work; elsewhere the processor's time too.

    The processor's counts all threads of this process, and little of what others do beside it.
    """

    def at_end() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    if device.type == "cuda":
        return {"wall": at_end}
    return {"wall": time.perf_counter, **PROCESSOR}


def take_turns(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    clocks: Mapping[str, Clock] = PROCESSOR,
) -> dict[str, dict[str, list[float]]]:
    """Seconds by clock and work, of each round: A B C, B C A, ... after a round that warms up, so
    that none always follows the same other."""
    seconds: dict[str, dict[str, list[float]]] = {c: {name: [] for name in works} for c in clocks}
    names = [*works]
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            start = {c: clock() for c, clock in clocks.items()}
            works[name]()
            taken = {c: clock() - start[c] for c, clock in clocks.items()}
            for c in clocks if number else ():
                seconds[c][name].append(taken[c])
    return seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds that ``work()`` takes, to the end of what it gave the device to do."""
    clock = clocks(device)["wall"]
    start = clock()
    work()
    return clock() - start


def rates(
    seconds: Mapping[str, Mapping[str, Sequence[float]]], amount: int, unit: str, target: float
) -> list[dict[str, Any]]:
    """A row per clock: ``amount`` units a round by "ours" and by "bare", and their ratio."""
    return [
        {
            "clock": clock,
            **{f"{n} {unit}/s": amount / statistics.median(times[n]) for n in ("ours", "bare")},
            "ratio": ratio(times, "ours", "bare"),
            "target": target,
        }
        for clock, times in seconds.items()
    ]


def ratio(seconds: Mapping[str, Sequence[float]], first: str, other: str) -> float:
    """How many times ``first`` is as fast as ``other``: the median over the rounds."""
    pairs = zip(seconds[other], seconds[first], strict=True)
    return statistics.median(other_time / time for other_time, time in pairs)


@dataclass(frozen=True)
class Used:
    """What a command took."""

    wall_seconds: float
    cpu_seconds: float  # of all its threads
    peak_bytes: int  # resident, with the pages of mapped files that it has looked at
    anonymous_bytes: int  # of these its own, which cannot be dropped: by looking often (Linux)
    output: str


def measured(command: Sequence[str]) -> Used:
    """Run a command to its end; its stderr is shown.

    Raises:
        CalledProcessError: it failed.
    """
    start, anonymous, most = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            result = resident_bytes(child.pid)
            anonymous, most = max(anonymous, result["RssAnon"]), max(most, result["VmHWM"])
            time.sleep(0.05)
        seconds, child.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, list(command), text)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = (
        most or usage.ru_maxrss * unit
    )  # on Linux the latter is at least the peak of who starts it
    return Used(seconds, usage.ru_utime + usage.ru_stime, peak, anonymous, text)


def resident_bytes(pid: int | str = "self") -> dict[str, int]:
    """A process's own memory and that of mapped files, as far as it is resident, and the most that
    both ever were together; 0 but on Linux."""
    results = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return results
    for line in lines:
        name, _, value = line.partition(":")
        if name in results:
            results[name] = int(value.split()[0]) * 1024
    return results


def machine(device: str = "cpu") -> dict[str, Any]:
    """Date, processor and versions, which every figure is to be read with."""
    description: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    if device.startswith("cuda"):
        description["gpu"] = torch.cuda.get_device_name(device)
        description["cuda"] = torch.version.cuda
    return description


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A table, one line per row; its columns are the first row's names."""
    click.echo(f"\n{title}")
    if not rows:
        return
    names = list(rows[0])
    cells = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        texts = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  " + "  ".join(texts).rstrip())


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def keep(path: Path, result: Mapping[str, object]) -> None:
    """Write the figures as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durable(path, (json.dumps(result, indent=2) + "\n").encode())
    click.echo(f"\n{path}")
