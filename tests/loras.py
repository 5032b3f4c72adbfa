"""LoRAs for the tests: on a small UNet, in every form, and what they add computed plainly."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from made import learner_of

from sdxl.lora.names import KOHYA, LORA
from sdxl.lora.read import read_lora_file
from sdxl.lora.write import kohya_bytes, lora_bytes
from sdxl.metadata import ModelMetadata

Tensors = dict[str, torch.Tensor]


def made_lora(base: Path, folder: Path, **settings: Any) -> Any:
    """A UNet with a random LoRA on it, and the files that a run would write of it."""
    unet = learner_of(base, **settings).unet
    for name, parameter in unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in lora_bytes(unet).items():
        (folder / name).write_bytes(data)
    if KOHYA not in lora_bytes(unet):  # of a DoRA only export writes it
        parts = read_lora_file(folder / LORA).parts
        (folder / KOHYA).write_bytes(kohya_bytes(parts, unet.config, ModelMetadata()))
    return unet


def lora_factors(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """By module: down, up, and the magnitude of DoRA."""
    results: dict[str, dict[str, torch.Tensor]] = {}
    kinds = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
    for name, parameter in unet.named_parameters():
        if match := re.fullmatch(r"(.*)\.(lora_\w+)\.\w+\.weight", name):
            results.setdefault(match[1], {})[kinds[match[2]]] = parameter.detach().clone()
    return results


@cache
def _plain(base: Path) -> Tensors:
    state: Tensors = UNet2DConditionModel.from_pretrained(base / "unet").state_dict()
    return state


def plain(base: Path) -> Tensors:
    """The weights of the base's UNet."""
    return {name: tensor.clone() for name, tensor in _plain(base).items()}


def fused_by_diffusers(base: Path, lora: Path) -> Tensors:
    """The same by the pipeline's own loader and its own fusing."""
    models = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    pipeline = StableDiffusionXLPipeline(**models, unet=unet, scheduler=None, add_watermarker=False)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    state: Tensors = unet.state_dict()
    return state


def fused(base: Path, unet: Any, scale: float) -> Tensors:
    """All weights of the base with scale B A in them, and with DoRA's rows."""
    weights = plain(base)
    for module, factors in lora_factors(unet).items():
        down, up = factors["down"], factors["up"]
        product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        merged = weights[f"{module}.weight"] + scale * product.reshape(len(up), *down.shape[1:])
        if "magnitude" in factors:
            rows = factors["magnitude"].flatten() / merged.square().flatten(1).sum(1).sqrt()
            merged = merged * rows.reshape(-1, *[1] * (merged.ndim - 1))
        weights[f"{module}.weight"] = merged
    return weights


def state_after(unet: Any) -> Tensors:
    """The weights of a UNet with all that is on it merged into them."""
    for module in list(unet.modules()):
        if hasattr(module, "merge"):
            module.merge()
    state = {name.replace(".base_layer", ""): t for name, t in unet.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}


def assert_close(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, atol=2e-6, rtol=1e-5), name


def num_changed(actual: Tensors, base: Path) -> int:
    """Weights that are not the base's any more."""
    before = _plain(base)
    return sum(not torch.allclose(actual[n], before[n], atol=1e-4) for n in before)


def as_diffusers(unet: Any, prefix: str = "unet.", old: bool = False) -> Tensors:
    """Without settings; ``old``: as attention processors kept theirs."""
    state = {}
    for module, factors in lora_factors(unet).items():
        if old:
            name = re.sub(r"\.to_out\.0$", ".to_out", module)
            name = re.sub(r"\.(to_\w+)$", r".processor.\1_lora", name)
            state[f"{prefix}{name}.down.weight"] = factors["down"]
            state[f"{prefix}{name}.up.weight"] = factors["up"]
        else:
            state[f"{prefix}{module}.lora_A.weight"] = factors["down"]
            state[f"{prefix}{module}.lora_B.weight"] = factors["up"]
    return state


def as_peft(unet: Any, folder: Path, **settings: Any) -> Path:
    """A folder as peft's ``save_pretrained`` leaves it."""
    folder.mkdir()
    state = as_diffusers(unet, "base_model.model.")
    safetensors.torch.save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "target_modules": ["to_q"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_underscored(unet: Any, alpha: float) -> Tensors:
    """kohya's tensors under diffusers' names, as some trainers write them."""
    state: Tensors = {}
    for module, factors in lora_factors(unet).items():
        key = "lora_unet_" + module.replace(".", "_")
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = (
            factors["down"],
            factors["up"],
        )
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def text_lora(rank: int, alpha: float, widths: tuple[int, int]) -> Tensors:
    """kohya's tensors for the first attention of both text encoders."""
    state: Tensors = {}
    for number, width in enumerate(widths, 1):
        for projection in ("q", "out"):
            key = f"lora_te{number}_text_model_encoder_layers_0_self_attn_{projection}_proj"
            state[f"{key}.lora_down.weight"] = torch.randn(rank, width) / 4
            state[f"{key}.lora_up.weight"] = torch.randn(width, rank) / 4
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state
