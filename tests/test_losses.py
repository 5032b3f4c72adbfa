"""The loss of a step, of a row of the log and of an eval against sums by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from made import (
    KINDS,
    SDXL,
    config_of,
    epoch_of,
    learner_of,
    made_batch,
    made_sample,
    reader_of,
    write_cache,
)

from shards.batches import Batch
from shards.reader import Cache
from train.learner import NUM_QUARTERS, Learner, evaluate, train_step
from train.log import RunLog


def plain_losses(unet: Any, batch: Batch, kind: str = "epsilon") -> torch.Tensor:
    """The loss of each sample, as the diffusers example script computes it."""
    schedule, timesteps = DDPMScheduler(**SDXL), (batch.times * 1000).long()
    predicted = unet(
        schedule.add_noise(batch.latents, batch.noise, timesteps),
        timesteps,
        encoder_hidden_states=batch.prompt,
        added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids},
    ).sample
    velocity = schedule.get_velocity(batch.latents, batch.noise, timesteps)
    target = batch.noise if kind == "epsilon" else velocity
    return (predicted - target).square().mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """5 samples of weights 1, 0.5, 3, 0 and 2, and 4 of weight 1 in a cache of weight 0.25."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("weighed")
    weights = (1.0, 0.5, 3.0, 0.0, 2.0)
    first = [made_sample(f"{n}.png", weight=w) for n, w in enumerate(weights)]
    prior = [made_sample(f"prior {n}.png", std=True) for n in range(4)]
    write_cache(folder / "mine", first)
    write_cache(folder / "prior", prior)
    return [Cache(folder / "mine"), Cache(folder / "prior", weight=0.25)]


