"""Any image that Pillow opens to sRGB: depth, palette, transparency, color profile."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from precompute.pictures.refusals import PictureError

Transform = ImageCms.ImageCmsTransform
GRAYS = ("1", "L", "LA")
UNSEEN = 2  # levels: a profile that changes no color by more is sRGB


def to_srgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits, in sRGB, transparency onto white.

    A profile that is damaged, or of another kind of image, is left out of account.
    """
    profile = image.info.get("icc_profile")
    image = _to_8_bits(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    is_gray, alpha = image.mode in GRAYS, None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colors = _convert(image, profile, is_gray)
    if alpha is None:
        return colors
    colors.putalpha(alpha)
    white = Image.new("RGBA", colors.size, "white")
    white.alpha_composite(colors)
    return white.convert("RGB")


def _convert(image: Image.Image, profile: bytes | None, is_gray: bool) -> Image.Image:
    space = _space(profile) if profile else ""
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _applied(ImageCms.buildTransform(*lab, "LAB", "RGB"), image)
    mode = {"CMYK": "CMYK", "GRAY": "L", "RGB": "RGB"}.get(space, "")
    suits = image.mode == "CMYK" if mode == "CMYK" else image.mode != "CMYK"
    if not profile or not mode or not suits or (mode == "L" and not is_gray):
        return image.convert("RGB")
    transform = _transform(profile, mode)
    return image.convert("RGB") if transform is None else _applied(transform, image.convert(mode))


def _applied(transform: Transform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=64)
def _space(profile: bytes) -> str:
    """The colors it describes: ``RGB``, ``GRAY``, ``CMYK``; empty if it cannot be read."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return ""


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Transform | None:
    """From the profile to sRGB; None where that is no change, or the profile has no way there."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(18, -1, 3)
    probe = Image.fromarray(grid).convert(mode)
    before, after = np.asarray(probe.convert("RGB")), np.asarray(_applied(transform, probe))
    return None if abs(after.astype(int) - before).max() <= UNSEEN else transform


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integers above 255 are 16 bits; floats up to 1 are shares of white.

    Raises:
        PictureError: a float is not finite.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():  # to 8 bits they would be black, without a word
        raise PictureError("it has values that are no numbers (NaN or infinity)")
    clear = image.info.get("transparency")  # one gray value, in the image's own depth
    alpha = None if clear is None else Image.fromarray(values != clear).convert("L")
    if image.mode == "F":
        values = values * (255 if values.max(initial=0) <= 1 else 1)
    elif image.mode != "I" or values.max(initial=0) > 255:
        values = values / 257
    image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if alpha is not None:
        image.putalpha(alpha)
    return image
