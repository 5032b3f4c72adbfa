"""Bytes to pixels: open an image whole or not at all, orient it, convert it to sRGB."""

import importlib
import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from precompute.images.damage import lacks_rows, load_jpeg, refuse_damage, strip_metadata
from precompute.images.rejections import ImageError, unidentified
from shards.buckets import Size

Transform = ImageCms.ImageCmsTransform
GRAYS = ("1", "L", "LA")
INVISIBLE_DIFFERENCE = 2  # levels: a profile that changes no color by more is sRGB


def to_srgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits, in sRGB, transparency onto white.

    A profile that is damaged, or of another kind of image, is ignored.
    """
    profile = image.info.get("icc_profile")
    image = _to_8_bits(image)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    is_gray, alpha = image.mode in GRAYS, None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colors = _convert_to_srgb(image, profile, is_gray)
    if alpha is None:
        return colors
    colors.putalpha(alpha)
    white = Image.new("RGBA", colors.size, "white")
    white.alpha_composite(colors)
    return white.convert("RGB")


def _convert_to_srgb(image: Image.Image, profile: bytes | None, is_gray: bool) -> Image.Image:
    space = _color_space(profile) if profile else ""
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _applied(ImageCms.buildTransform(*lab, "LAB", "RGB"), image)
    mode = {"CMYK": "CMYK", "GRAY": "L", "RGB": "RGB"}.get(space, "")
    suits = image.mode == "CMYK" if mode == "CMYK" else image.mode != "CMYK"
    if not profile or not mode or not suits or (mode == "L" and not is_gray):
        return image.convert("RGB")
    transform = _srgb_transform(profile, mode)
    return image.convert("RGB") if transform is None else _applied(transform, image.convert(mode))


def _applied(transform: Transform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


@lru_cache(maxsize=64)
def _color_space(profile: bytes) -> str:
    """The color space of a profile: ``RGB``, ``GRAY``, ``CMYK``; empty if it cannot be read."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return ""


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> Transform | None:
    """The transform from a profile to sRGB; None if it changes no color, or there is none."""
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
    return None if abs(after.astype(int) - before).max() <= INVISIBLE_DIFFERENCE else transform


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert to 8 bits: integers above 255 are taken for 16 bits, floats up to 1 for shares of
    white.

    Raises:
        ImageError: a float is not finite.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():  # to 8 bits they would be black, without a word
        raise ImageError("it has values that are no numbers (NaN or infinity)")
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


# Opening.

# What images are kept in. Pillow knows more, of which some run programs (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Plugin(NamedTuple):
    """What Pillow reads a format with, imported when there is such a file."""

    form: str  # its name in Pillow
    description: str
    extra: str  # of ours, that installs it
    module: str
    register: str  # the function that registers it; importing does where there is none


HEIF = Plugin("HEIF", "a HEIC image", "heif", "pillow_heif", "register_heif_opener")
JXL = Plugin("JXL", "a JPEG XL image", "jxl", "pillow_jxl", "")
JXL_STARTS = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
ORIENTATION = 0x0112  # EXIF tag; with values 5 to 8 the image is stored on its side
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_EXIF_KEYS = (
    b"eXIf",
    b"Raw profile type",
    b"adobe.xmp",
)  # keys under which a PNG may have an orientation
MAX_PIXELS = 180_000_000  # above any camera's; takes 0.7 GB as RGB
LARGE_PIXELS = 45_000_000  # of these one is decoded at a time
MAX_ASPECT = 8  # the widest bucket is 4:1, so of a longer image more than half were cut away
ZEROS = bytes(512)  # no coded image ends so
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS is the limit, with the image's size in the message

_large = threading.Lock()


def image_size(data: bytes) -> Size:
    """(width, height) after EXIF orientation, from the header alone.

    Raises:
        ImageError: it is too large, or too long for its width.
        Exception: whatever Pillow raises of a file it cannot read.
    """
    with open_checked(data) as image:
        width, height = image.size
        return (height, width) if _is_sideways(image, data) else (width, height)


