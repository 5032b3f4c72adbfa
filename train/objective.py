"""The training objective: noise schedule, noising, targets and losses, as pure functions.

Legend: B samples, C channels, h w latent size, T timesteps of the schedule. Noise and times are
arguments, and losses go out per sample: weighting, logging and tests share one path.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from shards.batches import Batch
from train.config import TrainConfig

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


def timesteps_of(times: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Times [B] in [0, 1) to timesteps [B] in low..high-1: uniform times give uniform timesteps."""
    return (low + (times * (high - low)).long()).clamp(max=high - 1)


def logit_normal(times: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Uniform times [B] to those of sigmoid(N(mean, std)), by the inverse of its distribution
    (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(times))


def _broadcast_like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *([1] * (latents.ndim - 1)))


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) noise (Ho et al. 2020, eq. 4); ``alphas`` [B] at t."""
    alphas = _broadcast_like(alphas, latents)
    return alphas.sqrt() * latents + (1 - alphas).sqrt() * noise


def target_of(
    prediction_type: str, latents: torch.Tensor, noise: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """The noise itself, or v = sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022, app. D)."""
    if prediction_type == "epsilon":
        return noise
    assert prediction_type == "v_prediction", prediction_type
    alphas = _broadcast_like(alphas, latents)
    return alphas.sqrt() * noise - (1 - alphas).sqrt() * latents


def offset_noise(noise: torch.Tensor, offsets: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise [B, C, h, w] with one more normal value a channel, ``offsets`` [B, C, 1, 1], so that
    the mean brightness is learned too (Guttenberg 2023, "Diffusion with offset noise")."""
    return noise + strength * offsets


def min_snr_weights(alphas: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Loss weights [B] by alphas [B] at t, SNR = a / (1 - a) (Hang et al. 2023, section 3.4):
    min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v."""
    snr = alphas / (1 - alphas)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # and 1 where SNR is 0
    return snr.clamp(max=gamma) / (snr + 1)


def errors(
    predicted: torch.Tensor, target: torch.Tensor, loss: str, huber_delta: float
) -> torch.Tensor:
    """Squared error, or Huber's: e^2 / 2 up to delta, then delta (|e| - delta / 2). Elementwise,
    fp32."""
    predicted, target = predicted.float(), target.float()
    if loss == "huber":
        return F.huber_loss(predicted, target, reduction="none", delta=huber_delta)
    return (predicted - target).square()


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over each sample, [B]: of all, or weighed by ``mask`` [B, 1, h, w] (0 where it is)."""
    if mask is None:
        return values.flatten(1).mean(dim=1)
    mask = mask.expand_as(values)
    area = mask.flatten(1).sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return (values * mask).flatten(1).sum(dim=1) / area


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """Which of the above a run uses."""

    alphas_cumprod: torch.Tensor  # [T]
    prediction_type: str = "epsilon"
    low: int = 0  # timesteps low..high-1
    high: int
    logit: tuple[float, float] | None = None  # mean and std of logit-normal times
    noise_offset: float = 0.0
    min_snr_gamma: float | None = None
    loss: str = "mse"
    huber_delta: float = 0.1

    def timesteps(self, times: torch.Tensor) -> torch.Tensor:
        """[B] of uniform times [B]."""
        if self.logit is not None:
            times = logit_normal(times, *self.logit)
        return timesteps_of(times, self.low, self.high)

    def losses(self, unet: Any, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """The loss of each sample, [B] fp32, without its own weight. ``dtype`` is the forward's."""
        timesteps = self.timesteps(batch.times)
        alphas = self.alphas_cumprod[timesteps]
        noise = batch.noise
        if batch.offsets is not None:
            noise = offset_noise(noise, batch.offsets, self.noise_offset)
        predicted = unet(
            add_noise(batch.latents, noise, alphas).to(dtype),
            timesteps,
            encoder_hidden_states=batch.prompt.to(dtype),
            added_cond_kwargs={"text_embeds": batch.pooled.to(dtype), "time_ids": batch.time_ids},
            return_dict=False,
        )[0]
        target = target_of(self.prediction_type, batch.latents, noise, alphas)
        values = errors(predicted, target, self.loss, self.huber_delta)
        losses = masked_mean(values, batch.mask)
        if self.min_snr_gamma is not None:
            losses = losses * min_snr_weights(alphas, self.min_snr_gamma, self.prediction_type)
        return losses


def objective_of(config: TrainConfig, scheduler: dict[str, Any]) -> Objective:
    """What ``config`` asks for on the schedule of a base.

    Raises:
        ValueError: a schedule or a prediction type that SDXL does not use.
    """
    if config.zero_terminal_snr is not None:
        scheduler = {**scheduler, "rescale_betas_zero_snr": config.zero_terminal_snr}
    alphas = alphas_cumprod(scheduler)
    kind = prediction_type_of(config, scheduler)
    if kind == "epsilon" and bool(alphas[-1] == 0):
        raise ValueError(
            "zero-terminal-SNR with epsilon: at the last timestep there is only noise to see, and "
            "nothing to learn; give --prediction-type v_prediction"
        )
    low, high = config.timestep_range or (0, len(alphas))
    if high > len(alphas):
        raise ValueError(f"--timestep-range: the schedule has {len(alphas)} timesteps, not {high}")
    logit = (config.logit_mean, config.logit_std) if config.timesteps == "logit-normal" else None
    return Objective(
        alphas_cumprod=alphas,
        prediction_type=kind,
        low=low,
        high=high,
        logit=logit,
        noise_offset=config.noise_offset,
        min_snr_gamma=config.min_snr_gamma,
        loss=config.loss,
        huber_delta=config.huber_delta,
    )


def prediction_type_of(config: TrainConfig, scheduler: dict[str, Any]) -> str:
    """What the run asks for, else what the base says.

    Raises:
        ValueError: the base says something else than epsilon or v_prediction.
    """
    kind = config.prediction_type or scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"the base's prediction_type is {kind}; known: {', '.join(PREDICTION_TYPES)}"
        )
    return str(kind)
