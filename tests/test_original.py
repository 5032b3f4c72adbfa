"""The original layout: its names are SDXL's own, and diffusers reads what is written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl.base import ModelSource, open_base
from sdxl.fingerprint import config_digest, weights_digest
from sdxl.load import load_text_encoders, load_unet, load_vae
from sdxl.metadata import Schedule
from sdxl.original_names import PREFIXES, OriginalNames
from sdxl.single_file import read_header, sdxl_config
from sdxl.write_original import Component, configs_metadata, original_shapes, write_original
from tests.singles import MODELS, parts_of, write_single

# Digest of the lines "name [shape]" of all tensors of sd_xl_base_1.0.safetensors, sorted.
SDXL_NAMES = "ee6d8435b5310eab19701490cac32617bef482fc5d9d2aa780c11dc8627e990c"
SAMPLES = {
    "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
    "model.diffusion_model.input_blocks.6.0.op.weight": [640, 640, 3, 3],
    "model.diffusion_model.output_blocks.5.2.conv.bias": [640],
    "model.diffusion_model.output_blocks.3.0.skip_connection.weight": [640, 1920, 1, 1],
    "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": [10240, 1280],
    "first_stage_model.decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3],
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": [768],
    "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
    "conditioner.embedders.1.model.positional_embedding": [77, 1280],
    "conditioner.embedders.1.model.text_projection": [1280, 1280],
    "conditioner.embedders.1.model.logit_scale": [],
}


@pytest.fixture(scope="module")
def single(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single(base, tmp_path_factory.mktemp("single") / "small.safetensors")


def full_size_parts() -> dict[str, Component]:
    """SDXL's models by its configs, without data."""
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
    kinds["text_encoder_2"] = CLIPTextModelWithProjection
    with torch.device("meta"):
        models = {name: k(CLIPTextConfig(**sdxl_config(name))) for name, k in kinds.items()}
        models["unet"] = UNet2DConditionModel.from_config(sdxl_config("unet"))
        models["vae"] = AutoencoderKL.from_config(sdxl_config("vae"))
    return {
        name: Component(sdxl_config(name), model.state_dict()) for name, model in models.items()
    }


def test_full_size_names_and_shapes_are_those_of_sdxls_own_file() -> None:
    shapes = original_shapes(full_size_parts())
    assert len(shapes) == 2514
    assert {name: shapes.get(name) for name in SAMPLES} == SAMPLES
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == SDXL_NAMES


@pytest.mark.parametrize("component", MODELS)
def test_every_name_comes_back(base: Path, component: str) -> None:
    for part in (full_size_parts() if component == "unet" else {}, parts_of(base)):
        if component not in part:
            continue
        names = OriginalNames(component, part[component].config)
        keys = {names.key_of(name) for name in part[component].tensors}
        back = [name for key in keys for name in names.names_of(key or "") or ()]
        assert sorted(back) == sorted(part[component].tensors)


@pytest.mark.parametrize("component", MODELS)
def test_a_name_of_another_model_has_no_place(base: Path, component: str) -> None:
    names = OriginalNames(component, parts_of(base)[component].config)
    if component != "text_encoder":  # whose names are the same in both
        assert names.key_of("down_blocks.7.resnets.0.conv1.weight") is None
        assert names.names_of("input_blocks.77.0.op.weight") is None


def test_diffusers_own_reader_finds_the_same_weights(single: Path, base: Path) -> None:
    expected = StableDiffusionXLPipeline.from_single_file(
        str(single), config=str(base), torch_dtype=torch.float32
    )
    for name, part in parts_of(base).items():
        state = getattr(expected, name).state_dict()
        assert part.tensors.keys() <= state.keys()
        for key, tensor in part.tensors.items():
            assert torch.equal(state[key], tensor), (name, key)


def load_all(path: Path, dtype: torch.dtype) -> list[Any]:
    base = open_base(path)
    encoders = load_text_encoders(base, dtype)
    return [load_unet(base.unet, dtype), load_vae(base.vae, dtype), *encoders]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_of_the_file_is_that_of_the_folder(
    single: Path, base: Path, dtype: torch.dtype
) -> None:
    for actual, expected in zip(load_all(single, dtype), load_all(base, dtype), strict=True):
        first, second = actual.state_dict(), expected.state_dict()
        assert list(first) == list(second)
        for name in first:
            assert torch.equal(first[name], second[name]), name
            assert first[name].dtype == dtype
        buffers = dict(expected.named_buffers())
        assert all(torch.equal(buffer, buffers[n]) for n, buffer in actual.named_buffers())
        assert not actual.training
        assert not any(parameter.requires_grad for parameter in actual.parameters())


@pytest.mark.parametrize("component", MODELS)
def test_digests_of_file_and_folder_agree(single: Path, base: Path, component: str) -> None:
    assert weights_digest(open_base(single).model(component)) == weights_digest(
        ModelSource(component, base / component)
    )
    first, second = (config_digest(open_base(b).model(component).config) for b in (single, base))
    assert first == second


