"""Checkpoints are written beside the steps, and hold the step that they are of."""

import errno
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
from ranks import train_on, written
from runs import at_step, config_of, losses, run

import train.checkpoint
from train.checkpoint import CheckpointWriter, newest_checkpoint, numbered
from train.option_values import Every

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
    with at_step(2, lambda: seen.append(sorted(numbered(tmp_path / "run")))):
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
    with pytest.warns(UserWarning, match=line) as told:
        run(cache, base, tmp_path, **settings)
    assert len(told) == 1
    assert list(numbered(tmp_path)) == [1, 3, 4]
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
    found = newest_checkpoint(tmp_path)
    assert found and found[1]["step"] == 1 and list(numbered(tmp_path)) == [1]
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
    assert list(numbered(tmp_path)) == [1]
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
