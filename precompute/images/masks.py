"""Masks: where in an image the loss counts, at the size of its latents."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from precompute.images.decode import apply_orientation, open_checked, open_image
from precompute.images.rejections import ImageError
from shards.buckets import Geometry, Size

FACTOR = 8  # image pixels per latent pixel, along a side
BAND = 512  # rows at a time: as floats a large mask would take eight times the memory
Gray = npt.NDArray[np.uint8]  # [H, W], 255 where the loss counts in full
Floats = npt.NDArray[np.float64]


def open_mask(data: bytes, original: Size) -> Gray:
    """A mask image, of any size in the aspect ratio of its image.

    Raises:
        ImageError: another aspect ratio, partly transparent, or black all over.
        Exception: whatever Pillow raises of a file it cannot read.
    """
    alpha = open_alpha(data)
    if alpha is not None and alpha.min() < 255:
        raise ImageError("partly transparent: make it a gray image, white where the loss counts")
    gray = open_image(data).convert("L")
    check_mask_size(gray.size, original)
    return _checked(np.asarray(gray))


def check_mask_size(size: Size, original: Size) -> None:
    """
    Raises:
        ImageError: another aspect ratio than its image's, by more than rounding to pixels.
    """
    (width, height), (columns, rows) = original, size
    if abs(columns * height - rows * width) > max(width, height, columns, rows):
        raise ImageError(f"of {columns} x {rows} pixels, where its image has {width} x {height}")


def open_alpha(data: bytes) -> Gray | None:
    """An image's own alpha, upright; None where it has none.

    Raises:
        ImageError: the image is transparent all over.
        Exception: whatever Pillow raises of a file it cannot read.
    """
    with open_checked(data) as image:
        image.load()
        if not image.has_transparency_data:
            return None
        turned = apply_orientation(image)
    if turned.mode in ("I", "I;16", "F"):  # one gray value is clear
        clear = np.asarray(turned) != turned.info["transparency"]
        return _checked(np.where(clear, np.uint8(255), np.uint8(0)))
    return _checked(np.asarray(turned.convert("RGBA").getchannel("A")))


def _checked(mask: Gray) -> Gray:
    if not mask.any():
        raise ImageError("black all over, so nothing would be learned of its image")
    return mask


def render_mask(mask: Gray, variants: Sequence[Geometry]) -> torch.Tensor:
    """The mean of the mask over the area of each latent pixel: [V, 1, h, w] fp32 in 0..1.

    The area is the one that the variant shows, exact to fractions of the mask's pixels.
    """
    masks = []
    for variant in variants:
        seen = mask[:, ::-1] if variant.flipped else mask
        (left, top), (width, height) = variant.crop, variant.target
        across = _coverage(seen.shape[1], variant.resized[0], left, width // FACTOR)
        down = _coverage(seen.shape[0], variant.resized[1], top, height // FACTOR)
        bands = (seen[at : at + BAND].astype(np.float64) for at in range(0, len(seen), BAND))
        masks.append(down @ np.concatenate([band @ across.T for band in bands]) / 255)
    return torch.from_numpy(np.stack(masks)).float().clamp(0, 1).unsqueeze(1)


def shows_anything(mask: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a mask that is stored in ``dtype`` lets any of the loss through."""
    return bool(mask.to(dtype).any())


def _coverage(num_pixels: int, resized: int, start: int, num_cells: int) -> Floats:
    """[cells, pixels]: the share of each latent cell that lies on each pixel of the mask.

    ``resized`` is how many pixels the mask would be long were it resized as its image is; the
    first cell begins at ``start`` of them.
    """
    edges = (start + FACTOR * np.arange(num_cells + 1)) * (num_pixels / resized)
    pixels = np.arange(num_pixels)
    upper = np.minimum(edges[1:, None], pixels + 1)
    lower = np.maximum(edges[:-1, None], pixels)
    overlap: Floats = np.clip(upper - lower, 0, None)
    overlap /= overlap.sum(axis=1, keepdims=True)
    return overlap
