"""Encoding on several processes: the bytes of one, and no rank waits for another at work."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from encodes import contents, encode, settings_of

import precompute.encode
import precompute.report
import runtime.work_queue
import shards.writer
from tools.draw_images import draw_images

ROOT = Path(__file__).parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["precompute.encode", "transformers", "diffusers"])


def _die_in_a_shard(*_: Any) -> None:
    os._exit(9)


def _rank(
    rank: int, world: int, port: int, settings: Any, output: Path, dies: bool = False
) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), **address})
    torch.set_num_threads(2)
    precompute.report.IDLE_SECONDS = runtime.work_queue.SHARED_SECONDS = 3
    if dies:
        shards.writer.write_index = _die_in_a_shard  # its tar is whole by then
    precompute.encode.encode(settings)


def encode_on(world: int, data: Path, base: Path, out: Path, **settings: Any) -> Path:
    """As ``encode``, on ``world`` processes."""
    output = out.with_name(out.name + ".output")
    codes = start_ranks([settings_of(data, base, out, **settings)] * world, output)
    assert codes == [0] * world, output.read_text()
    return out


def start_ranks(settings: list[Any], output: Path, dies: int = -1) -> list[Any]:
    """Without a launcher, as on machines of their own; the one numbered ``dies`` does so."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        _context.Process(target=_rank, args=(rank, len(settings), port, own, output, rank == dies))
        for rank, own in enumerate(settings)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    return [rank.exitcode for rank in ranks]


@pytest.fixture(scope="module")
def alone(images: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "cache"
    encode(images, base, out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    alone: Path, images: Path, base: Path, tmp_path: Path, world: int
) -> None:
    """Whatever number of threads the launcher gave them."""
    out = encode_on(world, images, base, tmp_path / "cache")
    assert contents(out) == contents(alone)


@pytest.mark.slow
def test_a_rerun_on_several_processes_copies_what_is_right(
    images: Path, base: Path, tmp_path: Path
) -> None:
    """train/ and val/ at once, and shards taken apart and put together again."""
    outs = [tmp_path / "one", tmp_path / "several"]
    for out, world in zip(outs, (1, 2), strict=True):
        for change in ({"shard_size": 2}, {"repack": True, "shard_size": 5}):
            if world == 1:
                precompute.encode.encode(settings_of(images, base, out, val_share=0.3, **change))
            else:
                encode_on(world, images, base, out, val_share=0.3, **change)
    assert contents(outs[0]) == contents(outs[1])


@pytest.mark.slow
def test_the_main_process_writes_what_a_lost_one_had_claimed(
    alone: Path, images: Path, base: Path, tmp_path: Path
) -> None:
    """No launcher tells of it, and the process says nothing: its machine is gone."""
    out, output = tmp_path / "cache", tmp_path / "output"
    codes = start_ranks([settings_of(images, base, out)] * 2, output, dies=1)
    assert codes == [0, 9], output.read_text()
    assert contents(out) == contents(alone)


@pytest.mark.slow
def test_processes_that_see_other_folders_are_refused(
    images: Path, base: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / host / "cache" for host in ("one", "two")]
    for out in outs:
        out.parent.mkdir()
    output = tmp_path / "output"
    codes = start_ranks([settings_of(images, base, out) for out in outs], output)
    assert codes == [1, 1]
    for out in outs:
        assert f"{out}: the processes do not see the same folder there" in output.read_text()
        assert [*out.parent.iterdir()] == []


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_a_rerun_finishes(
    base: Path, tmp_path: Path
) -> None:
    draw_images(tmp_path / "data", count=60, size=64)
    out = tmp_path / "cache"
    given = [str(tmp_path / "data"), "--base", str(base), "--out", str(out), "--gpus", "2"]
    given += ["--resolution", "64", "--bucket-step", "16", "--shard-size", "3", "--batch-size", "4"]
    child = subprocess.Popen(
        [sys.executable, "cli.py", "encode", *given, "--threads", "1", "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(out.glob("*.index"))) < 4:
        time.sleep(0.005)
    ranks = [
        int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    ]
    os.kill(ranks[-1], signal.SIGKILL)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == 1, output
    assert "was killed by SIGKILL" in output and "Traceback" not in output
    assert len(list(out.glob("*.index"))) < 20 and not (out / "manifest.json").exists()
    encode(tmp_path / "data", base, out)
    encode(tmp_path / "data", base, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
