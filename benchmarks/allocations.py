"""Counts the peak memory of a full-size training step, on a CPU, over fake tensors.

Fake tensors have shapes and no data, so the real UNet, adapter, loss, backward pass and optimizer
run as they are, and nothing is computed. Every storage is counted from its making to its end, in
the allocator's steps of 512 bytes. What a kernel takes for itself is not seen, and attention is
the CPU's fused kernel, which keeps what a card's does.

    python -m benchmarks.allocations [--out benchmark-output]
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.estimates import FULL, LORA, config_of
from benchmarks.report import keep, machine, show
from runtime.devices import pick_precision
from sdxl.base import ModelSource, open_base
from shards.batches import Batch
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import Learner, build_learner, train_step
from train.objective import objective_of
from train.unet import build_unet

CPU = torch.device("cpu")
STEP = 512  # bytes: of the CUDA allocator
RUNS: tuple[tuple[str, dict[str, Any], int, float | None], ...] = (
    ("LoRA 4", LORA, 512, 5.8),
    ("LoRA 4", LORA, 1024, 6.5),
    ("LoRA 4, no checkpointing", {**LORA, "gradient_checkpointing": False}, 1024, None),
    ("full, bf16, fused, adafactor", FULL, 1024, 9.5),
)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._counted: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:  # the optimizer's own numbers
            return True if args[0].dtype == torch.bool else 1
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._counted:
            return
        size = -(-storage.nbytes() // STEP) * STEP
        self._counted.add(storage)
        self.live += size
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.live -= size


def unet_without_data(config: TrainConfig) -> Any:
    """The run's UNet, on the meta device."""

    def empty(source: ModelSource, dtype: torch.dtype) -> Any:
        unet: Any = UNet2DConditionModel.from_config(source.config)
        return unet.to(dtype)

    meta = torch.device("meta")
    with mock.patch("train.unet.load_unet", empty), meta:
        precision = pick_precision("bf16", CPU, allow_cpu=True)
        return build_unet(config, open_base(config.base), precision, DistContext(meta))


def fill(unet: Any) -> Any:
    """The same with parameters of the mode at hand."""
    for module in unet.modules():
        for name, old in module.named_parameters(recurse=False):
            new = torch.empty(old.shape, dtype=old.dtype)
            setattr(module, name, torch.nn.Parameter(new, old.requires_grad))
    return unet


def batch_of(pixels: int, num: int = 1) -> Batch:
    """One of ``num`` images."""
    side = pixels // 8
    return Batch(
        latents=torch.empty(num, 4, side, side),
        prompt=torch.empty(num, 77, 2048, dtype=torch.float16),
        pooled=torch.empty(num, 1280, dtype=torch.float16),
        time_ids=torch.empty(num, 6),
        noise=torch.empty(num, 4, side, side),
        times=torch.empty(num),
        weights=torch.empty(num),
        keys=("key",) * num,
        num_entries=num,
        epoch=0,
        number=0,
        micro=0,
        num_micros=1,
    )


@contextmanager
def fake_learner(config: TrainConfig, *modes: Any) -> Iterator[Learner]:
    """The run's learner on the CPU; while entered, tensors are fake, and ``modes`` are entered too,
    before it is made."""
    base = open_base(config.base)
    objective = objective_of(config, base.scheduler_config)  # of real numbers
    unet = unet_without_data(config)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("train.learner.objective_of", lambda *_: objective))
        stack.enter_context(mock.patch("train.learner.build_unet", lambda *_: fill(unet)))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), *modes):
            stack.enter_context(mode)
        yield build_learner(config, base, DistContext(CPU))


def peaks(config: TrainConfig, pixels: int) -> dict[str, float]:
    """Bytes before the second step, when all state is there, and at its peak."""
    allocations = Allocations()
    with fake_learner(config, allocations) as learner:
        train_step(learner, iter([batch_of(pixels)]), 0, 1e-4)
        before = allocations.peak = allocations.live
        train_step(learner, iter([batch_of(pixels)]), 1, 1e-4)
    return {"kept": before, "peak": allocations.peak}


@click.command()
@click.option("--out", default=Path("benchmark-output"), type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """A table of peaks in GB, at batch 1 in bf16."""
    rows = []
    for name, settings, pixels, target in RUNS:
        result = peaks(config_of(allow_cpu_bf16=True, **settings), pixels)
        gb = {f"{kind} GB": size / 1e9 for kind, size in result.items()}
        rows.append({"run": name, "px": pixels, **gb, "target GB": target})
    show("peak of the second step's allocations over fake tensors, batch 1, bf16", rows)
    keep(out / "allocations.json", {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
