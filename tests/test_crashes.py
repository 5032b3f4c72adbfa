"""A run that dies anywhere leaves a whole checkpoint, and resumed it ends as if it had not died."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from disk import fork_for_each_operation
from ranks import output_of, start
from runs import assert_same_run, config_of, run

import train.loop
from runtime.path_kinds import checkpoints_in
from train.checkpoint import THREAD, newest_checkpoint, read_state
from train.option_values import Every

ROOT = Path(__file__).parent.parent
RUN = Path("run")  # below the working folder, so that a forked run can be sent elsewhere
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "full with an average": {"full": True, "ema": 0.9}}
SETTINGS: dict[str, Any] = {"steps": 3, "checkpoint_every": Every(1), "keep": 1, "log_every": 1}


def run_and_crash(cache: Path, base: Path, where: Path, **settings: Any) -> dict[int, Any]:
    """A run whose children die in every file operation of its second checkpoint, which rotates
    the first away, and of publishing what it has learned. Returns its checkpoints' states."""
    states: dict[int, Any] = {}
    state_of, publish, train_step = train.loop.state_of, train.loop.publish, train.loop.train_step
    parent, calls = os.getpid(), count(1)

    def fork_at_second(*args: Any) -> Any:
        if next(calls) == 2:
            fork_for_each_operation(RUN, where / "checkpoint")
        return state_of(*args)

    def end_child(*args: Any) -> Any:
        join_writer()
        if os.getpid() != parent:
            os._exit(0)
        states.update({step: read_state(path) for step, path in checkpoints_in(RUN).items()})
        return train_step(*args)

    def fork_and_publish(*args: Any, **more: Any) -> Any:
        states.update({step: read_state(path) for step, path in checkpoints_in(RUN).items()})
        is_child = fork_for_each_operation(RUN, where / "publish")
        path = publish(*args, **more)
        return os._exit(0) if is_child else path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.loop, "state_of", fork_at_second)
        patch.setattr(train.loop, "train_step", end_child)
        patch.setattr(train.loop, "publish", fork_and_publish)
        try:
            run(cache, base, RUN, **settings)
        finally:
            if os.getpid() != parent:
                traceback.print_exc()
                os._exit(1)
    return states


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_dies_in_any_file_operation_goes_on_from_a_whole_checkpoint(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With and without a power cut. Each time there is a checkpoint whose every byte is known to
    be right; and of the times that leave the same beside ``.partial`` files, one is resumed."""
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, **KINDS[kind]}
    states = run_and_crash(cache, base, Path("crashed").absolute(), **settings)
    assert sorted(checkpoints_in(RUN)) == [2, 3], "the first checkpoint was to be rotated away"
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power will fail from here on
    seen: set[Any] = set()
    folders = sorted(Path("crashed").glob("*/*"))
    assert len(folders) > 2 * 20
    for folder in folders:
        checkpoint = newest_checkpoint(folder / RUN)
        assert checkpoint and checkpoint[1] == states[checkpoint[1]["step"]], folder
        if " cut" not in folder.name:
            assert all(read_state(path) for path in checkpoints_in(folder / RUN).values())
        if (left := surviving_states(folder / RUN)) not in seen:
            seen.add(left)
            run(cache, base, folder / RUN, **settings, resume=True)
            assert_same_run(RUN, folder / RUN)
    assert {state["step"] for state in states.values()} == {1, 2, 3}


def join_writer() -> None:
    """Wait for the thread that writes a checkpoint."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def surviving_states(folder: Path) -> frozenset[tuple[str, bytes]]:
    """The files below ``folder`` with what they hold; of what is ``.partial`` the topmost name."""
    result = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if ".partial" in name:
            result.add((name.split(".partial")[0], b"partial"))
        elif path.is_file():
            result.add((name, path.read_bytes()))
    return frozenset(result)


@pytest.mark.slow
def test_a_soak_of_kills_at_random_times(cache: Path, base: Path, tmp_path: Path) -> None:
    """``kill -9``, again and again, until the run is through; then it is as if there had been
    none."""
    settings: dict[str, Any] = {**SETTINGS, "steps": 24, "keep": 2, "ema": 0.9}
    run(cache, base, tmp_path / "whole", **settings)
    dice, kills, out = random.Random(0), 0, tmp_path / "run"
    while True:
        (rank,) = start(config_of(cache, base, out, **settings, resume=True))
        rank.join(dice.uniform(0.2, 2.0) if kills < 5 else 120)
        if rank.exitcode is not None:
            break
        rank.kill()
        rank.join()
        kills += 1
        checkpoint = newest_checkpoint(out)
        assert checkpoint or not list(out.glob("checkpoints/checkpoint-*[0-9]"))
    assert rank.exitcode == 0 and kills, output_of(out)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_the_command_killed_at_a_random_time_goes_on(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """(``test_resume.py`` kills a LoRA's.)"""
    out = tmp_path / "run"
    settings = "--lr 1e-3 --batch-size 2 --device cpu --checkpoint-every 1 --keep 1 --steps 300"
    given = [
        str(cache),
        "--base",
        str(base),
        "--out",
        str(out),
        *settings.split(),
        "--full",
        "--ema=0.9",
    ]
    child = subprocess.Popen(
        [sys.executable, "cli.py", "train", *given], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not checkpoints_in(out):
        time.sleep(0.02)
    time.sleep(random.Random(0).uniform(0, 1))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    checkpoint = newest_checkpoint(out)
    assert checkpoint and checkpoint[1]["step"] < 299
    same: dict[str, Any] = {"steps": checkpoint[1]["step"] + 2, "full": True, "ema": 0.9}
    run(cache, base, out, **same, resume=True)
    run(cache, base, tmp_path / "whole", **same)
    assert_same_run(tmp_path / "whole", out)
