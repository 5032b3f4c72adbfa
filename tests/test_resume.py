"""A run that was stopped and resumed is the run that was not."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from runs import (
    LORA,
    UNET,
    Died,
    assert_same_run,
    at_step,
    config_of,
    die,
    losses,
    run,
    same_weights,
    stop_by,
)
from safetensors import SafetensorError

import train.checkpoint
import train.loop
import train.weights
from runtime.files import unseal
from runtime.signals import Stopped
from train.checkpoint import newest_checkpoint, read_state
from train.log import cut_metrics
from train.option_values import CacheUse, CaptionShares, Every
from train.run_folder import check_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def straight(cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps without a stop; 8 make an epoch (14 samples in buckets of 5, 5 and 4)."""
    out = tmp_path_factory.mktemp("straight")
    run(cache, base, out, steps=20)
    assert [step for step, _ in losses(out)] == list(range(1, 21))
    return out


@pytest.mark.parametrize(
    "stops", [[2, 5], [1, 8, 9, 16]], ids=["twice in an epoch", "at and after the ends of epochs"]
)
def test_stopped_and_resumed_is_bit_equal(
    straight: Path, cache: Path, base: Path, tmp_path: Path, stops: list[int]
) -> None:
    for number, steps in enumerate([*stops, 20]):
        run(cache, base, tmp_path, steps=steps, resume=number > 0)
    assert losses(tmp_path) == losses(straight)
    assert same_weights(tmp_path / LORA, straight / LORA)


@pytest.fixture(scope="module")
def two_caches(role_cache: Path, cache: Path) -> tuple[CacheUse, ...]:
    """One taken twice, with roles and a validation part, and one that counts half: 34 samples an
    epoch."""
    return CacheUse(role_cache, repeats=2), CacheUse(cache, weight=0.5)


