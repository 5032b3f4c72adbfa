"""``prompts.safetensors``: preview prompts with their embeddings, in a cache for the trainer.

Tensors, N prompts in the cache's dtype, rows in the order of the prompt file:

    prompt_embeds                    [N, T, D]
    pooled_prompt_embeds             [N, P]
    negative.prompt_embeds           [N, T, D]   the base's unconditional where there is no negative
    negative.pooled_prompt_embeds    [N, P]

The header's one metadata key, ``shardtune``, is sorted JSON: ``prompts`` (for each text, negative,
width, height, seed, num_steps, guidance_scale, sampler, num_images, original_width and _height,
crop_left and _top, in pixels; null or missing: the reader's default), ``made_with`` (what
else decides the tensors) and ``digest`` (sha256 over those two and the tensors). With that digest
the file vouches for itself where an interrupted encode has left no manifest.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from runtime import schema
from runtime.devices import DTYPES
from runtime.files import canonical_json
from runtime.schema import Check, misfit, read_json

KEY = "shardtune"


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


_SIZES = ("width", "height", "num_steps", "num_images", "original_width", "original_height")
PROMPT_FIELDS = {
    **dict.fromkeys(_SIZES, _or_none(schema.integer(1, 2**31))),
    "negative": _or_none(schema.text),
    "seed": _or_none(schema.integer(0, 2**64)),
    "guidance_scale": _or_none(schema.number),
    "sampler": _or_none(schema.text),
    "crop_left": _or_none(schema.integer(-(2**31), 2**31)),
    "crop_top": _or_none(schema.integer(-(2**31), 2**31)),
}
HEADER_FIELDS = {
    "prompts": schema.each(schema.fields({"text": schema.text}, PROMPT_FIELDS)),
    "made_with": schema.record,
}
TENSORS = (
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative.prompt_embeds",
    "negative.pooled_prompt_embeds",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreviewFile:
    """The contents of the file: ``prompts`` as plain JSON, ``made_with``, and the four tensors."""

    prompts: list[dict[str, Any]]
    made_with: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def to_bytes(self) -> bytes:
        """The same bytes in every process."""
        header = {"prompts": self.prompts, "made_with": self.made_with}
        header["digest"] = _digest(header, self.tensors)
        metadata = {KEY: json.dumps(header, sort_keys=True, ensure_ascii=False)}
        return safetensors.torch.save(self.tensors, metadata=metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> "PreviewFile":
        """The way back.

        Raises:
            ValueError: damaged, or something else.
        """
        try:
            (length,) = struct.unpack("<Q", data[:8])
            header = read_json(read_json(data[8 : 8 + length])["__metadata__"][KEY])
            tensors = safetensors.torch.load(data)
            digest = header.pop("digest")
            if problem := misfit(header, HEADER_FIELDS) or _misfit(header["prompts"], tensors):
                raise ValueError(problem)
            is_intact = _digest(header, tensors) == digest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no preview prompts ({error})") from None
        except (struct.error, SafetensorError, RecursionError) as error:
            raise ValueError(f"no whole safetensors file ({error})") from None
        if not is_intact:
            raise ValueError("damaged (its digest differs)")
        return cls(prompts=header["prompts"], made_with=header["made_with"], tensors=tensors)


def _misfit(prompts: list[Any], tensors: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with the tensors of these prompts; None if nothing is."""
    if sorted(tensors) != sorted(TENSORS):
        return "other tensors than those of prompts"
    for name in TENSORS[:2]:
        positive, negative = tensors[name], tensors[f"negative.{name}"]
        if positive.dtype not in DTYPES.values() or (positive.shape, positive.dtype) != (
            negative.shape,
            negative.dtype,
        ):
            return f"{name} of another shape or dtype than its negative"
        if positive.ndim != (3 if name == "prompt_embeds" else 2) or len(positive) != len(prompts):
            return f"{name} is not of {len(prompts)} prompts"
    return None


def _digest(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(canonical_json(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
