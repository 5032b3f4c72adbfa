"""The page of a run: its curves, previews, settings and checkpoints, and which one is best."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pages.curves import Chart, Line, draw_chart, short, smoothed
from pages.images import Embedded, embed_images
from pages.page import render, write_page
from pages.run_files import Checkpoint, RunFiles, read_run
from pages.settings import command_line, describe_settings, other_values, show
from pages.val_samples import rank_samples
from runtime.messages import pluralize
from runtime.options import StageCommand
from runtime.path_kinds import check_page

REPORT = "report.html"
MAX_CHECKPOINTS = 500  # in the table
MAX_SKIPPED = 30  # steps that are named
KINDS = {
    "every": "--checkpoint-every",
    "at": "--checkpoint-at",
    "last": "end of the run",
    "stop": "the run was stopped",
}
QUARTERS = ("1st quarter (least noise)", "2nd quarter", "3rd quarter", "4th quarter (most noise)")


@dataclass(frozen=True)
class Tile:
    """A number at the head of the page."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Preview:
    """A sheet of previews after ``step`` steps."""

    step: int
    image: Embedded


def write_report(
    run: Path, out: Path | None, command: StageCommand, val: Path | None = None
) -> Path:
    """Write the page of the run in a folder, by default into it.

    ``command`` is train's; ``val`` is the run's validation cache, where that is known.

    Raises:
        ValueError: the folder holds no run, or ``out`` is a file of another program.
        OSError: the page cannot be written.
    """
    path = run / REPORT if out is None else out
    files = read_run(run)
    check_page(path)
    write_page(path, report_page(files, command, val))
    return path


def report_page(run: RunFiles, command: StageCommand, val: Path | None = None) -> str:
    """The page as HTML."""
    images, notes = embed_images([*run.previews.values()])
    settings = describe_settings(run.settings, command)
    checkpoints = run.checkpoints[-MAX_CHECKPOINTS:]
    return render(
        "report.html",
        run=run,
        status=status_of(run),
        base=show(run.settings["base"]) if "base" in run.settings else "",
        tiles=_tiles(run),
        charts=draw_curves(run),
        previews=[Preview(n, images[p]) for n, p in run.previews.items() if p in images],
        preview_notes=notes,
        samples=rank_samples(run, val),
        checkpoints=checkpoints,
        num_older=len(run.checkpoints) - len(checkpoints),
        kinds=KINDS,
        best=run.best,
        generate=_generate_command(run, run.best),
        skipped=run.skipped_steps[:MAX_SKIPPED],
        num_skipped=len(run.skipped_steps),
        settings=settings,
        others=other_values(run.settings, command),
        command=command_line(run.settings, command),
    )


def status_of(run: RunFiles) -> str:
    """How far the run has come."""
    if run.num_steps is None:
        return f"{pluralize(run.last_step, 'step')} done"
    if run.last_step < run.num_steps:
        return f"{run.last_step:,} of {run.num_steps:,} steps: still running, or stopped"
    return f"finished: all of its {pluralize(run.num_steps, 'step')}"


def draw_curves(run: RunFiles) -> list[Chart]:
    """The charts of a run; without those of which it has no numbers."""
    train_loss, span = smoothed(run.series("train/loss"))
    over = f" smoothed over about {span:,.0f} steps" if span else ""
    quarters = [
        Line(name, smoothed(run.series(f"train/loss_quarter_{number}"))[0], number - 1, number - 1)
        for number, name in enumerate(QUARTERS, 1)
    ]
    charts = [
        draw_chart(
            "Loss",
            f"Training loss{over}, each step faintly behind it, and the loss on the validation "
            "cache at its evaluations.",
            [
                Line("train loss", train_loss, 0, 0, raw=run.series("train/loss")),
                Line("eval loss", run.series("eval/loss"), 1, 1, is_marked=True),
            ],
            run.skipped_steps,
        ),
        draw_chart(
            "Loss by quarter of the schedule",
            "Training loss of the samples whose timestep lies in each quarter of the noise "
            "schedule, smoothed. Their levels differ by nature: compare each with itself.",
            quarters,
        ),
        draw_chart("Learning rate", "Learning rate of each step.", [_plain(run, "train/lr", 2)]),
        draw_chart(
            "Gradient norm",
            "Norm of the gradient before clipping, smoothed, each step faintly behind it.",
            [_smooth(run, "gradient norm", "train/grad_norm", 3)],
            run.skipped_steps,
        ),
        draw_chart(
            "Throughput",
            "Training images per second, between two lines of the log.",
            [_smooth(run, "images per second", "train/images_per_second", 4)],
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _plain(run: RunFiles, name: str, color: int) -> Line:
    return Line("learning rate", run.series(name), color)


def _smooth(run: RunFiles, label: str, name: str, color: int) -> Line:
    return Line(label, smoothed(run.series(name))[0], color, raw=run.series(name))


def _tiles(run: RunFiles) -> list[Tile]:
    tiles = [Tile("Steps", f"{run.last_step:,}", f"of {run.num_steps:,}" if run.num_steps else "")]
    evals = run.series("eval/loss").finite
    if len(evals):
        lowest = int(evals.values.argmin())
        detail = f"at step {evals.steps[lowest]:,.0f}; {short(evals.values[0], 4)} at first"
        tiles.append(Tile("Lowest eval loss", short(evals.values[lowest], 4), detail))
    loss, span = smoothed(run.series("train/loss"))
    if len(loss):
        detail = f"over about the last {span:,.0f} steps" if span else ""
        tiles.append(Tile("Train loss", short(loss.values[-1], 4), detail))
    if run.best is not None:
        detail = f"{run.best.name} (eval {run.best.eval_loss:.4g})"
        tiles.append(Tile("Best checkpoint", f"step {run.best.step:,}", detail))
    rate = run.series("train/images_per_second").finite
    if len(rate):
        waits = run.series("train/data_wait_share").finite.values
        wait = f"{waits.mean():.0%} of the time spent waiting for data" if len(waits) else ""
        tiles.append(Tile("Images per second", short(float(np.median(rate.values))), wait))
    memory = run.series("train/peak_memory_bytes").finite.values
    if len(memory) and memory.max() > 0:
        tiles.append(Tile("Peak memory", f"{memory.max() / 1e9:.2f} GB"))
    tiles.append(Tile("Skipped steps", f"{len(run.skipped_steps):,}"))
    return tiles


def _generate_command(run: RunFiles, best: Checkpoint | None) -> list[str]:
    """How images are generated from the best checkpoint: words, quoted for a shell."""
    if best is None or "base" not in run.settings:
        return []
    weights = "--unet" if run.settings.get("full") is True else "--lora"
    where = f"{run.name}/checkpoints/{best.name}"
    base = str(run.settings["base"])
    words = ["python", "cli.py", "generate", "--base", base, weights, where]
    return [shlex.quote(word) for word in (*words, "--prompt", "TEXT", "--out", "IMAGES")]
