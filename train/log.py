"""The log of a run: a progress bar, ``metrics.jsonl`` and the trackers, by the main rank alone.

Losses stay on the device until ``flush``: between two flushes the host never waits for the GPU.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.errors import is_quiet
from runtime.files import write_durable, writing
from runtime.messages import first_line, printable
from runtime.safe_parsing import open_regular
from train.config import TrainConfig
from train.distributed import DistContext
from train.evaluation import Evaluation, cut_evaluations, write_evaluation
from train.learner import NUM_QUARTERS, Step, losses_by_quarter
from train.run_folder import METRICS
from train.trackers import Images, start_trackers

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]


def cut_metrics(run: Path, last_step: int) -> None:
    """Drop the rows after ``last_step``, which will be written again, and lines that are no rows:
    silently a last line that was cut off by a kill, with a warning a damaged one."""
    path = run / METRICS
    if not path.exists():
        return
    kept, damaged = [], []
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None and number < len(lines):
            damaged.append(number)
        elif step is None:
            continue
        elif step <= last_step and last_step > 0:
            kept.append(line + b"\n")
    if damaged:
        which = f"line {damaged[0]}" + (f" and {len(damaged) - 1} more" if damaged[1:] else "")
        warnings.warn(f"{path}: {which} is damaged and was dropped", stacklevel=2)
    with writing(path):
        write_durable(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a row of metrics; None where the line is none."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class RunLog:
    """Writes rows of numbers by step. It must be closed, whatever happens."""

    def __init__(
        self, config: TrainConfig, world: DistContext, start: int, num_steps: int, run_config: Any
    ) -> None:
        self.config, self.world = config, world
        self.num_skipped = 0  # steps left out since the run was started
        self._pending: list[tuple[int, Step]] = []
        self._since = time.perf_counter()
        self._trackers: list[Any] = []
        self.bar: Any = tqdm(
            total=num_steps,
            initial=start,
            unit="step",
            desc="train",
            disable=is_quiet() or not world.is_main,
        )
        if world.is_main:
            cut_metrics(config.out, start)
            cut_evaluations(config.out, start)
            self._path = config.out / METRICS
            self._trackers += start_trackers(config, run_config, start)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def step(self, number: int, step: Step) -> None:
        """Note step ``number`` (1, 2, ...); its tensors are not looked at yet."""
        self._pending.append((number, step))
        self.bar.update()

    def flush(self) -> list[tuple[int, Step, bool]]:
        """Write what is pending; returns those steps, and whether each was finite.

        Every rank must call it at the same step.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        values = torch.stack(
            [torch.stack([s.loss, s.grad_norm, s.finite.float()]) for _, s in pending]
        ).tolist()
        quarters = self.world.sum(losses_by_quarter(step for _, step in pending)).tolist()
        rows = [
            _row(number, step, *row) for (number, step), row in zip(pending, values, strict=True)
        ]
        finite = [bool(row[2]) for row in values]
        self.num_skipped += finite.count(False)
        self._summarize(rows, [step for _, step in pending], quarters)
        self._write(rows)
        return [(number, step, ok) for (number, step), ok in zip(pending, finite, strict=True)]

    def _summarize(self, rows: list[dict[str, Any]], steps: list[Step], quarters: Any) -> None:
        """Put what concerns several steps together into the last row and the bar."""
        now = time.perf_counter()
        seconds, self._since = max(now - self._since, 1e-9), now
        rate = sum(step.num_samples for step in steps) / seconds
        wait = sum(step.wait_seconds for step in steps) / seconds
        memory = _memory_bytes(self.world.device)
        last = rows[-1]
        last["train/images_per_second"] = round(rate, 3)
        last["train/data_wait_share"] = round(wait, 4)
        last["train/peak_memory_bytes"] = memory
        for quarter in range(NUM_QUARTERS):
            total, count = quarters[0][quarter], quarters[1][quarter]
            if count:
                last[f"train/loss_quarter_{quarter + 1}"] = _json(total / count)
        losses = [row["train/loss"] for row in rows if row["train/loss"] is not None]
        shown = {
            "loss": f"{sum(losses) / len(losses):.4f}" if losses else "not finite",
            "img_s": f"{rate:.1f}",
            "wait": f"{wait:.0%}",
            "mem": f"{memory / 1e9:.1f}GB",
        }
        if self.num_skipped:
            last["train/num_skipped"] = self.num_skipped
            shown["skipped"] = str(self.num_skipped)
        self.bar.set_postfix(shown)

    def eval(self, step: int, evaluation: Evaluation) -> None:
        """Note an evaluation after ``step`` steps."""
        if self.world.is_main:
            write_evaluation(self.config.out, step, evaluation)
        self._write([{"step": step, "eval/loss": _json(evaluation.loss)}])
        self.print(f"step {step}: eval loss {evaluation.loss:.5f}")

    def preview(self, step: int, path: Path, images: Images) -> None:
        """Note previews after ``step`` steps: their sheet, and each with its prompt."""
        self.print(f"step {step}: previews in {path}")
        self._track(lambda tracker: tracker.log_previews(step, images))

    def resume_clock(self) -> None:
        """Measure the rate from now on, without the time that was spent between the steps."""
        self._since = time.perf_counter()

    def print(self, line: str, *, is_warning: bool = False) -> None:
        """Print one line above the bar, with unsafe characters escaped; --quiet prints warnings."""
        if self.world.is_main and (is_warning or not is_quiet()):
            tqdm.write(printable(line))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not self.world.is_main:
            return
        with writing(self._path):
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
        for row in rows:
            self._track(lambda tracker, row=row: tracker.log_row(row))  # type: ignore[misc]

    def weights(self, path: Path) -> None:
        """Hand the run's final weights to the trackers."""
        self._track(lambda tracker: tracker.log_weights(path))

    def _track(self, act: Callable[[Any], None]) -> None:
        """Let each tracker act. One that fails is dropped, with a warning: hours of training are
        worth more than their copy elsewhere, and ``metrics.jsonl`` has every number."""
        for tracker in [*self._trackers]:
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                warnings.warn(
                    f"{tracker.option} failed, and the run goes on without it: {first_line(error)}",
                    stacklevel=2,
                )

    def close(self, failed: bool) -> None:
        self.bar.close()
        if self.world.is_main:
            with suppress(OSError):  # rows that the full disk refused, which was reported
                self._file.close()
        self._track(lambda tracker: tracker.close(failed))


def _row(number: int, step: Step, loss: float, norm: float, finite: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": number,
        "train/loss": _json(loss),
        "train/lr": step.lr,
        "train/grad_norm": _json(norm),
    }
    return row if finite else {**row, "train/skipped": 1}


def _memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of the GPU, or of this process on a CPU; 0 on Windows, where it is
    unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
