"""Variants and masks: each shows the part of the image that its sizes claim, in its own frame."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from PIL import Image

from precompute.images.decode import open_image
from precompute.images.masks import open_alpha, open_mask, render_mask
from precompute.images.variants import plan_variants, random_crops, render, render_variants
from precompute.report import warn_of_rejected
from precompute.settings import EncodeSettings
from shards.buckets import Geometry, cover, stretch
from shards.format import sample_key
from tests import encodes
from tests.encodes import encode, make_old

SIZES = [(200, 100), (97, 131), (64, 64), (33, 90)]
TARGETS = [(64, 64), (96, 48), (48, 80)]


def settings(**changes: Any) -> EncodeSettings:
    return EncodeSettings(dataset=Path("x"), base="", out=Path("x"), **changes)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def stored(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# Variants.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_each_variant_is_the_crop_it_claims(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Against numpy: the resized image, mirrored where it is flipped, sliced at its sizes."""
    image = noise(size)
    center = cover(size, target)
    variants = plan_variants(center, settings(crops=3, flip=True), "key")
    rendered = render_variants(image, variants)
    resized = np.asarray(image.resize(center.resized, Image.Resampling.LANCZOS))
    for variant, pixels in zip(variants, rendered, strict=True):
        height, width, top, left, *_ = variant.sizes
        assert (width, height) == size
        seen = resized[:, ::-1] if variant.flipped else resized
        expected = seen[top : top + target[1], left : left + target[0]]
        assert pixels.dtype == torch.uint8
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        assert torch.equal(pixels, render(image, variant))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("num", [0, 1, 4])
def test_which_variants_there_are(num: int, flip: bool) -> None:
    center = cover((300, 100), (96, 48))
    variants = plan_variants(center, settings(crops=num, flip=flip), "key")
    plain = [variant for variant in variants if not variant.flipped]
    assert len(set(variants)) == len(variants) == max(1, num) * (2 if flip else 1)
    assert plain == ([*random_crops(center, num, "key")] if num else [center])
    if flip:
        assert [variant.mirrored() for variant in variants[len(plain) :]] == plain


def test_a_mirrored_crop_shows_the_same_part() -> None:
    image, center = noise((300, 100)), cover((300, 100), (96, 48))
    (crop,) = random_crops(center, 1, "key")
    first, other = render_variants(image, (crop, crop.mirrored()))
    assert crop.crop[0] != crop.mirrored().crop[0]
    assert torch.equal(other.flip(-1), first)


def test_random_crops_are_of_the_sample_and_lie_everywhere() -> None:
    center = cover((104, 64), (96, 64))  # nine places
    assert center.resized == (104, 64)
    assert random_crops(center, 2, "a") == random_crops(center, 5, "a")[:2], "a larger N only adds"
    all_places = {crop.crop for crop in random_crops(center, 50, "a")}
    assert all_places == {(left, 0) for left in range(9)}
    first = [random_crops(center, 1, str(key))[0].crop[0] for key in range(900)]
    assert all(50 < first.count(left) < 150 for left in range(9)), "each as likely as another"
    assert len(random_crops(cover((96, 64), (96, 64)), 4, "a")) == 1, "there is but one place"


# Masks.


