"""Any number of processes train what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from ranks import has_loaded_base, output_of, seen, start, start_each, train_on
from runs import LORA, UNET, config_of, evals, losses, run, sample_losses

from sdxl.base import find_weights
from shards.reader import Cache
from train.checkpoint import newest_checkpoint
from train.option_values import CacheUse, CaptionShares

ROOT = Path(__file__).parent.parent
STEPS = 7


@pytest.fixture(scope="module")
def two_caches(role_cache: Path, cache: Path) -> tuple[CacheUse, ...]:
    """One taken twice, with roles and a validation part, and one that counts half."""
    return CacheUse(role_cache, repeats=2), CacheUse(cache, weight=0.5)


def close(first: list[tuple[int, float]], second: list[tuple[int, float]]) -> bool:
    return [step for step, _ in first] == [step for step, _ in second] and all(
        abs(a - b) <= 1e-5 for (_, a), (_, b) in zip(first, second, strict=True)
    )


def keys_of(cache: Path) -> list[str]:
    return [
        shard.index.key(row) for shard in Cache(cache).shards() for row in range(len(shard.index))
    ]


def losses_of_samples(out: Path) -> list[tuple[int, float]]:
    """By evaluation and sample, numbered in their order."""
    each = [loss for file in sample_losses(out).values() for _, loss in file["losses"].items()]
    return [*enumerate(each)]


@pytest.mark.slow
def test_any_number_of_processes_and_any_change_of_it_is_one_run(
    two_caches: tuple[CacheUse, ...], cache: Path, role_cache: Path, base: Path, tmp_path: Path
) -> None:
    """Global batches of 12, several of which are short: ranks often have less, or nothing."""

    def train(out: str, world: int, steps: int = STEPS, **more: Any) -> Path:
        settings = {"batch_size": 12 // world, "log_every": 3, "steps": steps, **more}
        settings["captions"] = CaptionShares.parse("tags=0.6,short=0.4")
        train_on(config_of(two_caches, base, tmp_path / out, **settings), world)
        return tmp_path / out

    single = train("1", 1)
    plan = seen(single)
    num_batches = json.loads((single / "config.json").read_text())["steps_per_epoch"]
    assert num_batches < STEPS and {sum(batch.values()) for batch in plan.values()} > {12}
    epoch = sum((plan[0, number] for number in range(num_batches)), Counter())
    assert epoch == Counter(2 * keys_of(role_cache / "train") + keys_of(cache))
    for world in (3, 4):
        other = train(str(world), world)
        assert close(losses(other), losses(single)) and close(evals(other), evals(single)), world
        assert seen(other) == plan, world
        assert close(losses_of_samples(other), losses_of_samples(single)), world
    for number, (world, steps) in enumerate([(3, 2), (1, 4), (4, 6), (2, STEPS)]):
        uneven = {"batch_size": 5} if number == 3 else {}  # 12 samples are 5 + 5 and 2 + 0
        mixed = train("mixed", world, steps, resume=number > 0, **uneven)
    assert close(losses(mixed), losses(single)) and seen(mixed) == plan
    first, second = (safetensors.torch.load_file(out / LORA) for out in (single, mixed))
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


@pytest.mark.slow
def test_matrices_that_are_cast_together_are_trained_over_processes(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """DDP sees all their gradients at the end of a backward pass; some are not exchanged."""
    settings: dict[str, Any] = {"precision": "bf16", "allow_cpu_bf16": True, "steps": 4}
    settings |= {"batch_size": 1, "log_every": 1}
    for world in (1, 2):
        config = config_of(cache, base, tmp_path / str(world), accumulate=4 // world, **settings)
        train_on(config, world)
    first, second = (dict(losses(tmp_path / str(world))) for world in (1, 2))
    assert second == pytest.approx(first, rel=0.01) and len(first) == 4
    weights = [safetensors.torch.load_file(tmp_path / str(world) / LORA) for world in (1, 2)]
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=3e-3) for n in weights[0])


@pytest.mark.slow
def test_ranks_that_see_other_folders_are_refused_at_once(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    outs = tmp_path / "one", tmp_path / "two"
    configs = [config_of(cache, base, out, steps=1, batch_size=1) for out in outs]
    ranks = start_each(configs)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    for out in outs:
        message = (
            f"{out}: the processes do not see the same folder there; machines need a shared one"
        )
        assert message in output_of(out)
        assert not (out / "ranks.nonce").exists() and not (out / "config.json").exists()


@pytest.mark.slow
def test_a_rank_that_stands_still_ends_the_others(cache: Path, base: Path, tmp_path: Path) -> None:
    """One that is stopped, as behind a link that is down, closes no connection."""
    out = tmp_path / "run"
    ranks = start(config_of(cache, base, out, steps=10_000), world=2, step_seconds=4)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(seen(out)) < 3:
        time.sleep(0.05)
    assert ranks[1].pid is not None
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(40)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert ranks[0].exitcode == 1, output_of(out)
    assert "is gone, or has not answered for 4 seconds" in output_of(out)


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_another_number_of_processes(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """FSDP: files of bounded size, written by two processes, read by one, then by three."""
    settings: dict[str, Any] = {"full": True, "ema": 0.5, "log_every": 2}
    single, mixed = tmp_path / "one", tmp_path / "mixed"
    run(cache, base, single, batch_size=6, steps=5, checkpoint_at=(2,), **settings)
    for number, (world, steps) in enumerate([(2, 2), (1, 3), (3, 5)]):
        more = {**settings, "batch_size": 6 // world, "steps": steps, "resume": number > 0}
        train_on(config_of(cache, base, mixed, **more), world, max_file_bytes=400_000)
    assert close(losses(mixed), losses(single))
    assert [has_loaded_base(mixed, rank) for rank in range(3)] == [True, False, False]
    passes = sum(
        (Counter(keys) for (epoch, _), keys in seen(mixed).items() if not epoch), Counter()
    )
    assert passes == Counter(keys_of(cache))
    written = mixed / "checkpoints" / "checkpoint-2"
    for folder in (written / "unet", written / "ema" / "unet", written / "optimizer"):
        files = find_weights(folder).files
        assert len(files) > 3 and all(path.stat().st_size < 500_000 for path in files), folder
    same = single / "checkpoints" / "checkpoint-2"
    for part in ("", "ema"):
        loaded = UNet2DConditionModel.from_pretrained(written / part / "unet").state_dict()
        weights = safetensors.torch.load_file(same / part / UNET)
        assert loaded.keys() == weights.keys()
        assert all(torch.allclose(loaded[n], weights[n], atol=1e-4) for n in weights), part
    first = safetensors.torch.load_file(single / UNET)
    second = UNet2DConditionModel.from_pretrained(mixed / "unet").state_dict()
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


FAILS = """
import os, sys
import cli

