"""``inspect`` tells what is in a cache; its sheets show it, and what was cut away."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from cli import commands
from precompute.sheets import BOX, CUT_AWAY, frame
from sdxl.contact_sheet import LINE, TILE
from shards.format import Sample
from shards.reader import Cache
from tests.conftest import Encode
from tests.made import made_sample, write_cache
from tools.draw_images import draw_images


def inspect(*arguments: Any) -> Result:
    return CliRunner().invoke(commands, ["inspect", *map(str, arguments)])


def with_captions(sample: Sample, path: str, *captions: str) -> Sample:
    return Sample(**{**vars(sample), "path": path, "captions": captions})


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache by hand: two buckets, masks, weights, variants, several captions."""
    torch.manual_seed(0)
    plain = [made_sample(str(number)) for number in range(5)]
    rich = [
        made_sample(f"r{number}", bucket=(16, 32), variants=2, captions=3, mask=True, weight=0.5)
        for number in range(2)
    ]
    samples = [
        *(with_captions(item, f"cats/{n}.png", "a cat") for n, item in enumerate(plain[:3])),
        with_captions(plain[3], "3.png", "x" * 120),
        with_captions(plain[4], "4.png", ""),
        *(with_captions(item, f"dogs/{n}.png", "a", "bb", "a cat") for n, item in enumerate(rich)),
    ]
    return write_cache(tmp_path_factory.mktemp("varied") / "cache", samples)


def test_it_counts_what_is_there(varied: Path) -> None:
    run = inspect(varied)
    assert run.exit_code == 0, run.output
    text = run.stdout
    manifest = Cache(varied).manifest
    assert (
        f"7 samples in 2 shards, {sum(s['bytes'] for s in manifest['shards']) / 1e6:.1f} MB" in text
    )
    assert f"digest {manifest['digest'][:12]}" in text
    buckets = dict(re.findall(r"^ +(\d+x\d+) +(\d+) ", text, re.MULTILINE))
    assert buckets == {"16x32": "2", "32x16": "5"}
    assert "captions: 11 (1 to 3 a sample), 5 different; 0 to 120 characters, median 5" in text
    top = re.findall(r"^ +(\d+)  (.*)$", text, re.MULTILINE)
    assert ("5", "a cat") in top and ("1", "(empty)") in top and ("1", "x" * 87 + "...") in top
    assert "variants a sample: 1 to 2; masks: 2; weight of a sample: 0.5 to 1; repeats: 1" in text
    assert ("3", "cats/") in top and ("2", "dogs/") in top and ("2", "./") in top
    assert "rejected: none" in text


def test_it_counts_a_real_cache(images: Path, tmp_path: Path, encode_to: Encode) -> None:
    dataset = shutil.copytree(images, tmp_path / "set")
    for number in range(3):
        (dataset / f"bad{number}.png").write_bytes(b"no image")
        (dataset / f"bad{number}.txt").write_text("a")
    for size in (900, 1000):
        Image.new("L", (size, 100)).save(dataset / f"long{size}.png")
        (dataset / f"long{size}.txt").write_text("a")
    cache = encode_to(dataset, tmp_path / "cache")
    text = inspect(cache).stdout
    manifest = Cache(cache).manifest
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert f"digest {manifest['recipe'][part]['digest'][:12]}" in text
    for name in ("mean", "std"):
        values = " ".join(f"{value:.3f}" for value in manifest["latents"][name])
        assert f"latents, {name} of each channel: {values}" in text
    assert f"built-in drawings {manifest['sanity']['drawings']['psnr']:.1f} dB, 3 of the" in text
    assert "rejected: 5" in text
    assert "      3  not an image that Pillow can read" in text
    assert "      2  N x N pixels are longer than N:N" in text
    captions = Counter(path.read_text().strip() for path in images.glob("*.txt"))
    text_of_most, count = captions.most_common(1)[0]
    assert re.search(rf"^ +{count}  {text_of_most}$", text, re.MULTILINE) or count == 1


def test_both_parts_of_a_split_cache(split_cache: Path, tmp_path: Path) -> None:
    run = inspect(split_cache, "--sheets", tmp_path / "sheets")
    assert run.exit_code == 0, run.output
    assert [line.split(":")[0] for line in run.stdout.splitlines() if "samples in" in line] == [
        str(split_cache / name) for name in ("train", "val")
    ]
    for part in ("train", "val"):
        buckets = {shard["bucket"][0] for shard in Cache(split_cache / part).manifest["shards"]}
        assert len([*(tmp_path / "sheets" / part).glob("*.png")]) == len(buckets)