def cell_means(mask: npt.NDArray[np.uint8], first: Geometry) -> npt.NDArray[np.float64]:
    """A plain loop: the mask enlarged until each latent pixel is whole pixels of it."""
    rows, columns = mask.shape
    large = np.kron(
        mask / 255, np.ones((first.resized[1], first.resized[0]))
    )  # each pixel, resized x rows
    large = large.reshape(first.resized[1], rows, first.resized[0], columns).mean(axis=(1, 3))
    seen = large[:, ::-1] if first.flipped else large
    (left, top), (width, height) = first.crop, first.target
    cut = seen[top : top + height, left : left + width]
    result = np.zeros((height // 8, width // 8))
    for row in range(height // 8):
        for column in range(width // 8):
            result[row, column] = cut[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean()
    return result


@pytest.mark.parametrize("shape", [(10, 20), (25, 50), (31, 62)])
def test_a_mask_is_the_mean_over_the_area_of_a_latent(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    center = cover((200, 100), (64, 48))
    variants = plan_variants(center, settings(crops=2, flip=True), "key")
    masks = render_mask(mask, variants)
    assert masks.shape == (4, 1, 6, 8) and masks.dtype == torch.float32
    for variant, values in zip(variants, masks, strict=True):
        np.testing.assert_allclose(values[0].numpy(), cell_means(mask, variant), atol=1e-6)


def test_a_mask_lies_where_its_image_shows_the_same() -> None:
    """An image that is its own mask: both shrink to the same, whatever the variant."""
    image = noise((20, 10), 1).convert("L").resize((400, 200), Image.Resampling.BICUBIC)
    for center in (cover((400, 200), (96, 80)), stretch((400, 200), (64, 64))):
        variants = plan_variants(center, settings(crops=2, flip=True), "key")
        pixels = render_variants(image.convert("RGB"), variants)[:, :1]
        shrunk = torch.nn.functional.avg_pool2d(pixels / 255, 8)
        mask = render_mask(open_mask(stored(image), (400, 200)), variants)
        torch.testing.assert_close(mask, shrunk, atol=0.02, rtol=0)
        assert not torch.allclose(mask, shrunk.flip(-1), atol=0.02, rtol=0)


def test_whole_masks_are_exact() -> None:
    for value in (0, 255):
        mask = np.full((1097, 131), value, np.uint8)
        assert (render_mask(mask, (cover((131, 1097), (64, 48)),)) == value / 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "I;16", "RGBA"])
def test_mask_images_of_every_mode(mode: str) -> None:
    gray = Image.linear_gradient("L").resize((40, 20)).point(lambda v: 255 * (v > 99))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    else:
        image = gray.convert(mode)
    expected = np.asarray(gray)
    np.testing.assert_array_equal(open_mask(stored(image), (40, 20)), expected)
    turned = open_mask(stored(gray.rotate(90, expand=True)), (20, 40))
    assert turned.shape == (40, 20)


def test_masks_that_do_not_fit_are_refused() -> None:
    white = Image.new("L", (40, 20), 255)
    assert open_mask(stored(white), (401, 200)).shape == (20, 40), "half a size, rounded"
    with pytest.raises(ValueError, match="of 40 x 20 pixels, where its image has 20 x 40"):
        open_mask(stored(white), (20, 40))
    white.putalpha(Image.linear_gradient("L").resize((40, 20)))
    with pytest.raises(ValueError, match="partly transparent: make it a gray image"):
        open_mask(stored(white), (40, 20))


def test_a_mask_that_hides_all_is_refused() -> None:
    with pytest.raises(ValueError, match="black all over"):
        open_mask(stored(Image.new("L", (40, 20))), (40, 20))
    with pytest.raises(ValueError, match="black all over"):
        open_alpha(stored(Image.new("RGBA", (40, 20))))


def test_alpha_is_upright_like_its_image() -> None:
    image = noise((40, 20)).convert("RGBA")
    alpha = noise((40, 20), 5).getchannel(0)
    image.putalpha(alpha)
    expected = np.asarray(alpha)
    actual = open_alpha(stored(image))
    assert actual is not None
    np.testing.assert_array_equal(actual, expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    data = stored(image, exif=exif)
    turned = open_alpha(data)
    assert turned is not None
    assert turned.shape == open_image(data).size[::-1]
    np.testing.assert_array_equal(turned, np.rot90(expected, -1))
    assert open_alpha(stored(noise((40, 20)))) is None


def test_alpha_of_palettes_and_grey_images() -> None:
    values = np.zeros((8, 8), np.uint8)
    values[:, :3] = 7
    expected = 255 * (values != 7)
    deep = Image.fromarray(values.astype(np.uint16))
    for image in (Image.fromarray(values), Image.fromarray(values).convert("P"), deep):
        alpha = open_alpha(stored(image, transparency=7))
        assert alpha is not None
        np.testing.assert_array_equal(alpha, expected, err_msg=image.mode)


@pytest.mark.filterwarnings("ignore:.*settings changed")
def test_no_variant_is_cached_whose_mask_is_black_all_over(base: Path, tmp_path: Path) -> None:
    """White only at one end of a wide image: cut off in the middle, and by some random crops."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for number in range(6):
        noise((320, 45), number).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("noise")
        mask = Image.new("L", (320, 45))
        mask.paste(255, (0, 0, 60 if number else 320, 45))
        mask.save(data / f"{number}.mask.png")
    make_old(data)
    report = encode(data, base, cache)
    assert report.num_samples == 1
    assert {rejection.path for rejection in report.rejected} == {
        f"{number}.png" for number in range(1, 6)
    }
    assert all(
        "mask: all of it is black in the part" in rejection.reason for rejection in report.rejected
    )
    report = encode(data, base, cache, crops=3, flip=True)
    dropped = dict(report.dropped_variants)
    assert dropped and 0 < sum(dropped.values()) == 6 * report.num_samples - report.num_variants
    assert len(report.rejected) + report.num_samples == 6
    warning = f"of {len(dropped)} images dropped: the mask is black all over in that crop; e.g. "
    assert warning + min(dropped) in warn_of_rejected(report)
    for path, members in encodes.samples_of(cache).items():
        tensors = safetensors.torch.load(members["safetensors"])
        assert tensors["mask"].flatten(1).any(dim=1).all()
        center = cover((320, 45), tuple(tensors["sizes"][0, [5, 4]].tolist()))
        planned = plan_variants(center, settings(crops=3, flip=True), sample_key(path))
        sizes = [variant.sizes for variant in planned]
        assert all(row in sizes for row in tensors["sizes"].tolist())
        assert len({len(tensor) for name, tensor in tensors.items() if "prompt" not in name}) == 1
    before = encodes.contents(cache)
    with encodes.counted() as count:
        encode(data, base, cache, crops=3, flip=True)
        encode(data, base, cache, crops=3, flip=True, repack=True)
    assert count == (0, 0)
    assert encodes.contents(cache) == before
    grown: list[dict[str, Any]] = [{"crops": 1}, {"crops": 2}, {"crops": 3, "flip": True}]
    for flags in grown:
        encode(data, base, tmp_path / "grown", **flags)
    assert encodes.samples_of(tmp_path / "grown") == encodes.samples_of(cache)
