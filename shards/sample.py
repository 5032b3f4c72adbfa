"""One encoded image with its captions, and its two tar members."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch

from runtime.devices import DTYPES

# TENSORS is their order in an index record.
VARIANT_TENSORS = ("latents.mean", "latents.std", "mask", "sizes")
MASK_TENSORS = ("mask",)
LATENT_TENSORS = tuple(name for name in VARIANT_TENSORS if name not in MASK_TENSORS)
CAPTION_TENSORS = ("prompt_embeds", "pooled_prompt_embeds")
TENSORS = VARIANT_TENSORS + CAPTION_TENSORS


def sample_key(path: str) -> str:
    """20 hex digits that name an image by its relative posix path, extension included."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shapes and dtype that every sample of one shard has in common (see ``shards``)."""

    dtype: str  # fp16, bf16 or fp32
    latent: tuple[int, int, int]  # (channels, h, w)
    prompt: tuple[int, int]  # (77k, D)
    pooled: int  # P

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one slice (one variant or one caption) of the tensor ``name``."""
        return {
            "latents.mean": self.latent,
            "latents.std": self.latent,
            "mask": (1, *self.latent[1:]),
            "sizes": (6,),
            "prompt_embeds": self.prompt,
            "pooled_prompt_embeds": (self.pooled,),
        }[name]

    def torch_dtype(self, name: str) -> torch.dtype:
        return torch.int32 if name == "sizes" else DTYPES[self.dtype]

    def slice_bytes(self, name: str) -> int:
        return int(torch.Size(self.shape(name)).numel()) * self.torch_dtype(name).itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """Tensors as in the format's specification (``shards``), and what they were made from."""

    key: str
    path: str  # relative posix path in the dataset
    captions: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    digests: dict[str, str] = field(default_factory=dict)  # cause -> sha256
    notes: dict[str, Any] = field(default_factory=dict)  # what encode notes of each half
    weight: float = 1.0  # of the loss, not of the sampling

    def members(self) -> dict[str, bytes]:
        """The tar members by extension, the same bytes in every process."""
        about = {
            "path": self.path,
            "captions": list(self.captions),
            "weight": self.weight,
            "digests": self.digests,
            "notes": self.notes,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        return {
            "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(),
            "safetensors": safetensors.torch.save(tensors),
        }

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes]) -> "Sample":
        """The way back, e.g. from a plain webdataset stream."""
        about: dict[str, Any] = json.loads(members["json"])
        return cls(
            key=key,
            path=about["path"],
            captions=tuple(about["captions"]),
            tensors=safetensors.torch.load(members["safetensors"]),
            digests=about["digests"],
            notes=about["notes"],
            weight=about["weight"],
        )