@pytest.mark.parametrize(("size", "batch_size"), [(9, 9), (9, 2), (4, 3), (1, 1)])
def test_a_step_is_the_sum_of_weighted_losses_over_the_number_of_samples(
    caches: list[Cache], base: Path, size: int, batch_size: int
) -> None:
    """Against a plain loop over global batches of ``size``, in micro-batches of ``batch_size``."""
    learner = learner_of(base)
    learner.max_grad_norm = 0.0
    reader, micros = reader_of(caches, size), reader_of(caches, size, batch_size=batch_size)
    keys, weights = weights_in(caches[0])
    weight_of = dict(zip(keys, weights, strict=True))
    seen: list[float] = []
    for number, batch in enumerate(epoch_of(reader)):
        batch_weights = torch.tensor([weight_of.get(key, 0.25) for key in batch.keys])
        seen += batch_weights.tolist()
        expected = (batch_weights * plain_losses(learner.unet, batch)).sum() / len(batch.keys)
        expected.backward()
        parameters = list(learner.optimizer.parameters.values())
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        learner.optimizer.zero_grad()
        planned = micros.plan.batch(0, number)
        parts = (micros.read(planned, micro) for micro in range(micros.share.num_micros(planned)))
        step = train_step(learner, parts, number, 1e-12)
        assert float(step.loss) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert float(step.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    assert sorted(seen) == [0.0, 0.25, 0.25, 0.25, 0.25, 0.5, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("settings", [{}, {"min_snr_gamma": 5.0}, {"masked_loss": True}])
@pytest.mark.parametrize("num", [1, 3])
def test_half_the_weight_is_half_the_loss_at_any_batch_size(
    base: Path, num: int, settings: dict[str, Any]
) -> None:
    batch = made_batch(num, mask=torch.rand(num, 1, 2, 4) if "masked_loss" in settings else None)
    losses = []
    for weight in (1.0, 0.5):
        weighted = replace(batch, weights=torch.full((num,), weight))
        losses.append(
            float(train_step(learner_of(base, **settings), iter([weighted]), 0, 1e-4).loss)
        )
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)


def weights_in(cache: Cache) -> tuple[list[str], list[float]]:
    (shard,) = cache.shards()
    rows = range(len(shard.index))
    return [shard.index.key(r) for r in rows], [
        float(shard.index.records[r]["weight"]) for r in rows
    ]


def log_of(learner: Learner, out: Path, **settings: Any) -> RunLog:
    out.mkdir(parents=True, exist_ok=True)
    return RunLog(config_of(out=out, **settings), learner.world, 0, 10, {})


def test_loss_quarters_are_means_by_hand(base: Path, tmp_path: Path) -> None:
    """Over the steps of a log's row; what weighs nothing is not counted."""
    learner = learner_of(base)
    edges = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.6, 0.7, 0.999])
    first = made_batch(8, times=edges, weights=torch.tensor([1.0, 2, 1, 1, 0, 1, 1, 1]))
    second = made_batch(3, times=torch.tensor([0.1, 0.74, 0.74]))
    sums, counts = np.zeros(NUM_QUARTERS), np.zeros(NUM_QUARTERS)
    log = log_of(learner, tmp_path)
    for number, batch in enumerate((first, second)):
        losses = plain_losses(learner.unet, batch).detach()
        for time, loss, weight in zip(batch.times, losses, batch.weights, strict=True):
            quarter = int(time * 1000) // 250
            sums[quarter] += float(loss) * bool(weight)
            counts[quarter] += bool(weight)
        log.step(number + 1, train_step(learner, iter([batch]), number, 1e-12))
    log.flush()
    log.close(failed=False)
    assert counts.tolist() == [3, 2, 4, 1]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    results = [row[f"train/loss_quarter_{number}"] for number in (1, 2, 3, 4)]
    assert results == pytest.approx((sums / counts).tolist(), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_quarters_leave_out_what_is_not_finite(base: Path, tmp_path: Path, bad: float) -> None:
    learner = learner_of(base)
    good = made_batch(3, times=torch.tensor([0.1, 0.3, 0.35]))
    latents = good.latents.clone()
    latents[1] = bad
    expected = plain_losses(learner.unet, good).tolist()
    log = log_of(learner, tmp_path)
    for number, batch in enumerate((good, replace(good, latents=latents))):
        log.step(number + 1, train_step(learner, iter([batch]), number, 1e-12))
    log.flush()
    log.close(failed=False)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["train/loss_quarter_1"] == pytest.approx(expected[0], rel=1e-4)
    second = (expected[1] + 2 * expected[2]) / 3
    assert row["train/loss_quarter_2"] == pytest.approx(second, rel=1e-4)


def test_eval_is_plain_whatever_the_run_learns_by(caches: list[Cache], base: Path) -> None:
    """Four times for each sample, one in each quarter; only the prediction type is the run's."""
    val = caches[0]
    odd: dict[str, Any] = {
        "min_snr_gamma": 1.0,
        "noise_offset": 0.5,
        "loss": "huber",
        "timesteps": "logit-normal",
        "timestep_range": (0, 10),
        "masked_loss": True,
        "caption_dropout": 0.9,
    }
    for kind in KINDS:
        plain, other = {"prediction_type": kind}, {"prediction_type": kind, **odd}
        learners = [learner_of(base, **settings) for settings in (plain, other)]
        actual, reference = (
            evaluate(learner, val, config_of(base, batch_size=2, **settings))
            for learner, settings in zip(learners, (plain, other), strict=True)
        )
        assert actual == reference
        expected: list[float] = []
        by_key: dict[str, list[float]] = {}
        reader = reader_of([val], 5, seed=0)
        with torch.no_grad():
            for pass_ in range(4):
                (batch,) = epoch_of(reader, pass_)
                batch = replace(batch, times=(batch.times + pass_) / 4)
                losses = plain_losses(learners[0].unet, batch, kind)
                expected += losses.tolist()  # the sample of weight 0 counts too
                for key, loss in zip(batch.keys, losses.tolist(), strict=True):
                    by_key.setdefault(key, []).append(loss)
        assert len(expected) == 4 * 5
        assert actual.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
        assert actual.samples == pytest.approx(
            {key: sum(each) / 4 for key, each in by_key.items()}, rel=1e-5
        )
        assert len(actual.samples) == 5 and actual.data == val.data_digest
