"""Caches of kohya's sd-scripts become caches of ours: the same numbers, and no VAE is run."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from encodes import contents, copy_old, counted, encode, samples_of, settings_of
from kohya_caches import (
    WIDTHS,
    Arrays,
    add_caches,
    latents_arrays,
    latents_path,
    save,
    text_arrays,
    text_path,
)
from made import write_cache
from runs import Died, losses, run

import precompute.encode_shard
import train.caches
from cli import commands
from precompute.plan.dry_run import dry_run
from shards.format import Sample, sample_key
from shards.inspect import describe_contents, read_contents
from shards.manifest import read_manifest
from shards.reader import Cache
from tools.random_base import SCALING_FACTOR

BUCKETS = {(64, 64): (64, 64), (85, 53): (80, 48), (53, 85): (48, 80)}
SCALE = SCALING_FACTOR  # of the random base; SDXL's is 0.13025
SQUARE, WIDE = "000.png", "001.png"  # drawn first


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    """The first images, without caches."""
    folder = copy_old(images, tmp_path / "data")
    for path in folder.iterdir():
        if path.stem not in ("000", "001", "002", "003"):
            path.unlink()
    return folder


def imported(data: Path, base: Path, **settings: Any) -> Any:
    return encode(data, base, data.parent / "cache", import_="kohya", **settings)


def tensors_of(cache: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        path: safetensors.torch.load(members["safetensors"])
        for path, members in samples_of(cache).items()
    }


def rejected(cache: Path) -> dict[str, str]:
    lines = (cache / "rejected.jsonl").read_text().splitlines()
    return {row["path"]: row["reason"] for row in map(json.loads, lines)}


def plain_sample(arrays: Arrays, flip: bool) -> dict[str, torch.Tensor]:
    """What a sample must hold, from the arrays of kohya's files, in fp16."""
    names = ["latents", "latents_flipped"] if flip else ["latents"]
    mean = np.stack([arrays[name] for name in names]) * SCALE
    width, height = (int(side) for side in arrays["original_size"])
    left, top, right, _ = arrays["crop_ltrb"].tolist()
    target = [8 * side for side in mean.shape[2:]]
    crops = [(top, left), (top, target[1] - right)][: len(names)]
    sizes = [[height, width, *map(round, crop), *target] for crop in crops]
    prompt = np.concatenate([arrays["hidden_state1"], arrays["hidden_state2"]], axis=1)
    tensors = {
        "latents.mean": torch.from_numpy(mean).half(),
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        "prompt_embeds": torch.from_numpy(prompt)[None].half(),
        "pooled_prompt_embeds": torch.from_numpy(arrays["pool2"])[None].half(),
    }
    if "alpha_mask" in arrays:
        alpha = arrays["alpha_mask"]
        sides = np.stack([alpha, alpha[:, ::-1]][: len(names)])[:, None]
        cells = [[[cell(side[0], y, x) for x in range(len(alpha[0]) // 8)]
                  for y in range(len(alpha) // 8)] for side in sides]  # fmt: skip
        tensors["mask"] = torch.tensor(cells)[:, None].half()
    return tensors


def cell(alpha: Any, y: int, x: int) -> float:
    return float(alpha[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].astype(np.float64).mean())


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_numbers_are_those_of_the_files_and_no_encoder_is_run(
    data: Path, base: Path, flip: bool, sized: bool
) -> None:
    arrays = add_caches(data, BUCKETS, flipped=flip, sized=sized, mask=flip)
    with counted() as count:
        report = imported(data, base, flip=flip)
    assert count == (0, 0)
    manifest = read_manifest(report.folder)
    assert manifest["imported"] == {"latents": 4, "text": 4} and "sanity" not in manifest
    assert manifest["recipe"]["storage"]["mean_only"]
    cached = tensors_of(report.folder)
    assert cached.keys() == arrays.keys()
    for name, tensors in cached.items():
        wanted = plain_sample(unsized(arrays[name]), flip)
        assert tensors.keys() == wanted.keys()
        for part, tensor in tensors.items():
            assert tensor.dtype == wanted[part].dtype
            torch.testing.assert_close(tensor, wanted[part], rtol=1e-3, atol=1e-6)
        assert torch.equal(tensors["sizes"], wanted["sizes"])
    *_, seen = read_contents(Cache(report.folder))
    lines = describe_contents(Cache(report.folder), seen)
    assert "imported from another trainer, not checked: latents of 4, text of 4" in lines
    fields = json.loads(samples_of(report.folder)[SQUARE]["json"])
    assert {part: fields["notes"][part]["imported"] for part in ("latents", "text")} == {
        "latents": "kohya",
        "text": "kohya",
    }


def unsized(arrays: Arrays) -> Arrays:
    def plain(name: str) -> str:
        head, _, tail = name.rpartition("_")
        return head if tail.partition("x")[0].isdigit() else name

    return {plain(name): array for name, array in arrays.items()}


def test_a_step_of_training_is_that_on_a_cache_made_by_hand(
    data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = add_caches(data, BUCKETS)
    cache = imported(data, base, dtype="fp32").folder
    with pytest.warns(UserWarning, match="imported, not checked .*latents of 4 and text of 4 of 4"):
        run(cache, base, data.parent / "run", steps=2)
    samples = [
        Sample(
            key=sample_key(name),
            path=name,
            captions=("x",),
            tensors={
                key: tensor if key == "sizes" else tensor.float()
                for key, tensor in plain_fp32(parts).items()
            },
        )
        for name, parts in arrays.items()
    ]
    made = write_cache(data.parent / "made", samples)
    empty = "unconditional.safetensors"
    shutil.copyfile(cache / empty, made / empty)
    monkeypatch.setattr(train.caches, "check_encoders", lambda *_: None)
    run(made, base, data.parent / "run of made", steps=2)
    of_imported, of_made = losses(data.parent / "run"), losses(data.parent / "run of made")
    assert of_imported == of_made and len(of_made) == 2


def plain_fp32(arrays: Arrays) -> dict[str, torch.Tensor]:
    tensors = plain_sample(arrays, flip=False)
    tensors["latents.mean"] = torch.from_numpy(arrays["latents"][None] * np.float32(SCALE))
    prompt = np.concatenate([arrays["hidden_state1"], arrays["hidden_state2"]], axis=1)
    tensors["prompt_embeds"] = torch.from_numpy(prompt)[None]
    tensors["pooled_prompt_embeds"] = torch.from_numpy(arrays["pool2"])[None]
    return tensors


def test_only_what_is_missing_is_encoded_and_reruns_change_only_what_changed(
    data: Path, base: Path
) -> None:
    add_caches(data, BUCKETS)
    latents_path(data / SQUARE).unlink()
    text_path(data / WIDE).unlink()
    with counted() as count:
        report = imported(data, base)
    assert count.captions == 1 and 1 <= count.images <= 2  # one is decoded back by the checks
    assert read_manifest(report.folder)["imported"] == {"latents": 3, "text": 3}
    before = contents(report.folder)
    with counted() as count:
        again = imported(data, base)
    assert again.changes.are_none and count == (0, 0) and contents(report.folder) == before

    save(text_path(data / "002.png"), text_arrays(5))
    add_latents = latents_arrays(6, (64, 64), (64, 64))
    save(latents_path(data / SQUARE), add_latents)
    with counted() as count:
        again = imported(data, base)
    assert count == (0, 0)
    assert dict(again.changes.causes) == {"imported file": 2}
    mean = tensors_of(report.folder)[SQUARE]["latents.mean"]
    assert torch.equal(mean[0], scaled(add_latents["latents"]))
    fresh = encode(data, base, data.parent / "fresh", import_="kohya")
    assert samples_of(fresh.folder) == samples_of(report.folder)


def test_without_import_the_imported_are_encoded_anew_which_is_told_before(
    data: Path, base: Path
) -> None:
    add_caches(data, BUCKETS)
    latents_path(data / SQUARE).unlink()
    text_path(data / SQUARE).unlink()
    cache = imported(data, base).folder
    with counted() as count, pytest.warns(UserWarning) as warned:
        encode(data, base, cache, mean_only=True)
    lines = [str(warning.message) for warning in warned]
    assert any("settings changed" in line and "import (3)" in line for line in lines)
    assert any("6 kohya caches" in line for line in lines)
    assert count.captions == 3 and "imported" not in read_manifest(cache)
    with pytest.warns(UserWarning):
        encode(data, base, data.parent / "plain", mean_only=True)
    assert samples_of(cache) == samples_of(data.parent / "plain")


def test_an_import_that_was_interrupted_ends_with_the_same_bytes(
    data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_caches(data, BUCKETS, mask=True)
    latents_path(data / SQUARE).unlink()
    fresh = encode(data, base, data.parent / "fresh", import_="kohya").folder
    write, written = precompute.encode_shard.write_shard, list[str]()

    def write_some(folder: Path, name: str, *rest: Any) -> Any:
        if written:
            raise Died
        written.append(name)
        return write(folder, name, *rest)

    monkeypatch.setattr(precompute.encode_shard, "write_shard", write_some)
    with pytest.raises(Died):
        imported(data, base)
    monkeypatch.setattr(precompute.encode_shard, "write_shard", write)
    assert contents(imported(data, base).folder) == contents(fresh)


def test_of_several_sizes_the_one_of_the_bucket_is_taken(data: Path, base: Path) -> None:
    fitting = latents_arrays(1, (80, 48), (85, 53), sized=True)
    other = latents_arrays(2, (64, 48), (85, 53), sized=True)
    small = latents_arrays(3, (40, 24), (85, 53), sized=True)
    save(latents_path(data / WIDE), small | other | fitting)
    save(latents_path(data / SQUARE), latents_arrays(4, (32, 32), (64, 64)))
    save(latents_path(data / "002.png"), latents_arrays(5, (48, 80), (85, 53)))
    report = imported(data, base)
    mean = tensors_of(report.folder)[WIDE]["latents.mean"]
    assert torch.equal(
        mean[0], torch.from_numpy(fitting["latents_6x10"] * np.float32(SCALE)).half()
    )
    assert report.imports is not None
    assert dict(report.imports.skipped) == {
        "made at another resolution": 1,
        "of an image of another size": 1,
    }
    assert report.imports.num_latents == 1


@pytest.mark.parametrize("tokens, chunks, num", [(77, 1, 4), (154, 2, 4), (152, 2, 0), (77, 2, 0)])
def test_embeddings_of_as_many_tokens_as_the_cache_has_are_taken(
    data: Path, base: Path, tokens: int, chunks: int, num: int
) -> None:
    for seed, image in enumerate(sorted(data.glob("*.png"))):
        save(latents_path(image), latents_arrays(seed, *size_and_bucket(image)))
        save(text_path(image), text_arrays(seed, tokens))
    with counted() as count:
        report = imported(data, base, long_captions=chunks)
    assert count == (0, 4 - num)
    assert report.imports is not None and report.imports.num_texts == num
    prompt = tensors_of(report.folder)[SQUARE]["prompt_embeds"]
    assert prompt.shape == (1, 77 * chunks, sum(WIDTHS))
    first = torch.from_numpy(text_arrays(0, tokens)["hidden_state1"]).half()
    assert torch.equal(prompt[0, :, : WIDTHS[0]], first) == bool(num)


def scaled(latents: Any) -> torch.Tensor:
    return torch.from_numpy(latents * np.float32(SCALE)).half()


def size_and_bucket(image: Path) -> tuple[Any, Any]:
    stem = latents_path(image).name.split("_")[1]
    size = tuple(map(int, stem.split("x")))
    return BUCKETS[size[0], size[1]], size


def test_a_text_of_several_captions_or_varied_ones_is_encoded(data: Path, base: Path) -> None:
    add_caches(data, BUCKETS)
    (data / "000.txt").write_text("a\nb\n")
    with counted() as count:
        report = imported(data, base, caption_lines=True)
    assert count == (0, 2) and read_manifest(report.folder)["imported"]["text"] == 3


def test_a_caption_that_was_changed_since_is_encoded(data: Path, base: Path) -> None:
    add_caches(data, BUCKETS)
    imported(data, base)
    (data / "000.txt").write_text("another caption")
    with counted() as count:
        report = imported(data, base)
    assert count == (0, 1) and read_manifest(report.folder)["imported"]["text"] == 3
    assert report.imports is not None
    assert [*report.imports.skipped] == ["text of a caption that was changed since"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "objects": ({"latents": np.array([{}], dtype=object)}, "pickles: those are never loaded"),
    "shape": ({"latents": np.zeros((4, 8), np.float32)}, "no latents"),
    "kind": ({"latents": np.zeros((4, 8, 8), np.int32)}, "no latents"),
    "channels": ({"latents": np.zeros((16, 8, 8), np.float32)}, "16 channels, not 4"),
    "nan": ({"latents": np.full((4, 8, 8), np.nan, np.float32)}, "not finite"),
    "large": ({"latents": np.full((4, 8, 8), 1e30, np.float32)}, "not finite in fp16"),
    "none": ({"x": np.zeros(3)}, "has no latents (its arrays: x)"),
    "crop": ({"crop_ltrb": np.array([0, 0, 64])}, "crop_ltrb of shape [3], not [4]"),
    "crop nan": ({"crop_ltrb": np.array([0, 0, np.inf, 1])}, "crop_ltrb that are no pixels"),
    "mask": ({"alpha_mask": np.ones((8, 8), np.float32)}, "alpha_mask of another shape"),
    "mask 2": ({"alpha_mask": np.full((64, 64), 2, np.float32)}, "alpha_mask that is not in 0..1"),
    "black": ({"alpha_mask": np.zeros((64, 64), np.float32)}, "black all over"),
    "text": ({"hidden_state2": np.zeros((76, 48), np.float32)}, "no embeddings of a caption"),
    "width": ({"pool2": np.zeros(1024, np.float32)}, "where the base's text encoders make"),
    "text nan": ({"pool2": np.full(48, np.nan, np.float32)}, "pool2 with numbers that are not"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_as_it_must_be_rejects_its_image(
    name: str, data: Path, base: Path
) -> None:
    arrays = add_caches(data, BUCKETS)[SQUARE]
    texts = {key: arrays.pop(key) for key in text_arrays(0)}
    changes, reason = BAD[name]
    if texts.keys() & changes.keys():
        save(text_path(data / SQUARE), texts | changes)
    else:
        save(latents_path(data / SQUARE), changes if name == "none" else arrays | changes)
    report = imported(data, base)
    assert report.num_samples == 3
    assert reason in rejected(report.folder)[SQUARE]


def test_pickles_and_damaged_zips_are_rejected_and_never_loaded(data: Path, base: Path) -> None:
    add_caches(data, BUCKETS)
    intact = latents_path(data / SQUARE).read_bytes()
    (data / "stolen").write_bytes(b"")

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.unlink, (data / "stolen",)

    latents_path(data / SQUARE).write_bytes(pickle.dumps(Bomb()))
    latents_path(data / WIDE).write_bytes(intact[: len(intact) // 2])
    with zipfile.ZipFile(latents_path(data / "002.png"), "w", zipfile.ZIP_DEFLATED) as bomb:
        header = b"\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (4, 8, 8), }"
        bomb.writestr("latents.npy", header.ljust(128) + bytes(300_000_000))
    flipped = bytearray(latents_path(data / "003.png").read_bytes())
    flipped[400] ^= 1  # within the latents: the checksum shows it
    latents_path(data / "003.png").write_bytes(flipped)
    with pytest.warns(UserWarning, match="no image could be encoded"):
        report = imported(data, base, max_rejected=1)
    assert (data / "stolen").exists()
    reasons = rejected(report.folder)
    assert {name: reason.partition("_sdxl.npz ")[2] for name, reason in reasons.items()} == {
        SQUARE: "is no .npz: cut off, or something else",
        WIDE: "is no .npz: cut off, or something else",
        "002.png": "has 300,000,128 bytes of latents, more than 256,000,000",
        "003.png": "is damaged: Bad CRC-32 for file 'latents.npy'",
    }


def test_what_cannot_go_together_is_not_taken_or_refused(data: Path, base: Path) -> None:
    add_caches(data, BUCKETS)
    shutil.copyfile(data / SQUARE, data / "000.mask.png")
    report = imported(data, base, mask_from_alpha=True)
    assert report.imports is not None
    assert dict(report.imports.skipped) == {
        "the image has a mask file, not fitted to this crop": 1,
        "without an alpha mask": 3,
    }
    report = encode(data, base, data.parent / "flip", import_="kohya", flip=True)
    assert report.imports is not None and report.imports.num_latents == 0
    for setting, message in (({"crops": 2}, "excludes --crops"), ({"squash": True}, "--squash")):
        with pytest.raises(ValueError, match=message):
            imported(data, base, **setting)
    for other in ("onetrainer", "simpletuner"):
        with pytest.raises(ValueError, match=f"--import {other}: its caches are pickles"):
            settings_of(data, base, data, import_=other)


def test_dry_run_counts_them_and_the_option_is_named_where_it_is_missing(
    data: Path, base: Path
) -> None:
    add_caches(data, BUCKETS)
    lines = [*dry_run(settings_of(data, base, data.parent / "out", import_="kohya"))]
    counts = "imported from kohya, not checked against the base: latents of 4 and text of 4 of 4"
    assert any(counts in line for line in lines)
    with pytest.warns(UserWarning, match=r"8 kohya caches \(.npz\) found: --import kohya takes"):
        encode(data, base, data.parent / "plain")


def test_a_recipe_may_have_import(data: Path, base: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    add_caches(data, BUCKETS)
    recipe = tmp_path / "encode.toml"
    recipe.write_text('import = "kohya"\nresolution = 64\nbucket-step = 16\n')
    arguments = ["encode", data, "--base", base, "--out", tmp_path / "out", "--config", recipe]
    result = CliRunner().invoke(commands, [*map(str, arguments), "--dry-run", "--device", "cpu"])
    assert result.exit_code == 0 and "latents of 4 and text of 4" in result.output, result.output
