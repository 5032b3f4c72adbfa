"""Measures how the miniature responds to SDXL's size and crop numbers: blur, shapes cut off."""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image

from tools.miniature.data import fresh_prompts
from tools.miniature.drawing import OLD_SHAPES, draw_scene, random_scene, shrink
from tools.miniature.score import look_at
from tools.miniature.vae import reconstruct_images

BATCH_SIZE = 16
# Arguments of diffusers' pipeline. Sizes are (height, width), a crop is (top, left), in pixels.
SETTINGS: dict[str, dict[str, Any]] = {
    "64x64": {"original_size": (64, 64)},
    "8x8": {"original_size": (8, 8)},
    "5x5": {"original_size": (5, 5)},
    "64 high, 96 wide, cropped by 16 on the left": {
        "original_size": (64, 96),
        "crops_coords_top_left": (0, 16),
    },
    "96 high, 64 wide, cropped by 16 at the top": {
        "original_size": (96, 64),
        "crops_coords_top_left": (16, 0),
    },
}


def measure_response(
    pipeline: Any, setting: str, num: int, seed: int, num_steps: int
) -> dict[str, float]:
    """Draw ``num`` fresh prompts; for all settings the same ones, from the same noise.

    Returns the mean sharpness, and the shares that are cut off at the sides and at top or bottom.
    """
    images = _draw(pipeline, SETTINGS[setting], num, seed, num_steps)
    edges = [cut_edges(image) for image in images]
    return {
        "sharpness": float(np.mean([sharpness(image) for image in images])),
        "cut_sides": float(np.mean([sides for sides, _ in edges])),
        "cut_ends": float(np.mean([ends for _, ends in edges])),
    }


def _draw(
    pipeline: Any, setting: dict[str, Any], num: int, seed: int, num_steps: int
) -> list[Image.Image]:
    _, captions = fresh_prompts(num, OLD_SHAPES, seed)
    images: list[Image.Image] = []
    for start in range(0, num, BATCH_SIZE):
        batch = captions[start : start + BATCH_SIZE]
        images += pipeline(
            batch,
            generator=[torch.Generator().manual_seed(start + row) for row in range(len(batch))],
            num_inference_steps=num_steps,
            guidance_scale=5.0,
            height=64,
            width=64,
            target_size=(64, 64),
            **setting,
        ).images
    return images


def decoded_sharpness(vae: Any, side: int, num: int = 64) -> float:
    """The sharpness of true images of ``side`` pixels, enlarged, encoded and decoded: the
    maximum."""
    choices = random.Random(5)
    drawn = [draw_scene(random_scene(choices), choices) for _ in range(num)]
    enlarged = [shrink(image, side).resize((64, 64), Image.Resampling.LANCZOS) for image in drawn]
    return float(np.mean([sharpness(image) for image in reconstruct_images(vae, enlarged)]))


def sharpness(image: Image.Image) -> float:
    """The steepest steps between neighbouring pixels, as a share of the image's contrast."""
    gray = np.asarray(image.convert("L"), dtype=np.float64)
    steps = np.abs(np.diff(gray, axis=1))
    return float(np.percentile(steps, 99) / max(1.0, float(gray.max() - gray.min())))


def cut_edges(image: Image.Image) -> tuple[bool, bool]:
    """Whether the shape reaches the left or right edge, and whether the top or bottom one."""
    mask = look_at(image).mask
    sides, ends = (mask[:, 0], mask[:, -1]), (mask[0], mask[-1])
    return any(edge.mean() > 0.1 for edge in sides), any(edge.mean() > 0.1 for edge in ends)
