"""``--overwrite``: the run that is in the folder stays on disk until a new one can replace it.

The states of a run's folder OUT, each made from the one before by renames:

    OUT/config.json, checkpoints/, ...                   the old run
    OUT/replaced-run.partial/ and the rest in OUT        its entries are being moved, there or back
    OUT/replaced-run/ and OUT/config.json, ...           the old run, and the new one's first steps
    OUT/config.json, checkpoints/checkpoint-100/, ...    the new run: it has a checkpoint

After a kill in any of them ``recover`` leaves the first or the last. What a run did not make (a
cache, notes, generated images) is never moved or deleted.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.files import PARTIAL, fsync_folder, remove_path
from sdxl.base import base_path
from sdxl.lora.names import KOHYA, LORA
from train.config import TrainConfig

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WANDB_ID = "wandb.json"
CHECKPOINTS = "checkpoints"
# All that a run writes into its folder, and so all that --overwrite may delete.
ENTRIES = frozenset(
    (CONFIG, METRICS, WANDB_ID, "wandb", CHECKPOINTS, "previews", LORA, KOHYA, "unet", "scheduler")
)
# The names that a run gives in its two folders of many files, also half written.
_WRITTEN = {
    CHECKPOINTS: re.compile(r"checkpoint-\d+(\.replaced)?(\.partial)?"),
    "previews": re.compile(r"step-\d+\.png(\.partial)?"),
}
REPLACED_RUN = "replaced-run"
_MOVING = REPLACED_RUN + PARTIAL
_DISCARDED = REPLACED_RUN + ".discarded" + PARTIAL


def run_entries(out: Path) -> list[Path]:
    """What a run made in its folder, finished or cut off."""
    paths = sorted(out.iterdir()) if out.is_dir() else []
    return [p for p in paths if p.name.removesuffix(PARTIAL).removesuffix(".replaced") in ENTRIES]


def has_replaced_run(out: Path) -> bool:
    """Whether a run that was to be replaced, or a part of it, still lies in the folder."""
    return (out / REPLACED_RUN).exists() or (out / _MOVING).exists()


def has_checkpoint(out: Path) -> bool:
    """Whether the run in the folder has come far enough to be resumed."""
    names = [path.name.removeprefix("checkpoint-") for path in (out / CHECKPOINTS).glob("c*-*")]
    return any(name.isdecimal() for name in names)


def check_input(path: Path, out: Path) -> None:
    """Refuse an input that ``--overwrite`` would delete, by its own path or where links lead.

    Raises:
        ValueError: names the input.
    """
    doomed = run_entries(out) + [p for p in (out / REPLACED_RUN, out / _MOVING) if p.exists()]
    is_out = bool(doomed) and path.resolve() == out.resolve()
    if is_out or any(_lies_in(part, entry) for part in _with_links(path) for entry in doomed):
        raise ValueError(
            f"{path}: --overwrite would delete it, because it lies in the run that {out} holds; "
            "move it elsewhere, or give another --out"
        )


def check_inputs(config: TrainConfig) -> None:
    """Refuse to delete what the new run is made from, or what no run has written."""
    for folder, name in _WRITTEN.items():
        for path in sorted((config.out / folder).glob("*")):
            if not name.fullmatch(path.name):
                raise ValueError(
                    f"{path}: --overwrite would delete it, and no run wrote it; move it elsewhere, "
                    "or give another --out"
                )
    paths = [use.folder for use in config.caches]
    paths += [path for path in (config.val, config.init_lora) if path is not None]
    for path in (*paths, base_path(config.base)):
        check_input(path, config.out)


def _with_links(path: Path) -> Iterator[Path]:
    """``path``, and the links in it, as deep as the files of a base or a cache lie."""
    yield path
    if path.is_dir():
        yield from (
            part for depth in ("*", "*/*") for part in path.glob(depth) if part.is_symlink()
        )


def _lies_in(path: Path, entry: Path) -> bool:
    named, real = Path(os.path.abspath(path)), path.resolve()
    return named.is_relative_to(os.path.abspath(entry)) or real.is_relative_to(entry.resolve())


@contextmanager
def replacing_run(out: Path) -> Iterator[None]:
    """Move the run in ``out`` aside for a new one; it comes back where that one fails before it has
    a checkpoint."""
    try:
        _set_aside(out)
        yield
    except BaseException as error:
        try:
            if recover(out):
                error.add_note(f"The run that was in {out} before is back in its place.")
        except OSError:
            error.add_note(
                f"The run that was in {out} before lies in {out / REPLACED_RUN}, and the next "
                "command with --overwrite or --resume puts it back."
            )
        raise
    discard_replaced_run(out)


def _set_aside(out: Path) -> None:
    entries = run_entries(out)
    if not entries:
        return
    (out / _MOVING).mkdir()
    fsync_folder(out)
    for path in entries:
        os.replace(path, out / _MOVING / path.name)
    fsync_folder(out / _MOVING)
    fsync_folder(out)
    os.replace(out / _MOVING, out / REPLACED_RUN)
    fsync_folder(out)


def discard_replaced_run(out: Path) -> None:
    """Delete the old run, if there is one: the new one has a checkpoint on disk."""
    if (out / REPLACED_RUN).exists():
        remove_path(out / _DISCARDED)
        os.replace(out / REPLACED_RUN, out / _DISCARDED)  # no half of it can come back
    remove_path(out / _DISCARDED)


def recover(out: Path) -> bool:
    """After a kill: finish replacing the old run, or put it back. Whether it was put back."""
    if (out / REPLACED_RUN).exists() and not has_checkpoint(out):
        for path in run_entries(out):  # of the new run, which cannot be resumed
            remove_path(path)
        os.replace(out / REPLACED_RUN, out / _MOVING)
        fsync_folder(out)
    is_back = (out / _MOVING).exists()
    if is_back:
        for path in sorted((out / _MOVING).iterdir()):
            os.replace(path, out / path.name)
        fsync_folder(out)
        (out / _MOVING).rmdir()
    discard_replaced_run(out)
    return is_back


def recover_with_warning(out: Path) -> None:
    """``recover``, and say so where the old run is back."""
    if recover(out):
        warnings.warn(
            f"{out}: a command with --overwrite ended before its run had a checkpoint; the run "
            "that was there before is back in its place",
            stacklevel=2,
        )
