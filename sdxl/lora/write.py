"""Writes LoRA files: one in diffusers' format, and one in kohya's.

diffusers' has peft's names and, always, the adapter's own settings: without them a reader takes
alpha = rank, and the strength is silently wrong.

kohya's has, beside a module's two weights, ``alpha``: the strength is alpha / rank. DoRA's
magnitude is ``dora_scale``. What a UI wants to know is in the metadata, all of it strings.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict

from sdxl.lora.names import (
    KOHYA,
    LORA,
    METADATA_KEY,
    SHARDTUNE_PREFIX,
    UNET,
    kohya_keys,
    kohya_text_keys,
    long_name,
)
from sdxl.lora.read import lora_parts
from sdxl.lora.weights import LoraWeights
from sdxl.metadata import ARCHITECTURE, ModelMetadata
from sdxl.tensor_files import digest_metadata, sorted_metadata_bytes

Parts = Mapping[str, Mapping[str, LoraWeights]]  # by unet, text_encoder, text_encoder_2; by module
PREFIX = f"{UNET}."
_SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_dropout",
)


def lora_state(unet: Any, values: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter's weights under diffusers' names, fp32, on the CPU: those that the UNet has, or
    others by the names of its parameters."""
    state = get_peft_model_state_dict(unet, values, adapter_name=next(iter(unet.peft_config)))
    return {PREFIX + name: t.detach().float().cpu().contiguous() for name, t in state.items()}


def lora_bytes(
    unet: Any,
    values: dict[str, torch.Tensor] | None = None,
    model_metadata: ModelMetadata | None = None,
) -> dict[str, bytes]:
    """The adapter on a UNet as files, by their names: one that ``load_lora_weights`` takes at its
    right strength, and kohya's, for the UIs.

    A DoRA has no kohya file: each UI divides its rows by another norm than peft does, or ignores
    them, so that none gives the images that were trained for.
    """
    config = next(iter(unet.peft_config.values())).to_dict()
    settings, state = _settings(UNET, config), lora_state(unet, values)
    parts = lora_parts(Path("the adapter"), state, settings)
    model_metadata = replace(
        model_metadata or ModelMetadata(), rank=config["r"], alpha=float(config["lora_alpha"])
    )
    files = {LORA: _diffusers_bytes(state, settings, model_metadata)}
    if not config["use_dora"]:
        files[KOHYA] = kohya_bytes(parts, unet.config, model_metadata)
    return files


def kohya_bytes(parts: Parts, config: Mapping[str, Any], model_metadata: ModelMetadata) -> bytes:
    """kohya's file of a LoRA; ``config`` is the UNet's."""
    state, resolution = kohya_state(parts, config), 8 * int(config["sample_size"])
    metadata = kohya_metadata(parts.get(UNET, {}), model_metadata, resolution)
    return sorted_metadata_bytes(state, digest_metadata(state, metadata))


def diffusers_bytes(parts: Parts, model_metadata: ModelMetadata) -> bytes:
    """A file that ``load_lora_weights`` takes, of a LoRA's parts."""
    state: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for part, adapters in parts.items():
        # Settings name modules by their ends, so that a level more or less changes nothing.
        short = {name.removeprefix("text_model."): adapter for name, adapter in adapters.items()}
        settings |= _settings(part, peft_config(short).to_dict())
        for module, adapter in adapters.items():
            name = module if part == UNET else long_name(module)
            state[f"{part}.{name}.lora_A.weight"] = adapter.down
            state[f"{part}.{name}.lora_B.weight"] = adapter.up
            if adapter.magnitude is not None:
                shape = (-1,) if adapter.down.ndim == 2 else (1, -1, 1, 1)
                state[f"{part}.{name}.lora_magnitude_vector"] = adapter.magnitude.reshape(shape)
    return _diffusers_bytes(state, settings, model_metadata)


