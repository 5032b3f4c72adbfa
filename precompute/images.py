"""Bytes to pixels: open whole, orient, colour, resize, crop."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from shards.buckets import Geometry, Size

ORIENTATION = 0x0112  # EXIF tag; 5 to 8 lie on their side


def picture_size(data: bytes) -> Size:
    """(width, height) after EXIF orientation, from the header alone.

    Raises:
        Exception: whatever Pillow raises of a file it cannot read.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        # Of a TIFF, Pillow gives the size as it will be after loading: upright.
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def open_picture(data: bytes) -> Image.Image:
    """The whole picture, upright, in RGB; transparency becomes white.

    Raises:
        Exception: whatever Pillow raises of a file it cannot read.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB, alpha onto white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        clear = image.info.get("transparency")  # one grey value, in the picture's own depth
        alpha = None if clear is None else Image.fromarray(np.asarray(image) != clear)
        image = _to_8_bits(image)
        if alpha is not None:
            image.putalpha(alpha.convert("L"))
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        image = Image.new("RGBA", upper.size, "white")
        image.alpha_composite(upper)
    if image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None
        return converted
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integers above 255 are 16 bits; floats up to 1 are shares of white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = values * (255 if values.max(initial=0) <= 1 else 1)
    elif image.mode != "I" or values.max(initial=0) > 255:
        values = values / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def render(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    """The cropped bucket of an RGB picture: [3, H, W] fp32 in -1..1."""
    return render_variants(image, (geometry,))[0]


def render_variants(image: Image.Image, variants: Sequence[Geometry]) -> torch.Tensor:
    """Its V variants, which differ in crop and side: [V, 3, H, W] fp32 in -1..1."""
    first = variants[0]
    if image.size != first.original:
        raise ValueError(f"its size is {image.size}, where its header said {first.original}")
    resized = image.resize(first.resized, Image.Resampling.LANCZOS)
    mirrored = ImageOps.mirror(resized) if any(one.flipped for one in variants) else resized
    cut = []
    for one in variants:
        (left, top), (width, height) = one.crop, one.target
        seen = mirrored if one.flipped else resized
        cut.append(np.asarray(seen.crop((left, top, left + width, top + height))))
    pixels = torch.from_numpy(np.stack(cut))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
