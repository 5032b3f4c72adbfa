"""Scores generated images by counting pixels: which shape and colors each shows.

Shapes: H W an image's size in pixels; a mask is [H, W] bool, true where the shape is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tools.miniature.drawing import COLORS, NEW_SHAPES, OLD_SHAPES, Scene, draw_shape

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
BORDER = 2  # pixels at the image's edge that are taken for ground
SHARES = tuple(step / 100 for step in range(36, 92, 4))  # sizes tried, of the short side


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What was found in an image. ``overlaps`` are, by shape, the best IoU at any size, place."""

    color: str
    ground: str
    mask: Mask
    overlaps: dict[str, float]

    @property
    def shape(self) -> str:
        return max(self.overlaps, key=lambda name: self.overlaps[name])


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of images that show what their prompt says; ``overlap`` is a mean IoU."""

    num: int
    shape: float
    colors: float  # the shape's and the ground's together
    both: float
    overlap: float

    def __str__(self) -> str:
        return (
            f"shape {self.shape:.2f}, colors {self.colors:.2f}, both {self.both:.2f}, "
            f"IoU {self.overlap:.2f} (n = {self.num})"
        )


def score(scenes: Sequence[Scene], images: Sequence[Image.Image]) -> Score:
    """Compare images with the scenes that were asked for."""
    rows = []
    for scene, image in zip(scenes, images, strict=True):
        seen = look_at(image)
        shape = seen.shape == scene.shape
        colors = (seen.color, seen.ground) == (scene.color, scene.ground)
        rows.append((shape, colors, shape and colors, seen.overlaps[scene.shape]))
    means = np.mean(np.asarray(rows, dtype=np.float64), axis=0)
    return Score(
        num=len(rows),
        shape=float(means[0]),
        colors=float(means[1]),
        both=float(means[2]),
        overlap=float(means[3]),
    )


def read_generated_images(folder: Path, num: int) -> list[Image.Image]:
    """The first ``num`` images that ``cli.py generate`` wrote, in the order of their prompts."""
    images = []
    for number in range(num):
        with Image.open(folder / f"{number:06d}.png") as image:
            images.append(image.convert("RGB"))
    return images


def look_at(image: Image.Image) -> Seen:
    """The ground's color is the edge's; what differs from it is the shape."""
    pixels = np.asarray(image, dtype=np.float64)
    edge = np.ones(pixels.shape[:2], dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(pixels[edge], axis=0)
    distance = np.linalg.norm(pixels - ground, axis=2)
    mask: Mask = distance > max(40.0, 0.5 * float(np.percentile(distance, 97)))
    name = _nearest(ground)
    if not mask.any():
        return Seen(color=name, ground=name, mask=mask, overlaps=dict.fromkeys(_SHAPES, 0.0))
    color = _nearest(np.median(pixels[mask], axis=0))
    return Seen(color=color, ground=name, mask=mask, overlaps=best_overlaps(mask))


def _nearest(value: Floats) -> str:
    return min(COLORS, key=lambda name: float(np.linalg.norm(value - np.array(COLORS[name]))))


_SHAPES = (*OLD_SHAPES, *NEW_SHAPES)


def best_overlaps(mask: Mask) -> dict[str, float]:
    """For each shape the best IoU of the mask with it, over all sizes and places.

    |A and B| at all places at once is a correlation, and IoU = |A and B| / (|A| + |B| - |A and B|).
    """
    height, width = mask.shape
    seen = np.conj(np.fft.rfft2(mask.astype(np.float64)))
    templates, areas = _templates(width, height)
    shared = np.fft.irfft2(templates * seen, s=mask.shape).max(axis=(-2, -1))
    overlaps = shared / (areas + float(mask.sum()) - shared)
    return dict(zip(_SHAPES, overlaps.max(axis=1).tolist(), strict=True))


@lru_cache(maxsize=8)
def _templates(width: int, height: int) -> tuple[npt.NDArray[np.complex128], Floats]:
    """Transforms [shapes, sizes, H, W // 2 + 1] of the drawn shapes, and their areas."""
    sharper, short = 4, min(width, height)
    drawn = np.zeros((len(_SHAPES), len(SHARES), height, width))
    for row, shape in enumerate(_SHAPES):
        for column, share in enumerate(SHARES):
            side = share * short * sharper
            left, top = (width * sharper - side) / 2, (height * sharper - side) / 2
            mask = Image.new("L", (width * sharper, height * sharper), 0)
            draw_shape(mask, shape, (left, top, left + side, top + side))
            small = mask.resize((width, height), Image.Resampling.BOX)
            drawn[row, column] = np.asarray(small, dtype=np.float64) / 255
    return np.fft.rfft2(drawn), drawn.sum(axis=(2, 3))
