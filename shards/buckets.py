"""Aspect-ratio buckets: the image sizes that training batches are made of. Pure integers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

Size = tuple[int, int]  # (width, height) in pixels


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """All (width, height) with area <= resolution², sides from resolution/2 to 2 x resolution.

    For each width the largest height that fits, and the transposes: 33 sizes for 1024 and 64,
    those that SDXL was trained on (SDXL report, appendix I) less its smaller duplicates.
    """
    if step < 8 or step % 8:
        raise ValueError(f"bucket-step must be a multiple of 8 (the VAE's factor), not {step}")
    if resolution < step or resolution % step:
        raise ValueError(f"resolution must be a multiple of bucket-step {step}, not {resolution}")
    smallest, largest = math.ceil(resolution / 2 / step) * step, 2 * resolution
    sizes = set()
    for width in range(smallest, largest + 1, step):
        height = min(largest, resolution**2 // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket whose aspect ratio is nearest on a log scale; of equals the larger."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - aspect), -b[0] * b[1]))


def largest_bucket(buckets: Iterable[Size]) -> Size:
    """The one of the largest area."""
    return max(buckets, key=lambda size: (size[0] * size[1], size))


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How one image becomes its bucket: resize to ``resized``, mirror it left to right where it
    is ``flipped``, then cut ``target`` at the crop.

    Sizes are (width, height); ``crop`` is (left, top) in the resized image as it then is: of a
    flipped one, the left is the mirrored image's.
    """

    original: Size
    resized: Size
    crop: Size
    target: Size
    flipped: bool = False

    @property
    def sizes(self) -> list[int]:
        """SDXL's micro-conditioning [orig_h, orig_w, crop_top, crop_left, target_h, target_w]."""
        (ow, oh), (left, top), (tw, th) = self.original, self.crop, self.target
        return [oh, ow, top, left, th, tw]

    @property
    def cut_share(self) -> float:
        """The share of the image's area that is cut away."""
        (rw, rh), (tw, th) = self.resized, self.target
        return 1 - tw * th / (rw * rh)

    def mirrored(self) -> "Geometry":
        """The same part of the image, mirrored left to right."""
        (left, top), spare = self.crop, self.resized[0] - self.target[0]
        return replace(self, crop=(spare - left, top), flipped=not self.flipped)

    @property
    def is_upscaled(self) -> bool:
        return self.enlargement > 1

    @property
    def enlargement(self) -> float:
        """How many times longer a side becomes; of both sides the larger number."""
        (ow, oh), (rw, rh) = self.original, self.resized
        return max(rw / ow, rh / oh)


def cover(original: Size, target: Size) -> Geometry:
    """Resize so that the target is just covered, then crop the center."""
    (ow, oh), (tw, th) = original, target
    scale = max(tw / ow, th / oh)
    resized = max(tw, round(ow * scale)), max(th, round(oh * scale))
    crop = (resized[0] - tw) // 2, (resized[1] - th) // 2
    return Geometry(original=original, resized=resized, crop=crop, target=target)


def stretch(original: Size, target: Size) -> Geometry:
    """Resize to the target, whatever that does to the aspect ratio."""
    return Geometry(original=original, resized=target, crop=(0, 0), target=target)


def bucket_name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
