"""Applies LoRA files to a model: matched to its modules, then added by peft or merged."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from sdxl.lora.names import PREFIXES, SHARDTUNE_PREFIX, UNET, key_table
from sdxl.lora.read import LoraFile, find_lora, is_extra, lora_metadata, open_lora, read_lora_file
from sdxl.lora.weights import Delta, LoraWeights
from sdxl.lora.write import peft_config
from sdxl.metadata import ModelMetadata, Schedule, check_long_captions

_OTHER_ARCHITECTURES = {  # by names that only they have
    r"(double|single)_blocks_|single_transformer_blocks_": "Flux",
    r"transformer_blocks_\d+_(img|txt)_m(lp|od)": "Qwen-Image",
    r"joint_blocks_|attn_add_[kqv]_proj|^lora_te3_": "SD3",
    r"prior|down_blocks_\d+_\d+_(channelwise|attention)": "Stable Cascade",
    r"(^|_)blocks_\d+_(self|cross)_attn_": "Wan",
    r"(^|_)layers_\d+_(attention|feed_forward|adaLN)": "Lumina or Z-Image",
}
_CONTEXT_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}  # the width of their text embeddings
# SDXL has no attention at full resolution.
_SD_MODULES = r"down_blocks_0_attentions|up_blocks_3_attentions|(in|out)put_blocks_(1|2|9|10|11)_1_"
_ARCHITECTURE_KEYS = ("modelspec.architecture", "ss_base_model_version", "base_model")


def adaptable(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a LoRA can adapt, by their modules' names: [out, in] of
    linears and [out, in, k, k] of convolutions, whether or not they have adapters already."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if ".base_layer" in name or ".lora_" in name:
            continue
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, torch.nn.Linear):
            shapes[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, torch.nn.Conv2d):
            shapes[name] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return shapes


def match_to_model(file: LoraFile, part: str, model: Any) -> dict[str, LoraWeights]:
    """A part of a LoRA file by the names of the modules of ``model``, which may be on the meta
    device: only shapes are compared.

    Raises:
        ValueError: a module that the model does not have, or has in another shape; or the file
            holds what can only be merged.
    """
    file.check_adapter(part)
    shapes = adaptable(model)
    adapters: dict[str, LoraWeights] = {}
    for name, name_in_file, adapter in _by_name(file, part, shapes, model.config):
        assert isinstance(adapter, LoraWeights)
        adapters[name] = _adapter_of(file, name_in_file, adapter, shapes[name])
    return adapters


def match_for_merging(file: LoraFile, part: str, model: Any) -> dict[str, LoraWeights | Delta]:
    """``match_to_model`` for a file that is merged into ``model``: it may also change norms,
    embeddings and biases.

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
    adapters: dict[str, LoraWeights | Delta] = {}
    for name, name_in_file, adapter in _by_name(file, part, shapes, model.config):
        if isinstance(adapter, LoraWeights):
            adapters[name] = _adapter_of(file, name_in_file, adapter, shapes[name])
            continue
        if adapter.has_weight and (reason := adapter.mismatch(shapes[name])):
            raise _mismatch_error(file, f"{name_in_file} ({adapter.algorithm.title}): {reason}")
        if adapter.bias is not None and tuple(adapter.bias.shape) != biases[name]:
            found_shape, expected_shape = list(adapter.bias.shape), biases[name]
            is_for = (
                "which has none here" if expected_shape is None else f"not {list(expected_shape)}"
            )
            raise _mismatch_error(
                file, f"its {name_in_file} is for a bias of {found_shape}, {is_for}"
            )
        adapters[name] = adapter
    return adapters


def _by_name(
    file: LoraFile, part: str, shapes: Mapping[str, Any], config: Any
) -> Iterator[tuple[str, str, LoraWeights | Delta]]:
    """For each module that the file changes: its name in the model, its name in the file, and the
    learned weights."""
    is_unet = part == UNET
    table = key_table(shapes, config) if is_unet else {_text_key(name): name for name in shapes}
    seen = set()
    for name_in_file, adapter in file.parts.get(part, {}).items():
        key = name_in_file.replace(".", "_")
        name = table.get(key if is_unet else _text_key(key))
        if name is None:
            raise _mismatch_error(file, f"it adapts {name_in_file}, which this base does not have")
        if name in seen:
            raise ValueError(f"{file.path}: adapts {name} twice")
        seen.add(name)
        yield name, name_in_file, adapter


