"""The product on a CUDA device, which is pretended (``pretended_cuda.py``)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_cuda import PretendedCuda
from test_amp import batches_of

from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import build_learner, train_step
from train.option_values import CacheUse


def steps(cache: Path, base: Path, device: str, num: int, settings: dict[str, Any]) -> list[float]:
    config = TrainConfig(
        caches=(CacheUse(cache),),
        base=str(base),
        out=Path("unused"),
        steps=1,
        device=device,
        **settings,
    )
    learner = build_learner(config, DistContext(torch.device(device)))
    batches = batches_of(cache)
    found = [float(train_step(learner, batches, number, 1e-3).loss) for number in range(num)]
    batches.close()
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"full": True},
        {"precision": "fp16"},
        {"precision": "fp32"},
        {"optimizer": "adafactor"},
        {"full": True, "pure_bf16": True, "fused_backward": True},
    ],
)
def test_a_step(cache: Path, base: Path, cuda: PretendedCuda, settings: dict[str, Any]) -> None:
    print(
        cuda(steps, cache, base, "cuda", 3, settings),
        steps(
            cache,
            base,
            "cpu",
            3,
            settings
            | {"allow_cpu_bf16": True, "precision": {"precision": "bf16", **settings}["precision"]},
        ),
    )
