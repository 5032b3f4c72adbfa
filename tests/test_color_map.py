"""The quadratic map from latents to preview colors: its fit, its use, and caches without it."""

import json
import shutil
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cli import commands
from sdxl.latent_rgb import QUADRATIC_RIDGE, LatentSums, color_map, latents_to_rgb
from shards.format import sample_key
from shards.index import Index, misfit_of_header
from shards.manifest import read_manifest
from tests.conftest import Encode

PAIRS = [*combinations_with_replacement(range(4), 2)]


def data(seed: int, num: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and colors that follow from them by squares."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(num, 4, 6, 5, generator=generator)
    red = 0.3 * latents[:, 0] + 0.2 * latents[:, 1] * latents[:, 2] - 0.1
    green = -0.2 * latents[:, 3] ** 2 + 0.3
    blue = 0.1 * latents[:, 0] * latents[:, 3] + 0.05 * latents[:, 1]
    return latents, torch.stack([red, green, blue], dim=1)


def sums_of(*seeds: int) -> LatentSums:
    total = LatentSums.empty(4)
    for seed in seeds:
        sums = LatentSums.empty(4)
        sums.add(*data(seed))
        total += LatentSums.from_json(json.loads(json.dumps(sums.to_json())))
    return total


def test_the_fit_is_that_of_all_pixels_at_once() -> None:
    """Against a design matrix with every product, and its ridge."""
    quadratic = sums_of(0, 1).fit()["quadratic"]
    latents, colors = (torch.cat(parts) for parts in zip(data(0), data(1), strict=True))
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    columns = [flat[:, i] * flat[:, j] for i, j in PAIRS]
    design = np.stack([*columns, *flat.T, np.ones(len(flat))], axis=1)
    gram = design.T @ design
    ridge = QUADRATIC_RIDGE * np.diag(np.diag(gram))
    seen = colors.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    expected = np.linalg.solve(gram + ridge, design.T @ seen)
    fitted = [*quadratic["products"], *quadratic["weight"], quadratic["bias"]]
    assert np.allclose(fitted, expected, rtol=1e-6, atol=1e-8)
    held_out, wanted = data(2)
    rgb = latents_to_rgb(held_out, **color_map(sums_of(0, 1).fit()))
    assert (rgb - (wanted / 2 + 0.5).clamp(0, 1)).abs().max() < 0.01
    linear = latents_to_rgb(held_out, **color_map(earlier(sums_of(0, 1)).fit()))
    assert (linear - (wanted / 2 + 0.5).clamp(0, 1)).abs().max() > 0.1


def earlier(sums: LatentSums) -> LatentSums:
    """As an earlier version kept them."""
    return LatentSums(sums.gram, sums.cross)


def test_sums_of_an_earlier_version_make_the_linear_map() -> None:
    old, new = earlier(sums_of(0)), sums_of(1)
    both = [sums_of(0) + new, old + new, new + old]
    maps = [sums.fit() for sums in both]
    assert "quadratic" in maps[0] and "quadratic" not in maps[1] and "quadratic" not in maps[2]
    assert maps[0]["weight"] == maps[1]["weight"] and maps[0]["bias"] == maps[1]["bias"]
    assert set(old.to_json()) == {"gram", "cross"}
    assert set(color_map(maps[1])) == {"weight", "bias"}


@pytest.mark.parametrize("fault", ["short", "alone", "text"])
def test_a_header_with_other_sums_is_refused(fault: str, cache: Path) -> None:
    header = Index(next(cache.glob("*.index"))).header
    assert misfit_of_header(header) is None
    sums = dict(header["sums"])
    if fault == "short":
        sums["moments"] = sums["moments"][:-1]
    elif fault == "alone":
        del sums["products"]
    else:
        sums["moments"] = ["a"] * len(sums["moments"])
    assert misfit_of_header({**header, "sums": sums})


@pytest.mark.slow
def test_a_cache_of_an_earlier_version_is_added_to_and_repaired(
    images: Path, encode_to: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = shutil.copytree(images, tmp_path / "data")
    out = tmp_path / "cache"
    first = min(dataset.glob("*.png"), key=lambda path: sample_key(path.name))  # in its shard too
    kept = {path: path.read_bytes() for path in (first, first.with_suffix(".txt"))}
    for path in kept:
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(LatentSums, "to_json", linear_json)
        encode_to(dataset, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "quadratic" not in read_manifest(out)["latent_rgb"]
    encode_to(dataset, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for path, content in kept.items():
        path.write_bytes(content)
    encode_to(dataset, out)
    manifest = read_manifest(out)
    assert manifest["num_samples"] == 14 and "quadratic" not in manifest["latent_rgb"]
    kinds = {frozenset(Index(path).header["sums"]) for path in out.glob("*.index")}
    assert kinds == {frozenset({"gram", "cross"})}
    # A sample of each version is in the shard that is repaired now.
    (tar,) = (out / f"{row['name']}.tar" for row in manifest["shards"] if changed(out, row, before))
    content = bytearray(tar.read_bytes())
    content[content.rindex(b'"path": "') + 9] ^= 1
    tar.write_bytes(content)
    result = CliRunner().invoke(commands, ["verify", "--repair", str(out)])
    assert "dropped 1 of its 5 samples" in result.output
    assert set(Index(tar.with_suffix(".index")).header["sums"]) == {"gram", "cross"}
    encode_to(dataset, out)
    assert read_manifest(out)["num_samples"] == 14
    encode_to(dataset, tmp_path / "fresh")
    fresh = read_manifest(tmp_path / "fresh")["latent_rgb"]
    assert np.allclose(fresh["weight"], read_manifest(out)["latent_rgb"]["weight"], atol=1e-6)
    assert "quadratic" in fresh


def linear_json(sums: LatentSums) -> dict[str, object]:
    return {"gram": sums.gram.tolist(), "cross": sums.cross.tolist()}


def changed(out: Path, row: dict[str, object], before: dict[str, bytes]) -> bool:
    name = f"{row['name']}.tar"
    return before.get(name) != (out / name).read_bytes()
