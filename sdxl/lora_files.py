"""LoRA files as diffusers reads them: peft's names and, always, the adapter's own settings.

Without the settings a reader takes alpha = rank, and the strength is silently wrong.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from sdxl.long_captions import NAME, check_long_captions
from sdxl.schedule import Schedule

LORA = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for in a folder
PREFIX = "unet."
OURS = "shardtune."  # in the metadata; diffusers looks at PREFIX alone
METADATA_KEY = "lora_adapter_metadata"  # diffusers.loaders.lora_base
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
    schedule: Schedule | None = None,
    num_chunks: int = 1,
) -> bytes:
    """A LoRA file: what ``load_lora_weights`` takes, at its right strength; it learned its
    captions in ``num_chunks`` chunks of 77 tokens.

    All metadata is in one key: safetensors writes several in an order of each process' own.
    """
    config = next(iter(unet.peft_config.values())).to_dict()
    settings = {PREFIX + name: _plain(config[name]) for name in _SETTINGS}
    settings |= {OURS + n: value for n, value in (schedule or Schedule()).to_config().items()}
    if num_chunks > 1:
        settings[OURS + NAME] = num_chunks
    metadata = {METADATA_KEY: json.dumps(settings, sort_keys=True)}
    return safetensors.torch.save(lora_state(unet, values), metadata=metadata)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def num_lora_parameters(path: Path) -> int:
    """Of the UNet's part of a LoRA file, by its header.

    Raises:
        ValueError: no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if "unet" in n and "alpha" not in n]  # noqa: SIM118
            shapes = [file.get_slice(name).get_shape() for name in names]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no LoRA file in safetensors format ({error})") from None
    return sum(torch.Size(shape).numel() for shape in shapes)


def read_schedule(path: Path) -> Schedule:
    """What the metadata of a LoRA file says of the run that made it; nothing in other tools'."""
    return Schedule.of_config(_told(path))


def read_num_chunks(path: Path) -> int:
    """In how many chunks a LoRA's captions were learned; one in other tools' files.

    Raises:
        ValueError: its metadata says what cannot be.
    """
    try:
        return check_long_captions(_told(path).get(NAME, 1))
    except ValueError as error:
        raise ValueError(f"{path}: {OURS}{error}") from None


def _told(path: Path) -> dict[str, Any]:
    """What our own metadata in a LoRA file says."""
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        return {n.removeprefix(OURS): v for n, v in settings.items() if n.startswith(OURS)}
    except (OSError, SafetensorError, ValueError, AttributeError):
        return {}  # what it is, load_lora says


def load_lora(unet: Any, path: Path) -> None:
    """Put the adapter of a LoRA file on ``unet``, by diffusers' own loader.

    Raises:
        ValueError: no LoRA file, or one of another architecture.
    """
    from diffusers import StableDiffusionXLPipeline

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no LoRA file in safetensors format ({error})") from None
    if not any("lora" in name for name in names):
        raise ValueError(f"{path}: holds no LoRA weights (e.g. {names[:1]})")
    try:
        state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            str(path), unet_config=unet.config, return_lora_metadata=True
        )
        theirs = {name for name in state if name.startswith(PREFIX)}
        if not theirs:
            raise ValueError(f"it has no weights for the UNet (e.g. {names[0]})")
        _check_modules(unet, state)
        if others := len(state) - len(theirs):
            warnings.warn(f"{path}: {others} text encoder weights in it are not used", stacklevel=2)
        alphas = None if metadata else alphas
        unet.load_lora_adapter(state, network_alphas=alphas, prefix="unet", metadata=metadata)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: does not fit this base: {reason}") from error


def read_lora(unet: Any, path: Path) -> None:
    """Copy the weights of a LoRA file into its adapter on ``unet``, as ``load_lora`` put it there,
    in the dtype that the adapter has now."""
    from diffusers import StableDiffusionXLPipeline

    state = StableDiffusionXLPipeline.lora_state_dict(str(path), unet_config=unet.config)[0]
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            module, _, part = name.partition(".lora_")
            old = {"A": "lora.down.weight", "B": "lora.up.weight"}.get(part[:1], "")
            new = "lora_magnitude_vector" if part.startswith("m") else f"lora_{part[:1]}.weight"
            for known in (f"{PREFIX}{module}.{new}", f"{PREFIX}{module}.{old}"):
                if part and known in state:
                    parameter.copy_(state[known])


def _check_modules(unet: Any, state: dict[str, torch.Tensor]) -> None:
    modules = dict(unet.named_modules())
    for name, tensor in state.items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if not name.startswith(PREFIX):
            continue
        if module not in modules:
            raise ValueError(f"it adapts {module}, which this UNet does not have")
        if part == "A.weight" and tensor.ndim == 2:
            width = modules[module].in_features
            if tensor.shape[1] != width:
                raise ValueError(f"{module} takes {width} features, and not {tensor.shape[1]}")