EVERYTHING: dict[str, Any] = {
    "steps": 14,
    "batch_size": 4,
    "accumulate": 2,
    "ema": 0.9,
    "captions": CaptionShares.parse("tags=0.6,short=0.4"),
    "caption_dropout": 0.3,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.1,
    "lr_schedule": "cosine-restarts",
    "num_cycles": 3,
    "warmup_steps": 3,
    "checkpoint_every": Every(3),
    "eval_every": Every(1, of_epochs=True),
    "log_every": 4,
    "keep": 2,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:--captions")  # the second cache has no roles
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_with_everything_on_random_stops_leave_no_trace(
    two_caches: tuple[CacheUse, ...], base: Path, tmp_path: Path, full: bool
) -> None:
    """Three stops a run, by a signal (which writes a checkpoint) or by death (which does not);
    the LoRA's are at and after the ends of epochs too."""
    complete = tmp_path / "whole"
    settings = {**EVERYTHING, "full": full}
    run(two_caches, base, complete, **settings)
    epoch = json.loads((complete / "config.json").read_text())["steps_per_epoch"]
    assert 2 * epoch < EVERYTHING["steps"], "two epoch ends are to be crossed"
    dice = random.Random(full)
    plans = {"random": sorted(dice.sample(range(1, EVERYTHING["steps"]), 3))}
    if not full:
        plans["ends"] = [epoch, epoch + 1, 2 * epoch]
    for name, stops in plans.items():
        for number, stop in enumerate(stops):
            act = dice.choice([stop_by(signal.SIGTERM), stop_by(signal.SIGINT), die])
            with at_step(stop, act), pytest.raises((Stopped, Died)):
                run(two_caches, base, tmp_path / name, **settings, resume=number > 0)
        run(two_caches, base, tmp_path / name, **settings, resume=True)
        assert_same_run(complete, tmp_path / name)


BF16 = {"precision": "bf16", "allow_cpu_bf16": True}
PURE = {"full": True, "pure_bf16": True, **BF16}
KINDS: dict[str, dict[str, Any]] = {
    "adamw8bit": {"full": True, "optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor", "ema": 0.9},
    "prodigy": {"optimizer": "prodigy"},
    "fused backward": {"full": True, "fused_backward": True},
    "fused backward, adamw8bit": {
        "full": True,
        "fused_backward": True,
        "optimizer": "adamw8bit",
    },
    "pure bf16": {**PURE, "ema": 0.9},
    "pure bf16, adafactor": {**PURE, "optimizer": "adafactor"},
    "pure bf16, adamw8bit": {**PURE, "optimizer": "adamw8bit"},
    "pure bf16, fused backward": {**PURE, "fused_backward": True, "optimizer": "adafactor"},
    "bf16": {**BF16, "ema": 0.9},
    "fp16": {"precision": "fp16", "allow_cpu_bf16": True},
    "dora": {"adapter": "dora", "ema": 0.9},
    "rslora": {"adapter": "rslora", "alpha": 3.0},
    "convolutions": {"conv": True, "alpha": 3.0, "ema": 0.9},
    "logit-normal huber": {
        "timesteps": "logit-normal",
        "loss": "huber",
        "ema_on_cpu": True,
        "ema": 0.5,
    },
    "channels last": {"full": True, "channels_last": True, "ema": 0.9},
    "int8": {"base_quant": "int8"},
    "nf4": {"base_quant": "nf4"},
}
QUICK = ("fused backward, adamw8bit", "dora")  # the rest is marked slow


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated")  # merging is not ours
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in KINDS]
)
def test_each_kind_of_run_is_bit_equal(cache: Path, base: Path, tmp_path: Path, kind: str) -> None:
    """Four steps against two and two; the state of every optimizer has to come back."""
    settings = {"steps": 4, "lr_schedule": "linear", **KINDS[kind]}
    if settings.get("optimizer") == "prodigy":
        settings["lr"] = None
    run(cache, base, tmp_path / "one", **settings)
    with at_step(2, stop_by(signal.SIGTERM)), pytest.raises(Stopped):
        run(cache, base, tmp_path / "two", **settings)
    run(cache, base, tmp_path / "two", **settings, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_that_began_with_a_lora_file_is_bit_equal(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    lora = run(cache, base, tmp_path / "first", steps=2, adapter="dora", rank=4, alpha=3.0)
    settings: dict[str, Any] = {"steps": 4, "init_lora": lora}
    run(cache, base, tmp_path / "one", **settings)
    with at_step(2, stop_by(signal.SIGINT)), pytest.raises(Stopped):
        run(cache, base, tmp_path / "two", **settings)
    lora.rename(tmp_path / "gone")
    with pytest.warns(UserWarning, match=f"{lora}: cannot be read, and is not needed"):
        run(cache, base, tmp_path / "two", **{**settings, "steps": 3}, resume=True)
    run(cache, base, tmp_path / "two", steps=4, targets=None, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match=r"the run began with --init-lora: .*--rank"):
        run(cache, base, tmp_path / "two", steps=4, targets=None, rank=4, resume=True)
    shutil.copy(tmp_path / "one" / LORA, lora)
    with pytest.raises(ValueError, match="the LoRA it began with is not the run's any more"):
        run(cache, base, tmp_path / "two", init_lora=lora, steps=8, resume=True)


def test_full_with_accumulation_and_cosine_is_bit_equal(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "full": True,
        "accumulate": 2,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "steps": 6,
        "checkpoint_at": (3,),
    }
    run(cache, base, tmp_path / "one", **settings)
    run(cache, base, tmp_path / "two", **settings)
    last = tmp_path / "two" / "checkpoints" / "checkpoint-6"
    (last / "state.json").unlink()  # as if the run had died before it
    with pytest.warns(UserWarning, match="checkpoint-6.*missing"):
        run(cache, base, tmp_path / "two", **settings, resume=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert same_weights(tmp_path / "one" / name, tmp_path / "two" / name)


def command(cache: Path, base: Path, out: Path, *more: str) -> list[str]:
    settings = (
        "--lr 1e-3 --batch-size 2 --device cpu --targets all --checkpoint-every 2 --log-every 1"
    )
    given = ["--base", str(base), "--out", str(out), *settings.split(), *more]
    return [sys.executable, "cli.py", "train", str(cache), *given]


def start_and_signal(arguments: list[str], out: Path, number: int) -> subprocess.Popen[str]:
    """Send the signal once three steps are in the metrics."""
    child = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and child.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            child.send_signal(number)
            break
        time.sleep(0.01)
    return child


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_killed_run_resumes_bit_equal(
    straight: Path, cache: Path, base: Path, tmp_path: Path, number: int, code: int
) -> None:
    child = start_and_signal(command(cache, base, tmp_path, "--steps", "400"), tmp_path, number)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == code, output
    assert "Traceback" not in output
    checkpoint = newest_checkpoint(tmp_path)
    done = checkpoint[1]["step"] if checkpoint else 0
    assert 2 <= done < 20, "the signal came too late for this test"
    run(cache, base, tmp_path, steps=20, resume=True)
    assert losses(tmp_path) == losses(straight)
    assert same_weights(tmp_path / LORA, straight / LORA)


def test_a_damaged_checkpoint_is_passed_over_by_name(
    straight: Path, cache: Path, base: Path, tmp_path: Path
) -> None:
    run(cache, base, tmp_path, steps=12, checkpoint_every=Every(4))
    path = tmp_path / "checkpoints" / "checkpoint-12" / "optimizer" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint-12/optimizer/model.safetensors: damaged"):
        read_state(path.parent.parent)
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-12"):
        run(cache, base, tmp_path, steps=20, resume=True)
    assert losses(tmp_path) == losses(straight)
    assert same_weights(tmp_path / LORA, straight / LORA)


def test_checkpoints_are_where_they_were_asked_for(cache: Path, base: Path, tmp_path: Path) -> None:
    run(cache, base, tmp_path, steps=7, checkpoint_every=Every(3), checkpoint_at=(4,))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"checkpoint-{step}" for step in (3, 4, 6, 7)]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_a_run_that_cannot_be_resumed_is_refused_by_name(
    cache: Path, split_cache: Path, base: Path, tmp_path: Path
) -> None:
    run(cache, base, tmp_path, steps=1)
    for settings, message in (
        ({}, "not empty; --resume goes on there"),
        ({"resume": True, "rank": 4}, "--rank 4: the run has 8"),
        ({"resume": True, "seed": 5}, "--seed 5: the run has 0"),
        ({"resume": True, "fused_backward": True}, "--fused-backward"),
    ):
        with pytest.raises(ValueError, match=message):
            run(cache, base, tmp_path, steps=2, **settings)  # type: ignore[arg-type]
    run(cache, base, tmp_path, steps=3, resume=True)
    with pytest.raises(ValueError, match="has 3 steps behind it, over 2"):
        run(cache, base, tmp_path, steps=2, resume=True)
    with pytest.raises(ValueError, match="the cache is not the run's any more"):
        run(split_cache, base, tmp_path, steps=2, resume=True)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*--resume found no whole")
def test_a_kill_before_the_first_file_has_its_name_leaves_a_folder_that_can_be_used(
    cache: Path, base: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    for name in ("train.lock", "config.json.partial"):
        (tmp_path / name).write_text("{")
    run(cache, base, tmp_path, steps=1, **how)
    assert len(losses(tmp_path)) == 1 and not (tmp_path / "config.json.partial").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt.partial").write_text("dear")
    with pytest.raises(ValueError, match="not empty, and no run of shardtune"):
        run(cache, base, tmp_path / "mine", steps=1)


def test_overwrite_deletes_runs_only(cache: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty, and no run of shardtune"):
        run(cache, base, tmp_path, steps=1, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    for how in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(ValueError, match="not empty, and no run of shardtune"):
            run(cache, base, tmp_path, steps=1, **how)
    assert (tmp_path / "thesis.txt").read_text() == "dear"
    run(cache, base, tmp_path / "run", steps=2)
    run(cache, base, tmp_path / "run", steps=1, overwrite=True)
    assert len(losses(tmp_path / "run")) == 1


def test_damage_beside_whole_checkpoints_is_named_and_costs_itself_alone(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """A half-written row of metrics is cut in silence; what else is damaged is said."""
    run(cache, base, tmp_path, steps=3)
    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    first, second, third = metrics.read_bytes().splitlines(keepends=True)
    later = b'{"step": 4, "train/loss": 1.0}\n{"step": 5, "tra'
    for damaged in (b"\xff" + second, b"[" * 100_000 + b"\n", b'{"step": "2"}\n', b"7\n", b"\n"):
        metrics.write_bytes(first + damaged + third + later)
        with pytest.warns(UserWarning, match=r"metrics.jsonl: line 2 is damaged and was dropped"):
            cut_metrics(tmp_path, 3)
        assert metrics.read_bytes() == first + third
    complete = json.loads(config.read_bytes())
    for blob in (b"", b"\xff", b"[]", b"[" * 100_000, json.dumps({**complete, "seed": 9}).encode()):
        config.write_bytes(blob)
        with pytest.warns(UserWarning, match=r"config.json: .*ignored, and written again"):
            check_folder(config_of(cache, base, tmp_path, steps=4, resume=True))
    (tmp_path / "wandb.json").write_bytes(b"\xff")
    with pytest.warns(UserWarning, match="config.json"):
        run(cache, base, tmp_path, steps=4, resume=True)
    assert [step for step, _ in losses(tmp_path)] == [1, 3, 4]
    assert json.loads(config.read_bytes())["num_steps"] == 4
    config.write_text(json.dumps({k: v for k, v in complete.items() if k != "digest"}))
    check_folder(config_of(cache, base, tmp_path, steps=4, resume=True))  # as it was before


@pytest.mark.slow
def test_a_run_keeps_no_path_of_this_machine(cache: Path, base: Path, tmp_path: Path) -> None:
    """People share runs."""
    out = tmp_path / "run"
    lora = run(cache, base, tmp_path / "first", steps=1)
    run((CacheUse(cache, repeats=2),), base, out, steps=1, targets=None, init_lora=lora, val=cache)
    settings = unseal((out / "config.json").read_bytes())
    assert settings["caches"] == [f"{cache.name},repeats=2"]
    assert (settings["base"], settings["out"], settings["val"]) == (base.name, "run", cache.name)
    assert settings["init_lora"] == lora.name
    private = [str(path.parent).encode() for path in (cache, base, out)]
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert not [name for name in private if name in path.read_bytes()], path


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "state.json"])
def test_a_pipe_among_a_runs_files_hangs_nothing(
    cache: Path, base: Path, tmp_path: Path, name: str
) -> None:
    run(cache, base, tmp_path, steps=1)
    path = (
        tmp_path / "checkpoints" / "checkpoint-1" / name
        if name == "state.json"
        else tmp_path / name
    )
    path.unlink()
    os.mkfifo(path)
    if name == "config.json":
        with pytest.warns(UserWarning, match="config.json: not a regular file; ignored"):
            run(cache, base, tmp_path, steps=2, resume=True)
        return
    match = "metrics.jsonl: not a regular" if name != "state.json" else "found no undamaged"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=match):
        warnings.simplefilter("ignore")
        run(cache, base, tmp_path, steps=2, resume=True)


def test_a_resume_without_checkpoints_replaces_no_finished_weights(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    weights = run(cache, base, tmp_path, steps=1)
    before = weights.read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="a run from step 0 would replace these weights; give"):
        run(cache, base, tmp_path, steps=2, resume=True)
    assert weights.read_bytes() == before


def test_a_resume_of_nothing_says_so(cache: Path, base: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="run: --resume found no whole checkpoint there; starts"):
        run(cache, base, tmp_path / "run", steps=1, resume=True)
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_disk_that_fills_is_named_with_what_is_still_good(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """In the second checkpoint, in the middle of a file; before it, by its size; and at the end."""
    settings: dict[str, Any] = {"steps": 2, "checkpoint_every": Every(1), "full": full}
    result = tmp_path / (UNET if full else LORA)
    real = safetensors.torch.save_file

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_half(tensors: Any, path: Path, **more: Any) -> None:
        real(tensors, path, **more)
        if "checkpoint-2" in str(path):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    def ends(match: str, good: int, **more: Any) -> None:
        with pytest.raises(OSError, match=match) as caught:
            run(cache, base, tmp_path, **settings, **more)
        (note,) = caught.value.__notes__
        assert note.startswith(f"The newest whole checkpoint is {tmp_path}/checkpoints/")
        assert f"checkpoint-{good};" in note
        assert not list(tmp_path.rglob("*.partial"))
        checkpoint = newest_checkpoint(tmp_path)
        assert checkpoint and checkpoint[1]["step"] == good

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", write_half)
        ends("checkpoint-2: cannot be written: the disk is full", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train.weights, "free_bytes", lambda folder: 10_000)
        with pytest.warns(UserWarning, match="make room for it"):  # before the first step
            ends("checkpoint-2: cannot be written: it takes .*has 0.01 MB left", 1, resume=True)
    run(cache, base, tmp_path, **settings, resume=True)
    before = result.read_bytes()
    publish = train.loop.publish

    def publish_to_full_disk(*given: Any, **more: Any) -> Any:
        patch.setattr(os, "fsync", no_space)
        return publish(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "publish", publish_to_full_disk)
        ends("(unet|lora_weights.safetensors): cannot be written: the disk is full", 2, resume=True)
    assert result.read_bytes() == before
    run(cache, base, tmp_path, **settings, resume=True)
    assert [step for step, _ in losses(tmp_path)] == [1, 2]


def test_a_refused_run_leaves_the_old_one(cache: Path, base: Path, tmp_path: Path) -> None:
    """``--overwrite`` deletes only when nothing can be refused any more."""
    run(cache, base, tmp_path / "run", steps=1)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights.popitem()
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors missing"):
        run(cache, tmp_path / "base", tmp_path / "run", steps=1, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_loss_that_is_not_finite_reaches_no_weight(
    cache: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FloatingPointError, match=r"3 steps in a row up to step \d"):
        run(
            cache,
            base,
            tmp_path,
            steps=30,
            lr=1e6,
            checkpoint_every=Every(1),
            max_grad_norm=0.0,
            max_skipped=3,
        )
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    weights = safetensors.torch.load_file(checkpoint[0] / LORA)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert not (tmp_path / LORA).exists()
    rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row.get("train/skipped") for row in rows[-3:]] == [1, 1, 1]
    assert rows[-1]["train/loss"] is None
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    skipped = ["train/skipped" in row for row in rows]
    third = [all(skipped[number - 2 : number + 1]) for number in range(2, len(rows))]
    assert len(lines) == sum(skipped) - sum(third), "two lines of those in a row"
    assert not any(".png" in line for line in lines), "the run diverged: no sample is at fault"


def test_another_schedule_of_the_base_is_refused_at_resume(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    run(cache, copy, tmp_path / "run", steps=1)
    config = copy / "scheduler" / "scheduler_config.json"
    text = config.read_text()
    config.write_text(text.replace('"epsilon"', '"v_prediction"'))
    with pytest.raises(ValueError, match="the prediction type is not the run's any more"):
        run(cache, copy, tmp_path / "run", steps=2, resume=True)
    config.write_text(text.replace("0.012", "0.02"))
    with pytest.raises(ValueError, match="the noise schedule is not the run's any more"):
        run(cache, copy, tmp_path / "run", steps=2, resume=True)
