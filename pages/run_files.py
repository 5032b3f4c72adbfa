"""Reads a run's folder as files: metrics, settings, checkpoints, previews.

What is damaged costs itself alone, and becomes a note on the page. Imports no torch.
"""

import json
import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import unseal
from runtime.messages import pluralize
from runtime.path_kinds import checkpoints_in
from runtime.safe_parsing import MAX_JSON_BYTES, open_regular, read_bounded, read_sealed

CONFIG = "config.json"
METRICS = "metrics.jsonl"
STATE = "state.json"
PREVIEWS = "previews"
EVALS = "evals"
CACHE_MANIFEST = "manifest.json"
PUBLISHED = ("pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors", "unet")
MAX_ROWS = 5_000_000  # of metrics
MAX_LINE_BYTES = 100_000
MAX_CHECKPOINTS = 10_000
MAX_NUMBER = 1e300  # beyond it a number is not finite to us
_PREVIEW = re.compile(r"step-(\d{1,15})\.png")
_EVAL = re.compile(r"step-(\d{1,15})\.json")


@dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was written."""

    steps: NDArray[np.float64]  # [N], ascending, each once
    values: NDArray[np.float64]  # [N]; NaN where the value was not finite

    @property
    def finite(self) -> "Series":
        is_finite = np.isfinite(self.values)
        return Series(self.steps[is_finite], self.values[is_finite])

    def __len__(self) -> int:
        return len(self.steps)


EMPTY = Series(np.empty(0), np.empty(0))


@dataclass(frozen=True)
class Checkpoint:
    """A folder ``checkpoint-STEP``; ``problem`` says why its ``state.json`` cannot be believed."""

    step: int
    name: str
    kind: str = ""  # every, at, last, stop
    eval_loss: float = math.nan  # where it was not evaluated
    problem: str = ""

    @property
    def was_evaluated(self) -> bool:
        return math.isfinite(self.eval_loss)


@dataclass
class RunFiles:
    """All that the pages show of a run."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # of config.json
    metrics: dict[str, Series] = field(default_factory=dict)  # by name, as in metrics.jsonl
    checkpoints: list[Checkpoint] = field(default_factory=list)
    previews: dict[int, Path] = field(default_factory=dict)  # by step
    evals: dict[int, Path] = field(default_factory=dict)  # losses of single samples, by step
    published: list[str] = field(default_factory=list)  # names of the final weights
    notes: list[str] = field(default_factory=list)  # what is damaged or missing

    def series(self, name: str) -> Series:
        return self.metrics.get(name, EMPTY)

    @property
    def last_step(self) -> int:
        steps = self.series("train/loss").steps
        return int(steps[-1]) if len(steps) else 0

    @property
    def num_steps(self) -> int | None:
        """The steps that the run is to have; None where its settings are lost."""
        value = self.settings.get("num_steps")
        return value if type(value) is int and value > 0 else None

    @property
    def skipped_steps(self) -> list[int]:
        return [int(step) for step in self.series("train/skipped").steps]

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the lowest eval loss; the first of equals."""
        evaluated = [checkpoint for checkpoint in self.checkpoints if checkpoint.was_evaluated]
        return min(evaluated, key=lambda checkpoint: checkpoint.eval_loss, default=None)


def read_run(folder: Path) -> RunFiles:
    """
    Raises:
        ValueError: the folder holds no run; says what it is, where that can be seen.
    """
    if not folder.is_dir():
        reason = "not a folder; give the run's folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {reason}")
    if any((folder / part / CACHE_MANIFEST).is_file() for part in ("", "train", "val")):
        raise ValueError(
            f"{folder}: a cache, not a run; `python cli.py inspect {folder}` describes it"
        )
    run = RunFiles(folder.resolve().name)
    run.settings = _read_settings(folder / CONFIG, run.notes)
    run.metrics = read_metrics(folder / METRICS, run.notes)
    run.checkpoints = list(_read_checkpoints(folder))
    is_run = "steps_per_epoch" in run.settings or len(run.series("train/loss")) > 0
    if not is_run and all(checkpoint.problem for checkpoint in run.checkpoints):
        raise ValueError(f"{folder}: no run of shardtune; give the folder that train's --out named")
    run.previews = _numbered(folder / PREVIEWS, _PREVIEW)
    run.evals = _numbered(folder / EVALS, _EVAL)
    run.published = [name for name in PUBLISHED if (folder / name).exists()]
    return run


def _read_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    """The fields of ``config.json``; those of earlier versions carry no digest."""
    try:
        return read_sealed(path)
    except FileNotFoundError:
        notes.append(f"{CONFIG} is missing, so no settings are shown.")
    except (OSError, ValueError):
        notes.append(f"{CONFIG} is damaged, so no settings are shown.")
    return {}


def read_metrics(path: Path, notes: list[str]) -> dict[str, Series]:
    """The numbers of ``metrics.jsonl`` by name; at most ``MAX_ROWS`` rows of it.

    A step that is there twice counts with its later value. A line that is no row is left out and
    counted in ``notes``; the last one may be cut off by a kill.
    """
    columns: dict[str, tuple[array[float], array[float]]] = {}
    num_rows = num_damaged = 0
    try:
        for line in _lines(path):
            if num_rows == MAX_ROWS:
                notes.append(f"{METRICS} has more than {MAX_ROWS:,} rows; the others are left out.")
                break
            row = _parse_row(line)
            if row is None:
                num_damaged += 1
                continue
            num_rows += 1
            step = row.pop("step")
            for name, value in row.items():
                if name not in columns:
                    if len(columns) == 100:  # train writes 13
                        continue
                    columns[name] = array("d"), array("d")
                steps, values = columns[name]
                steps.append(step)
                values.append(value)
    except FileNotFoundError:
        notes.append(f"{METRICS} is missing, so there are no curves.")
    except (OSError, ValueError):
        notes.append(f"{METRICS} cannot be read.")
    if num_damaged:
        are = "is" if num_damaged == 1 else "are"
        notes.append(f"{pluralize(num_damaged, 'line')} of {METRICS} {are} damaged and left out.")
    return {name: _series(*column) for name, column in columns.items()}


def _lines(path: Path) -> Iterator[bytes]:
    """The lines with text in them; of one that is too long the start, which is no row."""
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            if line.strip():
                yield line
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)


def _parse_row(line: bytes) -> dict[str, float] | None:
    """A row's numbers with ``step``; what is not finite is NaN. None where it is no row."""
    try:
        row = json.loads(line)
        step = row["step"]
        if type(step) is not int or not 0 <= step < 2**53:
            return None
        return {name: _number(value) for name, value in row.items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise TypeError
    return float(value) if abs(value) <= MAX_NUMBER else math.nan


def _series(steps: "array[float]", values: "array[float]") -> Series:
    order, kept = np.frombuffer(steps), np.frombuffer(values)
    if (np.diff(order) > 0).all():
        return Series(order, kept)
    unique, first = np.unique(order[::-1], return_index=True)
    return Series(unique, kept[::-1][first])


def _read_checkpoints(run: Path) -> Iterator[Checkpoint]:
    for step, path in [*checkpoints_in(run).items()][-MAX_CHECKPOINTS:]:
        try:
            state = unseal(read_bounded(path / STATE, MAX_JSON_BYTES))
        except FileNotFoundError:
            yield Checkpoint(step, path.name, problem=f"it has no {STATE}")
            continue
        except (OSError, ValueError):
            yield Checkpoint(step, path.name, problem=f"its {STATE} is damaged")
            continue
        loss: Any = state.get("eval_loss")
        is_number = type(loss) in (int, float) and abs(loss) <= MAX_NUMBER
        yield Checkpoint(
            step, path.name, str(state.get("kind"))[:40], float(loss) if is_number else math.nan
        )


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    """What lies in ``folder`` under such names, in the order of the numbers in them."""
    by_number = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if match := name.fullmatch(path.name):
                by_number[int(match[1])] = path
    return dict(sorted(by_number.items()))
