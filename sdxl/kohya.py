"""LoRA files as kohya's scripts write them, and as the UIs read them.

A module's key is ``lora_unet_`` and its name in the original layout, with ``_`` for ``.``; beside
its two weights stands ``alpha``, and the strength is alpha / rank. DoRA's magnitude is
``dora_scale``. What a UI wants to know is in the metadata, all of it strings.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sdxl.lora_formats import Adapted
from sdxl.original import OriginalNames

KEY = "lora_unet_"
ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"  # of the ModelSpec standard
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # its words


def kohya_keys(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The kohya key of each module of a UNet, by diffusers' name. ``config`` is the UNet's."""
    original = OriginalNames("unet", dict(config))
    keys = {name: original.key_of(f"{name}.weight") for name in names}
    return {
        name: KEY + key.removesuffix(".weight").replace(".", "_")
        for name, key in keys.items()
        if key is not None
    }


def key_table(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """The modules of a UNet by their kohya keys without ``lora_unet_``; and by diffusers' own
    names with ``_``, which some trainers write."""
    keys = kohya_keys(names, config)
    own = {name.replace(".", "_"): name for name in keys}
    return own | {key.removeprefix(KEY): name for name, key in keys.items()}


def kohya_state(
    found: Mapping[str, Adapted], config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """A LoRA's tensors under kohya's keys, in ``dtype`` (None: as they are); alpha always fp32.

    There, rsLoRA's strength alpha / sqrt(r) is written as alpha sqrt(r) over r.
    """
    keys = kohya_keys(found, config)
    state: dict[str, torch.Tensor] = {}
    for name, one in found.items():
        key = keys[name]
        state[f"{key}.lora_down.weight"] = one.down.to(dtype or one.down.dtype)
        state[f"{key}.lora_up.weight"] = one.up.to(dtype or one.up.dtype)
        state[f"{key}.alpha"] = torch.tensor(one.kohya_alpha)
        if one.magnitude is not None:
            shape = (-1, *[1] * (one.down.ndim - 1))  # [out, 1, ...]: a norm of each row
            state[f"{key}.dora_scale"] = one.magnitude.to(dtype or one.down.dtype).reshape(shape)
    return state
