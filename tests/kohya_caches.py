"""Writes the caches that kohya's sd-scripts leaves beside images, by its own layout."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.buckets import Size

WIDTHS, POOLED = (32, 48), 48  # of the random base's text encoders
Arrays = dict[str, npt.NDArray[Any]]


def crop_ltrb(bucket: Size, original: Size) -> tuple[float, float, float, float]:
    """As sd-scripts has it (library/train_util.py, ``get_crop_ltrb``)."""
    image_ar = original[0] / original[1]
    if bucket[0] / bucket[1] > image_ar:
        width, height = bucket[1] * image_ar, float(bucket[1])
    else:
        width, height = float(bucket[0]), bucket[0] / image_ar
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def latents_arrays(
    seed: int,
    bucket: Size,
    original: Size,
    *,
    flipped: bool = False,
    mask: bool = False,
    sized: bool = False,
) -> Arrays:
    rng = np.random.default_rng(seed)
    height, width = bucket[1] // 8, bucket[0] // 8
    arrays: Arrays = {
        "latents": 8 * rng.standard_normal((4, height, width), dtype=np.float32),
        "original_size": np.array(original),
        "crop_ltrb": np.array(crop_ltrb(bucket, original)),
    }
    if flipped:
        arrays["latents_flipped"] = 8 * rng.standard_normal((4, height, width), dtype=np.float32)
    if mask:
        arrays["alpha_mask"] = rng.random((bucket[1], bucket[0]), dtype=np.float32)
    suffix = f"_{height}x{width}" if sized else ""
    return {name + suffix: array for name, array in arrays.items()}


def text_arrays(seed: int, tokens: int = 77) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "hidden_state1": rng.standard_normal((tokens, WIDTHS[0]), dtype=np.float32),
        "hidden_state2": rng.standard_normal((tokens, WIDTHS[1]), dtype=np.float32),
        "pool2": rng.standard_normal(POOLED, dtype=np.float32),
    }


def latents_path(image: Path) -> Path:
    with Image.open(image) as opened:
        width, height = opened.size
    return image.with_name(f"{image.stem}_{width:04d}x{height:04d}_sdxl.npz")


def text_path(image: Path) -> Path:
    return image.with_name(f"{image.stem}_te_outputs.npz")


def save(path: Path, arrays: Arrays) -> None:
    np.savez(path, allow_pickle=True, **arrays)


def add_caches(folder: Path, buckets: dict[Size, Size], **options: Any) -> dict[str, Arrays]:
    """Caches for every image of a folder; ``buckets`` are by the size of the images. All arrays by
    the name of the image."""
    written = {}
    for seed, image in enumerate(sorted(folder.glob("*.png"))):
        with Image.open(image) as opened:
            size = opened.size
        arrays = latents_arrays(seed, buckets[size], size, **options)
        texts = text_arrays(1000 + seed)
        save(latents_path(image), arrays)
        save(text_path(image), texts)
        written[image.name] = arrays | texts
    return written
