"""A LoRA file by the modules of a model: what fits it, and what the file is of where it does not
fit."""

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from sdxl.adapted import Adapted
from sdxl.kohya import key_table
from sdxl.lora_formats import UNET, LoraFile

_OTHERS = {  # by names that only they have
    r"(double|single)_blocks_|single_transformer_blocks_": "Flux",
    r"joint_blocks_|attn_add_[kqv]_proj|^lora_te3_": "SD3",
    r"prior|down_blocks_\d+_\d+_(channelwise|attention)": "Stable Cascade",
}
_CONTEXTS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}  # the width of their text embeddings
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
        ValueError: a module that the model does not have, or has in another shape.
    """
    is_unet = part == UNET
    shapes = adaptable(model)
    table = (
        key_table(shapes, model.config) if is_unet else {_text_key(name): name for name in shapes}
    )
    found: dict[str, Adapted] = {}
    for written, one in file.parts.get(part, {}).items():
        key = written.replace(".", "_")
        name = table.get(key if is_unet else _text_key(key))
        if name is None:
            raise _misfit(file, f"it adapts {written}, which this base does not have")
        if name in found:
            raise ValueError(f"{file.path}: adapts {name} twice")
        shape = shapes[name]
        down, up = _shaped(one.down, len(shape)), _shaped(one.up, len(shape))
        if down.shape[1:] != shape[1:] or len(up) != shape[0]:
            theirs = [len(up), *down.shape[1:]]
            raise _misfit(file, f"its {written} is for weights of {theirs}, not {list(shape)}")
        found[name] = Adapted(down, up, one.alpha, one.rslora, one.magnitude)
    if len({one.magnitude is None for one in found.values()}) > 1:
        raise ValueError(f"{file.path}: has DoRA on some modules only, which cannot be read")
    return found


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
    names = [name.replace(".", "_") for name in file.parts.get(UNET, {})]
    for pattern, other in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return other
    for name, one in file.parts.get(UNET, {}).items():
        if re.search(r"attn2[._]to_[kv]$", name) and one.down.shape[1] in _CONTEXTS:
            return _CONTEXTS[one.down.shape[1]]
    return next((file.metadata[key] for key in _STATED if file.metadata.get(key)), "")
