"""What is learned: the noise schedule, noising, targets, losses. Pure functions.

Legend: B samples, C channels, h w latent size, T timesteps of the schedule. Noise and times are
arguments, and losses go out per sample: weighting, logging and tests share one path.
"""

from typing import Any

import torch

from shards.reader import Batch

PREDICTION_TYPES = ("epsilon", "v_prediction")


def alphas_cumprod(scheduler: dict[str, Any]) -> torch.Tensor:
    """The schedule's signal power, [T] fp32, from a scheduler's config (Ho et al. 2020, eq. 4).

    Raises:
        ValueError: a schedule that SDXL does not use.
    """
    kind, num = scheduler.get("beta_schedule"), scheduler.get("num_train_timesteps", 1000)
    start, end = scheduler.get("beta_start"), scheduler.get("beta_end")
    if not (isinstance(start, float) and isinstance(end, float) and isinstance(num, int)):
        raise ValueError("the base's scheduler has no beta_start and beta_end to train with")
    if scheduler.get("trained_betas") is not None or kind not in ("scaled_linear", "linear"):
        raise ValueError(
            f"the base's scheduler has beta_schedule {kind}; known: scaled_linear, linear"
        )
    if kind == "linear":
        betas = torch.linspace(start, end, num)
    else:
        betas = torch.linspace(start**0.5, end**0.5, num) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0)
    return zero_terminal_snr(alphas) if scheduler.get("rescale_betas_zero_snr") else alphas


def zero_terminal_snr(alphas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alphas) [T] so that the last is 0 and the first stays (Lin et al. 2023,
    algorithm 1)."""
    roots = alphas.sqrt()
    return ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2


def timesteps_of(times: torch.Tensor, num: int) -> torch.Tensor:
    """Times [B] in [0, 1) to timesteps [B] in 0..num-1: uniform times give uniform timesteps."""
    return (times * num).long().clamp(max=num - 1)


def _like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *([1] * (latents.ndim - 1)))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise (Ho et al. 2020, eq. 4); ``alphas`` [B] at t."""
    alphas = _like(alphas, latents)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise


def target_of(
    prediction_type: str, latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """The noise itself, or v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return noise
    assert prediction_type == "v_prediction", prediction_type
    alphas = _like(alphas, latents)
    return alphas.sqrt() * noise - (1 - alphas).sqrt() * latents


def mean_squares(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, [B] fp32."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def sample_losses(
    unet: Any,
    batch: Batch,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The loss of each sample of a batch, [B] fp32, unweighted. ``dtype`` is the forward's."""
    timesteps = timesteps_of(batch.times, len(alphas_cumprod))
    alphas = alphas_cumprod[timesteps]
    predicted = unet(
        add_noise(batch.latents, batch.noise, alphas).to(dtype),
        timesteps,
        encoder_hidden_states=batch.prompt.to(dtype),
        added_cond_kwargs={"text_embeds": batch.pooled.to(dtype), "time_ids": batch.time_ids},
        return_dict=False,
    )[0]
    return mean_squares(predicted, target_of(prediction_type, batch.latents, batch.noise, alphas))
