"""The page that compares runs: their curves in one chart, and the settings that differ."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages.curves import DASHES, NUM_COLORS, Chart, Line, draw_chart, short, smoothed
from pages.page import render, write_page
from pages.report import status_of
from pages.run_files import RunFiles, read_run
from pages.settings import describe_settings, flag, other_values, show
from runtime.options import StageCommand
from runtime.path_kinds import check_page

MAX_RUNS = NUM_COLORS * len(DASHES)  # that look different
# Evals of runs that differ in one of these are of different questions.
_OF_THE_EVAL = ("resolved_prediction_type", "zero_terminal_snr", "val", "caches", "base")


@dataclass(frozen=True)
class Row:
    """A run in the table of results."""

    name: str
    color: int
    status: str
    best: str
    lowest_eval: str
    at_step: str
    train_loss: str
    num_skipped: int


@dataclass(frozen=True)
class Difference:
    """A setting, and its value in each run."""

    name: str
    values: list[str]


def write_comparison(folders: Sequence[Path], out: Path, command: StageCommand) -> Path:
    """Write the page that compares the runs in these folders.

    Raises:
        ValueError: fewer than two, too many, or one of them holds no run; or ``out`` is a file of
            another program.
        OSError: the page cannot be written.
    """
    if not 2 <= len(folders) <= MAX_RUNS:
        raise ValueError(f"give 2 to {MAX_RUNS} runs to compare, not {len(folders)}")
    check_page(out)
    runs = [read_run(folder) for folder in folders]
    write_page(out, comparison_page(_with_own_names(runs), command))
    return out


def _with_own_names(runs: list[RunFiles]) -> list[RunFiles]:
    """Runs whose folders have one name are numbered: what tells them apart is a path."""
    counts, seen = Counter(run.name for run in runs), Counter[str]()
    for run in runs:
        seen[run.name] += 1
        if counts[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return runs


def comparison_page(runs: Sequence[RunFiles], command: StageCommand) -> str:
    """The page as HTML."""
    rows = [_row(number, run) for number, run in enumerate(runs)]
    evaluated = {run.name: run.best.eval_loss for run in runs if run.best is not None}
    return render(
        "compare.html",
        runs=runs,
        rows=rows,
        best=min(evaluated, key=lambda name: evaluated[name], default=""),
        notes=[*(f"{run.name}: {note}" for run in runs for note in run.notes), *_warnings(runs)],
        charts=_charts(runs),
        differences=differences(runs, command),
    )


def _row(number: int, run: RunFiles) -> Row:
    evals, train = run.series("eval/loss").finite, smoothed(run.series("train/loss"))[0]
    lowest = int(evals.values.argmin()) if len(evals) else None
    best = run.best
    return Row(
        name=run.name,
        color=number % NUM_COLORS,
        status=status_of(run),
        best=f"{best.name} (eval {best.eval_loss:.4g})" if best else "none with an eval",
        lowest_eval="" if lowest is None else short(evals.values[lowest], 4),
        at_step="" if lowest is None else f"{evals.steps[lowest]:,.0f}",
        train_loss=short(train.values[-1], 4) if len(train) else "",
        num_skipped=len(run.skipped_steps),
    )


def _warnings(runs: Sequence[RunFiles]) -> list[str]:
    """What makes the eval losses differ although the weights do not."""
    names = [name for name in _OF_THE_EVAL if len({_text(run, name) for run in runs}) > 1]
    if not names:
        return []
    return [
        f"The runs differ in {', '.join(names)}: their eval losses may answer different questions."
    ]


def _text(run: RunFiles, name: str) -> str:
    return show(run.settings.get(name)) if run.settings else ""


def _charts(runs: Sequence[RunFiles]) -> list[Chart]:
    charts = [
        draw_chart(
            "Eval loss",
            "Loss on the validation cache at each evaluation.",
            [_line(n, run, run.series("eval/loss"), True) for n, run in enumerate(runs)],
        ),
        *(
            draw_chart(
                title,
                text,
                [_line(n, run, smoothed(run.series(name))[0]) for n, run in enumerate(runs)],
            )
            for title, text, name in (
                ("Train loss", "Training loss, smoothed.", "train/loss"),
                ("Gradient norm", "Norm before clipping, smoothed.", "train/grad_norm"),
                ("Throughput", "Training images per second.", "train/images_per_second"),
            )
        ),
        draw_chart(
            "Learning rate",
            "Learning rate of each step.",
            [_line(n, run, run.series("train/lr")) for n, run in enumerate(runs)],
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _line(number: int, run: RunFiles, points: Any, is_marked: bool = False) -> Line:
    dash = number if number < NUM_COLORS else number // NUM_COLORS
    return Line(run.name, points, number % NUM_COLORS, dash, is_marked)


def differences(runs: Sequence[RunFiles], command: StageCommand) -> list[Difference]:
    """The settings, and what followed from them, whose values are not the same in all runs."""
    tables: list[dict[str, str]] = []
    for run in runs:
        own_values = {s.flag: s.value for s in describe_settings(run.settings, command)}
        tables.append({**own_values, **other_values(run.settings, command)})
    names = dict.fromkeys(name for table in tables for name in table)
    names.pop(flag("out"), None)  # which is the run's name
    rows = [Difference(name, [table.get(name, "not known") for table in tables]) for name in names]
    return [row for row in rows if len(set(row.values)) > 1]
