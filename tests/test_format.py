"""The cache: one set of bytes, whole or not there, readable by any webdataset client."""

import gc
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import webdataset as wds
from conftest import Encode

from precompute.dataset.records import Blob
from precompute.encode import encode
from precompute.plan.reuse import PREPROCESSING
from precompute.settings import EncodeSettings
from shards.format import CacheError, Layout, Sample, sample_key
from shards.index import Index
from shards.manifest import SCAN, read_manifest
from shards.reader import Cache
from shards.verify import verify
from shards.writer import write_shard
from tools.draw_images import draw_images

ROOT = Path(__file__).parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a cache; not what this machine remembers of its dataset."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != SCAN)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def faults(folder: Path) -> list[str]:
    return [str(fault) for faults in verify(folder, read_manifest(folder)) for fault in faults]


def random_sample(name: str, variants: int, captions: int, dtype: torch.dtype) -> Sample:
    tensors = {
        "latents.mean": torch.randn(variants, 4, 6, 10).to(dtype),
        "latents.std": torch.rand(variants, 4, 6, 10).to(dtype),
        "mask": torch.rand(variants, 1, 6, 10).to(dtype),
        "prompt_embeds": torch.randn(captions, 77, 12).to(dtype),
        "pooled_prompt_embeds": torch.randn(captions, 5).to(dtype),
        "sizes": torch.randint(0, 2000, (variants, 6), dtype=torch.int32),
    }
    texts = tuple(f"caption {number}" for number in range(captions))
    return Sample(key=sample_key(name), path=name, captions=texts, tensors=tensors, weight=0.5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_slice_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    """Several variants and captions a sample, differing in number, with masks."""
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    shapes = [(1, 1), (3, 2), (2, 4)]
    samples = sorted(
        (random_sample(f"{v}{c}.png", v, c, torch_dtype) for v, c in shapes), key=lambda s: s.key
    )
    layout = Layout(dtype=dtype, latent=(4, 6, 10), prompt=(77, 12), pooled=5)
    write_shard(tmp_path, "80x48-000000", iter(samples), layout, {"bucket": [80, 48]})
    from shards.reader import Shard

    index = Index(tmp_path / "80x48-000000.index")
    shard = Shard(tmp_path, "80x48-000000", index.sha256)
    assert len(index) == 3
    for row, sample in enumerate(samples):
        assert index.key(row) == sample.key
        assert shard.metadata(row)["path"] == sample.path
        assert index.records[row]["weight"] == 0.5
        for name, tensor in sample.tensors.items():
            for number, expected in enumerate(tensor):
                actual = torch.empty_like(expected)
                shard.read_into(actual, row, name, number)
                assert torch.equal(actual, expected), (name, number)


@pytest.mark.slow
def test_two_encodes_give_the_same_bytes(
    cache: Path, images: Path, base: Path, tmp_path: Path
) -> None:
    """In another process, of a copy of the images, into another folder."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(images.iterdir(), reverse=True):
        (copy / path.name).write_bytes(path.read_bytes())
    settings = ["--resolution", "64", "--bucket-step", "16", "--dtype", "fp32"]
    settings += ["--threads", "1", "--batch-size", "4"]
    given = [str(copy), "--base", str(base), "--out", str(tmp_path / "cache"), *settings]
    subprocess.run([sys.executable, "cli.py", "encode", *given], cwd=ROOT, check=True)
    assert contents(tmp_path / "cache") == contents(cache)


def test_a_batch_mates_absence_changes_no_byte(
    cache: Path, images: Path, encode_to: Encode, tmp_path: Path
) -> None:
    """An image is encoded to the same bits whoever is encoded beside it."""
    some = tmp_path / "some"
    some.mkdir()
    for number in (0, 3, 6, 7):
        for end in ("png", "txt"):
            name = f"{number:03}.{end}"
            (some / name).write_bytes((images / name).read_bytes())
    out = encode_to(some, tmp_path / "cache", dtype="fp32")
    complete, part = Cache(cache), Cache(out)
    count = 0
    for group in part.groups():
        for row in range(group.count):
            shard, at = part.locate(group, row)
            expected, place = find(complete, shard.index.key(at))
            for name in ("latents.mean", "latents.std", "prompt_embeds", "pooled_prompt_embeds"):
                first = torch.empty(shard.index.layout.shape(name))
                second = torch.empty_like(first)
                shard.read_into(first, at, name)
                expected.read_into(second, place, name)
                assert torch.equal(first, second), name
            count += 1
    assert count == 4


def find(cache: Cache, key: str) -> Any:
    for group in cache.groups():
        for row in range(group.count):
            shard, at = cache.locate(group, row)
            if shard.index.key(at) == key:
                return shard, at
    raise KeyError(key)


# webdataset leaves its last tar open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_alone_feeds_a_training_loop(cache: Path, base: Path) -> None:
    """No code of ours between the tars and the UNet, and the loss falls."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    tars = sorted(str(path) for path in cache.glob("64x64-*.tar"))
    rows = [*wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode()]
    gc.collect()
    assert rows and isinstance(rows[0]["json"], dict) and rows[0]["json"]["captions"]
    tensors = [safetensors.torch.load(row["safetensors"]) for row in rows]
    unet = UNet2DConditionModel.from_pretrained(str(base), subfolder="unet")
    schedule = DDPMScheduler.from_pretrained(str(base), subfolder="scheduler")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    latents = torch.cat([sample["latents.mean"] for sample in tensors])
    torch.manual_seed(0)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
    losses = []
    for _ in range(6):
        predicted = unet(
            schedule.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=torch.cat([sample["prompt_embeds"] for sample in tensors]),
            added_cond_kwargs={
                "text_embeds": torch.cat([sample["pooled_prompt_embeds"] for sample in tensors]),
                "time_ids": torch.cat([sample["sizes"] for sample in tensors]),
            },
        ).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_rerun_adopts_what_is_whole(
    cache: Path, images: Path, encode_to: Encode, base: Path, tmp_path: Path
) -> None:
    out = encode_to(images, tmp_path / "cache", dtype="fp32")
    before = contents(out)
    marks = {path.name: path.stat().st_mtime_ns for path in out.glob("*-*")}
    # As a kill would leave it: a shard without its mark, another in flight, no manifest.
    (out / "80x48-000000.index").unlink()
    (out / "64x64-000000.tar.partial").write_bytes(b"half")
    (out / "manifest.json").unlink()
    with pytest.raises(CacheError, match="unfinished; run the same encode again"):
        Cache(out)
    settings = EncodeSettings(
        dataset=images,
        base=str(base),
        out=out,
        resolution=64,
        bucket_step=16,
        dtype="fp32",
        batch_size=4,
        threads=1,
    )
    (report,) = encode(settings)
    assert (report.changes.num_new, report.changes.num_unchanged) == (5, 9)
    assert contents(out) == before
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*-*")}
    assert {n.split("-")[0] for n in marks if marks[n] != after[n]} == {"80x48"}
    assert faults(out) == []


@pytest.mark.filterwarnings("ignore:.*settings changed")
@pytest.mark.parametrize(
    ("settings", "cause"),
    [({"dtype": "fp16"}, "dtype"), ({"square": True}, PREPROCESSING), ({}, "captions")],
)
def test_what_is_stale_is_encoded_again(
    images: Path, encode_to: Encode, base: Path, tmp_path: Path, settings: Any, cause: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in images.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    common = {"base": str(base), "resolution": 64, "bucket_step": 16, "dtype": "fp32", "threads": 1}
    encode(EncodeSettings(dataset=data, out=tmp_path / "cache", **common))
    if cause == "captions":
        (data / "000.txt").write_text("an edited caption")
    changed = {**common, **settings}
    (report,) = encode(EncodeSettings(dataset=data, out=tmp_path / "cache", **changed))
    assert report.changes.causes[cause] == {"dtype": 14, PREPROCESSING: 9, "captions": 1}[cause]
    encode(EncodeSettings(dataset=data, out=tmp_path / "fresh", **changed))
    if cause == PREPROCESSING:  # what stays in its bucket stays in its shard
        encode(EncodeSettings(dataset=data, out=tmp_path / "cache", repack=True, **changed))
    assert contents(tmp_path / "cache") == contents(tmp_path / "fresh")


def test_a_failure_while_writing_leaves_no_shard(tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield random_sample("a.png", 1, 1, torch.float32)
        raise KeyboardInterrupt

    layout = Layout(dtype="fp32", latent=(4, 6, 10), prompt=(77, 12), pooled=5)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "80x48-000000", failing(), layout, {})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_knows_neither_time_nor_place(cache: Path, images: Path) -> None:
    text = (cache / "manifest.json").read_text()
    assert str(cache.parent) not in text and str(images) not in text
    manifest = json.loads(text)
    assert manifest["num_samples"] == 14
    for shard in manifest["shards"]:
        index = (cache / f"{shard['name']}.index").read_bytes()
        assert hashlib.sha256(index).hexdigest() == shard["index_sha256"]


def test_a_vae_that_overflows_in_half_precision_is_retried_in_fp32(
    images: Path, base: Path, tmp_path: Path
) -> None:
    """fp16 latents of a VAE whose activations pass 65,504 are NaN; the cache's are not."""
    other = tmp_path / "vae"
    shutil.copytree(base / "vae", other)
    file = other / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["encoder.conv_in.weight"] *= 1e6  # group norms take it out again in fp32
    weights["encoder.conv_in.bias"] *= 1e6
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    common = {"base": str(base), "vae": str(other), "resolution": 64, "bucket_step": 16}
    common["threads"] = 1
    for vae_dtype in ("fp16", "fp32"):
        out = tmp_path / vae_dtype
        (report,) = encode(
            EncodeSettings(dataset=images, out=out, vae_dtype=vae_dtype, dtype="fp32", **common)
        )
        assert report.num_samples == 14 and not report.rejected
    half, complete = Cache(tmp_path / "fp16"), Cache(tmp_path / "fp32")
    for group in half.groups():
        for row in range(group.count):
            shard, at = half.locate(group, row)
            expected, place = find(complete, shard.index.key(at))
            first = torch.empty(shard.index.layout.shape("latents.mean"))
            second = torch.empty_like(first)
            shard.read_into(first, at, "latents.mean")
            expected.read_into(second, place, "latents.mean")
            assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_an_interrupted_encode_goes_on_to_the_same_bytes(
    base: Path, encode_to: Encode, tmp_path: Path, number: int, code: int
) -> None:
    draw_images(tmp_path / "data", count=300, size=64)
    settings = {"shard_size": 5, "batch_size": 1}
    out = tmp_path / "cache"
    given = [str(tmp_path / "data"), "--base", str(base), "--out", str(out)]
    given += ["--resolution", "64", "--bucket-step", "16", "--shard-size", "5", "--batch-size", "1"]
    given += ["--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "cli.py", "encode", *given],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while child.poll() is None and len(list(out.glob("*.index"))) < 3:
        time.sleep(0.005)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == code, output
    assert "Traceback" not in output
    if number != signal.SIGKILL:
        assert re.search(r"Interrupted\. \d+ of 60 shards are whole; the same command goes", output)
    assert bool(list(out.glob("*.partial"))) <= (number == signal.SIGKILL)
    assert 3 <= len(list(out.glob("*.index"))) < 60 and not (out / "manifest.json").exists()
    encode_to(tmp_path / "data", out, **settings)
    assert faults(out) == []
    assert contents(out) == contents(encode_to(tmp_path / "data", tmp_path / "whole", **settings))


@pytest.mark.filterwarnings("ignore:.*settings changed")
def test_a_rerun_that_is_refused_leaves_the_cache(
    images: Path, encode_to: Encode, base: Path, tmp_path: Path
) -> None:
    """A VAE that does not load is refused before any shard of the old one is removed."""
    out = encode_to(images, tmp_path / "cache")
    before = contents(out)
    shutil.copytree(base / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights.popitem()
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors missing"):
        encode_to(images, out, vae=str(tmp_path / "vae"))
    assert contents(out) == before


@pytest.mark.filterwarnings("ignore:.*settings changed")
def test_files_of_the_user_stay(images: Path, encode_to: Encode, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("train", "val"):
        shutil.copytree(images, data / name)
    (data / "train" / "originals.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="train: is the dataset; give another --out"):
        encode_to(data, data)
    with pytest.raises(ValueError, match=r"not empty and no cache \(holds 000.png\)"):
        encode_to(images, data / "train")
    out = encode_to(images, tmp_path / "cache")
    (out / "backup.tar").write_bytes(b"precious")
    encode_to(images, out, dtype="fp32")
    assert (out / "backup.tar").read_bytes() == b"precious"
    assert [line.split(": ")[0] for line in faults(out)] == [str(out / "backup.tar")]


def test_a_read_error_ends_the_run_and_rejects_nothing(
    images: Path, encode_to: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a moment says nothing about the image."""
    real, reads = Blob.read, []

    def failing(blob: Blob) -> bytes:
        if blob.file.name == "004.png":
            reads.append(blob)
            if len(reads) == 2:  # the first is the planning pass
                raise OSError(5, "Input/output error", str(blob.file))
        return real(blob)

    monkeypatch.setattr(Blob, "read", failing)
    with pytest.raises(OSError, match="Input/output error"):
        encode_to(images, tmp_path / "cache")
    encode_to(images, tmp_path / "cache")
    assert read_manifest(tmp_path / "cache")["num_samples"] == 14
    assert (tmp_path / "cache" / "rejected.jsonl").read_bytes() == b""