def test_refusals(varied: Path, tmp_path: Path) -> None:
    run = inspect(tmp_path / "nowhere")
    assert run.exit_code == 2
    assert "nowhere: no such folder" in run.stderr
    run = inspect(varied, "--sheets", tmp_path / "sheets")
    assert run.exit_code == 2
    assert "its manifest has no latent_rgb map; encode it again" in run.stderr
    damaged = shutil.copytree(varied, tmp_path / "damaged")
    tar = next(damaged.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[520] ^= 1  # in the first JSON
    tar.write_bytes(data)
    run = inspect(damaged)
    assert run.exit_code == 2
    assert "json is damaged" in run.stderr


def tiles_of(sheet: Path, num: int) -> list[Image.Image]:
    image = Image.open(sheet)
    columns = image.width // TILE
    return [
        image.crop((x * TILE, y * (TILE + LINE), (x + 1) * TILE, y * (TILE + LINE) + TILE))
        for y, x in (divmod(number, columns) for number in range(num))
    ]


def test_sheets_show_the_images_in_their_frames(
    tmp_path: Path, encode_to: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the colors of the images, without a VAE; gray is what was cut away."""
    dataset = tmp_path / "set"
    dataset.mkdir()
    colors = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 30, 200)}
    for name, color in colors.items():
        for number in range(3):
            Image.new("RGB", (160, 64 + number), color).save(dataset / f"{name}{number}.png")
            (dataset / f"{name}{number}.txt").write_text(name)
    cache = Cache(encode_to(dataset, tmp_path / "cache", base="miniature", square=True))
    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", None)
    run = inspect(tmp_path / "cache", "--sheets", tmp_path / "sheets")
    assert run.exit_code == 0, run.output
    (path,) = (tmp_path / "sheets").glob("*.png")
    assert path.name == "64x64.png"
    captions = [
        s.metadata(row)["captions"][0] for s in cache.shards() for row in range(len(s.index))
    ]
    tiles = tiles_of(path, len(captions))
    for tile, caption in zip(tiles, captions, strict=True):
        middle = np.asarray(tile)[123:133, 123:133].mean(axis=(0, 1))
        distances = {name: abs(middle - color).max() for name, color in colors.items()}
        assert min(distances, key=lambda name: distances[name]) == caption
        assert distances[caption] < 100
        assert tile.getpixel((TILE // 8, TILE // 2)) == CUT_AWAY
        assert tile.getpixel((TILE // 2, 10)) == (255, 255, 255)


def box_of(tile: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((np.asarray(tile) == color).all(axis=2))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize(
    ("sizes", "squashed", "share"),
    [
        ([600, 300, 32, 0, 64, 64], False, (0, 0.25, 1, 0.75)),  # the middle of a tall one
        ([300, 600, 0, 64, 64, 64], False, (0.5, 0, 1, 1)),  # the right half of a wide one
        ([64, 64, 0, 0, 64, 64], False, (0, 0, 1, 1)),
        ([300, 600, 0, 0, 64, 64], True, (0, 0, 1, 1)),
    ],
)
def test_the_box_is_where_the_sizes_say(
    sizes: list[int], squashed: bool, share: tuple[float, ...]
) -> None:
    tile = frame(torch.full((3, 8, 8), 0.4), sizes, squashed)
    assert tile.size == (TILE, TILE)
    width, height = (sizes[5], sizes[4]) if squashed else (sizes[1], sizes[0])
    scale = (TILE - 8) / max(width, height)
    left, top = (TILE - width * scale) / 2, (TILE - height * scale) / 2
    expected = [
        start + part * length * scale
        for start, part, length in zip((left, top) * 2, share, (width, height) * 2, strict=True)
    ]
    assert box_of(tile, BOX) == pytest.approx(expected, abs=2)


def test_a_sheet_has_each_variant(images: Path, tmp_path: Path, encode_to: Encode) -> None:
    dataset = tmp_path / "set"
    draw_images(dataset, count=1, size=64)
    encode_to(dataset, tmp_path / "cache", flip=True)
    assert inspect(tmp_path / "cache", "--sheets", tmp_path / "sheets").exit_code == 0
    first, second = tiles_of(tmp_path / "sheets" / "64x64.png", 2)
    assert np.asarray(first).std() > 10
    assert np.asarray(second).std() > 10
