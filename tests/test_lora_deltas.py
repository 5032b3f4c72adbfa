"""What LyCORIS's algorithms add to a weight: compared with the ``lycoris-lora`` package, which
trains them, on the layers of a UNet, and through files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

from sdxl.base import open_base
from sdxl.load import load_unet
from sdxl.lora.apply import merge_loras, merged_weights
from sdxl.lora.names import UNET
from sdxl.lora.read import read_lora_file

Tensors = dict[str, torch.Tensor]
BLOCK = "down_blocks.1.attentions.0"
LAYERS = {  # diffusers' names by kohya's: linear layers, a 3x3 and a 1x1 convolution
    "input_blocks_3_1_transformer_blocks_0_attn1_to_q": f"{BLOCK}.transformer_blocks.0.attn1.to_q",
    "input_blocks_3_1_transformer_blocks_0_attn2_to_k": f"{BLOCK}.transformer_blocks.0.attn2.to_k",
    "input_blocks_3_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_3_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
}
NORMS = {
    "input_blocks_3_0_in_layers_0": "down_blocks.1.resnets.0.norm1",
    "input_blocks_3_1_transformer_blocks_0_norm1": f"{BLOCK}.transformer_blocks.0.norm1",
}
LOW_RANK = {"lora_dim": 3, "alpha": 1.5}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoCon, Tucker": (LoConModule, {**LOW_RANK, "use_tucker": True}),
    "DoRA, inputs": (LoConModule, {**LOW_RANK, "weight_decompose": True, "wd_on_out": False}),
    "LoHa": (LohaModule, LOW_RANK),
    "LoHa, Tucker": (LohaModule, {**LOW_RANK, "use_tucker": True}),
    "LoHa, rank-stabilized": (LohaModule, {**LOW_RANK, "rs_lora": True}),
    "LoHa, DoRA": (LohaModule, {**LOW_RANK, "weight_decompose": True}),
    "LoHa, DoRA, inputs": (LohaModule, {**LOW_RANK, "weight_decompose": True, "wd_on_out": False}),
    "LoKr": (LokrModule, {"lora_dim": 2, "alpha": 3.0, "factor": 4}),
    "LoKr, both": (LokrModule, {"lora_dim": 1, "alpha": 0.5, "decompose_both": True}),
    "LoKr, Tucker": (LokrModule, {"lora_dim": 1, "alpha": 3.0, "factor": 2, "use_tucker": True}),
    "LoKr, whole": (LokrModule, {"lora_dim": 4, "alpha": 1.0, "full_matrix": True}),
    "LoKr, DoRA": (LokrModule, {"lora_dim": 2, "factor": 4, "weight_decompose": True}),
    "GLoRA": (GLoRAModule, LOW_RANK),
    "(IA)^3, outputs": (IA3Module, {}),
    "(IA)^3, inputs": (IA3Module, {"train_on_input": True}),
    "OFT": (DiagOFTModule, {"lora_dim": 4}),
    "OFT, bound, rescaled": (DiagOFTModule, {"constraint": 0.01, "rescaled": True}),
    "BOFT": (ButterflyOFTModule, {"lora_dim": 8}),
    "BOFT, bound, rescaled": (ButterflyOFTModule, {"constraint": 0.01, "rescaled": True}),
    "full": (FullModule, {}),
    "norms": (NormModule, {}),
}
PLAIN: dict[str, tuple[Any, dict[str, Any]]] = {  # of which peft's adapters are made
    "LoRA": (LoConModule, LOW_RANK),
    "DoRA": (LoConModule, {**LOW_RANK, "weight_decompose": True}),
}


def made(kind: str, layer: Any) -> tuple[Any, Tensors]:
    """LyCORIS's module on a layer, with random factors, and what it saves of them."""
    make, settings = (KINDS | PLAIN)[kind]
    module = make("", layer, **settings)
    with torch.no_grad():
        for name, factor in module.named_parameters():
            if name in ("dora_scale", "rescale"):
                factor.mul_(1 + 0.3 * torch.rand_like(factor))
            else:
                factor.copy_(0.5 * torch.randn_like(factor))
    if kind == "full":  # its own state_dict assumes that it is in the layer's place
        return module, {"diff": module.weight, "diff_b": module.bias}
    return module, module.state_dict()


def written(path: Path, modules: dict[str, Tensors]) -> Path:
    tensors = {
        f"{key}.{name}": tensor.detach().clone().contiguous()
        for key, module in modules.items()
        for name, tensor in module.items()
        if tensor is not None
    }
    safetensors.torch.save_file(tensors, path)
    return path


