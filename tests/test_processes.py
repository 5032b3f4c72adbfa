"""Several processes of one command: how many, and that each piece of work is taken once."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from runtime.workers import WorkQueue, check_gpus, num_processes

WORLD = 3


def _work(rank: int, port: int, out: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(WORLD), **address})
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
    gathered = queue.gather("taken", json.dumps(taken))
    if queue.is_main:
        assert queue.add("sum", 0) == sum(range(20))
    (out / f"{rank}.json").write_text(json.dumps([heard, taken, gathered]))


@pytest.mark.slow
def test_each_piece_of_work_is_taken_once_and_a_slow_process_takes_fewer(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runtime.workers"])
    ranks = [context.Process(target=_work, args=(rank, port, tmp_path)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * WORLD
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert [heard for heard, _, _ in results] == ["abc"] * WORLD
    taken = [numbers for _, numbers, _ in results]
    assert Counter(chain.from_iterable(taken)) == Counter(range(20))
    assert len(taken[0]) < len(taken[1]) + len(taken[2])
    assert [gathered for _, _, gathered in results] == [
        [json.dumps(piece) for piece in taken],
        [],
        [],
    ]


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
    assert queue.is_main and queue.gather("x", "y") == ["y"]
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
