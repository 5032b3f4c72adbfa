"""The objective against the papers' formulas and the references' code."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from made import (
    KINDS,
    SDXL,
    config_of,
    made_batch,
)

from shards.plan import Draws
from train.objective import (
    Objective,
    errors,
    logit_normal,
    masked_mean,
    min_snr_weights,
    objective_of,
    offset_noise,
    timesteps_of,
)


def objective(**settings: Any) -> Objective:
    return objective_of(config_of(**settings), SDXL)


class Says:
    """In a UNet's place: answers with one tensor, and keeps what it was asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer

    def __call__(self, sample: torch.Tensor, timesteps: torch.Tensor, **_: Any) -> Any:
        self.sample, self.timesteps = sample, timesteps
        return (self.answer,)


def ks_distance(first: torch.Tensor, other: torch.Tensor) -> float:
    """Kolmogorov-Smirnov, in units of its standard: above 2.5 is one in 100,000."""
    every = torch.cat([first, other]).sort().values
    shares = [
        torch.searchsorted(x.sort().values, every, right=True) / len(x) for x in (first, other)
    ]
    scale = math.sqrt(len(first) * len(other) / (len(first) + len(other)))
    return float((shares[0] - shares[1]).abs().max()) * scale


# Weights by signal to noise.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_the_diffusers_example(kind: str, gamma: float) -> None:
    schedule, timesteps = DDPMScheduler(**SDXL), torch.arange(1000)
    snr = compute_snr(schedule, timesteps)
    least = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1).values
    expected = least / snr if kind == "epsilon" else least / (snr + 1)
    actual = min_snr_weights(objective().alphas_cumprod, gamma, kind)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=0)
    assert bool((actual < 0.999).any()) and actual.max() <= max(1.0, gamma / (gamma + 1))


def test_min_snr_weights_of_pure_noise_are_finite() -> None:
    nothing = torch.zeros(1)
    assert min_snr_weights(nothing, 5.0, "v_prediction").tolist() == [0.0]
    assert min_snr_weights(nothing, 5.0, "epsilon").tolist() == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_losses_by_the_runs_prediction_type(kind: str) -> None:
    batch = made_batch(64)
    plain = objective(prediction_type=kind)
    weighed = objective(prediction_type=kind, min_snr_gamma=2.0)
    unet = Says(torch.randn(64, 4, 2, 4))
    ratio = weighed.losses(unet, batch, torch.float32) / plain.losses(unet, batch, torch.float32)
    snr = compute_snr(DDPMScheduler(**SDXL), (batch.times * 1000).long())
    expected = snr.clamp(max=2.0) / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(ratio, expected, rtol=1e-4, atol=0)


# The end of the schedule.


