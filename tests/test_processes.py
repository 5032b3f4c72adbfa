"""Several processes of one command: how many, and that each piece of work is taken once."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import runtime.work_queue
from runtime.work_queue import WorkQueue
from runtime.workers import check_gpus, num_processes

WORLD = 3


def _work(rank: int, port: int, out: Path) -> None:
    _join(rank, port)
    queue = WorkQueue()
    if queue.is_main:
        time.sleep(0.3)  # the others wait for the plan
        queue.publish("plan", "abc")
    heard = "abc" if queue.is_main else queue.wait_for("plan")
    taken = []
    for number in queue.claim("work", 20):
        taken.append(number)
        time.sleep(0.05 if rank == 0 else 0.005)  # a slow process takes fewer
        queue.add("sum", number)
    if queue.is_main:
        assert queue.wait_until(lambda: queue.add("sum", 0) == sum(range(20)), 30)
    (out / f"{rank}.json").write_text(json.dumps([heard, taken]))
    queue.leave()


def _fail(rank: int, port: int, out: Path) -> None:
    """Process 2 fails; the others wait for what it would have done."""
    _join(rank, port)
    try:
        with WorkQueue() as queue:
            if rank == 2:
                raise ValueError("a.png: no image")
            if rank == 1:
                queue.wait_for("what never comes")
            queue.wait_until(lambda: False, 60)
    except (ValueError, ConnectionError) as error:
        (out / f"{rank}.txt").write_text(str(error))
        if rank == 0:
            time.sleep(1)  # the others meet in this process, and must have asked by then


def _stand_still(rank: int, port: int, out: Path) -> None:
    """The process in which the others meet is stopped: its machine is cut off."""
    _join(rank, port)
    runtime.work_queue.ANSWER_SECONDS = 2
    with open(out / f"{rank}.txt", "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    queue = WorkQueue()
    if rank == 0:
        queue.publish("plan", str(os.getpid()))
        queue.wait_until(lambda: False, 60)
    main = int(queue.wait_for("plan"))
    queue.add("heard", 1)
    if rank == 1:
        queue.wait_until(lambda: queue.add("heard", 0) == 2, 60)
        os.kill(main, signal.SIGSTOP)
    queue.wait_for("what never comes")


def _join(rank: int, port: int) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(WORLD), **address})


def join_all(work: Any, out: Path, main_stands_still: bool = False) -> list[int | None]:
    """Exit codes of three processes that do ``work``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runtime.work_queue"])
    ranks = [context.Process(target=work, args=(rank, port, out)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks[1:]:
        process.join(60)
    if main_stands_still:
        ranks[0].kill()
    ranks[0].join(60)
    return [process.exitcode for process in ranks]


@pytest.mark.slow
def test_a_failure_is_told_to_those_that_wait(tmp_path: Path) -> None:
    assert join_all(_fail, tmp_path) == [0] * WORLD
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in range(WORLD)]
    assert messages == ["process 2 failed: a.png: no image"] * 2 + ["a.png: no image"]


@pytest.mark.slow
def test_nobody_waits_for_an_answer_that_does_not_come(tmp_path: Path) -> None:
    codes = join_all(_stand_still, tmp_path, main_stands_still=True)
    assert codes == [-signal.SIGKILL, 1, 1]
    for rank in (1, 2):
        message = f"Error: process {rank}: the process in which the others of this command meet"
        assert message in (tmp_path / f"{rank}.txt").read_text()


@pytest.mark.slow
def test_each_piece_of_work_is_taken_once_and_a_slow_process_takes_fewer(tmp_path: Path) -> None:
    assert join_all(_work, tmp_path) == [0] * WORLD
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert [heard for heard, _ in results] == ["abc"] * WORLD
    taken = [numbers for _, numbers in results]
    assert Counter(chain.from_iterable(taken)) == Counter(range(20))
    assert len(taken[0]) < len(taken[1]) + len(taken[2])


LAUNCHER = """
import os, subprocess, sys, time
os.environ.update(TORCHELASTIC_RUN_ID="1", SHARDTUNE_LAUNCHER=str(os.getpid()))
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(300)
"""
WORKER = """
import time
from runtime.workers import end_with_launcher
end_with_launcher()
print("at work", flush=True)
time.sleep(300)
"""


def test_a_process_ends_when_its_launcher_is_killed() -> None:
    """(``test_distributed.py`` has a whole run.)"""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, WORKER], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"at work\n"
    launcher.kill()
    launcher.communicate(timeout=60)  # until no process holds the pipe any more


def test_one_process_alone_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    queue = WorkQueue()
    queue.publish("plan", "abc")
    assert [*queue.claim("work", 3)] == [0, 1, 2]
    assert queue.is_main
    queue.leave()
    assert [queue.add("sum", 2), queue.add("other", 1), queue.add("sum", 3)] == [2, 1, 5]


def test_a_world_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        WorkQueue()


@pytest.mark.parametrize("bad", ["0", "-1", "two", "1.5", "", "²"])
def test_gpus_is_a_number_or_auto(bad: str) -> None:
    with pytest.raises(ValueError, match=r"--gpus takes a number from 1 on"):
        check_gpus(bad)


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    requested = (None, "3", "auto")
    assert [num_processes(gpus, "cpu") for gpus in requested] == [1, 3, 1]
    monkeypatch.setenv("RANK", "0")
    assert num_processes("3", "cpu") == 1


@pytest.mark.parametrize(
    ("tasks", "refused"),
    [
        ({"SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4", "WORLD_SIZE": "4", "RANK": "1"}, False),  # by torchrun
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1 in a job of 8
        ({"SLURM_NTASKS": "1"}, False),
        ({}, False),
    ],
)
def test_tasks_of_slurm_that_know_nothing_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, tasks: dict[str, str], refused: bool
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    if not refused:
        assert num_processes(None, "cpu") == 1
        return
    with pytest.raises(ValueError, match=r"SLURM has 4 tasks.*torchrun"):
        num_processes(None, "cpu")
    assert num_processes("2", "cpu") == 2  # of a script that runs once
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="SLURM has 4 tasks"):
        num_processes("2", "cpu")
