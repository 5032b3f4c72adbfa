"""One forward and backward pass on the largest bucket, before anything counts.

Out-of-memory shows now, and not hours later when that bucket comes. Weights, optimizer, plan and
generators are afterwards what they were, bit for bit.
"""

from typing import Any

import torch

from shards.batches import Batch
from shards.buckets import Size
from shards.plan import Plan
from train.config import TrainConfig
from train.learner import Learner
from train.memory import STATE_BYTES


def largest_bucket(plan: Plan) -> Size:
    return max(plan.buckets, key=lambda size: (size[0] * size[1], size))


def warm_up(learner: Learner, config: TrainConfig, plan: Plan, tokens: int) -> None:
    """Run the pass, if the run asks for it (by default on CUDA). Every rank must.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device = learner.world.device
    if not (device.type == "cuda" if config.warm_up is None else config.warm_up):
        return
    batch = _batch_of_zeros(learner.unet, largest_bucket(plan), config.batch_size, tokens)
    with learner.sync_on(True):
        losses = learner.losses(learner.forward, batch.to(device))
        learner.scaler.scale(losses.mean()).backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda" and not learner.optimizer.state()[0]:
        # The optimizer makes its state in the first step, while the gradients are there.
        trained = sum(p.numel() for p in learner.optimizer.parameters.values())
        room = trained / (learner.world.size if config.full else 1) * STATE_BYTES[config.optimizer]
        del losses
        torch.empty(int(room), dtype=torch.uint8, device=device)
    learner.optimizer.zero_grad()


def _batch_of_zeros(unet: Any, bucket: Size, size: int, tokens: int) -> Batch:
    config = unet.config
    added = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    latents = torch.zeros(size, config.in_channels, bucket[1] // 8, bucket[0] // 8)
    return Batch(
        latents=latents,
        prompt=torch.zeros(size, tokens, config.cross_attention_dim),
        pooled=torch.zeros(size, added),
        time_ids=torch.zeros(size, 6),
        noise=latents,
        times=torch.zeros(size),
        weights=torch.ones(size),
        keys=(),
        num_entries=size,
        epoch=0,
        number=0,
        micro=0,
        num_micros=1,
    )
