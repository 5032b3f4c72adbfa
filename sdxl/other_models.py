"""What a file of weights, or a UNet, is of where it is not of SDXL as it can be used here.

One place for the names by which other models, and other forms of SDXL, are known, so that a refusal
says what the user has. Imports no torch.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdxl import BaseError

_FOREIGN = (
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
_CHANNELS = {
    9: "an inpainting UNet, which takes 9 channels where SDXL's takes 4",
    8: "a UNet that edits images (InstructPix2Pix), which takes 8 channels where SDXL's takes 4",
}
_CONTEXTS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner"}
_CONTENTS = (  # by the first bytes
    (b"GGUF", "a GGUF file, which cannot be read; use the safetensors file"),
    (b"PK\x03\x04", "a pickle: never loaded; convert it to safetensors"),
    (b"\x80\x02", "a pickle: never loaded; convert it to safetensors"),
    (b"version https://git-lfs", "a pointer of Git LFS, and not the file itself: run git lfs pull"),
    (b"<!DOCTYPE", "a web page, saved in place of the file"),
    (b"<html", "a web page, saved in place of the file"),
)


def content_of(head: bytes) -> str:
    """What a file is that is no safetensors file, by its first bytes; empty where unknown."""
    return next((what for start, what in _CONTENTS if head.startswith(start)), "")


def check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse a file by the names of its tensors.

    Raises:
        BaseError: says what it is of.
    """
    every = list(names)
    for pattern, what in _FOREIGN:
        if any(re.match(pattern, name) for name in every):
            raise BaseError(f"{path}: no SDXL base: {what}")


def check_channels(path: Path, channels: object) -> None:
    """Refuse the UNets that take more than the noisy latents.

    Raises:
        BaseError: says what it is.
    """
    if channels in _CHANNELS:
        raise BaseError(
            f"{path}: {_CHANNELS[int(str(channels))]}; it cannot be trained or used here"
        )


def check_context(path: Path, shapes: Mapping[str, tuple[int, ...]], expected: object) -> None:
    """Refuse the UNet of another Stable Diffusion, by the width of the text embeddings it takes.

    Raises:
        BaseError: says which.
    """
    widths = {shape[1] for name, shape in shapes.items() if _is_context(name, shape)}
    for width in widths - {expected}:
        if width in _CONTEXTS:
            raise BaseError(f"{path}: no SDXL base: the UNet of {_CONTEXTS[width]}")


def _is_context(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith("attn2.to_k.weight") and len(shape) == 2