def test_zero_terminal_snr_is_the_papers_algorithm() -> None:
    """Lin et al. 2023, algorithm 1, in fp64; and what DDPMScheduler makes by way of betas."""
    settings = {"zero_terminal_snr": True, "prediction_type": "v_prediction"}
    actual = objective(**settings).alphas_cumprod
    betas = np.linspace(SDXL["beta_start"] ** 0.5, SDXL["beta_end"] ** 0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root_0, root_t = root[0], root[-1]
    root = (root - root_t) * root_0 / (root_0 - root_t)
    assert np.allclose(actual.numpy(), root**2, atol=3e-7, rtol=1e-5)
    assert actual[-1] == 0 and actual[0] == pytest.approx(1 - SDXL["beta_start"])
    expected = DDPMScheduler(**SDXL, rescale_betas_zero_snr=True).alphas_cumprod
    assert torch.allclose(actual[:-1], expected[:-1], atol=1e-6, rtol=1e-3)


def test_the_last_timestep_of_a_zero_snr_schedule_is_pure_noise() -> None:
    result = objective(zero_terminal_snr=True, prediction_type="v_prediction")
    batch, unet = made_batch(2, times=torch.tensor([0.9999, 0.9999])), Says(torch.zeros(1))
    losses = result.losses(unet, batch, torch.float32)
    assert unet.timesteps.tolist() == [999, 999]
    assert torch.equal(unet.sample, batch.noise)
    assert torch.allclose(losses, batch.latents.square().mean(dim=(1, 2, 3)))  # v is -x_0


@pytest.mark.parametrize("by", ["flag", "base"])
def test_epsilon_with_zero_terminal_snr_is_refused(by: str) -> None:
    scheduler = {**SDXL, "rescale_betas_zero_snr": by == "base"}
    config = config_of(zero_terminal_snr=True if by == "flag" else None)
    with pytest.raises(ValueError, match=r"zero-terminal-SNR with epsilon: .*v_prediction"):
        objective_of(config, scheduler)
    objective_of(config_of(zero_terminal_snr=False), scheduler)  # the flag wins over the base


@pytest.mark.parametrize("flag", [None, *KINDS])
@pytest.mark.parametrize("base", KINDS)
def test_the_prediction_type_is_the_flags_else_the_bases(base: str, flag: Any) -> None:
    result = objective_of(config_of(prediction_type=flag), {**SDXL, "prediction_type": base})
    assert result.prediction_type == (flag or base)


# Noise.


def test_noise_offset_is_in_the_sample_and_in_the_target() -> None:
    noise, offsets = torch.randn(3, 4, 2, 4), torch.randn(3, 4, 1, 1)
    expected = noise + 0.3 * offsets.expand(3, 4, 2, 4)
    assert torch.equal(offset_noise(noise, offsets, 0.3), expected)
    batch = made_batch(3, noise=noise, offsets=offsets)
    schedule, timesteps = DDPMScheduler(**SDXL), (batch.times * 1000).long()
    for kind in KINDS:
        unet = Says(torch.zeros(3, 4, 2, 4))
        actual = objective(prediction_type=kind, noise_offset=0.3)
        losses = actual.losses(unet, batch, torch.float32)
        assert torch.equal(unet.sample, schedule.add_noise(batch.latents, expected, timesteps))
        velocity = schedule.get_velocity(batch.latents, expected, timesteps)
        target = expected if kind == "epsilon" else velocity
        assert torch.allclose(losses, target.square().mean(dim=(1, 2, 3)))


def test_offset_noise_moves_the_mean_of_each_channel_apart() -> None:
    """A channel's mean has variance 1 / (h w) + strength^2, and channels are independent."""
    draws, noise, offsets = Draws(), torch.empty(4000, 4, 2, 4), torch.empty(4000, 4, 1, 1)
    for n in range(4000):
        draws.start(seed=0, epoch=0, cache=0, key=f"{n:020x}", repeat=0)
        draws.normal(offsets[n].numpy())
        draws.normal(noise[n].numpy())
    means = offset_noise(noise, offsets, 0.5).mean(dim=(2, 3)).numpy()
    expected = np.eye(4) * (1 / 8 + 0.25)
    assert np.allclose(np.cov(means.T), expected, atol=0.03)
    assert np.allclose(means.mean(axis=0), 0, atol=0.04)
    assert np.allclose(np.cov(noise.mean(dim=(2, 3)).numpy().T), np.eye(4) / 8, atol=0.015)


# Errors and masks.


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_huber_is_the_formula(delta: float) -> None:
    a, b = torch.randn(2, 3, 4, 5, 6)
    error = (a - b).abs()
    expected = torch.where(error <= delta, error**2 / 2, delta * (error - delta / 2))
    losses = errors(a, b, "huber", delta)
    assert torch.allclose(losses, expected, atol=1e-6)
    assert torch.allclose(losses.mean(), torch.nn.HuberLoss(delta=delta)(a, b))
    assert bool((error <= delta).any()) and bool((error > delta).any())


@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_errors_of_halves_are_taken_in_fp32(loss: str) -> None:
    a, b = (600 * torch.randn(2, 50)).half()
    losses = errors(a, b, loss, 1e4)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, errors(a.float(), b.float(), loss, 1e4))
    assert losses.isfinite().all() and losses.max() > 65504


def test_the_losses_are_of_the_kind_asked_for() -> None:
    batch, unet = made_batch(5), Says(torch.randn(5, 4, 2, 4))
    for loss, delta in (("mse", 0.1), ("huber", 0.1), ("huber", 0.7)):
        actual = objective(loss=loss, huber_delta=delta).losses(unet, batch, torch.float32)
        expected = errors(unet.answer, batch.noise, loss, delta).mean(dim=(1, 2, 3))
        assert torch.equal(actual, expected)


