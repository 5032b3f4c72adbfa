"""The miniature's UNet: SDXL's own, narrower. Its weights come from ``cli.py train --full``."""

from typing import Any

import torch

import tools.small_sdxl
from tools.miniature.text import WIDTH_1, WIDTH_2


def make_unet(seed: int = 0) -> Any:
    """Random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return tools.small_sdxl.make_unet(
            channels=(48, 64, 48),
            num_heads=(3, 4, 3),
            text_widths=(WIDTH_1, WIDTH_2),
            time_embed_dim=32,
        )
