"""What is not finite reaches no weight, is counted and told, and in the end stops the run."""

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import WAYS, config_of, learner_of, made_batch, made_sample, write_cache

from shards.batches import Batch, Reader
from shards.format import sample_key
from train.checkpoint import newest_checkpoint
from train.ema import Ema
from train.learner import Learner, Step, train_step
from train.loop import train
from train.optim import supports_found_inf
from train.option_values import CacheUse


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.optimizer.parameters.items()}


def changed(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The names under which not every bit is the same."""
    return {n for n in first if not torch.equal(first[n].nan_to_num(7), other[n].nan_to_num(7))}


def step(learner: Learner, number: int, batch: Batch) -> Step:
    prodigys = "d_numerator" in learner.optimizer.torch_optimizer.param_groups[0]
    return train_step(learner, iter([batch]), number, 1.0 if prodigys else 1e-3)


def spoilt(batch: Batch, value: float) -> Batch:
    """With one number of one sample's latents replaced."""
    latents = batch.latents.clone()
    latents[1, 2, 0, 3] = value
    return replace(batch, latents=latents)


def spoil_one_gradient(learner: Learner, value: float) -> tuple[str, Any]:
    """Spoil the gradient of a parameter that comes late in the backward pass; its name and hook."""
    name, parameter = next(iter(learner.optimizer.parameters.items()))

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = value
        return grad

    return name, parameter.register_hook(spoil)


# Weights and state.


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_not_finite_changes_no_weight(base: Path, way: str) -> None:
    """Nor the state, unless weights are stepped in groups by what cannot be told; and the next
    step goes on."""
    learner = learner_of(base, **WAYS[way])
    batches = [made_batch(3) for _ in range(3)]
    assert bool(step(learner, 0, batches[0]).finite)
    weights, (tensors, numbers) = weights_of(learner), copy.deepcopy(learner.optimizer.state())
    bad = step(learner, 1, spoilt(batches[1], float("nan")))
    assert not bool(bad.finite) and not bool(bad.loss.isfinite())
    assert not changed(weights, weights_of(learner))
    after = learner.optimizer.state()
    assert all(bool(t.isfinite().all()) for t in after[0].values() if t.is_floating_point())
    if keeps_its_state(learner):
        assert not changed(tensors, after[0]) and numbers == after[1]
    assert all(p.grad is None for p in learner.optimizer.parameters.values())
    assert bool(step(learner, 2, batches[2]).finite)
    later = weights_of(learner)
    assert changed(weights, later) and all(bool(w.isfinite().all()) for w in later.values())


def keeps_its_state(learner: Learner) -> bool:
    """In a step that is skipped."""
    optimizer = learner.optimizer
    return not optimizer.in_groups or supports_found_inf(optimizer.torch_optimizer)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_not_finite_changes_no_weight(base: Path, way: str) -> None:
    """With fused backward it is known after other weights have stepped: its own stays."""
    learner = learner_of(base, **WAYS[way])
    batches = [made_batch(3) for _ in range(3)]
    step(learner, 0, batches[0])
    name, hook = spoil_one_gradient(learner, float("inf"))
    weights, state = weights_of(learner), copy.deepcopy(learner.optimizer.state()[0])
    bad = step(learner, 1, batches[1])
    hook.remove()
    assert bool(bad.loss.isfinite()) and not bool(bad.finite)
    later, after = weights_of(learner), learner.optimizer.state()[0]
    assert all(bool(t.isfinite().all()) for t in after.values() if t.is_floating_point())
    if learner.fused is None:
        assert not changed(weights, later)
        if keeps_its_state(learner):
            assert not changed(state, after)
    else:
        assert name not in changed(weights, later)
        if supports_found_inf(learner.optimizer.torch_optimizer):
            assert not {key for key in changed(state, after) if key.startswith(f"{name}|")}
    assert all(bool(w.isfinite().all()) for w in later.values())
    assert bool(step(learner, 2, batches[2]).finite)
    assert name in changed(later, weights_of(learner))


def test_a_micro_batch_that_is_not_finite_spoils_its_step_alone(base: Path) -> None:
    learner = learner_of(base)
    good = made_batch(2, num_micros=2)
    weights = weights_of(learner)
    for number, bad in enumerate((0, 1)):
        parts = [replace(good, micro=micro) for micro in (0, 1)]
        parts[bad] = spoilt(parts[bad], float("nan"))
        assert not bool(train_step(learner, iter(parts), number, 1e-3).finite)
        assert not changed(weights, weights_of(learner))
    parts = [replace(good, micro=micro) for micro in (0, 1)]
    assert bool(train_step(learner, iter(parts), 2, 1e-3).finite)
    assert changed(weights, weights_of(learner))


def test_the_average_stays_finite_too(base: Path) -> None:
    learner = learner_of(base)
    learner.ema = Ema(learner.optimizer.parameters, 0.9, on_cpu=False)
    for number, value in enumerate((0.0, float("nan"), 0.0)):
        step(learner, number, spoilt(made_batch(3), value))
    assert all(bool(value.isfinite().all()) for value in learner.ema.values.values())


# What a run tells of it, and when it stops.

NAMES = [f"folder/{number}.png" for number in range(6)]


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(bad, **settings)``: train on six samples, one a step; ``bad`` tells from epoch and key
    whether its latents are spoilt as they are read. Returns the rows of the metrics."""
    torch.manual_seed(7)
    cache = write_cache(tmp_path / "cache", [made_sample(name) for name in NAMES])
    digests = dict.fromkeys(("vae", "text_encoder", "text_encoder_2"), "made")
    monkeypatch.setattr("train.caches.encoder_digests_in_subprocess", lambda base: digests)
    read = Reader.read

    def run(bad: Any, **settings: Any) -> list[dict[str, Any]]:
        def spoiling(self: Reader, *place: Any) -> Batch:
            batch = read(self, *place)
            for row, key in enumerate(batch.keys):
                if bad(batch, key):
                    batch.latents[row, 0, 0, 0] = float("nan")
            return batch

        monkeypatch.setattr(Reader, "read", spoiling)
        uses = (CacheUse(cache),)
        out = tmp_path / "run"
        try:
            train(config_of(base, caches=uses, out=out, **{"lr": 1e-3, **settings}))
        finally:
            rows = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row) for row in rows]

    return run


def test_skipped_steps_are_counted_and_their_samples_named(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a batch of three only the bad one is named."""
    key = sample_key(NAMES[4])
    rows = run(lambda batch, k: k == key and batch.epoch > 0, batch_size=3, steps=8, log_every=3)
    skipped = [row["step"] for row in rows if "train/skipped" in row]
    assert len(skipped) == 3 and min(skipped) > 2  # once in each of epochs 1, 2 and 3
    for row in rows:
        assert (row["train/loss"] is None) == (row["step"] in skipped)
        if row["step"] in (3, 6, 8):
            so_far = sum(number <= row["step"] for number in skipped)
            assert row.get("train/num_skipped", 0) == so_far
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    expected = "left out, its loss is not finite: the cache holds values that are not finite of "
    assert lines == [f"step {number} {expected}folder/4.png" for number in skipped]


def test_a_gradient_that_is_not_finite_accuses_no_sample(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = train.__globals__["build_learner"]

    def spoiling(*given: Any) -> Learner:
        learner: Learner = build(*given)
        spoil_one_gradient(learner, float("nan"))
        return learner

    monkeypatch.setitem(train.__globals__, "build_learner", spoiling)
    rows = run(lambda batch, key: False, batch_size=6, steps=3, log_every=1)
    assert [row["train/skipped"] for row in rows] == [1, 1, 1]
    assert [row["train/num_skipped"] for row in rows] == [1, 2, 3]
    assert all(row["train/loss"] > 0 and row["train/grad_norm"] is None for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    line = "left out, its gradient is not finite"
    quiet = "; of those that follow in a row nothing is printed"
    assert lines == [f"step 1 {line}", f"step 2 {line}{quiet}"]


@pytest.mark.parametrize("checkpoint_at", [(), (1,)])
def test_a_run_that_diverges_accuses_no_sample_and_says_which_checkpoint_there_is(
    run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_at: tuple[int, ...],
) -> None:
    """From step 3 on the losses of sound samples are not finite. The first might be a sample's own
    fault."""
    learner_losses = Learner.losses

    def diverging(self: Learner, unet: Any, batch: Batch) -> torch.Tensor:
        losses = learner_losses(self, unet, batch)
        return losses * float("nan") if batch.number >= 2 else losses

    monkeypatch.setattr(Learner, "losses", diverging)
    settings: dict[str, Any] = {"max_skipped": 3, "log_every": 1, "checkpoint_at": checkpoint_at}
    with pytest.raises(FloatingPointError, match=r"^3 steps in a row up to step 5") as caught:
        run(lambda *_: False, steps=9, **settings)
    assert "had a loss that is not finite: --lr 0.001 is probably too high" in str(caught.value)
    path = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    command = f"python cli.py train --resume {tmp_path / 'run'}"
    good = f"The newest whole checkpoint is {path}; {command} goes on from it."
    assert caught.value.__notes__ == [good if checkpoint_at else "The run has no checkpoint yet."]
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert ".png" in lines[0]
    quiet = "; of those that follow in a row nothing is printed"
    assert lines[1:] == [f"step 4 left out, its loss is not finite{quiet}"]


@pytest.mark.parametrize("log_every", [1, 100])
def test_too_many_skipped_in_a_row_stop_the_run(run: Any, tmp_path: Path, log_every: int) -> None:
    """Steps 1 to 6 are of epoch 0: two bad, one good, two bad, one good; then all are bad."""

    def bad(batch: Batch, key: str) -> bool:
        return batch.epoch > 0 or batch.number in (0, 1, 3, 4)

    with pytest.raises(FloatingPointError, match=r"^3 steps in a row up to step 9 .*not finite"):
        run(bad, steps=20, max_skipped=3, log_every=log_every, checkpoint_at=(6,))
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint[0].name == "checkpoint-6"
    assert checkpoint[1]["skipped_in_a_row"] == 0


def test_skipped_in_a_row_goes_on_counting_after_a_resume(run: Any, tmp_path: Path) -> None:
    bad: dict[str, Any] = {"max_skipped": 4, "log_every": 1}
    run(lambda batch, key: True, steps=3, **bad)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint[1]["skipped_in_a_row"] == 3
    with pytest.raises(FloatingPointError, match=r"^4 steps in a row up to step 4 "):
        run(lambda batch, key: True, steps=9, resume=True, **bad)


def test_an_overflow_of_fp16_is_counted_and_backs_off(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale begins too high, is halved where it does not fit, and no sample is blamed."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    how: dict[str, Any] = {"precision": "fp16", "allow_cpu_bf16": True, "batch_size": 2}
    rows = run(lambda batch, key: False, steps=12, log_every=12, **how)
    skipped = ["train/skipped" in row for row in rows]
    num = skipped.count(True)
    assert skipped[0] and 0 < num < 12
    assert rows[-1]["train/num_skipped"] == num
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint[1]["scaler"]["scale"] == 2.0 ** (22 - num)
    assert "left out" not in capsys.readouterr().out
