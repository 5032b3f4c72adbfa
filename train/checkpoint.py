"""Checkpoints: weights in their final format, the rest as safetensors and one JSON.

``RUN/checkpoints/checkpoint-STEP/`` appears by a rename, after all its files are on disk; the JSON
holds their digests. A folder of that name is complete, or it is reported as damaged.
"""

import functools
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open

from runtime import schema
from runtime.files import (
    PARTIAL,
    discard_folder,
    fsync_folder,
    fsync_tree,
    remove_path,
    replace_path,
    seal,
    unseal,
    writing,
)
from runtime.path_kinds import CHECKPOINTS, checkpoints_in
from runtime.process import free_memory
from runtime.safe_parsing import MAX_JSON_BYTES, read_bounded
from runtime.workers import rank_info
from sdxl.base import find_weights
from sdxl.metadata import AVERAGE
from train.config import TrainConfig
from train.learner import Learner
from train.memory import state_bytes
from train.weights import (
    MAX_FILE_BYTES,
    WeightsFormat,
    Write,
    check_space,
    distribute_like,
    read_weights,
    sizes_of,
    tensor_files,
    weights_bytes,
    weights_files,
)

OPTIMIZER = "optimizer"
STATE = "state.json"
BLOCK_BYTES = 1 << 24
THREAD = "checkpoint"  # the name of the one that writes
MEMORY_SHARE = 0.8  # of the free main memory, that copies to be written may take
CLOSE_SECONDS = 60  # for the last checkpoint of a run that has failed
_FIELDS = {  # of the JSON: a digest tells that it is as it was written, and not who wrote it
    "step": schema.integer(),
    "epoch": schema.integer(),
    "batches_of_epoch": schema.integer(),
    "global_batch": schema.integer(1),
    "skipped_in_a_row": schema.integer(),
    "kind": schema.text,
    "plan": schema.text,
    "eval_loss": schema.maybe(lambda value: isinstance(value, float)),  # nan too
    "files": schema.table(schema.like(r"(\w[\w.-]*/)*\w[\w.-]*"), schema.like("[0-9a-f]{32}")),
    **dict.fromkeys(("identity", "config", "optimizer", "scaler"), schema.record),
}


def warn_of_space(config: TrainConfig, step: int, learner: Learner, kind: WeightsFormat) -> None:
    """Before the first step, warn where the disk has no room for even one checkpoint."""
    shapes = (parameter.shape for parameter in learner.optimizer.parameters.values())
    size = _weights_bytes(learner, kind) + state_bytes(config.optimizer, shapes)
    try:
        check_space(config.out / CHECKPOINTS / f"checkpoint-{step}", size)
    except OSError as error:
        warnings.warn(f"{error}; make room for it", stacklevel=2)


def _weights_bytes(learner: Learner, kind: WeightsFormat) -> int:
    return weights_bytes(learner.unet, kind, None) + (
        0 if learner.ema is None else weights_bytes(learner.unet, kind, learner.ema)
    )


