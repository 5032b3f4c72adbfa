"""LoRA files as kohya's scripts write them, and as the UIs read them.

A module's key is ``lora_unet_`` and its name in the original layout, with ``_`` for ``.``; beside
its two weights stands ``alpha``, and the strength is alpha / rank. DoRA's magnitude is
``dora_scale``. What a UI wants to know is in the metadata, all of it strings.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sdxl.adapted import Adapted
from sdxl.card import ARCHITECTURE, Card
from sdxl.lora_formats import UNET, long_name
from sdxl.original import OriginalNames

KEY = "lora_unet_"
TEXT_KEYS = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya_keys(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The kohya key of each module of a UNet, by diffusers' name. ``config`` is the UNet's."""
    original = OriginalNames("unet", dict(config))
    keys = {name: original.key_of(f"{name}.weight") for name in names}
    return {
        name: KEY + key.removesuffix(".weight").replace(".", "_")
        for name, key in keys.items()
        if key is not None
    }


def text_keys(names: Iterable[str], part: str) -> dict[str, str]:
    """The kohya key of each module of a text encoder."""
    return {n: TEXT_KEYS[part] + long_name(n).replace(".", "_") for n in names}


def key_table(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The modules of a UNet by their kohya keys without ``lora_unet_``; and by diffusers' own
    names with ``_``, which some trainers write."""
    keys = kohya_keys(names, config)
    own = {name.replace(".", "_"): name for name in keys}
    return own | {key.removeprefix(KEY): name for name, key in keys.items()}


def kohya_state(
    parts: Mapping[str, Mapping[str, Adapted]], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The parts of a LoRA under kohya's keys, alpha in fp32. ``config`` is the UNet's.

    There, rsLoRA's strength alpha / sqrt(r) is written as alpha sqrt(r) over r.

    Raises:
        ValueError: a module that the original layout does not have.
    """
    state: dict[str, torch.Tensor] = {}
    for part, found in parts.items():
        keys = kohya_keys(found, config) if part == UNET else text_keys(found, part)
        for name, one in found.items():
            if name not in keys:
                raise ValueError(f"{name} has no name in the original layout: kohya's has no key")
            key = keys[name]
            state[f"{key}.lora_down.weight"] = one.down
            state[f"{key}.lora_up.weight"] = one.up
            state[f"{key}.alpha"] = torch.tensor(one.kohya_alpha)
            if one.magnitude is not None:
                shape = (-1, *[1] * (one.down.ndim - 1))  # [out, 1, ...]: a norm of each row
                state[f"{key}.dora_scale"] = one.magnitude.reshape(shape)
    return state


def kohya_metadata(found: Mapping[str, Adapted], card: Card, resolution: int) -> dict[str, str]:
    """What UIs read of a LoRA on SDXL, and the card. ``resolution``: the base's pixels a side."""
    ranks = sorted({one.rank for one in found.values()})
    alphas = sorted({one.kohya_alpha for one in found.values()})
    several = "Dynamic"  # kohya's word
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0",  # without it UIs hide the file under SDXL
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else several,
        "ss_network_alpha": str(alphas[0]) if len(alphas) == 1 else several,
        **card.modelspec(f"{ARCHITECTURE}/lora", resolution),
        **card.to_metadata(),
    }
    if any(one.down.ndim == 4 for one in found.values()):
        conv = {"conv_dim": metadata["ss_network_dim"], "conv_alpha": metadata["ss_network_alpha"]}
        metadata["ss_network_args"] = json.dumps(conv)
    if card.buckets:
        buckets = {
            str(number): {"resolution": [width, height], "count": count}
            for number, (width, height, count) in enumerate(card.buckets)
        }
        metadata["ss_bucket_info"] = json.dumps({"buckets": buckets})
    stated = {
        "ss_output_name": card.name,
        "ss_sd_model_name": card.base,
        "ss_steps": card.steps,
        "ss_zero_terminal_snr": card.rescale_betas_zero_snr,
    }
    return metadata | {name: str(value) for name, value in stated.items() if value is not None}
