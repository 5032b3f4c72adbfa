"""Checkpoints are written beside the steps, and hold the step that they are of."""

import errno
import signal
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
from made import learner_of
from ranks import train_on, written
from runs import at_step, config_of, losses, run, stop_by

import train.checkpoint
import train.weights
from runtime import process
from runtime.path_kinds import checkpoints_in
from runtime.signals import Stopped
from sdxl.base import open_base
from train.checkpoint import CheckpointWriter, newest_checkpoint
from train.distributed import DistContext
from train.option_values import Every
from train.weights import WeightsFormat, publish

SETTINGS: dict[str, Any] = {"steps": 4, "checkpoint_at": (1,), "log_every": 1, "ema": 0.9}


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available")(1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_steps_go_on_and_the_checkpoint_is_of_its_own_step(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Its files wait until the run has made two more steps; they are those of a run that waited."""
    settings = {**SETTINGS, "full": full}
    later, real = threading.Event(), CheckpointWriter._write

    def write_later(writer: CheckpointWriter, final: Path, *more: Any) -> None:
        if final.name == "checkpoint-1":
            assert later.wait(60), "the steps do not go on"
        real(writer, final, *more)

    with monkeypatch.context() as patch, at_step(3, later.set):
        patch.setattr(CheckpointWriter, "_write", write_later)
        run(cache, base, tmp_path / "beside", **settings)
    memory = namedtuple("memory", "available")(1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    run(cache, base, tmp_path / "waited", **settings)
    for step in (1, 4):
        beside, waited = (
            contents(tmp_path / out / "checkpoints" / f"checkpoint-{step}")
            for out in ("beside", "waited")
        )
        assert beside == waited
        assert {name.split("/")[0] for name in beside} > {"optimizer", "ema", "state.json"}


@pytest.mark.usefixtures("short_of_memory")
def test_where_memory_is_short_the_steps_wait(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", fail_for_checkpoints(threading.Thread.start))
    seen = []
    with at_step(2, lambda: seen.append(sorted(checkpoints_in(tmp_path / "run")))):
        run(cache, base, tmp_path / "run", **SETTINGS)
    assert seen == [[1]]


def fail_for_checkpoints(real: Any) -> Any:
    def start(thread: threading.Thread) -> None:
        assert thread.name != train.checkpoint.THREAD
        real(thread)

    return start


def fill_disk(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Files of these checkpoints find no room."""
    real = safetensors.torch.save_file

    def save_file(tensors: Any, path: Path, **more: Any) -> None:
        if any(f"{name}.partial" in str(path) for name in names):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **more)

    patch.setattr(safetensors.torch, "save_file", save_file)


def test_one_checkpoint_that_finds_no_room_does_not_end_the_run(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "checkpoint_at": (1, 2, 3)}
    fill_disk(monkeypatch, "checkpoint-2")
    line = r"checkpoint-2: cannot be written: the disk is full; the run goes on to its next check"
    with pytest.warns(UserWarning, match=line) as caught:
        run(cache, base, tmp_path, **settings)
    assert len(caught) == 1
    assert list(checkpoints_in(tmp_path)) == [1, 3, 4]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_one_in_a_row_ends_it_with_the_good_one_kept(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "steps": 6, "checkpoint_every": Every(1), "keep": 1}
    fill_disk(monkeypatch, "checkpoint-2", "checkpoint-3")
    with (
        pytest.warns(UserWarning, match="checkpoint-2: cannot be written"),
        pytest.raises(OSError, match="checkpoint-3: cannot be written: the disk is full") as caught,
    ):
        run(cache, base, tmp_path, **settings)
    (note,) = caught.value.__notes__
    assert note.startswith(f"The newest whole checkpoint is {tmp_path}/checkpoints/checkpoint-1;")
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint and checkpoint[1]["step"] == 1 and list(checkpoints_in(tmp_path)) == [1]
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    run(cache, base, tmp_path, **settings, resume=True)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_fails_lets_its_checkpoint_become_whole(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, real = threading.Event(), CheckpointWriter._write

    def write_later(*given: Any) -> None:
        assert failed.wait(60)
        real(*given)

    def fail() -> None:
        failed.set()
        raise FloatingPointError("spoiled")

    monkeypatch.setattr(CheckpointWriter, "_write", write_later)
    with at_step(3, fail), pytest.raises(FloatingPointError, match="spoiled") as caught:
        run(cache, base, tmp_path, **SETTINGS)
    assert list(checkpoints_in(tmp_path)) == [1]
    assert "checkpoint-1;" in caught.value.__notes__[0]


@pytest.mark.slow
def test_each_rank_writes_files_of_its_own(cache: Path, base: Path, tmp_path: Path) -> None:
    """And any number of processes reads them (``test_distributed.py``)."""
    out = tmp_path / "run"
    config = config_of(cache, base, out, full=True, steps=1, batch_size=1, ema=0.5)
    train_on(config, 2, max_file_bytes=1_000_000)
    first, second = (set(written(out, rank)) for rank in (0, 1))
    assert abs(len(first) - len(second)) <= 2 and len(first) > 4
    assert not first & second
    for part in ("optimizer/", "ema/unet/", "checkpoint-1.partial/unet/"):
        assert any(part in name for name in first) and any(part in name for name in second), part


# Failures that could pass for a success, or end a run for nothing.


def test_a_stop_where_a_checkpoint_is_due_waits_for_it(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "checkpoint_every": Every(2)}
    with at_step(2, stop_by(signal.SIGTERM)), pytest.raises(Stopped):
        run(cache, base, tmp_path / "whole", **settings)
    assert 2 in checkpoints_in(tmp_path / "whole")
    fill_disk(monkeypatch, "checkpoint-2")
    with (
        at_step(2, stop_by(signal.SIGTERM)),
        pytest.raises(OSError, match="checkpoint-2: cannot be written: the disk is full"),
    ):
        run(cache, base, tmp_path / "full", **settings)


def test_an_error_of_the_thread_itself_reaches_the_run(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that another rank is gone."""

    def lost(*_: Any) -> None:
        raise RuntimeError("gloo/transport: connection closed")

    monkeypatch.setattr(CheckpointWriter, "_agreed", lost)
    with pytest.raises(RuntimeError, match="connection closed"):
        run(cache, base, tmp_path, **{**SETTINGS, "checkpoint_at": ()})
    assert not checkpoints_in(tmp_path)


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(train.checkpoint, "discard_folder", busy)
    settings = {**SETTINGS, "checkpoint_at": (), "checkpoint_every": Every(1), "keep": 1}
    with pytest.warns(UserWarning, match="an old checkpoint is not deleted: .*not empty"):
        run(cache, base, tmp_path, **settings)
    assert list(checkpoints_in(tmp_path)) == [1, 2, 3, 4]


def test_an_error_without_words_is_told_to_the_other_ranks(base: Path, tmp_path: Path) -> None:
    messages: list[str] = []

    class World(DistContext):
        def gather(self, names: list[str], group: Any = None) -> list[str]:
            messages.extend(names)
            return names

    learner = learner_of(base)
    kind = WeightsFormat(False, open_base(base), learner.schedule)
    writer = CheckpointWriter(tmp_path, learner, kind, None, lambda step: None)
    writer.world = World(learner.world.device)
    assert isinstance(writer._agreed(MemoryError()), MemoryError)
    assert messages == ["MemoryError"]


def test_the_room_that_is_asked_for_is_what_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average is fp32, and the fp16 copy as large as bf16 weights."""
    requested: list[int] = []
    monkeypatch.setattr(train.weights, "check_space", lambda path, size: requested.append(size))
    settings = {"pure_bf16": True, "allow_cpu_bf16": True, "precision": "bf16"}
    for number, ema in enumerate((0.0, 0.9)):
        learner = learner_of(base, full=True, ema=ema, **settings)
        kind = WeightsFormat(True, open_base(base), learner.schedule)
        out = tmp_path / str(number)
        out.mkdir()
        publish(learner.unet, kind, out, learner.world, learner.ema, steps=1)
        written = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
        assert 0 < written - requested[-1] < 300_000  # headers


def test_a_containers_limit_is_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = process.free_memory()
    (tmp_path / "memory.max").write_text(f"{5_000_000}\n")
    (tmp_path / "memory.current").write_text(f"{3_000_000}\n")
    (tmp_path / "memory.stat").write_text("anon 2000000\ninactive_file 1000000\n")
    places = [(tmp_path, "memory.max", "memory.current"), (tmp_path / "none", "a", "b")]
    monkeypatch.setattr(process, "_cgroups", lambda: places)
    assert process.free_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert process.free_memory() == pytest.approx(free, rel=0.2)
