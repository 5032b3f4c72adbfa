"""kohya's files: names against a published list, strength against diffusers' loader, metadata."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from loras import (
    assert_close,
    fused,
    fused_by_diffusers,
    lora_factors,
    made_lora,
    num_changed,
    plain,
    state_after,
)
from safetensors import safe_open

from sdxl.base import open_base
from sdxl.load import load_unet, model_without_weights
from sdxl.lora.apply import adaptable, load_lora
from sdxl.lora.names import KOHYA, UNET, kohya_keys
from sdxl.lora.weights import LoraWeights
from sdxl.lora.write import kohya_metadata, kohya_state
from sdxl.metadata import ModelMetadata
from sdxl.single_file import sdxl_config
from sdxl.tensor_files import KEY, METADATA_KEY, sorted_metadata_bytes
from train.unet import TARGETS

# sha256 of the lines "name [shape]" of the UNet's part of a rank 8 LoRA on all linears of SDXL's
# transformers, as kohya's scripts write it: 722 modules, three tensors each.
SDXL_KEYS = "ff171fe34cc8671a28a1e895a46901f7d7b36470193823b3896a810641821eea"
EXAMPLES = {
    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": [8, 640],
    "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj.lora_up.weight": [10240, 8],
    "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_down.weight": [8, 2048],
    "lora_unet_output_blocks_0_1_transformer_blocks_3_attn1_to_out_0.alpha": [],
    "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2.lora_down.weight": [8, 2560],
}


def test_names_and_shapes_at_full_size_are_the_published_ones() -> None:
    import re

    unet = model_without_weights(UNET, sdxl_config(UNET))
    results = {
        name: LoraWeights(torch.empty(8, *shape[1:], device="meta"), torch.empty(shape[0], 8), 3.0)
        for name, shape in adaptable(unet).items()
        if re.fullmatch(TARGETS["all"], name)
    }
    state = kohya_state({UNET: results}, unet.config)
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    assert len(results) == 722 and len(shapes) == 3 * 722
    assert shapes == shapes | EXAMPLES
    lines = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == SDXL_KEYS


def test_every_linear_and_convolution_has_a_key_of_its_own(base: Path) -> None:
    """For SDXL, and for a UNet with other numbers of layers."""
    for config in (sdxl_config(UNET), json.loads((base / "unet" / "config.json").read_bytes())):
        unet = model_without_weights(UNET, config)
        keys = kohya_keys(adaptable(unet), unet.config)
        assert keys.keys() == adaptable(unet).keys()
        assert len(set(keys.values())) == len(keys)
    assert (
        keys["down_blocks.1.resnets.0.conv_shortcut"]
        == "lora_unet_input_blocks_3_0_skip_connection"
    )
    assert keys["up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_1_2_conv"


CASES: list[tuple[dict[str, Any], float]] = [
    ({"rank": 4, "alpha": 16.0}, 16 / 4),
    ({"rank": 8, "alpha": 3.0}, 3 / 8),
    ({"rank": 8, "alpha": 3.0, "adapter": "rslora"}, 3 / math.sqrt(8)),
    ({"rank": 4, "alpha": 16.0, "conv": True}, 16 / 4),
    ({"rank": 8, "alpha": 3.0, "adapter": "dora"}, 3 / 8),
    ({"rank": 4, "alpha": 16.0, "adapter": "dora", "conv": True}, 16 / 4),
]


@pytest.mark.parametrize(("settings", "scale"), CASES[:4])
def test_diffusers_fuses_what_the_adapter_adds(
    base: Path, tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    unet = made_lora(base, tmp_path, targets="all", **settings)
    result = fused_by_diffusers(base, tmp_path / KOHYA)
    assert_close(result, fused(base, unet, scale))
    assert num_changed(result, base) == len(lora_factors(unet)) > 30


@pytest.mark.parametrize(("settings", "scale"), CASES)
def test_what_is_read_again_adds_the_same(
    base: Path, tmp_path: Path, settings: dict[str, Any], scale: float
) -> None:
    unet = made_lora(base, tmp_path, targets="all", **settings)
    again = load_unet(open_base(base).unet, torch.float32)
    load_lora(again, tmp_path / KOHYA)
    state = state_after(again)
    assert_close(state, fused(base, unet, scale))
    assert num_changed(state, base) == len(lora_factors(unet)) > 30


@pytest.mark.parametrize("conv", [False, True])
def test_dora_by_arithmetic(base: Path, tmp_path: Path, conv: bool) -> None:
    """Row by row from the file alone: dora_scale (W + alpha / r B A) / its norm."""
    settings = {"rank": 8, "alpha": 3.0, "adapter": "dora", "conv": conv, "targets": "all"}
    unet = made_lora(base, tmp_path, **settings)
    state = safetensors.torch.load_file(tmp_path / KOHYA)
    weights = plain(base)
    merged = state_after(unet)
    keys = kohya_keys(lora_factors(unet), unet.config)
    assert len(keys) > 30 and len(state) == 4 * len(keys)
    for module, key in keys.items():
        down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
        scale, rows = float(state[f"{key}.alpha"]) / len(down), state[f"{key}.dora_scale"]
        weight = weights[f"{module}.weight"]
        assert rows.shape == (len(weight), *[1] * (weight.ndim - 1))
        total = weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        for row in range(0, len(weight), 7):
            expected = rows[row].item() * total[row] / total[row].norm()
            assert torch.allclose(merged[f"{module}.weight"][row], expected, atol=2e-6), module


def test_metadata_is_what_uis_read(base: Path, tmp_path: Path) -> None:
    unet = made_lora(base, tmp_path, rank=8, alpha=3.0, adapter="rslora", targets="all")
    parts = {
        n: LoraWeights(o["down"], o["up"], 3.0, rslora=True) for n, o in lora_factors(unet).items()
    }
    card = ModelMetadata(
        name="hearts",
        base="sdxl",
        license="openrail++",
        caches=("12ab",),
        steps=70,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    metadata = kohya_metadata(parts, card, 1024)
    assert all(isinstance(value, str) for value in metadata.values())
    assert (
        metadata.items()
        >= {
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "8",
            "ss_network_alpha": str(3 * math.sqrt(8)),
            "ss_v2": "False",
            "ss_output_name": "hearts",
            "ss_steps": "70",
            "ss_zero_terminal_snr": "True",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.prediction_type": "v",
            "modelspec.license": "openrail++",
            "modelspec.title": "hearts",
            "modelspec.resolution": "1024x1024",
        }.items()
    )
    assert json.loads(metadata["shardtune"])["caches"] == ["12ab"]
    with safe_open(tmp_path / KOHYA, framework="pt") as file:
        assert file.metadata().keys() <= metadata.keys() | {KEY, METADATA_KEY}


def test_equal_content_is_equal_bytes() -> None:
    """The library's order of metadata is another one each time."""
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    metadata = {f"key {number}": f'ü"\\\n{number}' for number in range(12)}
    plain = {safetensors.torch.save(tensors, metadata=metadata) for _ in range(10)}
    sorted_files = {sorted_metadata_bytes(tensors, metadata) for _ in range(10)}
    assert len(plain) > 1 and len(sorted_files) == 1
    again = safetensors.torch.load(sorted_files.pop())
    assert torch.equal(again["b"], tensors["b"]) and again["a"].dtype == torch.float16
