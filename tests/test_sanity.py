"""Latents that are not what the VAE gives are seen, whatever the VAE; right ones raise no alarm."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import precompute.encode_samples
import precompute.encoders
import precompute.images.variants
from precompute.encoders import LatentEncoder
from precompute.images.decode import open_image
from precompute.images.variants import render
from precompute.sanity import (
    SIDE,
    alarms_of_drawings,
    alarms_of_image,
    make_drawings,
    measure_drawings,
    measure_image,
)
from sdxl.base import open_base, open_vae
from sdxl.load import load_vae
from shards.buckets import cover
from shards.manifest import MANIFEST
from tests.conftest import Encode
from tests.image_files import linear_profile, saved, scene

CPU = torch.device("cpu")
Change = Callable[[torch.Tensor], torch.Tensor]
PIXEL_FAULTS: dict[str, tuple[str, Change]] = {
    "no normalization": ("normalize", lambda pixels: (pixels + 1) / 2),
    "swapped channels": ("render_variants", lambda pixels: pixels.flip(1)),
}


def plant(patch: pytest.MonkeyPatch, fault: str) -> None:
    """In the stage's own code, as a slip of the pen would."""
    if fault == "doubled scale":
        real: Any = precompute.encoders.scale_mean
        patch.setattr(precompute.encoders, "scale_mean", lambda *args: 2 * real(*args))
        return
    name, change = PIXEL_FAULTS[fault]
    function = getattr(precompute.images.variants, name)
    for module in (precompute.images.variants, precompute.encode_samples, precompute.encoders):
        if hasattr(module, name):
            patch.setattr(module, name, lambda *args: change(function(*args)))


def sanity_of(cache: Path) -> Any:
    return json.loads((cache / MANIFEST).read_text())["sanity"]


def alarms(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "DO NOT TRAIN" in str(warning.message)]


@pytest.mark.parametrize("fault", [*PIXEL_FAULTS, "doubled scale"])
@pytest.mark.parametrize("which", ["random", "miniature"])
def test_a_planted_fault_is_seen(
    fault: str,
    which: str,
    base: Path,
    images: Path,
    tmp_path: Path,
    encode_to: Encode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"base": "miniature"} if which == "miniature" else {}
    with monkeypatch.context() as patch:
        plant(patch, fault)
        with pytest.warns(UserWarning, match="DO NOT TRAIN ON THIS CACHE") as caught:
            encode_to(images, tmp_path / "cache", **settings)
    lines = alarms([*caught])
    assert any("built-in drawings" in line for line in lines)
    if fault != "swapped channels":  # which some images look the same with
        assert any(".png: its latents are" in line for line in lines)
    assert all("\n" not in line for line in lines)
    with pytest.warns(UserWarning, match="DO NOT TRAIN ON THIS CACHE") as caught:
        encode_to(images, tmp_path / "cache", **settings)  # nothing to do; it is still wrong
    assert set(alarms([*caught])) == set(lines)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("vae_dtype", ["fp32", "bf16"])
def test_a_right_cache_raises_no_alarm(
    dtype: str, vae_dtype: str, images: Path, tmp_path: Path, encode_to: Encode
) -> None:
    """With a VAE of random weights; warnings are errors here."""
    encode_to(images, tmp_path / "cache", dtype=dtype, vae_dtype=vae_dtype)
    sanity = sanity_of(tmp_path / "cache")
    assert len(sanity["pictures"]) == 3
    most = 0.04 if "bf16" in (dtype, vae_dtype) else 0.001
    assert all(item["error"] < most for item in sanity["pictures"])
    assert sanity["drawings"]["error"] < most


@pytest.mark.parametrize("settings", [{"flip": True}, {"crops": 2}, {"square": True}], ids=str)
def test_variants_raise_no_alarm(
    settings: dict[str, Any], images: Path, tmp_path: Path, encode_to: Encode
) -> None:
    encode_to(images, tmp_path / "cache", **settings)
    assert len(sanity_of(tmp_path / "cache")["pictures"]) == 3


def test_the_miniature_gives_its_images_back(
    images: Path, tmp_path: Path, encode_to: Encode
) -> None:
    encode_to(images, tmp_path / "cache", base="miniature")
    sanity = sanity_of(tmp_path / "cache")
    assert sanity["drawings"]["psnr"] > 14
    assert all(item["psnr"] > 15 for item in sanity["pictures"])
    assert all("bare_psnr" not in item for item in sanity["pictures"])


