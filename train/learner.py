"""The training step, the evaluation, and the warm-up before the first step."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from runtime.devices import Precision, check_bf16, exact_fp32, pick_precision
from sdxl.base import Base
from sdxl.metadata import Schedule
from shards.batches import Batch, Reader
from shards.buckets import Size, largest_bucket
from shards.plan import Plan, RankShare
from shards.reader import Cache, read_ahead
from train.config import TrainConfig, check_processes
from train.cuda_graphs import CudaGraphs, why_no_graphs
from train.distributed import DistContext, is_dtensor
from train.ema import Ema
from train.evaluation import Evaluation
from train.fast_forwards import LoraCasts
from train.memory import state_bytes
from train.objective import Objective, objective_of
from train.optim import FusedBackward, Optimizer
from train.unet import build_unet, reshard, trainable

EVAL_SEED = 0  # not the run's: the eval losses of two runs can be compared
EVAL_PASSES = 4  # each sample at four times, one in each quarter of the schedule
NUM_QUARTERS = 4  # of the schedule: losses are logged for each


@dataclass
class Learner:
    """The state of training: UNet, objective, optimizer. ``forward`` is the UNet, or DDP around
    it."""

    unet: Any
    forward: Any
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    objective: Objective
    max_grad_norm: float
    world: DistContext
    ema: Ema | None = None
    fused: FusedBackward | None = None
    casts: LoraCasts | None = None
    graphs: CudaGraphs | None = None

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the weights must be sampled with."""
        objective = self.objective
        return Schedule(objective.prediction_type, bool(objective.alphas_cumprod[-1] == 0))

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast of the run's precision."""
        device, precision = self.world.device.type, self.precision
        return torch.autocast(device, precision.dtype) if precision.autocast else nullcontext()

    def losses(self, unet: Any, batch: Batch) -> torch.Tensor:
        """The loss of each sample, [B] fp32, in the run's precision."""
        with self.autocast():
            return self.objective.losses(unet, batch, self.precision.dtype)

    def compute(
        self, batch: Batch, arm: Callable[[torch.Tensor], None] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The forward and the backward pass of a micro-batch on the device; gradients are added to
        those that are there. ``arm`` is called in between, with whether the loss is finite.

        Returns:
            The loss of each sample, [B] fp32, and what they add to the loss of the step: their
            weighted sum by the number of samples of the global batch.
        """
        with self.casts.in_place() if self.casts is not None else nullcontext():
            losses = self.losses(self.forward, batch)
            loss = (losses * batch.weights).sum() / batch.num_entries
            if arm is not None:
                arm(loss.detach().isfinite())
            # DDP and FSDP take the mean over ranks, and the loss is a sum over them.
            self.scaler.scale(loss * self.world.size).backward()  # type: ignore[no-untyped-call]
        return losses.detach(), loss.detach()

    @contextmanager
    def eval_mode(self) -> Iterator[Any]:
        """While entered, the UNet is as the run would publish it, and in eval mode: with the
        average of its weights, if the run keeps one."""
        reshard(self.unet)
        self.unet.eval()
        try:
            with nullcontext() if self.ema is None else self.ema.in_place():
                yield self.unet
        finally:
            self.unet.train()
            reshard(self.unet)

    def grad_sync(self, last: bool) -> AbstractContextManager[Any]:
        """While entered, ranks exchange gradients only if this is the ``last`` micro-batch of a
        step. (Under FSDP in each: until then every rank would keep the gradients of the whole UNet,
        in fp32.)"""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()


class Micro(NamedTuple):
    """What the log reads of a micro-batch of this rank; tensors [B] are on the device."""

    place: tuple[int, int, int]  # epoch, number, micro
    losses: torch.Tensor
    weights: torch.Tensor
    quarters: torch.Tensor  # 0..3: in which quarter of the schedule each sample's timestep lies


@dataclass
class Step:
    """The results of a step over all ranks; tensors are on the device."""

    loss: torch.Tensor  # sum(w l) / N over the N samples of the global batch
    grad_norm: torch.Tensor  # before clipping
    finite: torch.Tensor  # bool: if not, the weights stayed as they were
    lr: float
    num_samples: int = 0  # of all ranks
    wait_seconds: float = 0.0  # for data
    micros: list[Micro] = field(default_factory=list)


def build_learner(
    config: TrainConfig, base: Base, world: DistContext, checkpoint: Path | None = None
) -> Learner:
    """UNet, adapters and optimizer, on this rank's device; ``checkpoint`` is what the run resumes
    from.

    Raises:
        ValueError: the base or the settings cannot be used.
    """
    precision = pick_precision(config.precision, world.device, config.allow_cpu_bf16)
    if config.pure_bf16 and precision.dtype != torch.bfloat16:
        check_bf16("--pure-bf16", world.device)
        raise ValueError("--pure-bf16 on a CPU: give --allow-cpu-bf16 and --precision bf16 too")
    if config.fused_backward and precision.scaler:  # auto, on a GPU without bf16
        raise ValueError(
            "--fused-backward steps before fp16's scale is known, and this GPU has no bf16; "
            "give --precision fp32, or leave it out"
        )
    check_processes(config, world.size)
    if precision.dtype == torch.float32:
        exact_fp32()
    objective = objective_of(config, base.scheduler_config)
    objective = replace(objective, alphas_cumprod=objective.alphas_cumprod.to(world.device))
    unet = build_unet(config, base, precision, world, checkpoint)
    forward = unet
    if world.size > 1 and not config.full:
        ids = [world.device.index] if world.device.type == "cuda" else None
        # All ranks have the same weights by the same base, seed and checkpoint; a quantized base
        # cannot be sent around.
        forward = DistributedDataParallel(
            unet, device_ids=ids, gradient_as_bucket_view=True, init_sync=False
        )
    parameters = trainable(unet)
    optimizer = Optimizer(parameters, config, world.device)
    fused = None
    if config.fused_backward:
        fused = FusedBackward(optimizer, config.max_grad_norm)
    learner = Learner(
        unet=unet,
        forward=forward,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=precision.scaler),
        precision=precision,
        objective=objective,
        max_grad_norm=config.max_grad_norm,
        world=world,
        ema=_average(parameters, config),
        fused=fused,
        casts=LoraCasts(unet, precision.dtype) if precision.autocast else None,
    )
    if config.cuda_graphs:
        _use_graphs(learner, config)
    return learner


def _use_graphs(learner: Learner, config: TrainConfig) -> None:
    world, optimizer = learner.world, learner.optimizer
    reason = why_no_graphs(config, world.device.type, world.size)
    if reason is None:
        learner.graphs = CudaGraphs(learner.compute, optimizer.parameters.values())
        optimizer.keeps_gradients = True
    elif world.is_main:
        warnings.warn(f"--cuda-graphs is left out: {reason}", stacklevel=2)


def _average(parameters: dict[str, torch.nn.Parameter], config: TrainConfig) -> Ema | None:
    return Ema(parameters, config.ema, config.ema_on_cpu, config.ema_every) if config.ema else None


def train_step(learner: Learner, batches: Iterator[Batch], number: int, lr: float) -> Step:
    """Optimizer step ``number`` (0, 1, ...) at ``lr`` on the next global batch.

    The loss is sum(w l) / N over the N samples of all ranks and micro-batches. N counts samples: a
    sum of their weights there would cancel the weight of a batch of one, and change what a weight
    means with the batch size. Nothing here waits for the device, unless the optimizer does.
    """
    world, device = learner.world, learner.world.device
    result = Step(
        loss=torch.zeros((), device=device),
        grad_norm=torch.zeros(()),  # this and the next are put in place by the update
        finite=torch.ones(()),
        lr=lr,
    )
    arm = partial(learner.fused.arm, number, lr) if learner.fused is not None else None
    last = False
    while not last:
        since = time.perf_counter()
        batch = next(batches)
        result.wait_seconds += time.perf_counter() - since
        batch, last = batch.to(device), batch.micro == batch.num_micros - 1
        with learner.grad_sync(last):
            if learner.graphs is not None:
                losses, loss = learner.graphs(batch)
            else:
                losses, loss = learner.compute(batch, arm)
        result.loss += loss
        result.micros.append(_note(learner.objective, batch, losses))
    result.num_samples = batch.num_entries
    result.loss = world.sum(result.loss)
    _update(learner, result, number)
    return result


def _note(objective: Objective, batch: Batch, losses: torch.Tensor) -> Micro:
    num = len(objective.alphas_cumprod)
    quarters = objective.timesteps(batch.times) * NUM_QUARTERS // num
    return Micro((batch.epoch, batch.number, batch.micro), losses, batch.weights, quarters)


def losses_by_quarter(steps: Iterable[Step]) -> torch.Tensor:
    """[2, 4] of this rank: sums of finite losses by quarter of the schedule, and how many."""
    _, losses, weights, quarters = zip(*(m for step in steps for m in step.micros), strict=True)
    values, counted = torch.cat(losses), torch.cat(weights) > 0
    where = torch.arange(NUM_QUARTERS, device=values.device)[:, None] == torch.cat(quarters)
    where = where & counted & values.isfinite()  # [4, samples]
    return torch.stack([torch.where(where, values, 0.0).sum(1), where.float().sum(1)])


def _update(learner: Learner, step: Step, number: int) -> None:
    """Update the weights, if loss and gradients are finite."""
    optimizer = learner.optimizer
    if learner.fused is not None:
        step.grad_norm = learner.fused.disarm()
        step.finite = step.loss.isfinite() & step.grad_norm.isfinite()
    else:
        if learner.scaler.is_enabled():
            learner.scaler.unscale_(optimizer.torch_optimizer)
        limit = learner.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters.values(), limit)
        step.grad_norm = norm.full_tensor() if is_dtensor(norm) else norm
        step.finite = step.loss.isfinite() & step.grad_norm.isfinite()
        optimizer.step(number, step.lr, step.finite)
        learner.scaler.update()
        optimizer.zero_grad()
    if learner.ema is not None:
        learner.ema.update(number)


@torch.no_grad()
def evaluate(learner: Learner, val: Cache, config: TrainConfig) -> Evaluation:
    """Mean squared error over a validation cache, always with the same noise and timesteps, plain:
    each sample counts once, without its weight, the run's loss weights, offsets and choice of
    timesteps. Every rank must call it, and gets the losses of all samples."""
    world, training = learner.world, learner.objective
    plan = Plan(val.groups(), EVAL_SEED, config.batch_size * world.size)
    share = RankShare(batch_size=config.batch_size, world=world.size, rank=world.rank)
    reader = Reader([val], plan, share)
    alphas = training.alphas_cumprod
    objective = Objective(
        alphas_cumprod=alphas, prediction_type=training.prediction_type, high=len(alphas)
    )

    def read(place: tuple[int, int]) -> Batch:
        pass_, number = place
        batch = reader.read(plan.batch(pass_, number), 0)
        return replace(batch, times=(batch.times + pass_) / EVAL_PASSES)

    places = [(p, n) for p in range(EVAL_PASSES) for n in range(plan.num_batches)]
    total, count = torch.zeros((), device=world.device), 0
    keys: list[str] = []
    losses_of_keys: list[torch.Tensor] = []  # which stay on the device until the end
    with learner.eval_mode() as unet:
        for batch in read_ahead(read, places, config.reader_threads, 2 * config.reader_threads):
            batch = batch.to(world.device)
            with learner.autocast():
                losses = objective.losses(unet, batch, learner.precision.dtype)
            num = len(batch.keys)  # 0 in the dummy of a rank that has no samples of this batch
            total, count = total + losses[:num].sum(), count + num
            keys += batch.keys
            losses_of_keys.append(losses[:num])
    mean: torch.Tensor = world.sum(total) / world.sum(
        torch.tensor(float(count), device=total.device)
    )
    pairs = [*zip(keys, torch.cat(losses_of_keys).tolist(), strict=True)]
    return Evaluation(mean.item(), _means(world.gather(pairs)), val.data_digest)


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each key."""
    values: dict[str, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: sum(each) / len(each) for key, each in values.items()}


# The warm-up: one forward and backward pass on the largest bucket, before the first step.
# Out-of-memory shows then, and not hours later when that bucket comes. Weights, optimizer, plan and
# generators are afterwards what they were, bit for bit.


def warm_up(learner: Learner, config: TrainConfig, plan: Plan, tokens: int) -> None:
    """Run the pass, if the run asks for it (by default on CUDA). Every rank must.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    device = learner.world.device
    if not (device.type == "cuda" if config.warm_up is None else config.warm_up):
        return
    batch = _batch_of_zeros(learner.unet, largest_bucket(plan.buckets), config.batch_size, tokens)
    state = None
    if device.type == "cuda" and not learner.optimizer.state()[0]:
        # The optimizer makes its state at the end of the first step. From the second step on it is
        # in memory beside the activations, so it is allocated before the pass.
        shapes = (parameter.shape for parameter in learner.optimizer.parameters.values())
        room = state_bytes(config.optimizer, shapes)
        room //= learner.world.size if config.full else 1
        state = torch.empty(room, dtype=torch.uint8, device=device)
    # With accumulation the gradients of a step's first passes are in memory during the later ones.
    accumulates = plan.global_batch > config.batch_size * learner.world.size
    for last in (False, True) if accumulates else (True,):
        with learner.grad_sync(last):
            learner.compute(batch.to(device))
    learner.optimizer.zero_grad()
    del state


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
