"""LoRA files on a model, each at its strength."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from sdxl.adapted import Adapted
from sdxl.card import Card
from sdxl.long_captions import check_long_captions
from sdxl.lora_fit import fit
from sdxl.lora_formats import LORA as LORA
from sdxl.lora_formats import (
    OURS,
    PREFIXES,
    UNET,
    LoraFile,
    find_lora,
    is_extra,
    lora_card,
    open_lora,
    read_lora_file,
)
from sdxl.lora_merge import merge_loras
from sdxl.lora_write import peft_config
from sdxl.schedule import Schedule

TEXT_PREFIXES = tuple(prefix for prefix, part in PREFIXES.items() if part != UNET)


def num_lora_parameters(path: Path) -> int:
    """Of the UNet's part of a LoRA file, by its header.

    Raises:
        ValueError: no safetensors file.
    """
    with open_lora(find_lora(path)) as file:
        every = [name for name in file.keys() if not is_extra(name)]  # noqa: SIM118
        names = [n for n in every if not n.startswith(TEXT_PREFIXES) and not n.endswith(".alpha")]
        shapes = [file.get_slice(name).get_shape() for name in names]
    return sum(torch.Size(shape).numel() for shape in shapes)


def read_schedule(path: Path) -> Schedule:
    """What the metadata of a LoRA file says of the run that made it; nothing in other tools'."""
    return _card(path).schedule


def read_num_chunks(path: Path) -> int:
    """In how many chunks a LoRA's captions were learned; one in other tools' files.

    Raises:
        ValueError: its metadata says what cannot be.
    """
    try:
        return check_long_captions(_card(path).long_captions or 1)
    except ValueError as error:
        raise ValueError(f"{path}: {OURS}{error}") from None


def _card(path: Path) -> Card:
    try:
        with open_lora(find_lora(path)) as file:
            return lora_card(dict(file.metadata() or {}))
    except ValueError:
        return Card()  # what it is, load_lora says


def apply_loras(unet: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Put LoRA files (or folders with one) on a UNet, each at its weight, all of them at work: as
    adapters, which can be switched off again, or, of those that peft cannot hold, merged into it.

    Their text encoders' parts are for ``apply_text_loras``.

    Raises:
        ValueError: no LoRA file, one of another architecture, or one that does not fit.
    """
    _apply(unet, UNET, [(read_lora_file(path), weight) for path, weight in loras])


def apply_text_loras(encoders: Sequence[Any], loras: Sequence[tuple[Path, float]]) -> int:
    """Put what LoRA files have for the text encoders on both; how many modules that was.

    Raises:
        ValueError: as ``apply_loras``.
    """
    files = [(read_lora_file(path), weight) for path, weight in loras]
    for part, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=True):
        _apply(encoder, part, files)
    return sum(file.num_text for file, _ in files)


def merged_parts(paths: Sequence[Path]) -> frozenset[str]:
    """The parts of a model that ``apply_loras`` and ``apply_text_loras`` merge LoRA files into,
    so that they do not have the base's weights any more."""
    return frozenset(part for path in paths for part in read_lora_file(path).merged_parts)


def _apply(model: Any, part: str, files: Sequence[tuple[LoraFile, float]]) -> None:
    merged = [(file, weight) for file, weight in files if part in file.merged_parts]
    merge_loras(model, part, merged)
    adapters = [(file, weight) for file, weight in files if part not in file.merged_parts]
    for number, (file, _) in enumerate(adapters):
        _add(model, fit(file, part, model), f"lora_{number}")
    _weigh(model, [weight for _, weight in adapters])


def load_lora(unet: Any, path: Path) -> None:
    """Put the adapter of a LoRA file on ``unet``, to be trained on; warns of what it has for the
    text encoders, which is left out.

    Raises:
        ValueError: no LoRA file, or one of another architecture.
    """
    file = read_lora_file(path)
    found = fit(file, UNET, unet)
    if file.num_text:
        warnings.warn(
            f"{path}: what it has for {file.num_text} modules of the text encoders is not used",
            stacklevel=2,
        )
    if not found:
        raise ValueError(f"{path}: does not fit this base: it has no weights for the UNet")
    _add(unet, found, "default")


def read_lora(unet: Any, path: Path) -> None:
    """Copy the weights of a LoRA file into its adapter on ``unet``, as ``load_lora`` put it there,
    in the dtype that the adapter has now."""
    _fill(unet, fit(read_lora_file(path), UNET, unet), next(iter(unet.peft_config)))


def _add(model: Any, found: dict[str, Adapted], name: str) -> None:
    """One more adapter on a model, by peft."""
    if not found:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # as is meant
        inject_adapter_in_model(peft_config(found), model, adapter_name=name)
    model._hf_peft_config_loaded = True  # so that diffusers and transformers know of it
    _fill(model, found, name)


def _fill(model: Any, found: dict[str, Adapted], name: str) -> None:
    """Copy weights into adapter ``name``, in the dtype that it has."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for module, one in found.items():
            layer = modules[module]
            layer.lora_A[name].weight.copy_(one.down)
            layer.lora_B[name].weight.copy_(one.up)
            if one.magnitude is not None:
                magnitude = layer.lora_magnitude_vector[name].weight
                magnitude.copy_(one.magnitude.reshape(magnitude.shape))


def _weigh(model: Any, weights: Sequence[float]) -> None:
    """Put all adapters of a model to work, ``lora_N`` at its weight."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter([f"lora_{number}" for number in range(len(weights))], inference_mode=True)
        for number, weight in enumerate(weights):
            layer.set_scale(f"lora_{number}", weight)