def test_a_masked_loss_is_the_mean_over_the_mask() -> None:
    values, mask = torch.rand(3, 4, 5, 6), torch.rand(3, 1, 5, 6)
    mask[1] = (mask[1] > 0.5).float()
    expected = []
    for row in range(3):
        total = area = 0.0
        for c, y, x in np.ndindex(4, 5, 6):
            total += float(values[row, c, y, x] * mask[row, 0, y, x])
            area += float(mask[row, 0, y, x])
        expected.append(total / area)
    assert masked_mean(values, mask).tolist() == pytest.approx(expected, rel=1e-5)
    ones, zeros = torch.ones_like(mask), torch.zeros_like(mask)
    assert torch.allclose(masked_mean(values, ones), masked_mean(values, None))
    assert masked_mean(values, zeros).tolist() == [0.0, 0.0, 0.0]
    assert torch.allclose(masked_mean(values, 0.01 * mask), masked_mean(values, mask))


def test_what_is_outside_the_mask_teaches_nothing() -> None:
    mask = torch.zeros(2, 1, 2, 4)
    mask[0, :, :, :2], mask[1] = 1, 0
    batch = made_batch(2, mask=mask)
    answer = torch.randn(2, 4, 2, 4, requires_grad=True)
    losses = objective().losses(Says(answer), batch, torch.float32)
    losses.sum().backward()
    assert answer.grad is not None
    assert bool(answer.grad[0, :, :, :2].all()) and not bool(answer.grad[0, :, :, 2:].any())
    assert not bool(answer.grad[1].any()) and losses[1] == 0


# Timesteps.


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.0, 1.8)])
def test_logit_normal_times_are_the_sigmoid_of_a_normal(mean: float, std: float) -> None:
    times = torch.rand(500)
    normal = statistics.NormalDist()
    expected = [1 / (1 + math.exp(-mean - std * normal.inv_cdf(t))) for t in times.tolist()]
    assert logit_normal(times, mean, std).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    drawn = torch.sigmoid(mean + std * torch.randn(20_000))
    assert ks_distance(logit_normal(torch.rand(20_000), mean, std), drawn) < 2.5
    assert ks_distance(logit_normal(torch.rand(20_000), mean + 0.2, std), drawn) > 2.5
    ends = logit_normal(torch.tensor([0.0, 1 - 2**-24]), mean, std)
    assert ends.isfinite().all() and 0 <= ends[0] < ends[1] <= 1


def test_the_timesteps_of_a_run_are_logit_normal_where_asked() -> None:
    result = objective(timesteps="logit-normal", logit_mean=0.5, logit_std=0.8)
    times = torch.rand(20_000)
    actual = result.timesteps(times)
    drawn = torch.sigmoid(0.5 + 0.8 * torch.randn(20_000))
    assert ks_distance(actual / 1000, drawn) < 2.5
    assert torch.equal(objective().timesteps(times), (times * 1000).long())


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 203), (999, 1000), (0, 500)])
@pytest.mark.parametrize("how", ["uniform", "logit-normal"])
def test_timesteps_stay_in_their_range(low: int, high: int, how: str) -> None:
    result = objective(timestep_range=(low, high), timesteps=how)
    ends = torch.tensor([0.0, 1 - 2**-24])
    timesteps = torch.cat([result.timesteps(ends), result.timesteps(torch.rand(5000))])
    assert low <= int(timesteps.min()) and int(timesteps.max()) < high
    if how == "uniform":
        assert (int(timesteps[0]), int(timesteps[1])) == (low, high - 1)
        even = torch.arange(3 * (high - low)) / (3 * (high - low)) + 1e-6
        counts = timesteps_of(even, low, high).bincount()[low:]
        assert counts.tolist() == [3] * (high - low)


def test_a_range_beyond_the_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--timestep-range: the schedule has 1000 .*not 1001"):
        objective(timestep_range=(0, 1001))
