"""A run that draws previews is the run that does not, and leaves its sheets."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from runs import losses

from precompute.prompts import change_prompts
from sdxl.base import open_base
from sdxl.contact_sheet import LINE, fit_tile, read_sheet
from sdxl.load import load_scheduler, load_unet, load_vae
from sdxl.lora.names import LORA
from shards.reader import Cache
from train.config import TrainConfig
from train.loop import train
from train.option_values import CacheUse, Every
from train.preview import TILE, draw_previews, read_preview_prompts


@pytest.fixture
def prompted(cache: Path, base: Path, tmp_path: Path) -> Path:
    """The cache with two preview prompts."""
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 3\na blue square --s 3 --d 5\n")
    change_prompts(folder, prompts, str(base), "cpu")
    return folder


def run(cache: Path, base: Path, out: Path, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"steps": 4, "batch_size": 2, "device": "cpu", "lr": 1e-2}
    train(
        TrainConfig(caches=(CacheUse(cache),), base=str(base), out=out, **{**defaults, **settings})
    )
    return out


def pixels(image: Image.Image | Path) -> np.ndarray:
    opened = Image.open(image) if isinstance(image, Path) else image
    return np.asarray(opened.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    "settings",
    [pytest.param({}, marks=pytest.mark.slow), {"full": True, "ema": 0.5}],
    ids=["lora", "full+ema"],
)
def test_previews_change_nothing_but_what_is_seen(
    prompted: Path, base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = run(prompted, base, tmp_path / "plain", **settings)
    drawn = run(prompted, base, tmp_path / "drawn", preview_every=Every(2), **settings)
    assert losses(plain) == losses(drawn)
    name = "unet/diffusion_pytorch_model.safetensors" if settings else LORA
    left, right = (safetensors.torch.load_file(folder / name) for folder in (plain, drawn))
    assert all(torch.equal(left[key], right[key]) for key in left)
    sheets = sorted(path.name for path in (drawn / "previews").iterdir())
    assert sheets == [f"step-{step:06d}.png" for step in (0, 2, 4)]
    apart = read_sheet(drawn / "previews" / sheets[0])
    assert [prompt for _, prompt in apart] == ["a red circle", "a blue square"]
    previews = read_preview_prompts(Cache(prompted))
    assert previews is not None
    unet = load_unet(open_base(base).unet, torch.float32)
    images = [image for image, _ in draw_previews(unet, load_scheduler(open_base(base)), previews)]
    first, last = (read_sheet(drawn / "previews" / name) for name in (sheets[0], sheets[2]))
    assert [text for _, text in first] == ["a red circle", "a blue square"]
    pairs = list(zip(first, last, images, strict=True))
    for (shown, _), (learned, _), image in pairs:
        assert np.abs(pixels(shown) - pixels(fit_tile(image, TILE))).max() <= 1
        assert np.abs(pixels(shown) - pixels(learned)).max() > 1, "it has learned"
    titles = [pixels(drawn / "previews" / name)[:LINE] for name in (sheets[0], sheets[2])]
    assert not np.array_equal(*titles), "each says its step"


def test_true_colors_are_the_vaes(prompted: Path, base: Path, tmp_path: Path) -> None:
    out = run(prompted, base, tmp_path / "run", preview_every=Every(9), preview_vae=True)
    previews = read_preview_prompts(Cache(prompted))
    assert previews is not None
    unet, vae = (
        load_unet(open_base(base).unet, torch.float32),
        load_vae(open_base(base).vae, torch.float32),
    )
    expected = draw_previews(unet, load_scheduler(open_base(base)), previews, vae=vae)
    actual = read_sheet(out / "previews" / "step-000000.png")
    for (shown, _), (image, _) in zip(actual, expected, strict=True):
        assert np.abs(pixels(shown) - pixels(fit_tile(image, TILE))).max() <= 1


@pytest.mark.slow
def test_a_run_resumes_with_other_prompts(prompted: Path, base: Path, tmp_path: Path) -> None:
    straight = run(prompted, base, tmp_path / "straight")
    out = run(prompted, base, tmp_path / "run", steps=2, preview_every=Every(2))
    other = tmp_path / "other.txt"
    other.write_text("a green triangle --s 2\n")
    change_prompts(prompted, other, str(base), "cpu")
    run(prompted, base, out, resume=True, preview_every=Every(2))
    assert losses(out) == losses(straight)
    wide, narrow = (pixels(out / "previews" / f"step-{n:06d}.png").shape for n in (2, 4))
    assert wide[1] > narrow[1], "two prompts, then one"


def test_previews_that_cannot_be_drawn_are_refused_before_the_run(
    cache: Path, prompted: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="has no preview prompts; add some with"):
        run(cache, base, out, preview_every=Every(1))
    own = tmp_path / "base"
    shutil.copytree(base, own)
    for path in (own / "vae").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"vae.*safetensors"):
        run(prompted, own, out, preview_every=Every(1), preview_vae=True)
    assert not out.exists()
