"""What the sizes in a cache claim about an image is measured in the rendered pixels."""

import io
import math
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from precompute.dataset.records import Blob, SourceImage
from precompute.images.decode import image_size, open_image, to_srgb
from precompute.images.variants import normalize, render
from precompute.plan.scan import plan_images
from precompute.settings import EncodeSettings
from shards.buckets import Geometry, Size, bucket_sizes, cover, nearest_bucket, stretch

ORIGINALS = [(720, 450), (410, 660), (333, 900), (500, 500), (150, 110)]  # the last is too small
LOW, SPAN = 25, 200  # a ramp from 25 to 225: nothing is clipped
ORIENTATION = 0x0112
COMPLETE_1024 = {
    512: (1856, 1920, 1984, 2048),
    576: (1664, 1728, 1792),
    640: (1536, 1600),
    704: (1408, 1472),
    768: (1280, 1344),
    832: (1216,),
    896: (1152,),
    960: (1088,),
    1024: (1024,),
}
Pixels = npt.NDArray[np.uint8]


def ramps(size: Size) -> Pixels:
    """[H, W, 3]: red grows with x, green with y; dithered, so that a mean sees below one level."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    levels = LOW + SPAN * np.stack([x, y, 0.5 + 0 * x], axis=-1)
    dither = np.random.default_rng(1).uniform(-1, 1, levels.shape)
    return (levels + dither).round().astype(np.uint8)


def stored(pixels: Pixels, form: str = "PNG", orientation: int | None = None) -> bytes:
    options: dict[str, Any] = {"compress_level": 1} if form == "PNG" else {}
    if form == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


@cache
def ramps_png(size: Size) -> bytes:
    return stored(ramps(size))


def levels(pixels: torch.Tensor) -> npt.NDArray[np.float64]:
    return pixels.double().numpy()


def misplaced(means: npt.NDArray[np.float64], side: int, offset: int) -> tuple[float, float]:
    """How many pixels off the claim the first and the last edge are, by one ramp's levels.

    Claim: an image ``side`` pixels long was cut from ``offset`` on.
    """
    centers = np.arange(len(means)) + 0.5
    inside = slice(10, -10)
    slope, start = np.polyfit(centers[inside], means[inside], 1)
    first, last = ((slope * edge + start - LOW) / SPAN * side for edge in (0, len(means)))
    return first - offset, last - offset - len(means)


def assert_rendered_as_claimed(data: bytes, geometry: Geometry) -> None:
    pixels = render(open_image(data), geometry)
    _, _, top, left, height, width = geometry.sizes
    assert pixels.shape == (3, height, width)
    across = misplaced(levels(pixels)[0].mean(axis=0), geometry.resized[0], left)
    down = misplaced(levels(pixels)[1].mean(axis=1), geometry.resized[1], top)
    assert (*across, *down) == pytest.approx((0, 0, 0, 0), abs=0.3)


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("target", bucket_sizes(256, 64), ids="{0[0]}x{0[1]}".format)
def test_a_bucket_shows_the_part_that_its_sizes_claim(original: Size, target: Size) -> None:
    data = ramps_png(original)
    geometry = cover(image_size(data), target)
    (width, height), (target_width, target_height) = original, target
    scale = max(target_width / width, target_height / height)
    assert geometry.sizes[:2] == [height, width]
    assert geometry.sizes[4:] == [target_height, target_width]
    assert geometry.resized == pytest.approx((width * scale, height * scale), abs=0.5)
    spare = width * scale - target_width, height * scale - target_height
    assert geometry.crop == pytest.approx((spare[0] / 2, spare[1] / 2), abs=0.75), "the center"
    assert min(geometry.crop) >= 0
    assert_rendered_as_claimed(data, geometry)


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_square_is_the_middle_of_the_image(original: Size) -> None:
    data = ramps_png(original)
    geometry = cover(image_size(data), (256, 256))
    longer = 256 * max(original) / min(original)
    assert sorted(geometry.resized) == pytest.approx([256, longer], abs=0.5)
    assert sorted(geometry.crop) == pytest.approx([0, (longer - 256) / 2], abs=0.75)
    assert_rendered_as_claimed(data, geometry)


@pytest.mark.parametrize("original", ORIGINALS)
def test_a_squashed_image_is_all_there(original: Size) -> None:
    data = ramps_png(original)
    geometry = stretch(image_size(data), (256, 256))
    assert geometry.sizes == [original[1], original[0], 0, 0, 256, 256]
    assert geometry.resized == (256, 256)
    assert_rendered_as_claimed(data, geometry)


def lay_down(upright: Pixels, orientation: int) -> Pixels:
    """What a camera stores: EXIF says which side of the scene row 0 and column 0 are."""
    row_0, column_0 = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    if "bottom" in (row_0, column_0):
        upright = upright[::-1]
    if "right" in (row_0, column_0):
        upright = upright[:, ::-1]
    return np.ascontiguousarray(upright.transpose(1, 0, 2) if orientation > 4 else upright)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(form: str, orientation: int) -> None:
    upright = ramps((400, 300))
    data = stored(lay_down(upright, orientation), form, orientation)
    size = image_size(data)
    assert size == (400, 300)
    tolerance = 0 if form != "JPEG" else 6
    difference = np.asarray(open_image(data)).astype(int) - upright
    assert abs(difference).max() <= tolerance
    geometry = cover(size, (256, 128))
    assert geometry.sizes == [300, 400, 32, 0, 128, 256]
    assert_rendered_as_claimed(data, geometry)
    pixels = render(open_image(data), geometry)
    expected = render(Image.fromarray(upright), geometry)
    assert abs(levels(pixels) - levels(expected)).max() <= tolerance


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ({}, [600, 300, 8, 0, 80, 48]),
        ({"square": True}, [600, 300, 32, 0, 64, 64]),
        ({"squash": True}, [600, 300, 0, 0, 64, 64]),
    ],
    ids=["buckets", "square", "squash"],
)
def test_the_settings_choose_the_geometry(
    tmp_path: Path, flags: dict[str, bool], sizes: list[int]
) -> None:
    """An image that lies on its side: 600 x 300 stored, 300 x 600 seen."""
    file = tmp_path / "a.png"
    file.write_bytes(stored(np.zeros((300, 600, 3), np.uint8), orientation=6))
    settings = EncodeSettings(
        dataset=tmp_path, base="", out=tmp_path, resolution=64, bucket_step=16, **flags
    )
    (planned,), rejected = plan_images([SourceImage("a.png", Blob.of(file), ("a",))], settings)
    assert rejected == []
    assert planned.variants[0].sizes == sizes


def test_buckets_of_1024_are_those_of_sdxl() -> None:
    tall = {(short, long) for short, longs in COMPLETE_1024.items() for long in longs}
    both = tall | {(long, short) for short, long in tall}
    assert len(both) == 33
    assert bucket_sizes(1024, 64) == sorted(both)


@pytest.mark.parametrize(("resolution", "step"), [(256, 64), (512, 64), (1024, 32), (768, 128)])
def test_buckets_are_all_that_fit(resolution: int, step: int) -> None:
    sides = [n for n in range(step, 2 * resolution + 1, step) if 2 * n >= resolution]
    fitting = {(w, h) for w in sides for h in sides if w * h <= resolution**2}
    widest = {(w, h) for w, h in fitting if (w, h + step) not in fitting}
    assert set(bucket_sizes(resolution, step)) == widest | {(h, w) for w, h in widest}


def test_832x1216_stays_as_it_is() -> None:
    bucket = nearest_bucket((832, 1216), bucket_sizes(1024, 64))
    geometry = cover((832, 1216), bucket)
    assert geometry.sizes == [1216, 832, 0, 0, 1216, 832]
    assert geometry.resized == (832, 1216)
    assert not geometry.is_upscaled


def test_is_upscaled_looks_at_both_sides() -> None:
    assert cover((100, 300), (128, 128)).is_upscaled
    assert stretch((100, 300), (128, 128)).is_upscaled
    assert stretch((300, 100), (128, 128)).is_upscaled
    assert not cover((128, 129), (128, 128)).is_upscaled


def distance(size: Size, bucket: Size) -> Fraction:
    """How many times wider or narrower, exactly."""
    ratio = Fraction(size[0] * bucket[1], size[1] * bucket[0])
    return max(ratio, 1 / ratio)


@pytest.mark.parametrize(("resolution", "step"), [(256, 64), (1024, 64)])
def test_the_nearest_bucket_is_nearest(resolution: int, step: int) -> None:
    buckets = bucket_sizes(resolution, step)
    random = np.random.default_rng(0)
    for _ in range(300):
        size = int(random.integers(16, 3000)), int(random.integers(16, 3000))
        best = min(distance(size, bucket) for bucket in buckets)
        assert distance(size, nearest_bucket(size, buckets)) == best, size


def test_every_bucket_is_its_own_nearest() -> None:
    buckets = bucket_sizes(1024, 64)
    assert [nearest_bucket(bucket, buckets) for bucket in buckets] == buckets


@pytest.mark.parametrize("buckets", [[(64, 64), (128, 128)], [(128, 128), (64, 64)]])
def test_of_equal_aspects_the_larger_is_nearest(buckets: list[Size]) -> None:
    assert nearest_bucket((50, 50), buckets) == (128, 128)


@pytest.mark.parametrize(
    ("resolution", "step", "option"),
    [
        (1024, 0, "bucket-step"),
        (1024, -64, "bucket-step"),
        (1024, 4, "bucket-step"),
        (1024, 60, "bucket-step"),
        (1000, 64, "resolution"),
        (32, 64, "resolution"),
        (0, 64, "resolution"),
        (-1024, 64, "resolution"),
    ],
)
def test_bad_sizes_are_named(resolution: int, step: int, option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be .*, not {'-?[0-9]+'}$"):
        bucket_sizes(resolution, step)


RED_HALF = (255, 127, 127)  # half transparent red on white
GREY_HALF = (177, 177, 177)  # 100 at alpha 128 on white: 255 - 155 * 128 / 255
GREEN = (10, 200, 30)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 128), GREY_HALF),
        ("La", (50, 128), GREY_HALF),
        ("RGB", GREEN, GREEN),
        ("RGBX", (*GREEN, 0), GREEN),
        ("RGBA", (255, 0, 0, 128), RED_HALF),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBa", (128, 0, 0, 128), RED_HALF),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 155), (100, 100, 100)),
        ("YCbCr", (76, 85, 255), (255, 0, 0)),  # JFIF
        ("HSV", (85, 255, 255), (0, 255, 0)),  # a third of the circle
        ("LAB", (121, 183, 173), (200, 60, 40)),  # L 47.3, a 55.4, b 44.6 (D50)
        ("I", 200, (200, 200, 200)),
        ("I", 128 * 257, (128, 128, 128)),
        ("I", -5, (0, 0, 0)),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I;16", 100, (0, 0, 0)),  # 16 bits are 16 bits, however dark
        ("I;16B", 128 * 257, (128, 128, 128)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 100.0, (100, 100, 100)),
        ("F", 300.0, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, color: Any, expected: tuple[int, int, int]) -> None:
    image = to_srgb(Image.new(mode, (5, 4), color))
    assert (image.mode, image.size) == ("RGB", (5, 4))
    difference = np.asarray(image).astype(int) - expected
    assert abs(difference).max() <= 2


def one_color(mode: str, color: Any, transparency: Any = None) -> Image.Image:
    """Palette: 0 is black, 1 green, 2 red."""
    image = Image.new(mode, (8, 8), color)
    if mode in ("P", "PA"):
        image.putpalette([0, 0, 0, *GREEN, 255, 0, 0])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (one_color("P", 1), GREEN),
        (one_color("P", 1, transparency=0), GREEN),
        (one_color("P", 1, transparency=1), (255, 255, 255)),
        (one_color("P", 2, transparency=bytes([255, 255, 128])), RED_HALF),
        (one_color("PA", (2, 128)), RED_HALF),
        (one_color("PA", (1, 255)), GREEN),
        (one_color("L", 7, transparency=7), (255, 255, 255)),
        (one_color("L", 7, transparency=8), (7, 7, 7)),
        (one_color("RGB", GREEN, transparency=GREEN), (255, 255, 255)),
        (one_color("RGB", GREEN, transparency=(1, 2, 3)), GREEN),
    ],
)
def test_palettes_and_transparent_colors(
    image: Image.Image, expected: tuple[int, int, int]
) -> None:
    converted = to_srgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((3, 3)) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(
    ("image", "form", "expected"),
    [
        (one_color("I;16", 0x8000), "PNG", (128, 128, 128)),
        (one_color("I;16", 128 * 257), "TIFF", (128, 128, 128)),
        (one_color("I", 128 * 257), "TIFF", (128, 128, 128)),
        (one_color("F", 0.5), "TIFF", (128, 128, 128)),
        (one_color("RGBA", (255, 0, 0, 128)), "PNG", RED_HALF),
        (one_color("RGBA", (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (one_color("LA", (100, 128)), "PNG", GREY_HALF),
        (one_color("P", 2, transparency=bytes([255, 255, 128])), "PNG", RED_HALF),
        (one_color("P", 1, transparency=1), "GIF", (255, 255, 255)),
        (one_color("CMYK", (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (one_color("1", 1), "PNG", (255, 255, 255)),
        (one_color("I;16", 700, transparency=700), "PNG", (255, 255, 255)),
    ],
)
def test_files_of_every_depth(
    image: Image.Image, form: str, expected: tuple[int, int, int]
) -> None:
    file = io.BytesIO()
    image.save(file, form, **image.info)
    opened = open_image(file.getvalue())
    assert opened.mode == "RGB"
    assert opened.getpixel((3, 3)) == pytest.approx(expected, abs=2)


def test_white_is_one_and_black_minus_one() -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :, 2] = 255
    tensor = normalize(render(Image.fromarray(pixels), cover((32, 16), (16, 8))))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 8, 16)
    assert tensor.amin(dim=(1, 2)).tolist() == [-1, -1, 1]
    assert tensor.amax(dim=(1, 2)).tolist() == [-1, -1, 1]


def test_each_level_is_normalized_to_the_bits_that_caches_have() -> None:
    """A GPU would multiply by the reciprocal of a number, which differs in some levels' last bits;
    by a tensor of its own it divides."""
    pixels = torch.arange(256).to(torch.uint8)
    expected = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(normalize(pixels).numpy(), expected)
    reciprocal = np.arange(256, dtype=np.float32) * (np.float32(1) / np.float32(127.5))
    assert (reciprocal - np.float32(1) != expected).any()
    divisors = []

    class Divisions(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if function is torch.ops.aten.div.Tensor:
                divisors.append(args[1])
            return function(*args, **(kwargs or {}))

    with Divisions():
        normalize(torch.empty(2, dtype=torch.uint8, device="meta"))
    assert [divisor.device.type for divisor in divisors] == ["meta"]


def test_shrinking_averages() -> None:
    """A chequerboard of single pixels becomes gray, not a pattern."""
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = render(Image.fromarray(np.stack([board] * 3, axis=-1)), cover((256, 256), (64, 64)))
    assert abs(levels(pixels)[:, 4:-4, 4:-4] - 127.5).max() < 6


def test_another_size_than_the_header_said_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(64, 32\), where its header said \(32, 64\)"):
        render(Image.new("RGB", (64, 32)), cover((32, 64), (32, 32)))


def test_the_distance_is_symmetric_in_log_aspect() -> None:
    """1.5 is as far from 1 as from 2.25, and nearer to 2 than to 1."""
    assert math.isclose(distance((3, 2), (1, 1)), distance((3, 2), (9, 4)))
    assert nearest_bucket((3, 2), [(64, 64), (128, 64)]) == (128, 64)
    assert nearest_bucket((2, 3), [(64, 64), (64, 128)]) == (64, 128)
    assert nearest_bucket((7, 5), [(64, 64), (128, 64)]) == (64, 64)
