"""What a LoRA adapts in the real SDXL UNet, on the meta device: shapes without weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from train.adapters import add_adapter, trainable
from train.config import CacheUse, TrainConfig


@pytest.fixture
def sdxl() -> Any:
    """SDXL's UNet by its published sizes."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.mark.parametrize(
    ("targets", "num_modules", "num_parameters"),
    [
        ("attention-out", 140, 1_331_200),
        ("attention", 560, 5_806_080),
        ("all", 722, 10_639_360),
    ],
)
def test_targets_in_sdxl(sdxl: Any, targets: Any, num_modules: int, num_parameters: int) -> None:
    assert sum(p.numel() for p in sdxl.parameters()) == 2_567_463_684
    sdxl.requires_grad_(False)
    out = Path("unused")
    config = TrainConfig(
        caches=(CacheUse(out),), base="", out=out, steps=1, rank=4, targets=targets
    )
    with torch.device("meta"):
        add_adapter(sdxl, config)
    adapted = trainable(sdxl)
    assert len(adapted) == 2 * num_modules
    assert sum(p.numel() for p in adapted.values()) == num_parameters
    assert {p.dtype for p in adapted.values()} == {torch.float32}