if os.environ.get("RANK") == "1":
    import shards.batches

    read = shards.batches.Reader.read

    def fail(self, batch, micro):
        if batch.number >= 3:
            {how}
        return read(self, batch, micro)

    shards.batches.Reader.read = fail
cli.commands()
"""


def command(out: Path, cache: Path, base: Path, *more: str) -> list[str]:
    settings = ["--lr", "1e-3", "--device", "cpu", "--targets", "all", "--batch-size", "2"]
    return [
        "train",
        str(cache),
        "--base",
        str(base),
        "--out",
        str(out),
        *settings,
        "--log-every",
        "1",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("os.kill(os.getpid(), 9)", 1, "process 1 was killed by SIGKILL"),
        (
            "raise ValueError('cache: a sample\\nis damaged')",
            2,
            "process 1 failed with exit code 2",
        ),
    ],
    ids=["killed", "bad input"],
)
def test_a_process_that_fails_ends_them_all_with_its_reason(
    cache: Path, base: Path, tmp_path: Path, how: str, code: int, reason: str
) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS.format(how=how))
    arguments = command(tmp_path / "run", cache, base, "--steps", "200", "--gpus", "2")
    ended = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert ended.returncode == code, ended.stderr
    lines = [line for line in ended.stderr.replace("\r", "\n").splitlines() if "Error: " in line]
    errors = [line[line.index("Error: ") :] for line in lines]
    assert errors[-1].startswith(f"Error: {reason}"), errors
    # Process 0 adds what can be resumed, where it notices the end before it is ended itself.
    end = "Error: another process of this run is gone"
    others = [line for line in errors[:-1] if not line.startswith(end)]
    assert others == ["Error: process 1: cache: a sample is damaged"] * (code == 2)
    assert "Traceback" not in ended.stderr


def signalled(arguments: list[str], out: Path, row: int, number: int) -> int:
    """The exit code of a command that got a signal when ``row`` steps were in the metrics."""
    child = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and child.poll() is None:
        if (out / "metrics.jsonl").exists() and len(losses(out)) >= row:
            child.send_signal(number)
            break
        time.sleep(0.02)
    _, message = child.communicate(timeout=90)
    assert "Traceback" not in message, message
    return child.returncode


@pytest.mark.slow
def test_signals_to_the_launcher_and_torchrun(cache: Path, base: Path, tmp_path: Path) -> None:
    """SIGTERM, then Ctrl-C, each leaves a checkpoint and its exit code; torchrun ends the run."""
    out, steps = tmp_path / "run", 60
    arguments = command(out, cache, base, "--steps", str(steps), "--gpus", "2")
    program = [sys.executable, "cli.py"]
    assert signalled([*program, *arguments], out, 4, signal.SIGTERM) == 143
    first = stopped_at(out)
    assert signalled([*program, *arguments, "--resume"], out, first + 4, signal.SIGINT) == 130
    assert first < stopped_at(out) < steps
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = [*torchrun, "cli.py", *arguments[:-2], "--resume"]
    subprocess.run(ended, cwd=ROOT, check=True, timeout=120, capture_output=True)
    run(cache, base, tmp_path / "one", steps=steps, batch_size=4)
    assert close(losses(out), losses(tmp_path / "one"))


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_processes_along(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """They leave a checkpoint, as after SIGTERM."""
    out = tmp_path / "run"
    arguments = command(out, cache, base, "--steps", "100000", "--gpus", "2")
    with open(tmp_path / "output", "wb") as output:
        launcher = subprocess.Popen(
            [sys.executable, "cli.py", *arguments], cwd=ROOT, stdout=output, stderr=output
        )
        deadline = time.monotonic() + 240
        metrics = out / "metrics.jsonl"
        while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
            assert launcher.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{launcher.pid}/task").glob("*/children")
        ranks = [int(pid) for path in children for pid in path.read_text().split()]
        assert len(ranks) >= 2
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(map(is_running, ranks)):
        time.sleep(0.1)
    assert not [pid for pid in ranks if is_running(pid)]
    assert stopped_at(out) > 0 and not (out / "train.lock").exists()


def is_running(pid: int) -> bool:
    """A process that has ended, and that nobody has asked how, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stopped_at(out: Path) -> int:
    checkpoint = newest_checkpoint(out)
    assert (
        checkpoint
        and checkpoint[1]["kind"] == "stop"
        and checkpoint[1]["step"] == losses(out)[-1][0]
    )
    return int(checkpoint[1]["step"])
