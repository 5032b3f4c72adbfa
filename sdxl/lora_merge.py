"""LoRA files merged into the weights of a model: what peft's adapters cannot hold."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sdxl.adapted import Adapted
from sdxl.lora_deltas import Delta
from sdxl.lora_fit import fit_merged
from sdxl.lora_formats import LoraFile


def merged_weights(
    model: Any, part: str, files: Sequence[tuple[LoraFile, float]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of ``model`` that LoRA files change, each at its strength, in fp32, one after
    the other.

    Each file adds the difference that it makes of the base's weights, so that the order of several
    does not matter; at strength 0 it adds nothing.

    Raises:
        ValueError: a file does not fit the model, or what it makes is not finite.
    """
    changes: dict[str, list[tuple[Path, Adapted | Delta, float]]] = defaultdict(list)
    for file, strength in files:
        for module, one in fit_merged(file, part, model).items():
            if strength:
                changes[module].append((file.path, one, strength))
    parameters = dict(model.named_parameters())
    for module, several in changes.items():
        for name, change in (("weight", _change_weight), ("bias", _change_bias)):
            key = f"{module}.{name}"
            if key not in parameters:
                continue
            before = parameters[key].detach().float()
            after = before
            for path, one, strength in several:
                merged = change(one, before, strength)
                if merged is None:
                    continue
                after = merged if after is before else after + (merged - before)
                if not after.isfinite().all():
                    raise ValueError(f"{path}: damaged: with it {key} is not finite")
            if after is not before:
                yield key, after


def _change_weight(
    one: Adapted | Delta, weight: torch.Tensor, strength: float
) -> torch.Tensor | None:
    if isinstance(one, Delta) and not one.has_weight:
        return None
    return one.merged(weight, strength)


def _change_bias(one: Adapted | Delta, bias: torch.Tensor, strength: float) -> torch.Tensor | None:
    difference = one.bias if isinstance(one, Delta) else None
    return None if difference is None else bias + strength * difference.float()


def merge_loras(model: Any, part: str, files: Sequence[tuple[LoraFile, float]]) -> None:
    """Put the sum of several LoRA files into the weights of ``model``, in the dtype they have."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in merged_weights(model, part, files):
            parameters[key].copy_(tensor)
