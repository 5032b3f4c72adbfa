"""The small bases as one file in the original layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sdxl.base import find_weights, read_config
from sdxl.write_original import Component, write_original

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
Tensors = dict[str, torch.Tensor]


def parts_of(base: Path) -> dict[str, Component]:
    """All models of a diffusers folder."""
    parts = {}
    for name in MODELS:
        tensors: Tensors = {}
        for file in find_weights(base / name).files:
            tensors |= safetensors.torch.load_file(file)
        parts[name] = Component(read_config(base / name), tensors)
    return parts


def write_single(base: Path, path: Path, *without: str, **settings: Any) -> Path:
    """A diffusers folder as one file, less the models ``without``."""
    parts = {name: part for name, part in parts_of(base).items() if name not in without}
    write_original(path, parts, **settings)
    return path


def rewrite(path: Path, changes: Mapping[str, torch.Tensor | None], out: Path) -> Path:
    """A safetensors file with other tensors; None takes one away."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    safetensors.torch.save_file(kept, out, metadata=metadata)
    return out
