"""One step of learning, and one evaluation."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from sdxl.device import Precision, exact_fp32, pick_precision
from shards.plan import Plan, Share
from shards.reader import Batch, Cache, read_ahead, read_batch
from train.adapters import trainable
from train.config import TrainConfig
from train.distributed import World
from train.objective import alphas_cumprod, sample_losses
from train.optim import build_optimizer
from train.unet import build_unet, prediction_type, scheduler_config

EVAL_SEED = 0  # not the run's: the eval losses of two runs can be compared
EVAL_PASSES = 4  # each sample at four times, one in each quarter of the schedule


@dataclass
class Learner:
    """What a step needs. ``forward`` is the UNet, or DDP around it."""

    unet: Any
    forward: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    alphas: torch.Tensor  # [T]
    prediction_type: str
    max_grad_norm: float
    world: World

    def losses(self, unet: Any, batch: Batch) -> torch.Tensor:
        """The loss of each sample, [B] fp32, in the run's precision."""
        device, precision = self.world.device.type, self.precision
        with torch.autocast(device, precision.dtype) if precision.autocast else nullcontext():
            return sample_losses(unet, batch, self.alphas, self.prediction_type, precision.dtype)


def build_learner(config: TrainConfig, world: World) -> Learner:
    """UNet, adapters and optimizer, on this rank's device."""
    scheduler = scheduler_config(config.base)
    precision = pick_precision(config.precision, world.device, config.allow_cpu_bf16)
    if precision.dtype == torch.float32:
        exact_fp32()
    unet = build_unet(config, precision.dtype, world.device)
    forward = unet
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        forward = DistributedDataParallel(
            unet, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return Learner(
        unet=unet,
        forward=forward,
        optimizer=build_optimizer(trainable(unet).values(), config, world.device),
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision.scaler),
        precision=precision,
        alphas=alphas_cumprod(scheduler).to(world.device),
        prediction_type=prediction_type(config, scheduler),
        max_grad_norm=config.max_grad_norm,
        world=world,
    )


def train_step(
    learner: Learner, batches: Iterator[Batch], lr: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One optimizer step on the next global batch.

    Its loss is sum(w l) / sum(w) over all ranks and micro-batches. Returns this rank's share of
    it, the norm of the gradient before clipping (both on the device), and the samples of all
    ranks.
    """
    world, total = learner.world, torch.zeros((), device=learner.world.device)
    last = False
    while not last:
        batch = next(batches).to(world.device)
        last = batch.micro == batch.num_micros - 1
        with nullcontext() if last or world.size == 1 else learner.forward.no_sync():
            losses = learner.losses(learner.forward, batch)
            loss = (losses * batch.weights).sum() / batch.total_weight
            # DDP takes the mean over ranks, and the loss is a sum over them.
            learner.scaler.scale(loss * world.size).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    learner.scaler.unscale_(learner.optimizer)
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    limit = learner.max_grad_norm or float("inf")
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    for group in learner.optimizer.param_groups:
        group["lr"] = lr
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return total, grad_norm, batch.num_entries


@torch.no_grad()
def evaluate(learner: Learner, val: Cache, config: TrainConfig) -> float:
    """Mean loss over a validation cache, always with the same noise and timesteps."""
    world = learner.world
    plan = Plan(val.groups(), EVAL_SEED, config.batch_size * world.size)
    share = Share(batch_size=config.batch_size, world=world.size, rank=world.rank)

    def read(place: tuple[int, int]) -> Batch:
        pass_, number = place
        batch = read_batch([val], plan, plan.batch(pass_, number), share, 0)
        return replace(batch, times=(batch.times + pass_) / EVAL_PASSES)

    places = [(p, n) for p in range(EVAL_PASSES) for n in range(plan.num_batches)]
    sums = torch.zeros(2, device=world.device)
    learner.unet.eval()
    for batch in read_ahead(read, places, config.reader_threads, 2 * config.reader_threads):
        batch = batch.to(world.device)
        losses = learner.losses(learner.unet, batch)
        sums += torch.stack([(losses * batch.weights).sum(), batch.weights.sum()])
    learner.unet.train()
    total, weight = world.sum(sums).tolist()
    return float(total / weight)
