"""A LoRA file by the modules of a model: what fits it, and what the file is of where it does not
fit."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from sdxl.adapted import Adapted
from sdxl.kohya import key_table
from sdxl.lora_deltas import Delta
from sdxl.lora_formats import UNET, LoraFile

_OTHERS = {  # by names that only they have
    r"(double|single)_blocks_|single_transformer_blocks_": "Flux",
    r"transformer_blocks_\d+_(img|txt)_m(lp|od)": "Qwen-Image",
    r"joint_blocks_|attn_add_[kqv]_proj|^lora_te3_": "SD3",
    r"prior|down_blocks_\d+_\d+_(channelwise|attention)": "Stable Cascade",
    r"(^|_)blocks_\d+_(self|cross)_attn_": "Wan",
    r"(^|_)layers_\d+_(attention|feed_forward|adaLN)": "Lumina or Z-Image",
}
_CONTEXTS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}  # the width of their text embeddings
# SDXL has no attention at full resolution.
_SD = r"down_blocks_0_attentions|up_blocks_3_attentions|(in|out)put_blocks_(1|2|9|10|11)_1_"
_STATED = ("modelspec.architecture", "ss_base_model_version", "base_model")


def adaptable(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a LoRA can adapt, by their modules' names: [out, in] of
    linears and [out, in, k, k] of convolutions, without regard to adapters that are there."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if ".base_layer" in name or ".lora_" in name:
            continue
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, torch.nn.Linear):
            found[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, torch.nn.Conv2d):
            found[name] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return found


def fit(file: LoraFile, part: str, model: Any) -> dict[str, Adapted]:
    """A part of a LoRA file by the names of the modules of ``model``; of that the shapes are
    enough (the meta device).

    Raises:
        ValueError: a module that the model does not have, or has in another shape; or the file
            holds what can only be merged.
    """
    file.check_adapter(part)
    shapes = adaptable(model)
    found: dict[str, Adapted] = {}
    for name, written, one in _by_name(file, part, shapes, model.config):
        assert isinstance(one, Adapted)
        found[name] = _adapter_of(file, written, one, shapes[name])
    return found


def fit_merged(file: LoraFile, part: str, model: Any) -> dict[str, Adapted | Delta]:
    """The same of a file that is merged into ``model``: norms, embeddings and biases may change as
    well.

    Raises:
        ValueError: a module that the model does not have, or has in another shape.
    """
    shapes, biases = dict(adaptable(model)), {}
    for name, module in model.named_modules():
        kinds = torch.nn.GroupNorm | torch.nn.LayerNorm | torch.nn.Embedding
        if isinstance(module, kinds) and module.weight is not None:
            shapes[name] = tuple(module.weight.shape)
        bias = getattr(module, "bias", None)
        biases[name] = tuple(bias.shape) if isinstance(bias, torch.Tensor) else None
    found: dict[str, Adapted | Delta] = {}
    for name, written, one in _by_name(file, part, shapes, model.config):
        if isinstance(one, Adapted):
            found[name] = _adapter_of(file, written, one, shapes[name])
            continue
        if one.has_weight and (reason := one.mismatch(shapes[name])):
            raise _misfit(file, f"{written} ({one.algorithm.title}): {reason}")
        if one.bias is not None and tuple(one.bias.shape) != biases[name]:
            theirs, ours = list(one.bias.shape), biases[name]
            is_for = "which has none here" if ours is None else f"not {list(ours)}"
            raise _misfit(file, f"its {written} is for a bias of {theirs}, {is_for}")
        found[name] = one
    return found


def _by_name(
    file: LoraFile, part: str, shapes: Mapping[str, Any], config: Any
) -> Iterator[tuple[str, str, Adapted | Delta]]:
    """(module of the model, as the file writes it, what is learned of it)."""
    is_unet = part == UNET
    table = key_table(shapes, config) if is_unet else {_text_key(name): name for name in shapes}
    seen = set()
    for written, one in file.parts.get(part, {}).items():
        key = written.replace(".", "_")
        name = table.get(key if is_unet else _text_key(key))
        if name is None:
            raise _misfit(file, f"it adapts {written}, which this base does not have")
        if name in seen:
            raise ValueError(f"{file.path}: adapts {name} twice")
        seen.add(name)
        yield name, written, one


def _adapter_of(file: LoraFile, written: str, one: Adapted, shape: tuple[int, ...]) -> Adapted:
    """An adapter in the shape of the module it is for."""
    down, up = _shaped(one.down, len(shape)), _shaped(one.up, len(shape))
    if down.ndim != len(shape) or down.shape[1:] != shape[1:] or len(up) != shape[0]:
        theirs = [len(up), *down.shape[1:]]
        raise _misfit(file, f"its {written} is for weights of {theirs}, not {list(shape)}")
    if up.ndim != len(shape) or up.shape[2:].numel() != 1:
        raise ValueError(f"{file.path}: damaged: {written} has an up weight of {list(up.shape)}")
    return replace(one, down=down, up=up)


def _text_key(name: str) -> str:
    """transformers' versions differ in a level of names."""
    return name.replace(".", "_").removeprefix("text_model_")


def _shaped(tensor: torch.Tensor, num_dims: int) -> torch.Tensor:
    """A linear's as a matrix, where it was written as a 1x1 convolution's, and the other way."""
    if num_dims == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor[..., None, None] if num_dims == 4 and tensor.ndim == 2 else tensor


def _misfit(file: LoraFile, reason: str) -> ValueError:
    other = _architecture(file)
    what = f" (a LoRA of {other})" if other else ""
    return ValueError(f"{file.path}: does not fit this base{what}: {reason}")


def _architecture(file: LoraFile) -> str:
    """What a LoRA is of, by its names, its shapes, or what it says; empty where nothing tells."""
    unet = {name.replace(".", "_"): one for name, one in file.parts.get(UNET, {}).items()}
    for pattern, other in _OTHERS.items():
        if any(re.search(pattern, name) for name in unet):
            return other
    for name, one in unet.items():
        width = one.down.shape[1] if isinstance(one, Adapted) else one.num_inputs
        if re.search(r"attn2_to_[kv]$", name) and width in _CONTEXTS:
            return _CONTEXTS[width]
    if any(re.search(_SD, name) for name in unet):
        return "SD 1 or 2"
    return next((file.metadata[key] for key in _STATED if file.metadata.get(key)), "")
