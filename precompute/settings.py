"""What the encode stage can be told. Imports no torch: ``--help`` is made from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdxl.base import BASE_HELP, TOKENIZERS_HELP

Dtype = Literal["fp16", "bf16", "fp32"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of one encode. Lengths in pixels, sizes in samples."""

    dataset: Path
    base: str = field(metadata={"help": BASE_HELP})
    out: Path = field(metadata={"help": "The cache folder to write."})
    resolution: int = _option(1024, "Buckets have at most this squared as area.")
    bucket_step: int = _option(64, "Sides of the buckets are multiples of this.")
    square: bool = _option(False, "Shorter side to the resolution, then the centre square.")
    squash: bool = _option(False, "Stretch every picture to a square.")
    val_share: float = _option(0.0, "Share of the pictures, chosen by key, that becomes OUT/val.")
    empty_captions: bool = _option(
        False, "Keep pictures with an empty caption: they teach what no prompt means."
    )
    vae: str | None = _option(None, "Another VAE: its folder or file, or a base with it.")
    tokenizers: Path | None = _option(None, TOKENIZERS_HELP)
    vae_dtype: Dtype = _option("fp32", "Precision of the VAE; non-finite latents: again in fp32.")
    dtype: Dtype = _option("fp16", "Precision of the stored tensors.")
    mean_only: bool = _option(False, "Store only the mean of the VAE's posterior.")
    preview_prompts: Path | None = _option(
        None, "Prompt file to draw from while training; default: the prompts the cache has."
    )
    device: str = _option("auto", "auto, cuda, cuda:N, mps or cpu.")
    batch_size: int = _option(2, "Pictures encoded at a time; 1024² takes about 3 GB for each.")
    threads: int | None = _option(None, "CPU threads; the default is torch's.")
    shard_size: int = _option(512, "Most samples in one shard.")

    def __post_init__(self) -> None:
        if self.square and self.squash:
            raise ValueError("--square and --squash exclude each other")
        for name in ("batch_size", "shard_size", "resolution"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, not {getattr(self, name)}")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"--threads must be from 1 to 1024, not {self.threads}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"--val-share must be in 0..1, 1 excluded, not {self.val_share}")
        if self.resolution % 8:
            raise ValueError(f"--resolution must be a multiple of 8, not {self.resolution}")
