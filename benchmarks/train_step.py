"""Compares ``cli.py train`` with the bare loop, on the same UNet and optimizer: steps a second.

The bare loop has its tensors resident and does nothing but forward, backward, clip and step, by the
forward passes of peft and diffusers (with ``--same-forwards`` by the product's own). Both
run in this process on the same batches, in turns (A B, B A, ...), so that a noisy machine disturbs
both alike; the ratio is the median of the rounds'.

    python -m benchmarks.train_step [--base BASE] [CACHE | --pixels 64] [--full] [--same-forwards]
"""

import tempfile
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.caches import kind_for, random_samples, write_random
from benchmarks.operations import library_forwards
from benchmarks.report import clocks, keep, machine, rates, show, take_turns
from runtime.devices import pick_device
from sdxl.base import open_base
from shards.batches import Batch, Reader
from shards.plan import Plan, RankShare
from shards.reader import Cache
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import Learner, build_learner, train_step
from train.log import RunLog
from train.optim import learning_rate
from train.option_values import CacheUse


def bare_steps(learner: Learner, optimizer: Any, batches: list[Batch]) -> None:
    """What nobody can do without."""
    parameters = list(learner.optimizer.parameters.values())
    for batch in batches:
        loss = learner.losses(learner.unet, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class ProductLoop:
    """The product's own steps: read ahead from the shards, logged, flushed."""

    def __init__(self, config: TrainConfig, learner: Learner, cache: Cache, plan: Plan) -> None:
        self.config, self.learner, self.done = config, learner, 0
        share = RankShare(batch_size=config.batch_size, world=1, rank=0)
        pin = learner.world.device.type == "cuda"
        self.batches = Reader([cache], plan, share).epochs(pin=pin)
        config.out.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(config, learner.world, 0, 10**6, {})
        self.log.bar.disable = True

    def steps(self, num: int) -> None:
        for _ in range(num):
            lr = learning_rate(self.config, self.done, 10**6)
            step = train_step(self.learner, self.batches, self.done, lr)
            self.done += 1
            self.log.step(self.done, step)
            if self.done % self.config.log_every == 0:
                self.log.flush()


def compare(
    config: TrainConfig, device: torch.device, rounds: int, steps: int, same_forwards: bool
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round of both, by wall clock and by processor (of all threads)."""
    opened = Cache(config.caches[0].folder)
    plan = Plan(opened.groups(), 0, config.batch_size)
    base = open_base(config.base)
    product = ProductLoop(config, build_learner(config, base, DistContext(device)), opened, plan)
    with nullcontext() if same_forwards else library_forwards():
        bare = build_learner(config, base, DistContext(device))
    reader = Reader([opened], plan, RankShare(batch_size=config.batch_size, world=1, rank=0))
    stream = reader.epochs()
    resident = [batch.to(device) for batch in islice(stream, plan.num_batches)]
    stream.close()
    endless = cycle(resident)
    optimizer = bare.optimizer.torch_optimizer
    works = {
        "ours": lambda: product.steps(steps),
        "bare": lambda: bare_steps(bare, optimizer, list(islice(endless, steps))),
    }
    seconds = take_turns(works, rounds, clocks(device))
    product.batches.close()
    product.log.close(failed=False)
    return seconds


@click.command()
@click.argument("cache", required=False, type=click.Path(path_type=Path))
@click.option("--base", default="miniature", show_default=True)
@click.option("--pixels", default=64, show_default=True, help="Of random samples, without CACHE.")
@click.option("--full", is_flag=True)
@click.option("--same-forwards", is_flag=True, help="For both: what shards and logs cost.")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Of a round.")
@click.option("--rounds", default=7, show_default=True, help="Of each, in turns.")
@click.option("--device", default="auto", show_default=True)
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(
    cache: Path | None,
    base: str,
    pixels: int,
    full: bool,
    same_forwards: bool,
    batch_size: int,
    steps: int,
    rounds: int,
    device: str,
    out: Path,
) -> None:
    """Steps/s of the product and of the bare loop, and their ratio."""
    place = pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        if cache is None:
            cache, kind = Path(folder) / "cache", kind_for(base, pixels)
            write_random(cache, kind, random_samples(kind, 64))
        config = TrainConfig(
            caches=(CacheUse(cache),),
            base=base,
            out=Path(folder) / "run",
            full=full,
            steps=1,
            batch_size=batch_size,
            device=device,
        )
        seconds = compare(config, place, rounds, steps, same_forwards)
    rows = rates(seconds, steps, "steps", target=0.97)
    trained = "the whole UNet" if full else "LoRA"
    show(f"{trained} of {base}, batch {batch_size}, {rounds} rounds of {steps} steps", rows)
    keep(out / "train_step.json", {"machine": machine(str(place)), "pixels": pixels, "rows": rows})


if __name__ == "__main__":
    main()
