"""The forms in which bases are shared: each is used, or named for what it is."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sdxl import BaseError
from sdxl.base import (
    ModelSource,
    find_weights,
    open_base,
)
from sdxl.fingerprint import tensors_digest, weights_digest
from sdxl.load import load_text_encoders, load_unet
from sdxl.original_names import PREFIXES
from sdxl.single_file import CONFIGS_KEY
from tests.singles import parts_of, rewrite, write_single

ATTENTION = "middle_block.1.attn2.to_k.weight"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def single(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single(base, tmp_path_factory.mktemp("single") / "small.safetensors")


@pytest.fixture(scope="module")
def metadata(base: Path) -> dict[str, str]:
    """What says that a file's UNet is a small one."""
    return {CONFIGS_KEY: json.dumps({"unet": parts_of(base)["unet"].config})}


def original_unet(single: Path, prefix: str) -> Tensors:
    start = PREFIXES["unet"]
    tensors = safetensors.torch.load_file(single).items()
    return {prefix + n.removeprefix(start): t for n, t in tensors if n.startswith(start)}


def refused(path: Path) -> str:
    """The line with which a base is refused; it names the file."""
    with pytest.raises(BaseError) as caught:
        load_unet(open_base(path).unet, torch.float32)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "diffusers"),
    [
        ("", False),
        ("", True),
        ("model.diffusion_model.", False),
        ("diffusion_model.", False),
        ("unet.", True),
    ],
)
def test_a_unet_alone(
    single: Path,
    base: Path,
    metadata: dict[str, str],
    tmp_path: Path,
    prefix: str,
    diffusers: bool,
) -> None:
    path = tmp_path / "unet.safetensors"
    own = parts_of(base)["unet"].tensors
    tensors = (
        {prefix + n: t for n, t in own.items()} if diffusers else original_unet(single, prefix)
    )
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    state = load_unet(open_base(path).unet, torch.float32).state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[n], own[n]) for n in own)
    assert tensors_digest(open_base(path).model("unet")) == tensors_digest(
        ModelSource("unet", base / "unet")
    )
    with pytest.raises(BaseError, match=r"holds no VAE: it is a UNet alone, which train takes"):
        open_base(path).model("vae")


def test_a_unet_alone_beside_its_config(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "unet", tmp_path / "unet")
    (path,) = (tmp_path / "unet").glob("*.safetensors")
    assert load_unet(open_base(path).unet, torch.float32).config.sample_size == 8


def test_position_ids_say_nothing(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    names = (
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.position_ids",
        "conditioner.embedders.1.model.transformer.text_model.embeddings.position_ids",
    )
    rewrite(single, {name: torch.arange(77)[None] for name in names}, path)
    actual, plain = (load_text_encoders(open_base(item), torch.float32) for item in (path, single))
    for result, reference in zip(actual, plain, strict=True):
        expected = reference.state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in result.state_dict().items())
    for part in ("text_encoder", "text_encoder_2"):
        assert tensors_digest(open_base(path).model(part)) == tensors_digest(
            open_base(single).model(part)
        )