def _adapter_of(
    file: LoraFile, name_in_file: str, adapter: LoraWeights, shape: tuple[int, ...]
) -> LoraWeights:
    """An adapter reshaped for the module that it changes."""
    down, up = _match_dims(adapter.down, len(shape)), _match_dims(adapter.up, len(shape))
    if down.ndim != len(shape) or down.shape[1:] != shape[1:] or len(up) != shape[0]:
        found_shape = [len(up), *down.shape[1:]]
        raise _mismatch_error(
            file, f"its {name_in_file} is for weights of {found_shape}, not {list(shape)}"
        )
    if up.ndim != len(shape) or up.shape[2:].numel() != 1:
        raise ValueError(
            f"{file.path}: damaged: {name_in_file} has an up weight of {list(up.shape)}"
        )
    return replace(adapter, down=down, up=up)


def _text_key(name: str) -> str:
    """A text encoder's module without the level of names that transformers' versions differ in."""
    return name.replace(".", "_").removeprefix("text_model_")


def _match_dims(tensor: torch.Tensor, num_dims: int) -> torch.Tensor:
    """A linear layer's factor as a matrix if it was written as a 1x1 convolution's, or vice
    versa."""
    if num_dims == 2 and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor[..., None, None] if num_dims == 4 and tensor.ndim == 2 else tensor


def _mismatch_error(file: LoraFile, reason: str) -> ValueError:
    other = _architecture(file)
    origin = f" (a LoRA of {other})" if other else ""
    return ValueError(f"{file.path}: does not fit this base{origin}: {reason}")


def _architecture(file: LoraFile) -> str:
    """The architecture that a LoRA is for, by its names, shapes or metadata; empty if unknown."""
    unet = {name.replace(".", "_"): adapter for name, adapter in file.parts.get(UNET, {}).items()}
    for pattern, other in _OTHER_ARCHITECTURES.items():
        if any(re.search(pattern, name) for name in unet):
            return other
    for name, adapter in unet.items():
        width = adapter.down.shape[1] if isinstance(adapter, LoraWeights) else adapter.num_inputs
        if re.search(r"attn2_to_[kv]$", name) and width in _CONTEXT_WIDTHS:
            return _CONTEXT_WIDTHS[width]
    if any(re.search(_SD_MODULES, name) for name in unet):
        return "SD 1 or 2"
    return next((file.metadata[key] for key in _ARCHITECTURE_KEYS if file.metadata.get(key)), "")


# Merged into the weights: what peft's adapters cannot hold.


