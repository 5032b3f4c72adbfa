"""The page of a cache: every sample with its captions and their tokens, and what was rejected."""

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from test_pages import Page, table

import pages.cache
from cli import commands
from sdxl.base import open_base
from sdxl.latent_rgb import color_map, latents_to_rgb
from sdxl.load import load_tokenizers
from shards.reader import Cache
from tests.conftest import Encode
from tests.made import made_sample, write_cache


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(commands, ["inspect", *map(str, arguments)])


def cards_of(page: Page) -> list[str]:
    """The HTML of each sample."""
    return page.html.split('<ul id="cards" class="cards">')[1].split("\n</ul>")[0].split("<li>")[1:]


@pytest.fixture(scope="module")
def dataset(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 images, one with a caption too long, and one that is none."""
    data = shutil.copytree(images, tmp_path_factory.mktemp("dataset") / "data")
    first = sorted(data.glob("*.txt"))[0]
    first.write_text("cat " * 30)
    (data / "bad.png").write_bytes(b"no image")
    (data / "bad.txt").write_text("a <b>cat</b>")
    return data


@pytest.fixture(scope="module")
def encoded(
    dataset: Path, encode_to: Encode, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Page]:
    """The cache of it, and its page without a base."""
    folder = tmp_path_factory.mktemp("encoded")
    cache = encode_to(dataset, folder / "cache")
    result = inspect(cache, "--html", folder / "page.html")
    assert not result.exit_code, result.output
    assert result.stdout.splitlines()[-1] == f"{folder / 'page.html'}: open it in a browser"
    return cache, Page((folder / "page.html").read_text())


def test_every_sample_is_there_with_its_image(encoded: tuple[Path, Page]) -> None:
    folder, page = encoded
    cache, cards = Cache(folder), cards_of(page)
    rows = [(shard, row) for shard in cache.shards() for row in range(len(shard.index))]
    assert len(cards) == len(rows) == cache.manifest["num_samples"] == 14
    for card, (shard, row) in zip(cards, rows, strict=True):
        fields = shard.metadata(row)
        assert fields["path"] in card and fields["captions"][0].strip() in card
        (data,) = re.findall('src="data:image/webp;base64,([^"]*)"', card)
        assert 'loading="lazy"' in card and "token" not in card
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            seen = torch.tensor(np.asarray(image.convert("RGB"))).float().flatten(0, 1) / 255
        latents = torch.empty(shard.index.layout.latent)
        shard.read_into(latents, row, "latents.mean")
        colors = cache.manifest["latent_rgb"]
        expected = latents_to_rgb(latents[None], **color_map(colors))[0].flatten(1).T
        assert (seen - expected).abs().mean() < 0.1, "WebP is lossy, and these are tiny"


def test_numbers_and_rejected_images(encoded: tuple[Path, Page]) -> None:
    folder, page = encoded
    counts = {row[0]: row[1] for row in table(page, "bucket-table")}
    assert counts == {"48x80": "4", "64x64": "5", "80x48": "5"}
    ((path, reason),) = table(page, "rejected-table")
    assert path == "bad.png" and reason
    assert re.search(r"Samples with a cut caption\s*1\s", page.text)
    assert len(re.findall("a caption was cut", page.html)) == 1
    assert "http:" not in page.html and str(folder.parent) not in page.html
    assert all(image["src"].startswith("data:") for image in page.all("img") if image["src"])


def test_tokens_are_counted_by_the_bases_tokenizer(
    encoded: tuple[Path, Page], base: Path, tmp_path: Path
) -> None:
    cache, _ = encoded
    out = tmp_path / "page.html"
    assert not inspect(cache, "--html", out, "--base", base).exit_code
    page = Page(out.read_text())
    tokenizer, _ = load_tokenizers(open_base(base))
    texts = [
        c
        for s in Cache(cache).shards()
        for n in range(len(s.index))
        for c in s.metadata(n)["captions"]
    ]
    wanted = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    shown = [int(num) for card in cards_of(page) for num in re.findall(r">(\d+) token", card)]
    assert shown == wanted and max(wanted) == 90
    assert len(re.findall(r"90 tokens, <strong>cut</strong>", page.html)) == 1
    assert "there is room for 75" in page.text

    result = inspect(cache, "--base", base)
    assert result.exit_code == 2 and "give --html PAGE too" in result.output
    result = inspect(cache, "--html", out, "--base", "miniature")
    assert result.exit_code == 2 and "was encoded with another tokenizer" in result.output


def test_captions_are_text_and_many_samples_are_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [made_sample(f"{number}.png", captions=7, variants=2) for number in range(9)]
    evil = ("<script>alert(1)</script>", *(f"caption {number}" for number in range(6)))
    samples = [replace(sample, captions=evil) for sample in samples]
    cache = write_cache(tmp_path / "train", samples)
    monkeypatch.setattr(pages.cache, "MAX_SAMPLES", 4)
    monkeypatch.setattr(pages.cache, "SIDES", ((4, 64),))
    out = tmp_path / "page.html"
    assert not inspect(cache, "--html", out).exit_code
    page = Page(out.read_text())
    assert len(page.all("script")) == 1 and "<script>alert" in page.text
    assert len(cards_of(page)) == 4 and "4 of them, evenly spaced" in page.text
    assert page.text.count("and 2 more captions") == 4 and "2 variants" in page.text


def test_equal_images_are_told_of(tmp_path: Path) -> None:
    samples = [
        replace(made_sample(f"{name}.png"), digests={"picture": digest} if digest else {})
        for name, digest in (("a", "1"), ("b", "2"), ("c", "1"), ("d", ""), ("e", ""))
    ]
    cache = write_cache(tmp_path / "train", samples)
    out = tmp_path / "page.html"
    assert not inspect(cache, "--html", out).exit_code
    cards = cards_of(Page(out.read_text()))  # in the order of their keys
    (card,) = [card for card in cards if "the same image as" in card]
    pair = {name for name in ("a.png", "c.png") if name in card}
    assert len(cards) == 5 and pair == {"a.png", "c.png"}
    assert "Samples of an equal image" in out.read_text()


def test_a_split_cache_has_two_pages(split_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert not inspect(split_cache, "--html", out).exit_code
    for name in ("train", "val"):
        text = (tmp_path / f"page-{name}.html").read_text()
        assert f"<h1>{split_cache.name}/{name}</h1>" in text
    assert not out.exists()
    out.write_text("mine")
    result = inspect(split_cache / "val", "--html", out)
    assert result.exit_code == 2 and "not written by shardtune" in result.output
