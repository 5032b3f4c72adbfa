"""AdamW, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch

from train.config import TrainConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainConfig, device: torch.device
) -> torch.optim.AdamW:
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused
    )


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Of optimizer step 0..num_steps-1: linear warmup, then constant or half a cosine to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
