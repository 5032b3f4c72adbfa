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
from encodes import contents, copy_old, encode, settings_of

import precompute.encode
import precompute.encode_part
import precompute.report
import runtime.work_queue
import shards.writer
from shards.manifest import read_manifest
from shards.verify import verify
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
    world = len(settings)
    return _run([(n, world, port, own, output, n == dies) for n, own in enumerate(settings)])


def start_parts(settings: list[Any], output: Path, dies: int = -1) -> list[Any]:
    """At once, and not as the processes of one command."""
    return _run([(0, 1, 0, own, output, number == dies) for number, own in enumerate(settings)])


def _run(arguments: list[Any]) -> list[Any]:
    processes = [_context.Process(target=_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


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


def test_parts_in_any_order_write_the_bytes_of_one_encode(
    images: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = {name: tmp_path / name for name in ("whole", "parts")}
    same = {"shard_size": 3, "val_share": 0.3}
    precompute.encode.encode(settings_of(images, base, outs["whole"], **same))

    def part(part: str, **more: Any) -> None:
        precompute.encode.encode(
            settings_of(images, base, outs["parts"], part=part, **same, **more)
        )

    with pytest.raises(ValueError, match="has no plan; run the same with --part plan first"):
        part("1/2")
    with pytest.raises(ValueError, match="has no plan; run the same with --part plan first"):
        part("finish")
    part("plan")
    part("2/2")
    with pytest.raises(FileNotFoundError, match=r"\d of \d+ shards are not written: .*/train/"):
        part("finish")
    with pytest.raises(ValueError, match=r"other settings .*differing: preprocessing\)"):
        part("1/2", flip=True)
    for again in ("1/2", "2/2", "finish"):
        part(again)
    assert contents(outs["parts"]) == contents(outs["whole"])
    capsys.readouterr()
    part("1/2")
    assert "is finished, nothing is left to write" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["0/3", "4/3", "plans", "1/", "1/2/3", ""])
def test_a_part_is_one_of_its_number(base: Path, part: str) -> None:
    with pytest.raises(ValueError, match="--part is plan, I/N such as 1/16, or finish"):
        settings_of(Path("data"), base, Path("out"), part=part)
    with pytest.raises(ValueError, match="--part is of one process"):
        settings_of(Path("data"), base, Path("out"), part="1/3", gpus="2")


@pytest.mark.slow
def test_parts_die_and_run_twice_at_once(
    alone: Path, images: Path, base: Path, tmp_path: Path
) -> None:
    out, output = tmp_path / "cache", tmp_path / "output"
    for part in ("plan", "1/2"):
        precompute.encode.encode(settings_of(images, base, out, part=part))
    own = settings_of(images, base, out, part="2/2")
    assert start_parts([own], output, dies=0) == [9]
    assert start_parts([own, own], output) == [0, 0], output.read_text()
    precompute.encode.encode(settings_of(images, base, out, part="finish"))
    assert contents(out) == contents(alone)


@pytest.mark.filterwarnings("ignore:--batch-size 4")
def test_a_part_that_outlives_its_plan_replaces_nothing(
    images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was held up goes on after another has done its work, which copied latents."""
    data, out = copy_old(images, tmp_path / "data"), tmp_path / "cache"
    encode(data, base, out, batch_size=1)
    for file in data.rglob("*.txt"):
        file.write_text("another " + file.read_text())

    def part(part: str) -> None:
        precompute.encode.encode(settings_of(data, base, out, part=part))

    part("plan")
    real, done = precompute.encode_part.encode_shard, list[dict[str, bytes]]()

    def held_up(*args: Any, **more: Any) -> None:
        if not done:
            monkeypatch.setattr(precompute.encode_part, "encode_shard", real)
            part("1/1")
            part("finish")
            done.append(contents(out))
        real(*args, **more)

    monkeypatch.setattr(precompute.encode_part, "encode_shard", held_up)
    part("1/1")
    assert [contents(out)] == done and not any(verify(out, read_manifest(out)))
    # Planned anew meanwhile, what it writes is not what is wanted.
    for file in data.rglob("*.txt"):
        file.write_text("third " + file.read_text())
    part("plan")
    again = list[int]()

    def planned_anew(*args: Any, **more: Any) -> None:
        if not again:
            again.append(1)
            next(data.rglob("*.txt")).write_text("fourth")
            part("plan")
        real(*args, **more)

    monkeypatch.setattr(precompute.encode_part, "encode_shard", planned_anew)
    with pytest.raises(ValueError, match="finished or planned anew meanwhile"):
        part("1/1")
    assert not list(out.glob("*.index"))


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
