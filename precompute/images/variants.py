"""Chooses and renders the variants of an image that are cached: random crops, mirrored or not."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageOps

from precompute.images.rejections import ImageError
from precompute.settings import EncodeSettings
from shards.buckets import Geometry
from shards.plan import derive_key


def plan_variants(center: Geometry, settings: EncodeSettings, key: str) -> tuple[Geometry, ...]:
    """The variants of the sample ``key``, those that are mirrored last.

    Random crops depend on the key alone: they are the same in every run, and a larger ``--crops``
    only adds. They are all different; where there are fewer places than crops, each place once.
    """
    crops = random_crops(center, settings.crops, key) if settings.crops else (center,)
    return (*crops, *(crop.mirrored() for crop in crops)) if settings.flip else crops


def random_crops(center: Geometry, num: int, key: str) -> tuple[Geometry, ...]:
    """``num`` different crops at whole pixels of the resized image, each as likely as another."""
    (rw, rh), (tw, th) = center.resized, center.target
    columns, rows = rw - tw + 1, rh - th + 1
    generator = np.random.Generator(np.random.Philox(key=derive_key("crops", key)))
    places: dict[int, None] = {}
    while len(places) < min(num, columns * rows):
        places[int(generator.integers(columns * rows))] = None
    return tuple(replace(center, crop=(at % columns, at // columns)) for at in places)


def render(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    """The cropped bucket of an RGB image: [3, H, W] uint8."""
    return render_variants(image, (geometry,))[0]


def render_variants(image: Image.Image, variants: Sequence[Geometry]) -> torch.Tensor:
    """Its V variants, which differ in crop and side: [V, 3, H, W] uint8."""
    first = variants[0]
    if image.size != first.original:
        raise ImageError(f"its size is {image.size}, where its header said {first.original}")
    resized = image.resize(first.resized, Image.Resampling.LANCZOS)
    mirrored = ImageOps.mirror(resized) if any(variant.flipped for variant in variants) else resized
    cut = []
    for variant in variants:
        (left, top), (width, height) = variant.crop, variant.target
        seen = mirrored if variant.flipped else resized
        cut.append(np.asarray(seen.crop((left, top, left + width, top + height))))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as a VAE takes them: fp32 in -1..1, with the same bits on every device.

    (CUDA multiplies by the reciprocal of a number, which rounds otherwise; by a tensor it divides.)
    """
    return pixels.float() / torch.full((), 127.5, device=pixels.device) - 1