def _is_sideways(image: Image.Image, data: bytes) -> bool:
    """Whether an image that is not loaded yet lies on its side."""
    if image.format == "TIFF":  # Pillow gives its size after orientation already
        return False
    if image.format == "PNG":
        if not any(key in data for key in PNG_EXIF_KEYS):
            return False  # to look for it, Pillow would decode the image
        if "exif" not in image.info:
            image.load()  # it may follow the pixels
    return _orientation(image) in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. EXIF that cannot be read says nothing, as in other viewers."""
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises anything of bad EXIF
        return 1
    return turned if turned in TRANSPOSES else 1


def apply_orientation(image: Image.Image) -> Image.Image:
    """A loaded image, turned as its EXIF orientation says."""
    turned = _orientation(image)
    return image.transpose(TRANSPOSES[turned]) if turned in TRANSPOSES else image


def open_image(data: bytes) -> Image.Image:
    """The whole image (of several, the first), upright, in sRGB; transparency becomes white.

    Raises:
        ImageError: it is too large, too long for its width, or not all there.
        Exception: whatever Pillow raises of a file it cannot read.
    """
    with open_checked(data) as image:
        _check_complete(data, image)
        if isinstance(image, JpegImageFile):
            load_jpeg(image, data)
        with refuse_damage(image, data):
            image.load()
        if image.format == "PNG" and _is_last_row_empty(image) and lacks_rows(data):
            raise ImageError("truncated: its data end before its last row")
        return to_srgb(apply_orientation(image))


def _is_last_row_empty(image: Image.Image) -> bool:
    """Whether the last row is all zeros, as where nothing was decoded; few whole images are so."""
    width, height = image.size
    return image.crop((0, height - 1, width, height)).getbbox() is None


def _check_complete(data: bytes, image: Image.Image) -> None:
    """Refuse truncated files of formats whose decoders fill up with zeros, before decoding."""
    if image.format in ("WEBP", "AVIF") and data.endswith(ZEROS):
        raise ImageError("truncated: its end is all zeros, as of an unfinished download")
    if image.format == "PNG":
        with Image.open(io.BytesIO(strip_metadata(data)[0]), formats=("PNG",)) as again:
            again.verify()  # the checksums of its chunks


@contextmanager
def open_checked(data: bytes) -> Iterator[Image.Image]:
    """Open an image, reading its header alone, and check its size.

    Raises:
        ImageError: it is too large, too long for its width, or no image.
        Exception: whatever Pillow raises of a file it cannot read.
    """
    plugin = _needed_plugin(data)
    if plugin is not None and not _is_registered(plugin):
        raise ImageError(
            f"{plugin.description}, which Pillow cannot read alone: `pip install "
            f"'.[{plugin.extra}]'`, or save it as JPEG or PNG"
        )
    if data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ImageError("truncated: the file is shorter than it says")
    formats = FORMATS if plugin is None else (*FORMATS, plugin.form)
    kept, profile = strip_metadata(data)
    try:
        image = Image.open(io.BytesIO(kept), formats=formats)
    except UnidentifiedImageError:
        raise unidentified(data) from None
    with image:
        if profile is not None:
            image.info["icc_profile"] = profile
        _check_size(*image.size)
        yield image


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{width} x {height} pixels are more than {MAX_PIXELS // 10**6} million: scale it down"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{width} x {height} pixels are longer than {MAX_ASPECT}:1, and most of it would be "
            "cut away: crop it"
        )


def _reads_avif(data: bytes) -> bool:
    """Whether an HEIF file is AVIF: its main brand may be general, the compatible ones tell."""
    size = int.from_bytes(data[:4])
    return b"avif" in data[16 : min(size, 256)] or b"avis" in data[16 : min(size, 256)]


def _needed_plugin(data: bytes) -> Plugin | None:
    """The plugin that Pillow needs for a file; None where it needs none."""
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and not _reads_avif(data):
        return HEIF
    return JXL if data.startswith(JXL_STARTS) else None


@cache
def _is_registered(plugin: Plugin) -> bool:
    """Whether a plugin is installed; then it is registered with Pillow."""
    try:
        module = importlib.import_module(plugin.module)
    except ImportError:
        return False
    if plugin.register:
        getattr(module, plugin.register)()
    return True


def limit_large_images(size: Size) -> AbstractContextManager[object]:
    """Hold this while an image is opened and rendered: only one large image is in memory then."""
    return _large if size[0] * size[1] > LARGE_PIXELS else nullcontext()
