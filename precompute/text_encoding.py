"""Loading the text encoders for encode, what their output depends on, and the empty prompt."""

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from runtime.devices import DTYPES
from runtime.files import content_digest, write_durable
from sdxl.base import Base
from sdxl.text_encoders import TextEncoders
from shards.manifest import UNCONDITIONAL
from shards.previews import KEY


def load_text(base: Base, device: torch.device, num_chunks: int) -> TextEncoders:
    """The base's text encoders, in the precision that captions are encoded in."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return TextEncoders(base, dtype, device, num_chunks)


def text_recipe_digest(recipe: dict[str, Any]) -> str:
    """A digest of everything but the text that decides a stored embedding."""
    parts = [recipe["text_encoder"], recipe["text_encoder_2"], recipe["storage"]["dtype"]]
    if "long_captions" in recipe:
        parts.append(recipe["long_captions"])
    return content_digest(parts)


def write_unconditional(
    folder: Path, encoders: TextEncoders, batch_size: int, recipe: dict[str, Any]
) -> None:
    """Write the empty prompt both ways, as zeros and encoded; ``text_shape`` reads its shapes."""
    empty = encoders.encode([""], batch_size).to(DTYPES[recipe["storage"]["dtype"]])
    zeros = empty.zeros_like()
    tensors = {
        "empty.prompt_embeds": empty.prompt,
        "empty.pooled_prompt_embeds": empty.pooled,
        "zeros.prompt_embeds": zeros.prompt,
        "zeros.pooled_prompt_embeds": zeros.pooled,
    }
    write_durable(folder / UNCONDITIONAL, _with_digest(tensors, text_recipe_digest(recipe)))


def _with_digest(tensors: dict[str, torch.Tensor], recipe_digest: str) -> bytes:
    """A file with a digest of its own, for an interrupted encode leaves no manifest to check it."""
    digest = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
    return safetensors.torch.save(tensors, metadata={KEY: f"{recipe_digest} {digest}"})


def unconditional_is_whole(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether an earlier run wrote the file that this one would write, up to last bits."""
    try:
        data = (folder / UNCONDITIONAL).read_bytes()
        tensors = safetensors.torch.load(data)
    except (OSError, SafetensorError):
        return False
    return _with_digest(tensors, text_recipe_digest(recipe)) == data


def text_shape(folder: Path) -> dict[str, int]:
    """``tokens`` and ``depth`` of a prompt embedding, and the width of the ``pooled`` one."""
    tensors = safetensors.torch.load((folder / UNCONDITIONAL).read_bytes())
    _, tokens, depth = tensors["empty.prompt_embeds"].shape
    return {
        "tokens": tokens,
        "depth": depth,
        "pooled": tensors["empty.pooled_prompt_embeds"].shape[1],
    }