def merged_weights(
    model: Any, part: str, files: Sequence[tuple[LoraFile, float]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of ``model`` that LoRA files change, merged, in fp32, one by one.

    Each file adds its own difference to the base's weights, at its strength, so that the order of
    several files does not matter; at strength 0 it adds nothing.

    Raises:
        ValueError: a file does not fit the model, or what it makes is not finite.
    """
    changes: dict[str, list[tuple[Path, LoraWeights | Delta, float]]] = defaultdict(list)
    for file, strength in files:
        for module, adapter in match_for_merging(file, part, model).items():
            if strength:
                changes[module].append((file.path, adapter, strength))
    parameters = dict(model.named_parameters())
    for module, several in changes.items():
        for name, change in (("weight", _change_weight), ("bias", _change_bias)):
            key = f"{module}.{name}"
            if key not in parameters:
                continue
            before = parameters[key].detach().float()
            after = before
            for path, adapter, strength in several:
                merged = change(adapter, before, strength)
                if merged is None:
                    continue
                after = merged if after is before else after + (merged - before)
                if not after.isfinite().all():
                    raise ValueError(f"{path}: damaged: with it {key} is not finite")
            if after is not before:
                yield key, after


def _change_weight(
    adapter: LoraWeights | Delta, weight: torch.Tensor, strength: float
) -> torch.Tensor | None:
    if isinstance(adapter, Delta) and not adapter.has_weight:
        return None
    return adapter.merged(weight, strength)


def _change_bias(
    adapter: LoraWeights | Delta, bias: torch.Tensor, strength: float
) -> torch.Tensor | None:
    difference = adapter.bias if isinstance(adapter, Delta) else None
    return None if difference is None else bias + strength * difference.float()


def merge_loras(model: Any, part: str, files: Sequence[tuple[LoraFile, float]]) -> None:
    """Put the sum of several LoRA files into the weights of ``model``, in the dtype they have."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in merged_weights(model, part, files):
            parameters[key].copy_(tensor)


# Every file of a run on one model, each at its strength.

TEXT_PREFIXES = tuple(prefix for prefix, part in PREFIXES.items() if part != UNET)


def num_lora_parameters(path: Path) -> int:
    """The number of parameters in the UNet's part of a LoRA file, by its header.

    Raises:
        ValueError: no safetensors file.
    """
    with open_lora(find_lora(path)) as file:
        every = [name for name in file.keys() if not is_extra(name)]  # noqa: SIM118
        names = [n for n in every if not n.startswith(TEXT_PREFIXES) and not n.endswith(".alpha")]
        shapes = [file.get_slice(name).get_shape() for name in names]
    return sum(torch.Size(shape).numel() for shape in shapes)


def read_schedule(path: Path) -> Schedule:
    """The schedule in the metadata of a LoRA file; an empty one in other tools' files."""
    return _file_metadata(path).schedule


def read_num_chunks(path: Path) -> int:
    """The number of chunks that a LoRA's captions had in training; 1 in other tools' files.

    Raises:
        ValueError: its metadata says what cannot be.
    """
    try:
        return check_long_captions(_file_metadata(path).long_captions or 1)
    except ValueError as error:
        raise ValueError(f"{path}: {SHARDTUNE_PREFIX}{error}") from None


def _file_metadata(path: Path) -> ModelMetadata:
    try:
        with open_lora(find_lora(path)) as file:
            return lora_metadata(dict(file.metadata() or {}))
    except ValueError:
        return ModelMetadata()  # loading it will say what is wrong


def apply_loras(unet: Any, loras: Sequence[tuple[Path, float]]) -> None:
    """Put LoRA files (or folders with one) on a UNet, each at its weight, all of them active: as
    adapters, which can be switched off again, or merged into it where peft cannot hold them.

    Their text encoders' parts are for ``apply_text_loras``.

    Raises:
        ValueError: no LoRA file, one of another architecture, or one that does not fit.
    """
    _apply(unet, UNET, [(read_lora_file(path), weight) for path, weight in loras])


def apply_text_loras(encoders: Sequence[Any], loras: Sequence[tuple[Path, float]]) -> int:
    """Put the text encoders' parts of LoRA files on both; return the number of modules.

    Raises:
        ValueError: as ``apply_loras``.
    """
    files = [(read_lora_file(path), weight) for path, weight in loras]
    for part, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=True):
        _apply(encoder, part, files)
    return sum(file.num_text_modules for file, _ in files)


def merged_parts(paths: Sequence[Path]) -> frozenset[str]:
    """The parts of a model that ``apply_loras`` and ``apply_text_loras`` merge LoRA files into,
    so that they do not have the base's weights any more."""
    return frozenset(part for path in paths for part in read_lora_file(path).merged_parts)


def _apply(model: Any, part: str, files: Sequence[tuple[LoraFile, float]]) -> None:
    merged = [(file, weight) for file, weight in files if part in file.merged_parts]
    merge_loras(model, part, merged)
    adapters = [(file, weight) for file, weight in files if part not in file.merged_parts]
    for number, (file, _) in enumerate(adapters):
        _add_adapter(model, match_to_model(file, part, model), f"lora_{number}")
    _set_lora_weights(model, [weight for _, weight in adapters])


def load_lora(unet: Any, path: Path) -> None:
    """Put the adapter of a LoRA file on ``unet``, to be trained on; warns of what it has for the
    text encoders, which is not used.

    Raises:
        ValueError: no LoRA file, or one of another architecture.
    """
    file = read_lora_file(path)
    adapters = match_to_model(file, UNET, unet)
    if file.num_text_modules:
        warnings.warn(
            f"{path}: what it has for {file.num_text_modules} modules of the text encoders is "
            "not used",
            stacklevel=2,
        )
    if not adapters:
        raise ValueError(f"{path}: does not fit this base: it has no weights for the UNet")
    _add_adapter(unet, adapters, "default")


def read_lora(unet: Any, path: Path) -> None:
    """Copy the weights of a LoRA file into its adapter on ``unet``, as ``load_lora`` put it there,
    in the dtype that the adapter has now."""
    _copy_weights(
        unet, match_to_model(read_lora_file(path), UNET, unet), next(iter(unet.peft_config))
    )


def _add_adapter(model: Any, adapters: dict[str, LoraWeights], name: str) -> None:
    """Add an adapter to a model, by peft."""
    if not adapters:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # as is meant
        inject_adapter_in_model(peft_config(adapters), model, adapter_name=name)
    model._hf_peft_config_loaded = True  # so that diffusers and transformers know of it
    _copy_weights(model, adapters, name)


def _copy_weights(model: Any, adapters: dict[str, LoraWeights], name: str) -> None:
    """Copy weights into adapter ``name``, in the dtype that it has."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for module, adapter in adapters.items():
            layer = modules[module]
            layer.lora_A[name].weight.copy_(adapter.down)
            layer.lora_B[name].weight.copy_(adapter.up)
            if adapter.magnitude is not None:
                magnitude = layer.lora_magnitude_vector[name].weight
                magnitude.copy_(adapter.magnitude.reshape(magnitude.shape))


def _set_lora_weights(model: Any, weights: Sequence[float]) -> None:
    """Activate all adapters of a model, ``lora_N`` at its weight."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter([f"lora_{number}" for number in range(len(weights))], inference_mode=True)
        for number, weight in enumerate(weights):
            layer.set_scale(f"lora_{number}", weight)