def test_it_follows_from_what_the_cache_holds(
    images: Path, tmp_path: Path, encode_to: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the runs it took; and no VAE is loaded where the images are the same."""
    dataset = shutil.copytree(images, tmp_path / "set")
    late = sorted(dataset.glob("*.png"))[4:]
    for path in late:
        path.rename(tmp_path / path.name)
    cache = encode_to(dataset, tmp_path / "cache")
    for path in late:
        (tmp_path / path.name).rename(path)
    encode_to(dataset, cache)
    fresh = encode_to(dataset, tmp_path / "fresh")
    assert sanity_of(cache) == sanity_of(fresh)
    (dataset / "000.txt").write_text("another caption")
    monkeypatch.setattr("precompute.encoders.LatentEncoder", None)
    encode_to(dataset, cache)
    assert sanity_of(cache) == sanity_of(fresh)


def test_a_wrong_scaling_factor_of_a_vae_is_seen(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base / "vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    for factor, num in ((0.25, 0), (3.0, 1), (0.01, 1)):
        (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": factor}))
        measures = measure_drawings(LatentEncoder(open_vae(str(folder)), torch.float32, CPU, 2))
        lines = alarms_of_drawings(measures)
        assert len(lines) == num
        assert all("scaling_factor" in line for line in lines)


def test_a_posterior_twice_as_wide_is_seen(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = precompute.encoders.scale_std
    monkeypatch.setattr(precompute.encoders, "scale_std", lambda *args: 2 * real(*args))
    (line,) = alarms_of_drawings(
        measure_drawings(LatentEncoder(open_base(base).vae, torch.float32, CPU, 2))
    )
    assert "the posterior's std of built-in drawings is 2 times" in line


def test_the_figures_are_those_of_diffusers(base: Path) -> None:
    """PSNR, mean and std of the drawings, by the plain formulas."""
    vae: Any = load_vae(open_base(base).vae, torch.float32)
    measures = measure_drawings(LatentEncoder(open_base(base).vae, torch.float32, CPU, 2))
    pixels = np.stack(make_drawings()).astype(np.float32)
    assert pixels.shape == (2, SIDE, SIDE, 3)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(tensor).latent_dist.mean
        decoded = vae.decode(mean).sample.clamp(-1, 1)
    levels = (decoded.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    psnr = 10 * np.log10(255**2 / np.mean((levels - pixels) ** 2))
    assert measures["psnr"] == pytest.approx(psnr, abs=0.02)
    scaled = mean * vae.config.scaling_factor
    assert measures["std"] == pytest.approx(scaled.std(dim=(0, 2, 3)).tolist(), abs=0.006)
    assert measures["mean"] == pytest.approx(scaled.mean(dim=(0, 2, 3)).tolist(), abs=0.006)


def test_only_what_can_be_opened_by_another_way_is_compared(base: Path) -> None:
    encoder = LatentEncoder(open_base(base).vae, torch.float32, CPU, 1)
    geometry = cover((96, 64), (64, 48))
    image = scene()
    stored = encoder.encode([render(image, geometry)]).mean[0]
    exif = Image.Exif()
    exif[0x0112] = 3
    for data in (
        saved(image.convert("P"), "PNG"),
        saved(image.convert("RGBA"), "PNG"),
        saved(image.convert("CMYK"), "JPEG"),
        saved(image, "PNG", icc_profile=linear_profile()),
        saved(image, "PNG", exif=exif),
    ):
        assert measure_image(encoder, "a", data, geometry, stored) is None
    for form in ("PNG", "BMP"):
        measures = measure_image(encoder, "a", saved(image, form), geometry, stored)
        assert measures is not None
        assert measures["error"] < 1e-4
        assert alarms_of_image(measures) == []
    gray = image.convert("L")
    stored = encoder.encode([render(open_image(saved(gray, "PNG")), geometry)]).mean[0]
    measures = measure_image(encoder, "a", saved(gray, "PNG"), geometry, stored)
    assert measures is not None and measures["error"] < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_latents_that_are_no_numbers_are_all_wrong(base: Path, value: float) -> None:
    encoder = LatentEncoder(open_base(base).vae, torch.float32, CPU, 1)
    stored = torch.full((4, 6, 8), value)
    measures = measure_image(encoder, "a", saved(scene(), "PNG"), cover((96, 64), (64, 48)), stored)
    assert measures is not None
    assert measures["error"] == 1
    assert len(alarms_of_image(measures)) >= 1
    json.dumps(measures, allow_nan=False)