def test_scaled_fp8_is_multiplied(single: Path, metadata: dict[str, str], tmp_path: Path) -> None:
    scale_name = "scale_weight"  # or weight_scale
    path = tmp_path / "one.safetensors"
    prefix, tensors = PREFIXES["unet"], original_unet(single, PREFIXES["unet"])
    name = next(n for n in tensors if n.endswith("attn2.to_k.weight"))
    weight, factor = tensors[name], torch.tensor(0.03125)
    tensors[name] = (weight / factor).to(torch.float8_e4m3fn)
    tensors[name.replace("weight", scale_name)] = factor
    tensors[name.replace("weight", "scale_input")] = torch.ones(1)
    tensors[f"{prefix}scaled_fp8"] = torch.ones(2).to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    plain = load_unet(open_base(single).unet, torch.float32).state_dict()
    state = load_unet(open_base(path).unet, torch.float32).state_dict()
    (other,) = [n for n in plain if not torch.equal(state[n], plain[n])]
    assert torch.equal(state[other], tensors[name].float() * factor)
    digest = tensors_digest(open_base(path).model("unet"))
    tensors[name.replace("weight", scale_name)] = factor * 2
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    assert tensors_digest(open_base(path).model("unet")) != digest
    tensors[name.replace("weight", scale_name)] = torch.ones(3, 5)
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    assert re.search("in a form that cannot be read; use the fp16 file", refused(path))
    tensors[f"{prefix}nothing.{scale_name}"] = tensors.pop(name.replace("weight", scale_name))
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    assert re.search(f"nothing.{scale_name} scales no tensor that is known", refused(path))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)}, "an inpainting UNet"),
        ({"input_blocks.0.0.weight": torch.ones(16, 8, 3, 3)}, "InstructPix2Pix"),
        ({ATTENTION: torch.ones(2, 768)}, "the UNet of Stable Diffusion 1"),
        ({ATTENTION: torch.ones(2, 1024)}, "the UNet of Stable Diffusion 2"),
        ({"input_blocks.0.0.weight": torch.ones(16, 4, 3, 3).char()}, "in I8, a quantized form"),
        ({"a.weight.quant_state.bitsandbytes__nf4": torch.ones(2)}, "quantized by bitsandbytes"),
    ],
)
def test_what_cannot_be_used_is_named(
    single: Path, tmp_path: Path, changes: Tensors, problem: str
) -> None:
    for prefix in ("", PREFIXES["unet"]):
        path = tmp_path / "one.safetensors"
        tensors = original_unet(single, prefix) | {prefix + n: t for n, t in changes.items()}
        with safetensors.safe_open(single, framework="pt") as file:
            safetensors.torch.save_file(tensors, path, metadata=file.metadata())
        assert re.search(problem, refused(path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF file"),
        (b"PK\x03\x04" + bytes(40), "a pickle: never loaded"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_files_that_are_something_else_by_their_bytes(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "one.safetensors").write_bytes(content)
    assert re.search(problem, refused(tmp_path / "one.safetensors"))


def test_an_inpainting_folder(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    with pytest.raises(BaseError, match="an inpainting UNet"):
        load_unet(open_base(tmp_path / "base").unet, torch.float32)


def test_a_folder_without_a_schedule_takes_sdxls(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("scheduler"))
    with pytest.warns(UserWarning, match=r"has no scheduler/: SDXL's own is used"):
        config = open_base(tmp_path / "base").scheduler_config
    assert (config["prediction_type"], config["beta_end"]) == ("epsilon", 0.012)


@pytest.mark.parametrize("variant", ["non_ema", "ema-only"])
def test_the_only_variant_is_used(base: Path, tmp_path: Path, variant: str) -> None:
    shutil.copytree(base, tmp_path / "base")
    for name in ("unet", "text_encoder"):
        (path,) = (tmp_path / "base" / name).glob("*.safetensors")
        path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))
        assert find_weights(path.parent).variant == variant
    state = load_unet(open_base(tmp_path / "base").unet, torch.float32).state_dict()
    expected = load_unet(open_base(base).unet, torch.float32).state_dict()
    assert all(torch.equal(state[n], expected[n]) for n in expected)


def test_weights_that_cannot_be_chosen_are_named(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    unet = tmp_path / "base" / "unet"
    (path,) = unet.glob("*.safetensors")
    for names, kind in (
        (["diffusion_pytorch_model.a.safetensors", "model.b.safetensors"], "several variants"),
        (["my_unet.safetensors"], r"knows \(found: my_unet.safetensors\)"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], r"index\.json that lists them"),
        (["diffusion_pytorch_model.bin"], "a pickle: never loaded"),
        ([], "no .safetensors file"),
    ):
        path = path.rename(tmp_path / "weights")
        for name in names:
            shutil.copy(path, unet / name)
        assert re.search(kind, refused(tmp_path / "base"))
        for name in names:
            (unet / name).unlink()


def test_a_forged_list_of_pieces(tmp_path: Path) -> None:
    maps = (
        "[]",
        "{}",
        '{"a": 5}',
        '{"a": "../x.safetensors"}',
        '{"a": ["b"]}',
        '{"a": 1, "b": ""}',
    )
    forged = [f'{{"weight_map": {weight_map}}}' for weight_map in maps]
    for content in (*forged, "{}", "[]", "{", "", "[" * 200_000, "1" * 5000):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(BaseError) as caught:
            find_weights(tmp_path)
        assert str(tmp_path / INDEX) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "in_channels", "4"),
        ("unet", "sample_size", [8, 8]),
        ("unet", "block_out_channels", {"a": 1}),
        ("unet", "down_block_types", ["Nothing", "Nothing", "Nothing"]),
        ("unet", "transformer_layers_per_block", 10**9),
        ("unet", "layers_per_block", [1, 1, 10**400]),
        ("unet", "norm_num_groups", 0),
        ("unet", "architectures", [5]),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "architectures", [5]),
        ("text_encoder_2", "projection_dim", None),
        ("text_encoder_2", "hidden_act", "nothing"),
        ("vae", "scaling_factor", "x"),
        ("scheduler", "num_train_timesteps", 10**12),
        ("scheduler", "prediction_type", ["epsilon"]),
        ("scheduler", "trained_betas", "x"),
        ("scheduler", "beta_start", float("nan")),
    ],
)
def test_a_config_of_wrong_types_is_one_line_with_its_name(
    base: Path, tmp_path: Path, part: str, field: str, value: Any
) -> None:
    from sdxl.load import load_scheduler, model_without_weights

    folder = shutil.copytree(base / part, tmp_path / part)
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    config = json.loads((folder / name).read_text()) | {field: value}
    (folder / name).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, before it fails
        try:
            if part == "scheduler":
                load_scheduler(open_base(tmp_path))
            else:
                model_without_weights(part, open_base(tmp_path).model(part).config)
        except BaseError as error:
            assert "\n" not in str(error)


def test_a_remembered_digest_that_was_changed_is_computed_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = tmp_path / "shardtune" / "fingerprints.json"
    digest = weights_digest(ModelSource("vae", base / "vae"))
    complete = store.read_text()
    assert digest in complete
    for content in (complete.replace(digest, "0" * 64), '{"a": "b"}', "[" * 10_000, ""):
        store.write_text(content)
        assert weights_digest(ModelSource("vae", base / "vae")) == digest
        assert store.read_text() == complete