class CheckpointWriter:
    """Writes a run's checkpoints while its steps go on, one at a time.

    ``begin`` copies all that is to be written to the CPU's memory. A thread then writes the files,
    waits until those of all ranks are complete, and renames the folder; so a crash in between
    leaves the previous checkpoint. Where memory has no room for the copy, ``begin`` itself writes
    file after file, and the steps wait.

    If the disk has no room for a checkpoint, the run warns and continues to the next; a second such
    one in a row ends it. ``good`` is the newest complete one; ``after`` is called with the step of
    each, on the main rank.
    """

    def __init__(
        self,
        run: Path,
        learner: Learner,
        kind: WeightsFormat,
        good: Path | None,
        after: Callable[[int], None],
    ) -> None:
        self.run, self.learner, self.kind, self.good, self.after = run, learner, kind, good, after
        self.world = learner.world
        self._group = (
            self.world.new_group()
        )  # a group of its own, as the thread exchanges values while the steps do
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures = 0  # in a row
        self._must = False  # be whole: the run ends with it

    def begin(self, step: int, state: dict[str, Any], *, wait: bool = False) -> None:
        """Start to write checkpoint-STEP, when the one before is written; ``state`` is plain JSON.
        All ranks must take part. With ``wait`` it returns when the checkpoint is complete.

        Raises:
            OSError: it could not be written, and neither could the one before.
        """
        self.finish()
        self._must = wait
        final = self.run / CHECKPOINTS / f"checkpoint-{step}"
        partial = final.with_name(final.name + PARTIAL)
        tensors, numbers = self.learner.optimizer.state()
        record = json.loads(json.dumps({"step": step, **state, "optimizer": numbers}))
        size = _weights_bytes(self.learner, self.kind) + sum(sizes_of(tensors).values())
        if not self._make_room(final, partial, size):
            self.finish()
            return
        files = self._files(step, tensors)
        if _fits_in_memory(size if not self.kind.full else size // self.world.size):
            arguments = final, partial, list(files), record
            self._thread = threading.Thread(
                target=self._write_beside, args=arguments, name=THREAD, daemon=True
            )
            self._thread.start()
        else:
            self._write(final, partial, files, record)
            self.world.wait()  # for the main rank, which may delete old ones
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. All ranks must.

        Raises:
            OSError: it could not be written, and it is the run's last, or the second in a row.
            ValueError: what was written is damaged.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and not self._may_go_on(error):
            raise error

    def close(self) -> None:
        """After a failed run: finish the checkpoint that is being written, unless that would wait
        for another process, which may be gone."""
        if self._thread is not None:
            self._thread.join(None if self.world.size == 1 else CLOSE_SECONDS)

    def _make_room(self, final: Path, partial: Path, size: int) -> bool:
        """On the main rank, before anything is copied: whether the disk has room."""
        error = ""
        if self.world.is_main:
            try:
                for left in final.parent.glob("*" + PARTIAL):  # by a run that was killed
                    with suppress(OSError):  # somebody may be reading it
                        remove_path(left)
                check_space(final, size)
                with writing(final):
                    partial.mkdir(parents=True)
            except OSError as caught:
                error = str(caught)
        if error := self.world.share(error):
            self._fail(OSError(error))
        return not error

    def _files(self, step: int, tensors: dict[str, torch.Tensor]) -> Iterator[Write]:
        learner, kind, world = self.learner, self.kind, self.world
        # Every rank has the whole adapter; the main one writes its small files.
        owners = cycle(range(world.size if kind.full else 1))
        yield from weights_files(learner.unet, kind, world, None, owners, steps=step)
        if learner.ema is not None:
            average = weights_files(learner.unet, kind, world, learner.ema, owners, steps=step)
            yield from (_below(AVERAGE, write) for write in average)
        sizes, get = sizes_of(tensors), tensors.__getitem__
        yield from tensor_files(f"{OPTIMIZER}/model", sizes, get, world, owners)

    def _write(
        self, final: Path, partial: Path, files: Iterable[Write], record: dict[str, Any]
    ) -> None:
        """Write this rank's files; the main rank then makes a checkpoint of all."""
        error: Exception | None = None
        for write in files:  # to their end in any case: ranks gather tensors on the way
            if error is None:
                error = _caught(final, functools.partial(write, partial))
        error = self._agreed(error)
        if error is None and self.world.is_main:
            error = _caught(final, functools.partial(self._seal, final, partial, record))
        if error is not None and self.world.is_main:
            with suppress(OSError):  # what is half written must not fill the disk any longer
                remove_path(partial)
        error = self._agreed(error)
        if error is None:
            self.good, self._failures = final, 0
            if self.world.is_main:
                error = self._finish_up(record["step"])
        if error is not None:
            self._fail(error)

    def _finish_up(self, step: int) -> Exception | None:
        """Call ``after``, once a checkpoint is complete. An old one that cannot be deleted, as
        somebody may be reading it, is a warning."""
        try:
            self.after(step)
        except OSError as error:
            warnings.warn(f"an old checkpoint is not deleted: {error}", stacklevel=2)
        except Exception as error:
            return error
        return None

    def _write_beside(self, *arguments: Any) -> None:
        """``_write`` in the thread: what it raises itself, such as that another rank is gone, is
        raised again by ``finish``."""
        try:
            self._write(*arguments)
        except Exception as error:
            self._error = error

    def _seal(self, final: Path, partial: Path, record: dict[str, Any]) -> None:
        sealed = seal({**record, "files": _digests(partial)})
        (partial / STATE).write_text(json.dumps(sealed, indent=2, sort_keys=True) + "\n")
        fsync_tree(partial)
        replace_path(partial, final)  # there is one if the run was resumed from before it
        fsync_folder(self.run)  # the first time the folder of checkpoints is new as well

    def _agreed(self, error: Exception | None) -> Exception | None:
        """The error of this rank, or of another one; None where all went well."""
        words = "" if error is None else str(error) or type(error).__name__
        errors = [text for text in self.world.gather([words], self._group) if text]
        return error or (OSError(errors[0]) if errors else None)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._failures += 1
        if self._may_go_on(error) and self.world.is_main:
            warnings.warn(f"{error}; the run goes on to its next checkpoint", stacklevel=2)

    def _may_go_on(self, error: Exception) -> bool:
        return isinstance(error, OSError) and self._failures < 2 and not self._must


def _caught(final: Path, action: Callable[[], None]) -> Exception | None:
    try:
        with writing(final):
            action()
    except Exception as error:
        return error
    return None


def _below(name: str, write: Write) -> Write:
    return lambda folder: write(folder / name)


def _fits_in_memory(size: int) -> bool:
    """Whether memory has room for a copy of ``size`` bytes for each process of this machine, and
    for the file that is being written."""
    num_bytes = size + min(size, MAX_FILE_BYTES)
    return num_bytes * rank_info().local_size < MEMORY_SHARE * free_memory()


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_xxh3(path) for path in files}


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state; warns of those that it passes over, and
    why."""
    for path in reversed(checkpoints_in(run).values()):
        try:
            return path, read_state(path)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    return None


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The checkpoint with the lowest eval loss, and that loss; None where none was evaluated."""
    return next(iter(_by_eval_loss(run)), None)