def test_the_digest_is_over_name_dtype_shape_and_bytes_in_order(base: Path, single: Path) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(parts_of(base)["text_encoder_2"].tensors.items()):
        digest.update(f"{name} F32 {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert weights_digest(open_base(single).model("text_encoder_2")) == digest.hexdigest()


def test_a_changed_number_changes_the_digest_of_its_model_alone(
    single: Path, base: Path, tmp_path: Path
) -> None:
    parts = parts_of(base)
    projection = parts["text_encoder_2"].tensors["text_projection.weight"]
    projection[3, 5] += 1
    write_original(tmp_path / "other.safetensors", parts)
    changed = [
        name
        for name in MODELS
        if weights_digest(open_base(single).model(name))
        != weights_digest(open_base(tmp_path / "other.safetensors").model(name))
    ]
    assert changed == ["text_encoder_2"]


def test_older_names_in_a_folder_have_the_same_digest(base: Path, tmp_path: Path) -> None:
    old = {
        "text_encoder": lambda name: f"text_model.{name}",
        "vae": lambda name: (
            name.replace("to_q", "query").replace("to_out.0", "proj_attn").replace("to_v", "value")
            if ".attentions.0." in name
            else name
        ),
    }
    for component, rename in old.items():
        part = parts_of(base)[component]
        folder = tmp_path / component
        folder.mkdir()
        tensors = {rename(name): tensor for name, tensor in part.tensors.items()}
        assert tensors.keys() != part.tensors.keys()
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        assert weights_digest(ModelSource(component, folder)) == weights_digest(
            ModelSource(component, base / component)
        )


def test_the_file_is_one_that_the_library_reads_and_the_same_each_time(
    base: Path, tmp_path: Path
) -> None:
    fields = {"modelspec.title": "small", "license": "none", "a": "b"}
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for path in paths:
        write_single(base, path, metadata=fields, dtype=torch.float16)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with safe_open(paths[0], framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
        projection = file.get_tensor(PREFIXES["text_encoder_2"] + "text_projection")
    assert metadata.items() >= {**fields, "format": "pt"}.items()
    expected = parts_of(base)["text_encoder_2"].tensors["text_projection.weight"]
    assert torch.equal(projection, expected.half().T)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]


def test_mixed_dtypes_are_kept(base: Path, tmp_path: Path) -> None:
    parts = parts_of(base)
    vae = parts["vae"]
    in_bf16 = {name: tensor.bfloat16() for name, tensor in parts["unet"].tensors.items()}
    path = tmp_path / "mixed.safetensors"
    write_original(path, {"unet": Component(parts["unet"].config, in_bf16), "vae": vae})
    dtypes = {name: item.dtype for name, item in read_header(path)[0].items()}
    assert {d for n, d in dtypes.items() if n.startswith(PREFIXES["unet"])} == {"BF16"}
    assert {d for n, d in dtypes.items() if n.startswith(PREFIXES["vae"])} == {"F32"}
    unet = load_unet(open_base(path).unet, torch.bfloat16)
    assert all(torch.equal(tensor, in_bf16[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [None, False, True])
def test_what_it_predicts_is_written_as_bare_keys(
    base: Path, tmp_path: Path, prediction_type: str, zero_snr: bool | None
) -> None:
    path = tmp_path / "one.safetensors"
    write_single(base, path, schedule=Schedule(prediction_type, zero_snr))
    with safe_open(path, framework="pt") as file:
        bare = {name for name in file.keys() if "." not in name}  # noqa: SIM118
    expected = {"v_pred"} if prediction_type == "v_prediction" else set()
    assert bare == expected | ({"ztsnr"} if zero_snr else set())


def test_only_other_sizes_than_sdxls_are_written_into_the_metadata(
    single: Path, base: Path
) -> None:
    _, metadata = read_header(single)
    assert json.loads(metadata["shardtune.configs"]).keys() == set(MODELS)
    assert configs_metadata(full_size_parts()) == {}
    part = parts_of(base)["vae"]
    moved = {"vae": Component({**part.config, "_name_or_path": "/home/someone"}, part.tensors)}
    assert "someone" not in configs_metadata(moved)["shardtune.configs"]


def test_a_failed_write_leaves_nothing(base: Path, tmp_path: Path) -> None:
    parts = parts_of(base)
    del parts["text_encoder_2"].tensors["text_model.encoder.layers.1.self_attn.k_proj.bias"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"text_encoder_2: .*k_proj\.bias is missing"):
        write_original(tmp_path / "one.safetensors", parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("component", ["vae", "text_encoder", "text_encoder_2"])
def test_a_config_saved_by_todays_libraries_has_the_same_digest(component: str) -> None:
    config = sdxl_config(component)
    if component == "vae":
        with torch.device("meta"):
            text = AutoencoderKL.from_config(config).to_json_string()
    else:
        text = CLIPTextConfig(**config).to_json_string()
    saved = json.loads(text)
    assert saved != config
    assert config_digest(saved) == config_digest(config)
    changed = {"scaling_factor": 1.0} if component == "vae" else {"layer_norm_eps": 1e-6}
    assert config_digest({**saved, **changed}) != config_digest(config)
