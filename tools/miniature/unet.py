"""The miniature's UNet: SDXL's own, narrower. Its weights come from ``cli.py train --full``."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tools.miniature.text import WIDTH_1, WIDTH_2

TIME_EMBED_DIM = 32  # of each of the six size and crop numbers


def make_unet(seed: int = 0) -> Any:
    """Random weights. Three levels as in SDXL: no attention in the first, then transformers of one
    layer (SDXL: 2) and of two (SDXL: 10)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(48, 64, 48),
            layers_per_block=1,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(3, 4, 3),  # by diffusers' old misnomer: the number of heads
            norm_num_groups=8,
            cross_attention_dim=WIDTH_1 + WIDTH_2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_EMBED_DIM,
            projection_class_embeddings_input_dim=WIDTH_2 + 6 * TIME_EMBED_DIM,
        )
