"""Refuses weights and configs that are not SDXL's, before a library loads them. No torch.

First the weights: the tensor names by which other models, and other forms of SDXL, are known, so
that a refusal can name what the user has. Then the configs: the libraries check hardly anything in
them; a number that is text fails somewhere in a layer, and a count of a billion builds layers until
memory is out.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdxl import BaseError

_FOREIGN_NAMES = (
    (r"(lora_|lycoris_|.*\.lora_)", "a LoRA, and no base: give it as --lora"),
    (r"cond_stage_model\.", "a Stable Diffusion 1 or 2 file"),
    (r".*\.?(joint_blocks|double_blocks|double_stream_modules)\.", "a file of SD3, Flux or alike"),
    (
        r"(transformer\.|model\.diffusion_model\.)?(single_)?transformer_blocks\.",
        "a file of SD3, Flux or alike",
    ),
    (r"conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
    (r"edm_", "a model with EDM's noise schedule (Playground 2.5, CosXL)"),
    (r"control_model\.|.*controlnet_|(input_hint_block|zero_convs)\.", "a ControlNet"),
    (r".*\.quant_state\.bitsandbytes", "weights quantized by bitsandbytes; use the fp16 file"),
    (r"(effnet|clip_txt_mapper|clf)\.", "a file of Stable Cascade"),
)
_OTHER_CHANNELS = {
    9: "an inpainting UNet, which takes 9 channels where SDXL's takes 4",
    8: "a UNet that edits images (InstructPix2Pix), which takes 8 channels where SDXL's takes 4",
}
_CONTEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner"}
_FILE_SIGNATURES = (  # by the first bytes
    (b"GGUF", "a GGUF file, which cannot be read; use the safetensors file"),
    (b"PK\x03\x04", "a pickle: never loaded; convert it to safetensors"),
    (b"\x80\x02", "a pickle: never loaded; convert it to safetensors"),
    (b"version https://git-lfs", "a pointer of Git LFS, and not the file itself: run git lfs pull"),
    (b"<!DOCTYPE", "a web page, saved in place of the file"),
    (b"<html", "a web page, saved in place of the file"),
)


def describe_foreign_file(head: bytes) -> str:
    """What a file that is no safetensors file is, by its first bytes; empty if unknown."""
    return next((content for start, content in _FILE_SIGNATURES if head.startswith(start)), "")


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse a file by the names of its tensors.

    Raises:
        BaseError: says what it is of.
    """
    every = list(names)
    for pattern, content in _FOREIGN_NAMES:
        if any(re.match(pattern, name) for name in every):
            raise BaseError(f"{path}: no SDXL base: {content}")


def check_channels(path: Path, channels: object) -> None:
    """Refuse the UNets that take more than the noisy latents.

    Raises:
        BaseError: says what it is.
    """
    if channels in _OTHER_CHANNELS:
        raise BaseError(
            f"{path}: {_OTHER_CHANNELS[int(str(channels))]}; it cannot be trained or used here"
        )


def check_context(path: Path, shapes: Mapping[str, tuple[int, ...]], expected: object) -> None:
    """Refuse the UNet of another Stable Diffusion, by the width of the text embeddings it takes.

    Raises:
        BaseError: says which.
    """
    widths = {shape[1] for name, shape in shapes.items() if _is_context(name, shape)}
    for width in widths - {expected}:
        if width in _CONTEXT_WIDTHS:
            raise BaseError(f"{path}: no SDXL base: the UNet of {_CONTEXT_WIDTHS[width]}")


def _is_context(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith("attn2.to_k.weight") and len(shape) == 2


# Configs
# -------

MAX_NUMBER = 1_000_000  # no number in any of these configs is larger
MAX_LAYERS = 256
MAX_DEPTH = 6  # lists in lists: a UNet has at most two of them
_LAYER_FIELDS = (
    "layers_per_block",
    "num_hidden_layers",
    "reverse_transformer_layers_per_block",
    "transformer_layers_per_block",
)
_SIZE, _NUMBER, _TEXT = "a positive whole number", "a number", "text"
_SIZES, _TEXTS = "a list of positive whole numbers", "a list of texts"
_BLOCK_FIELDS = {"block_out_channels": _SIZES, "down_block_types": _TEXTS, "up_block_types": _TEXTS}
_CLIP_FIELDS = dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers"), _SIZE)
_CLIP_FIELDS |= dict.fromkeys(("intermediate_size", "max_position_embeddings", "vocab_size"), _SIZE)
_FIELD_KINDS: dict[str, dict[str, str]] = {
    "unet": {
        **dict.fromkeys(("in_channels", "out_channels", "sample_size"), _SIZE),
        **dict.fromkeys(("addition_time_embed_dim", "cross_attention_dim"), _SIZE),
        "projection_class_embeddings_input_dim": _SIZE,
        **_BLOCK_FIELDS,
    },
    "vae": {
        **dict.fromkeys(("in_channels", "latent_channels", "out_channels"), _SIZE),
        "scaling_factor": _NUMBER,
        **_BLOCK_FIELDS,
    },
    "text_encoder": _CLIP_FIELDS,
    "text_encoder_2": {**_CLIP_FIELDS, "projection_dim": _SIZE},
    "scheduler": {
        "_class_name": _TEXT,
        "beta_end": _NUMBER,
        "beta_schedule": _TEXT,
        "beta_start": _NUMBER,
        "num_train_timesteps": _SIZE,
        "prediction_type": _TEXT,
    },
}


def check_config(where: str | Path, component: str, config: dict[str, Any]) -> None:
    """Refuse a config with values that no SDXL has. Missing fields are left to the library.

    Raises:
        BaseError: names ``where`` and the field.
    """
    for name, value in config.items():
        if not _is_plain(value, MAX_LAYERS if name in _LAYER_FIELDS else MAX_NUMBER):
            raise BaseError(f"{where}: its {name[:60]} holds numbers or lists that no SDXL has")
    for name, kind in _FIELD_KINDS[component].items():
        value = config.get(name)
        if value is not None and not _is_of(value, kind):
            raise BaseError(f"{where}: its {name} must be {kind}, not {_shown(value)}")


def _is_plain(value: Any, limit: int, depth: int = MAX_DEPTH) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | list | dict):
        return True
    if isinstance(value, int | float):
        return -limit <= value <= limit  # false of NaN too
    parts = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_plain(part, limit, depth - 1) for part in parts)


def _is_of(value: Any, kind: str) -> bool:
    if kind in (_SIZES, _TEXTS):
        item_kind = _SIZE if kind == _SIZES else _TEXT
        return (
            isinstance(value, list)
            and bool(value)
            and all(_is_of(part, item_kind) for part in value)
        )
    if kind == _TEXT:
        return isinstance(value, str)
    is_size = type(value) is int and value > 0
    return is_size if kind == _SIZE else type(value) in (int, float)


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | None) else "a list or table"