def _by_eval_loss(run: Path) -> list[tuple[Path, float]]:
    """The checkpoints that were evaluated and their losses, the lowest first."""
    losses: dict[Path, float] = {}
    for path in checkpoints_in(run).values():
        with suppress(ValueError):  # damaged
            loss = _unsealed(path).get("eval_loss")
            if loss is not None and math.isfinite(loss):
                losses[path] = loss
    return sorted(losses.items(), key=lambda item: item[1])


def load_best(run: Path, learner: Learner, full: bool) -> int | None:
    """Put the weights of the undamaged checkpoint with the lowest eval loss in place, and those of
    its average; return its step. None, and a warning, where there is none."""
    best = learner.world.share(_best_undamaged(run) if learner.world.is_main else "")
    if not best:
        warnings.warn(f"{run}: no checkpoint was evaluated; the last weights stand", stacklevel=2)
        return None
    path = Path(best)
    _load_weights(path, learner, full)
    return int(path.name.removeprefix("checkpoint-"))


def _best_undamaged(run: Path) -> str:
    for path, _ in _by_eval_loss(run):
        try:
            read_state(path)
            return str(path)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
    return ""


def rotate(run: Path, keep: int, newest: int) -> None:
    """Delete the checkpoints of ``--checkpoint-every`` (and those of a stop), except the last
    ``keep`` up to step ``newest`` and the one with the lowest eval loss. Nothing is deleted unless
    ``newest``, which was just written, is intact. (Checkpoints of later steps are damaged: the run
    was resumed from an earlier one, and will write them again.)

    Raises:
        ValueError: the newest is damaged: nothing was deleted.
    """
    paths = {step: path for step, path in checkpoints_in(run).items() if step <= newest}
    states = {newest: read_state(paths[newest])}
    for step, path in paths.items():
        if step != newest:
            try:
                states[step] = _unsealed(path)
            except ValueError:
                continue  # damaged: it may be of use to the user
    turning = [step for step, state in states.items() if state.get("kind") in ("every", "stop")]
    evals = {step: states[step].get("eval_loss") for step in turning}
    losses = {n: loss for n, loss in evals.items() if loss is not None and math.isfinite(loss)}
    best = min(losses, key=lambda step: losses[step]) if losses else None
    for step in sorted(turning)[:-keep]:
        if step != best:
            discard_folder(paths[step], paths[step].with_name(paths[step].name + PARTIAL))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint all of whose files are as they were written.

    Raises:
        ValueError: names the file that is missing or damaged.
    """
    state = _unsealed(checkpoint)
    for name, digest in state["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if file_xxh3(path) != digest:
            raise ValueError(f"{path}: damaged (xxh3 differs)")
    return state


def _unsealed(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    try:
        state = unseal(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise ValueError(f"{path}: missing, or cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if wrong := schema.misfit(state, _FIELDS):
        raise ValueError(f"{path}: {wrong}")
    return state


def load_checkpoint(checkpoint: Path, learner: Learner, full: bool, state: dict[str, Any]) -> None:
    """Weights, average, optimizer and scaler, bit for bit as they were."""
    _load_weights(checkpoint, learner, full)
    parameters = learner.optimizer.parameters
    tensors: dict[str, torch.Tensor] = {}
    for path in find_weights(checkpoint / OPTIMIZER).files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = distribute_like(
                    parameters[key.rsplit("|", 1)[0]], file.get_tensor(key)
                )
    learner.optimizer.load(tensors, state["optimizer"])
    if state["scaler"]:  # empty where the run had none
        learner.scaler.load_state_dict(state["scaler"])


def _load_weights(checkpoint: Path, learner: Learner, full: bool) -> None:
    read_weights(learner.unet, full, checkpoint, None)
    if learner.ema is not None:
        read_weights(learner.unet, full, checkpoint / AVERAGE, learner.ema)


def file_xxh3(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
