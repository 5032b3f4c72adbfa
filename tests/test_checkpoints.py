"""Which checkpoints there are, which go, and what a resume takes, skips and refuses."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Encode
from runs import LORA, UNET, Died, at_step, config_of, die, losses, run, same_weights

import train.loop
from runtime.locks import locked
from runtime.path_kinds import checkpoints_in
from runtime.signals import Stopped
from sdxl.lora.read import read_lora_file
from train.checkpoint import CheckpointWriter, best_checkpoint, newest_checkpoint
from train.evaluation import Evaluation
from train.option_values import CacheUse, Every
from train.report import describe_result


def flip(path: Path) -> None:
    """Damage a file in the middle; of a JSON, so that it can still be read."""
    data = bytearray(path.read_bytes())
    place = data.rindex(b'"epoch": ') + 9 if path.suffix == ".json" else len(data) // 2
    data[place] ^= 1
    path.write_bytes(data)


def kinds(out: Path) -> dict[int, str]:
    states = {n: json.loads((p / "state.json").read_text()) for n, p in checkpoints_in(out).items()}
    return {step: state["kind"] for step, state in states.items()}


@pytest.mark.slow
def test_rotation_keeps_the_newest_the_asked_for_and_the_best(
    split_cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evals are made up: that of step 4 is the best but for step 3, which stays anyway."""
    evals = iter([9.0, float("nan"), 4.0, 1.0, 2.0, float("nan"), 3.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(train.loop, "evaluate", lambda *_: Evaluation(next(evals), {}, ""))
    settings: dict[str, Any] = {"checkpoint_every": Every(1), "keep": 2, "checkpoint_at": (2, 3)}
    run(split_cache, base, tmp_path, steps=9, eval_every=Every(1), **settings)
    assert kinds(tmp_path) == {2: "at", 3: "at", 4: "every", 7: "every", 8: "every", 9: "last"}
    assert not list(tmp_path.rglob("*.partial"))
    best = tmp_path / "checkpoints" / "checkpoint-3"
    assert best_checkpoint(tmp_path) == (best, 1.0)
    lines = describe_result(
        config_of(split_cache, base, tmp_path, steps=9, keep=2), tmp_path / LORA
    )
    assert any(
        line.startswith("checkpoints kept: 2, 3, 4, 7, 8, 9 (the newest 2") for line in lines
    )
    assert f"lowest eval loss: 1.00000, at {best}" in lines
    assert not same_weights(tmp_path / LORA, best / LORA)
    settings |= {"resume": True, "publish": "best"}
    run(split_cache, base, tmp_path, steps=9, eval_every=Every(1), **settings)
    assert same_weights(tmp_path / LORA, best / LORA)
    assert read_lora_file(tmp_path).model_metadata.steps == 3
    (best / LORA).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-3"):
        run(split_cache, base, tmp_path, steps=9, eval_every=Every(1), **settings)
    assert same_weights(tmp_path / LORA, tmp_path / "checkpoints" / "checkpoint-4" / LORA)
    flip(best / "state.json")
    path, loss = best_checkpoint(tmp_path) or (None, 0)
    assert path == tmp_path / "checkpoints" / "checkpoint-4" and loss == 2.0


def test_the_best_average_is_published_at_once(
    split_cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = iter([9.0, 2.0, 1.0, 3.0])
    monkeypatch.setattr(train.loop, "evaluate", lambda *_: Evaluation(next(evals), {}, ""))
    each: dict[str, Any] = {"checkpoint_every": Every(1), "eval_every": Every(1)}
    settings = {"steps": 3, "full": True, "ema": 0.5, "publish": "best", **each}
    calls: list[list[int]] = []
    train.loop.train(
        config_of(split_cache, base, tmp_path, **settings),
        lambda: calls.append([*checkpoints_in(tmp_path)]),
    )
    assert calls == [[1], [1, 2], [1, 2, 3]]
    averages = [tmp_path / "checkpoints" / f"checkpoint-{step}" / "ema" for step in (1, 2, 3)]
    equal = [same_weights(tmp_path / UNET, average / UNET) for average in averages]
    assert equal == [False, True, False]


def test_the_best_of_no_evals_is_refused_at_once(cache: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--publish best: there is no eval to choose by"):
        run(cache, base, tmp_path / "run", steps=1, publish="best")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_without_evals_the_newest_stay_and_a_stop_is_one_of_them(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"checkpoint_every": Every(2), "keep": 1, "steps": 8}
    with at_step(5, lambda: os.kill(os.getpid(), 15)), pytest.raises(Stopped) as stop:
        run(cache, base, tmp_path, **settings)
    assert stop.value.exit_code == 143
    assert kinds(tmp_path) == {5: "stop"}
    run(cache, base, tmp_path, **settings, resume=True)
    assert kinds(tmp_path) == {6: "every", 8: "last"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.json", "optimizer/model.safetensors"])
def test_nothing_goes_unless_the_new_checkpoint_is_whole(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = CheckpointWriter._seal

    def seal_badly(writer: CheckpointWriter, final: Path, *more: Any) -> None:
        real(writer, final, *more)
        if final.name == "checkpoint-3":
            flip(final / name)

    settings: dict[str, Any] = {"checkpoint_every": Every(1), "keep": 1}
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "_seal", seal_badly)
        with pytest.raises(ValueError, match=f"checkpoint-3/{name}.*damaged"):
            run(cache, base, tmp_path, steps=5, **settings)
    assert list(checkpoints_in(tmp_path)) == [2, 3]
    with pytest.warns(UserWarning, match=f"passed over: .*checkpoint-3/{name}.*damaged"):
        run(cache, base, tmp_path, steps=5, **settings, resume=True)
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_damaged_newer_checkpoint_costs_no_whole_one(
    cache: Path, base: Path, tmp_path: Path
) -> None:
    """Resumed from before it, the run rotates as if it were not there, until it writes it anew."""
    settings: dict[str, Any] = {"checkpoint_every": Every(1), "keep": 1, "steps": 9}
    with at_step(6, die), pytest.raises(Died):
        run(cache, base, tmp_path, **{**settings, "keep": 0})
    for step in (4, 5):
        flip(tmp_path / "checkpoints" / f"checkpoint-{step}" / "optimizer" / "model.safetensors")
    with pytest.warns(UserWarning) as caught, at_step(5, die), pytest.raises(Died):
        run(cache, base, tmp_path, **settings, resume=True)
    assert len([warning for warning in caught if "passed over" in str(warning.message)]) == 2
    assert list(checkpoints_in(tmp_path)) == [4, 5], (
        "3 went when 4 was whole again; 5 is still damaged"
    )
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-5"):
        checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint and checkpoint[1]["step"] == 4
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-5"):
        run(cache, base, tmp_path, **settings, resume=True)
    assert list(checkpoints_in(tmp_path)) == [8, 9]


def test_a_checkpoint_and_its_name_are_on_disk_for_good(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder's name too, the first time. (``test_crashes.py`` has the order.)"""
    out, fsync = tmp_path / "run", os.fsync
    synced: set[int] = set()
    named: set[tuple[int, str]] = set()

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(at := os.fstat(descriptor).st_ino)
        paths = [path for path in out.rglob("*") if path.parent.stat().st_ino == at]
        named.update((at, path.name) for path in paths)

    with monkeypatch.context() as patch, at_step(2, die), pytest.raises(Died):
        patch.setattr(os, "fsync", note)
        run(cache, base, out, steps=2, checkpoint_every=Every(1))
    paths = [path for path in out.rglob("*") if path.name != "metrics.jsonl"]
    assert {"checkpoints", "checkpoint-1", "state.json"} <= {path.name for path in paths}
    for path in paths:
        inside = path.parent.relative_to(out).parts[:2]
        assert path.stat().st_ino in synced, path
        moved = len(inside) == 2  # a checkpoint's files were named in its .partial folder
        assert moved or (path.parent.stat().st_ino, path.name) in named, path


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        pytest.param("5", [5, 10, 15], marks=pytest.mark.slow),
        pytest.param("0.5ep", [4, 8, 12, 16], marks=pytest.mark.slow),
        ("1ep", [8, 16]),
        pytest.param("2ep", [16], marks=pytest.mark.slow),
    ],
)
def test_intervals_are_of_steps_or_epochs_also_after_a_stop(
    cache: Path, base: Path, tmp_path: Path, every: str, steps: list[int]
) -> None:
    """8 steps are an epoch."""
    settings: dict[str, Any] = {"checkpoint_every": Every.parse(every), "steps": 17, "rank": 1}
    with at_step(11, lambda: os.kill(os.getpid(), 15)), pytest.raises(Stopped):
        run(cache, base, tmp_path, **settings)
    run(cache, base, tmp_path, **settings, resume=True)
    assert [step for step, kind in kinds(tmp_path).items() if kind == "every"] == steps


@pytest.mark.slow
def test_a_resume_says_what_it_takes_and_what_it_skips(
    cache: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(cache, base, tmp_path, steps=4, checkpoint_every=Every(1))
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "checkpoint-4" / "optimizer")
    flip(folder / "checkpoint-3" / "state.json")
    flip(folder / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    (folder / "checkpoint-9.partial").mkdir()
    capsys.readouterr()
    with pytest.warns(UserWarning) as caught:
        run(cache, base, tmp_path, steps=5, resume=True)
    messages = [str(warning.message).partition("checkpoints/")[2] for warning in caught]
    assert messages == [
        "checkpoint-4/optimizer/model.safetensors: missing",
        "checkpoint-3/state.json: damaged: its digest differs",
        "checkpoint-2/pytorch_lora_weights.safetensors: damaged (xxh3 differs)",
    ]
    assert (
        f"goes on from {folder / 'checkpoint-1'}: 4 of 5 steps are left\n"
        in capsys.readouterr().out
    )
    for path in checkpoints_in(tmp_path).values():
        (path / "state.json").unlink()
    before = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    with (
        pytest.warns(UserWarning, match="missing"),
        pytest.raises(ValueError, match="found no undamaged checkpoint, and a run from step 0"),
    ):
        run(cache, base, tmp_path, steps=1, resume=True)
    assert (tmp_path / "pytorch_lora_weights.safetensors").read_bytes() == before


@pytest.mark.slow
def test_changed_data_is_refused_by_name_or_starts_the_epoch_again(
    images: Path, base: Path, tmp_path: Path, encode_to: Encode
) -> None:
    data, cache, out = tmp_path / "data", tmp_path / "cache", tmp_path / "run"
    shutil.copytree(images, data)
    encode_to(data, cache, dtype="fp32")
    run(cache, base, out, steps=11)  # three steps into the second epoch of 8
    next(data.glob("*.txt")).write_text("quite another caption")
    for path in sorted(data.glob("*.png"))[:4]:
        path.unlink()
    encode_to(data, cache, dtype="fp32")
    with pytest.raises(ValueError, match="the cache is not the run's any more; --allow-changed"):
        run(cache, base, out, steps=14, resume=True)
    again: dict[str, Any] = {"resume": True, "allow_changed_data": True}
    with pytest.raises(ValueError, match="the precision is not the run's any more"):
        run(cache, base, out, steps=14, precision="bf16", allow_cpu_bf16=True, **again)
    run(cache, base, out, steps=14, **again)
    epoch = json.loads((out / "config.json").read_text())["steps_per_epoch"]
    checkpoint = newest_checkpoint(out)
    assert epoch < 8 and checkpoint
    assert (checkpoint[1]["step"], checkpoint[1]["epoch"], checkpoint[1]["batches_of_epoch"]) == (
        14,
        1,
        3,
    )
    run(cache, base, out, epochs=2, resume=True)
    assert len(losses(out)) == 11 + epoch, "the second epoch, whole"


@pytest.mark.slow
def test_what_cannot_change_is_refused_and_what_can_is_noted(
    cache: Path, split_cache: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(cache, base, out, steps=1, ema=0.5)
    other = tmp_path / "base"
    shutil.copytree(base, other)
    flip(other / "unet" / "diffusion_pytorch_model.safetensors")
    same: dict[str, Any] = {"steps": 2, "resume": True, "ema": 0.5}
    for settings, name in (
        ({"optimizer": "adafactor"}, "--optimizer adafactor: the run has adamw"),
        ({"adapter": "dora"}, "--adapter dora: the run has lora"),
        ({"alpha": 1.0}, r"--alpha 1\.0: the run has 32"),
        ({"targets": "attention"}, "--targets attention: the run has all"),
        ({"conv": True}, "--conv True: the run has False"),
        ({"ema": 0.0}, r"--ema 0\.0: the run has 0\.5"),
        ({"base_quant": "int8"}, "--base-quant int8: the run has none"),
        ({"fused_backward": True}, "--fused-backward True: the run has False"),
        ({"full": True, "targets": None}, "--full True: the run has False"),
        ({"prediction_type": "v_prediction"}, "the prediction type is not"),
        ({"precision": "bf16", "allow_cpu_bf16": True}, "the precision is not"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume.*{name}"):
            run(cache, base, out, **{**same, **settings})
    with pytest.raises(ValueError, match="the base UNet is not the run's any more"):
        run(cache, other, out, **same)
    for use in (CacheUse(cache, weight=0.5), CacheUse(cache, repeats=2)):
        with pytest.raises(ValueError, match="the cache is not the run's any more"):
            run((use,), base, out, **same)
    with pytest.warns(UserWarning) as caught:
        run(cache, base, out, **same, lr=5e-4, caption_dropout=0.5, timestep_range=(0, 500))
    assert sorted(str(warning.message) for warning in caught) == [
        "the run goes on with --caption-dropout 0.5; it was 0.0",
        "the run goes on with --lr 0.0005; it was 0.001",
        "the run goes on with --timestep-range (0, 500); it was []",
    ]


def test_a_second_run_in_a_folder_is_refused(cache: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out / "train.lock"), pytest.raises(ValueError, match="another train writes to it"):
        run(cache, base, out, steps=1)
    assert not out.exists() or not any(out.iterdir())
    run(cache, base, out, steps=1)
    assert not (out / "train.lock").exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for how in ({"resume": True, "steps": 2}, {"overwrite": True, "steps": 1}):
        with locked(out / "train.lock"), pytest.raises(ValueError, match="another train"):
            run(cache, base, out, **how)
        after = {path: path.stat().st_mtime_ns for path in before}
        assert {p: t for p, t in after.items() if p != out} == {
            p: t for p, t in before.items() if p != out
        }
    (out / "train.lock").touch()  # as a kill leaves it
    run(cache, base, out, steps=1, overwrite=True)
    assert {path.name for path in out.iterdir()} >= {"config.json", "metrics.jsonl"}
