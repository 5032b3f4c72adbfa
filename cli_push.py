"""The body of ``push``: what a run says of its weights, and the weights to the hub."""

import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from infer.export_settings import PushSettings
from infer.publish import RunRecord, gathered, write_folder
from pages.run_files import Checkpoint, RunFiles, read_run
from pages.settings import describe_settings
from runtime.files import format_bytes
from runtime.options import StageCommand
from runtime.path_kinds import CHECKPOINTS, RUN, kind_of
from sdxl.hub import is_hub_id, push_files
from sdxl.metadata import weights_folder

# Settings that make no other weights, by their heading in train's help, and others that tell of the
# machine. Paths are told by their types.
_HIDDEN_PANELS = ("Evaluation and previews", "Checkpoints", "Logging and the rest")
_HIDDEN = frozenset({"base", "device", "gpus", "fit", "reader_threads", "warm_up"})


def push(settings: PushSettings, train: StageCommand) -> Iterator[str]:
    """Send weights with a card to the hub, or with ``--dry-run`` write them into a folder; yields
    the lines to print. ``train`` is the command whose settings a run keeps.

    Raises:
        ValueError: there are no such weights, or what the card needs is not known.
        OSError: the hub refuses them, or cannot be reached.
    """
    weights, record = _find(settings, train)
    visibility = "public" if settings.public else "private"
    with gathered(settings, weights, record) as files:
        if settings.dry_run:
            out = settings.out or Path(f"{settings.name}-hub")
            write_folder(files, out)
            yield f"{out}: what push would send to {settings.repository} ({visibility}):"
            for name, path in files.items():
                yield f"  {name}  {format_bytes(path.stat().st_size)}"
            yield f"look at {out / 'README.md'}: it shows all that is said, prompts too"
            return
        pushed = push_files(settings.repository, files, public=settings.public)
    if pushed.replaced:
        names = ", ".join(pushed.replaced)
        yield f"replaced by a new commit: {names}; other files stay as they were"
    yield f"{pushed.address}: {len(files)} files are there"
    if settings.public and pushed.is_private:
        yield (
            f"{settings.repository} was there already, and stays private in spite of --public: "
            f"make it public in {pushed.address}/settings"
        )


def _find(settings: PushSettings, train: StageCommand) -> tuple[Path, RunRecord]:
    """The weights' file or folder, and what their run says of them."""
    if settings.weights.is_file() or kind_of(settings.weights) != RUN:
        if settings.checkpoint is not None:
            raise ValueError(f"--checkpoint is of a run, and {settings.weights} is none")
        return settings.weights, RunRecord()
    run = read_run(settings.weights)
    if settings.checkpoint is None:
        return settings.weights, _record(run, None, train)
    checkpoint = _choose(settings, run)
    folder = settings.weights / CHECKPOINTS / checkpoint.name
    return weights_folder(folder), _record(run, checkpoint.step, train)


def _choose(settings: PushSettings, run: RunFiles) -> Checkpoint:
    good = [checkpoint for checkpoint in run.checkpoints if not checkpoint.problem]
    if settings.checkpoint == "best":
        if run.best is None:
            raise ValueError(f"{settings.weights}: no checkpoint of it was evaluated: none is best")
        return run.best
    if settings.checkpoint == "last" and good:
        return good[-1]
    for checkpoint in good:
        if str(checkpoint.step) == str(settings.checkpoint).lstrip("0"):
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in good) or "none"
    raise ValueError(
        f"{settings.weights}: has no good checkpoint {settings.checkpoint}; there are: {steps}"
    )


def _record(run: RunFiles, step: int | None, train: StageCommand) -> RunRecord:
    shown = (
        (setting.flag, " ".join(setting.value.split()))
        for setting in describe_settings(run.settings, train)
        if setting.differs and setting.name not in hidden_settings(train)
    )
    base, batch = run.settings.get("base"), run.settings.get("global_batch")
    return RunRecord(
        base=base if isinstance(base, str) and is_hub_id(base) else None,
        sheets=run.previews,
        step=step,
        last_step=run.last_step,
        settings=tuple(shown),
        facts=(("images a step", f"{batch:,}"),) if type(batch) is int else (),
    )


def hidden_settings(train: StageCommand) -> set[str]:
    """Those of train that a card does not show."""
    hints = typing.get_type_hints(train.settings)
    panels = (train.settings.PANELS[title] for title in _HIDDEN_PANELS)
    paths = {spec.name for spec in fields(train.settings) if _has_path(hints[spec.name])}
    return {*_HIDDEN, *paths, *" ".join(panels).split()}


def _has_path(hint: Any) -> bool:
    """Whether a value of this type is a path, or has one."""
    if hint is Path or any(_has_path(part) for part in typing.get_args(hint)):
        return True
    return any(_has_path(part) for part in getattr(hint, "__annotations__", {}).values())
