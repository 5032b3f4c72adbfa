"""A base in one file does what its diffusers folder does, and says clearly what is wrong."""

import filecmp
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import infer.generate
import sdxl.load
from infer.settings import GenerateSettings
from precompute.prompts import change_prompts
from sdxl import BaseError
from sdxl.base import open_base, open_vae
from sdxl.fingerprint import tokenizer_digest, weights_digest
from sdxl.load import load_scheduler, load_tokenizers, load_vae
from sdxl.metadata import Schedule
from sdxl.original_names import PREFIXES
from shards.manifest import SCAN, read_manifest
from shards.reader import Cache
from tests.runs import LORA, UNET, losses, run, same_weights
from tests.singles import parts_of, rewrite, write_single
from tests.test_promise import TOKENIZERS
from train.caches import check_encoders

Encode = Callable[..., Path]
TEXTS = ("a red heart", "hi! so much!! ok", "zebra æøå 漢字 🙂", "")


@pytest.fixture(scope="module")
def single(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single(base, tmp_path_factory.mktemp("single") / "small.safetensors")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the tensors that are read from single files."""
    names: list[str] = []
    real = sdxl.load.safe_open

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> "Watched":
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            names.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(sdxl.load, "safe_open", Watched)
    yield names


def prefixes(names: list[str]) -> set[str]:
    return {component for component, p in PREFIXES.items() if any(n.startswith(p) for n in names)}


@pytest.fixture(scope="module")
def single_cache(
    single: Path, base: Path, images: Path, encode_to: Encode, tmp_path_factory: Any
) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    return encode_to(images, out, base=str(single), tokenizers=base, dtype="fp32")


@pytest.mark.usefixtures("no_network")
def test_encode(
    single: Path,
    base: Path,
    images: Path,
    cache: Path,
    tmp_path: Path,
    encode_to: Encode,
    read: list[str],
) -> None:
    out = encode_to(images, tmp_path / "cache", base=str(single), tokenizers=base, dtype="fp32")
    names = sorted(path.name for path in cache.iterdir() if path.name != SCAN)
    assert sorted(path.name for path in out.iterdir() if path.name != SCAN) == names
    assert filecmp.cmpfiles(cache, out, names, shallow=False)[0] == names
    assert prefixes(read) == {"vae", "text_encoder", "text_encoder_2"}
    assert read_manifest(out)["recipe"] == read_manifest(cache)["recipe"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("full", [False, True])
def test_train(
    single: Path, base: Path, cache: Path, tmp_path: Path, read: list[str], full: bool
) -> None:
    for name, item in (("file", single), ("folder", base)):
        run(cache, item, tmp_path / name, steps=2, full=full)
    assert losses(tmp_path / "file") == losses(tmp_path / "folder")
    result = UNET if full else LORA
    assert same_weights(tmp_path / "file" / result, tmp_path / "folder" / result)
    assert prefixes(read) == {"unet"}
    if full:
        unets = [tmp_path / name / "unet" / "config.json" for name in ("file", "folder")]
        first, second = (json.loads(path.read_bytes()) for path in unets)
        assert {n: v for n, v in first.items() if n[0] != "_"} == {
            n: v for n, v in second.items() if n[0] != "_"
        }


def draw(base: Path | str, out: Path, **settings: Any) -> bytes:
    settings = {"num_steps": 2, "size": "64", "device": "cpu", "seed": 3, **settings}
    infer.generate.generate(GenerateSettings(base=str(base), out=out, prompt="a cat", **settings))
    return Image.open(out / "000000.png").tobytes()


@pytest.mark.usefixtures("no_network")
def test_generate(single: Path, base: Path, tmp_path: Path, read: list[str]) -> None:
    actual = draw(single, tmp_path / "file", tokenizers=base)
    assert prefixes(read) == PREFIXES.keys()
    assert actual == draw(base, tmp_path / "folder")


@pytest.mark.usefixtures("no_network")
def test_prompts_and_checks_take_file_and_folder_for_the_same(
    single: Path, base: Path, cache: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(cache, tmp_path / "cache")
    check_encoders(Cache(own), open_base(single))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    change_prompts(own, tmp_path / "prompts.txt", str(single), "cpu", base)
    actual = (own / "prompts.safetensors").read_bytes()
    change_prompts(own, tmp_path / "prompts.txt", str(base), "cpu")
    assert (own / "prompts.safetensors").read_bytes() == actual


def test_training_refuses_a_cache_of_other_encoders(
    single: Path, cache: Path, tmp_path: Path
) -> None:
    name = PREFIXES["text_encoder_2"] + "ln_final.bias"
    tensor = safetensors.torch.load_file(single)[name]
    other = rewrite(single, {name: tensor + 1}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"made with another text_encoder_2 than {other} holds"):
        run(cache, other, tmp_path / "run", steps=1)


def test_training_needs_the_unet_alone(base: Path, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    write_single(base, path, "vae", "text_encoder", "text_encoder_2")
    with pytest.warns(UserWarning, match="has no vae, text_encoder, text_encoder_2"):
        run(cache, path, tmp_path / "run", steps=1)


KINDS = [("epsilon", None), ("v_prediction", None), ("v_prediction", True)]


@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
def test_what_it_predicts_is_read(
    base: Path, cache: Path, tmp_path: Path, kind: str, zero_snr: bool | None
) -> None:
    path = tmp_path / "one.safetensors"
    write_single(base, path, schedule=Schedule(kind, zero_snr))
    config = open_base(path).scheduler_config
    assert config["prediction_type"] == kind
    scheduler = load_scheduler(open_base(path))
    assert scheduler.config.prediction_type == kind
    assert bool(scheduler.config.rescale_betas_zero_snr) is bool(zero_snr)
    assert (scheduler.config.timestep_spacing == "trailing") is bool(zero_snr)
    run(cache, path, tmp_path / "run", steps=1)
    metadata = json.loads((tmp_path / "run" / "config.json").read_bytes())
    assert metadata["resolved_prediction_type"] == kind
    written = sdxl.lora.apply.read_schedule(tmp_path / "run" / LORA)
    assert (written.prediction_type, bool(written.zero_snr)) == (kind, bool(zero_snr))


def test_the_metadata_of_other_trainers_says_what_it_predicts(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    tensors = safetensors.torch.load_file(single)
    for stated, kind in (("v", "v_prediction"), ("epsilon", "epsilon")):
        metadata = {"modelspec.prediction_type": stated}
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        assert open_base(path).scheduler_config["prediction_type"] == kind


def test_a_vae_of_its_own(single: Path, base: Path, tmp_path: Path) -> None:
    """In one file: with the other models, alone in either layout; or in its folder."""
    part = parts_of(base)["vae"]
    alone = tmp_path / "alone" / "vae.safetensors"
    alone.parent.mkdir()
    tensors = safetensors.torch.load_file(single)
    prefix = PREFIXES["vae"]
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    text = json.dumps({"vae": part.config})
    safetensors.torch.save_file(
        {**own, "loss.logvar": torch.ones(1)}, alone, metadata={"shardtune.configs": text}
    )
    reference = tmp_path / "theirs" / "vae.safetensors"
    shutil.copytree(base / "vae", reference.parent)
    next(reference.parent.glob("*.safetensors")).rename(reference)
    expected = load_vae(open_base(base).vae, torch.float32).state_dict()
    for source in (single, alone, reference, base / "vae"):
        actual = load_vae(open_vae(str(source)), torch.float32)
        assert actual.config.scaling_factor == 0.25
        assert all(torch.equal(t, expected[n]) for n, t in actual.state_dict().items())
        digests = {weights_digest(open_vae(str(item))) for item in (source, base)}
        assert len(digests) == 1


@pytest.mark.slow
def test_another_vae_draws_other_images(single: Path, base: Path, tmp_path: Path) -> None:
    part = parts_of(base)["vae"]
    part.tensors["decoder.conv_out.bias"][:] += 0.5
    other = tmp_path / "vae.safetensors"
    sdxl.write_original.write_original(other, {"vae": part})
    plain = draw(single, tmp_path / "plain", tokenizers=base)
    assert draw(single, tmp_path / "same", tokenizers=base, vae=str(base / "vae")) == plain
    assert draw(base, tmp_path / "other", vae=str(other)) != plain


def test_one_clip_tokenizer_does_for_both(base: Path, single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(base / "tokenizer" / name, folder)
    for actual, expected, name in zip(
        load_tokenizers(open_base(single, tokenizers=folder)),
        load_tokenizers(open_base(base)),
        TOKENIZERS,
        strict=True,
    ):
        for text in TEXTS:
            ids = [
                t(text, padding="max_length", truncation=True).input_ids for t in (actual, expected)
            ]
            assert ids[0] == ids[1]
        result, own = (
            open_base(single, tokenizers=given).tokenizer(name) for given in (folder, base)
        )
        assert tokenizer_digest(result) == tokenizer_digest(own)
    assert len({tokenizer_digest(open_base(base).tokenizer(name)) for name in TOKENIZERS}) == 2


def test_tokenizers_of_the_local_hub_cache(
    base: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    snapshots = tmp_path / "models--stabilityai--stable-diffusion-xl-base-1.0"
    for name in TOKENIZERS:
        shutil.copytree(base / name, snapshots / "snapshots" / ("0" * 40) / name)
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for actual, expected in zip(
        load_tokenizers(open_base(single)), load_tokenizers(open_base(base)), strict=True
    ):
        assert actual("a cat!").input_ids == expected("a cat!").input_ids


def test_tokenizers_that_are_nowhere(single: Path) -> None:
    with (
        pytest.warns(UserWarning, match="has no tokenizers: fetching tokenizer of stabilityai/"),
        pytest.raises(BaseError, match=r"single file has no tokenizers, .*; give --tokenizers DIR"),
    ):
        load_tokenizers(open_base(single))
