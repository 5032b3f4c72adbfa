"""The host does not wait for the device between two writes of the log."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from made import WAYS, config_of, learner_of, made_batch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.devices import Precision
from train.distributed import DistContext
from train.ema import Ema
from train.learner import Learner, losses_by_quarter, train_step
from train.objective import Objective
from train.optim import Optimizer, supports_found_inf


class Watch(TorchDispatchMode):
    """Counts what makes the host wait: values that become Python's, by dtype; copies between
    devices that block."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[torch.dtype] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero"):
            self.reads.append(args[0].dtype)
        if name in ("_to_copy", "copy_", "_copy_from"):
            into = kwargs.get("device") or args[0].device
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            source = args[1] if name == "copy_" else args[0]
            if blocks and source.device != torch.device(into):
                self.copies.append(f"{name} {source.device} to {into} {tuple(source.shape)}")
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("way", "flags"),
    [
        *((way, 0) for way in ("adamw", "bf16 fused", "adafactor")),
        ("prodigy", 2),
        *(
            pytest.param(way, flags, marks=pytest.mark.slow)
            for flags, ways in (
                (0, ("full", "fused adamw", "bf16 adamw", "bf16 adafactor", "fused adafactor")),
                (2, ("adamw8bit",)),
            )
            for way in ways
        ),
    ],
)
def test_the_host_reads_a_flag_a_step_or_nothing(base: Path, way: str, flags: int) -> None:
    """With AdamW and Adafactor nothing at all. Others read the flag, and Prodigy what it learns."""
    learner = learner_of(base, **WAYS[way])
    if "bf16" not in way:
        learner.ema = Ema(learner.optimizer.parameters, 0.9, on_cpu=False)
    train_step(learner, iter([made_batch(2)]), 0, 1e-3)
    batches = iter([replace(made_batch(2), micro=m, num_micros=2) for m in (0, 1)] * 2)
    if learner.fused is not None:
        batches = iter([made_batch(2) for _ in range(2)])
    with Watch() as watch:
        for number in range(2):
            train_step(learner, batches, number + 1, 1e-3)
    assert watch.reads.count(torch.bool) == flags
    assert flags or watch.reads == []


class FusedStub:
    """Stands in for a fused optimizer, on a device without data."""

    param_groups: list[dict[str, Any]] = [{}]  # noqa: RUF012
    _step_supports_amp_scaling = True
    steps = 0

    def step(self) -> None:
        self.steps += 1


@pytest.mark.slow
def test_no_copy_to_or_from_the_device_blocks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, whose values nobody can read: a wait is an error, a copy is seen.

    The batch goes there as a pinned one goes to a GPU; of ``to_device`` test_devices tells.
    """
    meta = torch.device("meta")
    monkeypatch.setattr(
        "shards.batches.to_device", lambda tensor, device: tensor.to(device, non_blocking=True)
    )
    with meta:
        config = UNet2DConditionModel.load_config(base / "unet")
        unet: Any = UNet2DConditionModel.from_config(config).train()
    parameters = dict(unet.named_parameters())
    optimizer = Optimizer(parameters, config_of(full=True), meta)
    assert not supports_found_inf(optimizer.torch_optimizer)
    optimizer_stub: Any = FusedStub()
    optimizer.torch_optimizer = optimizer_stub
    learner = Learner(
        unet=unet,
        forward=unet,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        precision=Precision(dtype=torch.float32, autocast=False, scaler=False),
        objective=Objective(
            alphas_cumprod=torch.empty(1000, device=meta),
            high=1000,
            logit=(0.0, 1.0),
            noise_offset=0.1,
            min_snr_gamma=5.0,
            loss="huber",
        ),
        max_grad_norm=1.0,
        world=DistContext(meta),
        ema=Ema(parameters, 0.9, on_cpu=False),
    )
    more = {"offsets": torch.randn(2, 4, 1, 1), "mask": torch.rand(2, 1, 4, 4)}
    with Watch() as watch:
        for number in range(2):
            batch = made_batch(2, (4, 4, 4), **more)
            result = train_step(learner, iter([batch]), number, 1e-3)
    assert optimizer_stub.steps == 2 and watch.reads == [] and watch.copies == []
    sums = losses_by_quarter([result])
    for value in (result.loss, result.grad_norm, result.finite, sums):
        assert value.device == meta
    with pytest.raises(RuntimeError, match="meta"):
        bool(result.finite)


def test_the_watch_sees_what_waits() -> None:
    value = torch.ones(2)
    with Watch() as watch:
        float(value.sum()), bool(value.any()), value.sum().item(), value.to("meta")
        torch.empty(2, device="meta").copy_(value)
        value.to("meta", non_blocking=True)
    assert watch.reads == [torch.float32, torch.bool, torch.float32]
    assert len(watch.copies) == 2