def _diffusers_bytes(
    state: dict[str, torch.Tensor], settings: dict[str, Any], model_metadata: ModelMetadata
) -> bytes:
    """A file in diffusers' format; the settings are in diffusers' own metadata key."""
    own = {SHARDTUNE_PREFIX + name: value for name, value in model_metadata.to_dict().items()}
    metadata = {METADATA_KEY: json.dumps(settings | own, sort_keys=True)}
    return sorted_metadata_bytes(state, digest_metadata(state, metadata))


def peft_config(adapters: Mapping[str, LoraWeights]) -> LoraConfig:
    """peft's settings of an adapter: its commonest rank and alpha, and the exceptions."""
    first = next(iter(adapters.values()))
    (rank, alpha), _ = Counter(
        (adapter.rank, adapter.alpha) for adapter in adapters.values()
    ).most_common(1)[0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(adapters),
        rank_pattern={
            re.escape(name): adapter.rank
            for name, adapter in adapters.items()
            if adapter.rank != rank
        },
        alpha_pattern={
            re.escape(name): adapter.alpha
            for name, adapter in adapters.items()
            if adapter.alpha != alpha
        },
        use_rslora=first.rslora,
        use_dora=first.magnitude is not None,
    )


def _settings(part: str, config: dict[str, Any]) -> dict[str, Any]:
    """The part of peft's settings that a file keeps, by ``part.name``."""
    return {
        f"{part}.{name}": sorted(value) if isinstance(value := config[name], set) else value
        for name in _SETTINGS
    }


def kohya_state(
    parts: Mapping[str, Mapping[str, LoraWeights]], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The parts of a LoRA under kohya's keys, alpha in fp32. ``config`` is the UNet's.

    There, rsLoRA's strength alpha / sqrt(r) is written as alpha sqrt(r) over r.

    Raises:
        ValueError: a module that the original layout does not have.
    """
    state: dict[str, torch.Tensor] = {}
    for part, adapters in parts.items():
        keys = kohya_keys(adapters, config) if part == UNET else kohya_text_keys(adapters, part)
        for name, adapter in adapters.items():
            if name not in keys:
                raise ValueError(f"{name} has no name in the original layout: kohya's has no key")
            key = keys[name]
            state[f"{key}.lora_down.weight"] = adapter.down
            state[f"{key}.lora_up.weight"] = adapter.up
            state[f"{key}.alpha"] = torch.tensor(adapter.kohya_alpha)
            if adapter.magnitude is not None:
                shape = (-1, *[1] * (adapter.down.ndim - 1))  # [out, 1, ...]: a norm of each row
                state[f"{key}.dora_scale"] = adapter.magnitude.reshape(shape)
    return state


def kohya_metadata(
    adapters: Mapping[str, LoraWeights], model_metadata: ModelMetadata, resolution: int
) -> dict[str, str]:
    """The metadata that UIs read of a LoRA on SDXL, and shardtune's own. ``resolution`` is the
    base's, in pixels a side."""
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    alphas = sorted({adapter.kohya_alpha for adapter in adapters.values()})
    several = "Dynamic"  # kohya's word
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",  # without it UIs hide the file under SDXL
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else several,
        "ss_network_alpha": str(alphas[0]) if len(alphas) == 1 else several,
        **model_metadata.modelspec(f"{ARCHITECTURE}/lora", resolution),
        **model_metadata.to_metadata(),
    }
    if any(adapter.down.ndim == 4 for adapter in adapters.values()):
        conv = {"conv_dim": metadata["ss_network_dim"], "conv_alpha": metadata["ss_network_alpha"]}
        metadata["ss_network_args"] = json.dumps(conv)
    if model_metadata.buckets:
        buckets = {
            str(number): {"resolution": [width, height], "count": count}
            for number, (width, height, count) in enumerate(model_metadata.buckets)
        }
        metadata["ss_bucket_info"] = json.dumps({"buckets": buckets})
    stated = {
        "ss_output_name": model_metadata.name,
        "ss_sd_model_name": model_metadata.base,
        "ss_steps": model_metadata.steps,
        "ss_zero_terminal_snr": model_metadata.rescale_betas_zero_snr,
    }
    return metadata | {name: str(value) for name, value in stated.items() if value is not None}
