"""A cache with all that a sample can have, from the user's files to a run that learns from it."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from shards.format import Sample
from shards.reader import Cache
from tests.conftest import Encode
from tests.folders import put_list
from tests.made import config_of, epoch_of, reader_of
from tests.test_fidelity import SCALING, samples_of
from train.loop import train

SIZES = {"a": (90, 70), "b": (75, 100), "c": (80, 80)}
VARIANTS = {"a": 4, "b": 4, "c": 2}  # of c there is one crop, all of it, and its mirror
ROWS: dict[str, dict[str, Any]] = {
    "a": {"text": ["one", "two"], "weight": 0.5, "repeats": 3},
    "b": {"text": "b"},
    "c": {"text": ["x", "y"], "mask": "of c.png"},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images: a has an alpha of its own, b no mask, c a mask image of half its size."""
    folder = tmp_path_factory.mktemp("rich")
    for number, (name, size) in enumerate(SIZES.items()):
        values = np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)
        image = Image.fromarray(values).resize(size)
        if name == "a":
            image.putalpha(Image.linear_gradient("L").resize(size))
        image.save(folder / f"{name}.png")
    half = Image.linear_gradient("L").rotate(90).resize((40, 40))
    half.save(folder / "of c.png")
    put_list(folder, *({"file_name": f"{name}.png"} | row for name, row in ROWS.items()))
    return folder


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory, dataset: Path, encode_to: Encode) -> Path:
    return encode_to(
        dataset,
        tmp_path_factory.mktemp("rich-cache") / "cache",
        dtype="fp32",
        flip=True,
        crops=2,
        mask_from_alpha=True,
    )


def seen_by(name: str, sample: Sample, values: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """The part of pixels [H, W, ...], resized for a sample, that each variant shows by its
    sizes."""
    results = []
    sizes = sample.tensors["sizes"].tolist()
    for number, (_, _, top, left, height, width) in enumerate(sizes):
        mirrored = values[:, ::-1] if number >= len(sizes) // 2 else values
        results.append(mirrored[top : top + height, left : left + width])
    return results


def resized_for(name: str, sample: Sample, image: Image.Image, how: Image.Resampling) -> Any:
    (ow, oh), (*_, height, width) = SIZES[name], sample.tensors["sizes"][0].tolist()
    scale = max(width / ow, height / oh)
    return np.asarray(image.resize((round(ow * scale), round(oh * scale)), how))


def test_each_variant_has_latents_of_its_own(rich: Path, dataset: Path, base: Path) -> None:
    vae = AutoencoderKL.from_pretrained(str(base), subfolder="vae")
    for path, sample in samples_of(rich).items():
        name = path[0]
        pasted = Image.new("RGB", SIZES[name], "white")
        with Image.open(dataset / path) as image:
            pasted.paste(image, mask=image if image.mode == "RGBA" else None)
        variants = seen_by(
            name, sample, resized_for(name, sample, pasted, Image.Resampling.LANCZOS)
        )
        assert len(variants) == len(sample.tensors["latents.mean"]) == VARIANTS[name]
        for number, pixels in enumerate(variants):
            inputs = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
            with torch.no_grad():
                expected = vae.encode(inputs[None]).latent_dist.mean[0] * SCALING
            actual = sample.tensors["latents.mean"][number]
            torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


def test_masks_lie_where_their_variants_do(rich: Path, dataset: Path) -> None:
    for path, sample in samples_of(rich).items():
        name = path[0]
        if name == "b":
            assert "mask" not in sample.tensors
            continue
        if name == "a":
            with Image.open(dataset / path) as image:
                gray = image.getchannel("A")
        else:
            with Image.open(dataset / "of c.png") as image:
                gray = image.resize(SIZES[name], Image.Resampling.BOX)
        variants = seen_by(
            name, sample, resized_for(name, sample, gray, Image.Resampling.BILINEAR) / 255
        )
        for number, pixels in enumerate(variants):
            rows, columns = (side // 8 for side in pixels.shape)
            expected = pixels.reshape(rows, 8, columns, 8).mean(axis=(1, 3))
            actual = sample.tensors["mask"][number, 0].numpy()
            np.testing.assert_allclose(actual, expected, atol=0.03)
            assert actual.max() - actual.min() > 0.3


def test_text_is_there_once(rich: Path) -> None:
    for path, sample in samples_of(rich).items():
        texts = ROWS[path[0]]["text"]
        assert sample.captions == tuple(texts if isinstance(texts, list) else [texts])
        assert len(sample.tensors["prompt_embeds"]) == len(sample.captions)
        assert len(sample.tensors["pooled_prompt_embeds"]) == len(sample.captions)
        assert sample.weight == ROWS[path[0]].get("weight", 1.0)


def test_a_run_reads_all_of_it(rich: Path) -> None:
    cache = Cache(rich)
    reader = reader_of([cache], 1, masks=True)
    paths = {sample.key: path for path, sample in samples_of(rich).items()}
    seen: dict[str, set[Any]] = {path: set() for path in paths.values()}
    counts: collections.Counter[str] = collections.Counter()
    for epoch in range(40):
        for batch in epoch_of(reader, epoch):
            path = paths[batch.keys[0]]
            counts[path] += 1
            assert batch.mask is not None
            parts = (batch.time_ids, batch.prompt[0, :3, :3], batch.mask[0, 0, 0])
            seen[path].add(tuple(tuple(part.flatten().tolist()) for part in parts))
            assert float(batch.weights) == ROWS[path[0]].get("weight", 1.0)
    assert counts == {"a.png": 120, "b.png": 40, "c.png": 40}
    variants = {path: len({row[::2] for row in rows}) for path, rows in seen.items()}
    captions = {path: len({row[1] for row in rows}) for path, rows in seen.items()}
    assert captions == {"a.png": 2, "b.png": 1, "c.png": 2}
    assert variants == {f"{name}.png": number for name, number in VARIANTS.items()}
    assert {row[2] for row in seen["b.png"]} == {(1.0,) * len(next(iter(seen["b.png"]))[2])}


def test_it_trains(rich: Path, base: Path, tmp_path: Path) -> None:
    config = config_of(base, rich, out=tmp_path / "run", epochs=2, masked_loss=True)
    assert train(config).exists()