def inputs_of(layer: Any) -> torch.Tensor:
    if isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm):
        return torch.randn(2, layer.weight.shape[isinstance(layer, torch.nn.Conv2d)], 6, 5)
    return torch.randn(2, layer.weight.shape[-1])


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    return load_unet(open_base(base).unet, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_computes_what_lycoris_does(plain: Any, tmp_path: Path, kind: str) -> None:
    """The reference is its forward pass, which is what was trained. (Its own merging applies the
    scale of LoHa and LoKr twice.)"""
    torch.manual_seed(0)
    layers = NORMS if kind == "norms" else LAYERS
    references, states = {}, {}
    for key, name in layers.items():
        references[name], states[f"lora_unet_{key}"] = made(kind, plain.get_submodule(name))
    file = read_lora_file(written(tmp_path / "lycoris.safetensors", states))
    assert file.merged_parts == {UNET}
    for strength in (1.0, 0.6, -0.5):
        merged = dict(merged_weights(plain, UNET, [(file, strength)]))
        for name, module in references.items():
            layer = plain.get_submodule(name)
            values = {n: merged.get(f"{name}.{n}", p) for n, p in layer.named_parameters()}
            inputs, module.multiplier = inputs_of(layer), strength
            with torch.no_grad():
                expected, before = module(inputs), layer(inputs)
                actual = torch.func.functional_call(layer, values, inputs)
            assert (expected - before).abs().max() > 0.02, name
            assert torch.allclose(actual, expected, atol=3e-5, rtol=1e-4), (name, strength)


def merged_of(plain: Any, path: Path, states: dict[str, Tensors], strength: float = 1.0) -> Tensors:
    file = read_lora_file(written(path, states))
    return dict(merged_weights(plain, UNET, [(file, strength)]))


def test_other_spellings_are_the_same_weights(plain: Any, tmp_path: Path) -> None:
    """Without alpha, with a learned factor, in another precision, of early LyCORIS versions."""
    torch.manual_seed(1)
    key, name = next(iter(LAYERS.items()))
    layer = plain.get_submodule(name)

    def merged(state: Tensors) -> torch.Tensor:
        return merged_of(plain, tmp_path / "a", {f"lora_unet_{key}": state})[f"{name}.weight"]

    _, loha = made("LoHa", layer)
    bare = {name: tensor for name, tensor in loha.items() if name != "alpha"}
    difference = merged(bare) - layer.weight
    scaled = merged({**bare, "alpha": torch.tensor([6.0]), "scalar": torch.tensor(0.25)})
    assert torch.allclose(scaled - layer.weight, 6 / 3 * 0.25 * difference, atol=1e-6)
    in_fp16 = merged({name: tensor.half() for name, tensor in bare.items()})
    assert torch.allclose(in_fp16 - layer.weight, difference, atol=5e-3)
    _, glora = made("GLoRA", layer)
    swapped = dict(zip(["a1", "a2", "b1", "b2"], ["a2", "a1", "b2", "b1"], strict=True))
    early = {f"{old}.weight": glora[f"{new}.weight"] for old, new in swapped.items()}
    assert torch.equal(merged({**early, "alpha": glora["alpha"]}), merged(glora))
    module, oft = made("OFT", layer)
    with torch.no_grad():
        rotation = module.get_r()
    assert torch.allclose(merged({"oft_diag": rotation}), merged(oft), atol=1e-5)


def test_several_files_add_their_own_differences_of_the_base(plain: Any, tmp_path: Path) -> None:
    """In any order, with a LoRA beside norms in one file; at strength 0 nothing."""
    torch.manual_seed(2)
    key, name = next(iter(LAYERS.items()))
    norm_key, norm_name = next(iter(NORMS.items()))
    down, up = torch.randn(4, 32), torch.randn(32, 4) / 8
    states: list[dict[str, Tensors]] = [
        {f"lora_unet_{key}": made("OFT", plain.get_submodule(name))[1]},
        {f"lora_unet_{key}": made("GLoRA", plain.get_submodule(name))[1]},
        {
            f"lora_unet_{key}": {"lora_down.weight": down, "lora_up.weight": up},
            f"lora_unet_{norm_key}": {"w_norm": torch.ones(16), "b_norm": -torch.ones(16)},
        },
    ]
    paths = [written(tmp_path / str(number), state) for number, state in enumerate(states)]
    files = [
        (read_lora_file(path), weight) for path, weight in zip(paths, (0.5, 1, 2), strict=True)
    ]
    before = plain.get_submodule(name).weight.detach()
    expected = before + 2 * up @ down
    for file, weight in files[:2]:
        alone = dict(merged_weights(plain, UNET, [(file, weight)]))
        expected = expected + alone[f"{name}.weight"] - before
    for order in (files, files[::-1]):
        merged = dict(merged_weights(plain, UNET, order))
        assert merged.keys() == {f"{name}.weight", f"{norm_name}.weight", f"{norm_name}.bias"}
        assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-5)
        norm = plain.get_submodule(norm_name)
        assert torch.allclose(merged[f"{norm_name}.bias"], norm.bias - 2)
    assert not dict(merged_weights(plain, UNET, [(file, 0.0) for file, _ in files]))
    half = copy.deepcopy(plain).half()
    rounded = dict(merged_weights(half, UNET, files))
    merge_loras(half, UNET, files)
    assert torch.equal(half.get_submodule(name).weight, rounded[f"{name}.weight"].half())


def test_dora_on_some_modules_only_is_merged(plain: Any, tmp_path: Path) -> None:
    """A LoRA beside a DoRA in one file, which peft cannot hold."""
    torch.manual_seed(4)
    references, states = {}, {}
    for number, (key, name) in enumerate(LAYERS.items()):
        layer = plain.get_submodule(name)
        references[name], states[f"lora_unet_{key}"] = made("DoRA" if number else "LoRA", layer)
    merged = merged_of(plain, tmp_path / "a", states)
    for name, module in references.items():
        expected = module.get_merged_weight()[0]
        assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-5), name
