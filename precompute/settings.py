"""What the encode stage can be told. Imports no torch: ``--help`` is made from it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.workers import check_gpus
from sdxl.base import BASE_HELP, TOKENIZERS_HELP

MOST_CROPS = 1000
MOST_CHUNKS = 4000  # of captions a picture: 1.3 GB in two bytes; an index counts to 4 GB
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
    missing_caption: str = _option(
        "reject", "What a picture without a caption gets: reject, empty, or this TEXT."
    )
    caption_prefix: str = _option("", "Put before each caption, with a space.")
    caption_lines: bool = _option(False, "Each line of a text file is a caption of its own.")
    shuffle_tags: int = _option(0, "Cache this many orders of each caption's comma-separated tags.")
    keep_tokens: int = _option(0, "The first tags that --shuffle-tags leaves in their place.")
    repeat_folders: bool = _option(
        False, "Pictures in folders named N_name are taken N times an epoch."
    )
    min_size: int = _option(0, "Pictures whose shorter side has fewer pixels are rejected.")
    mask_from_alpha: bool = _option(
        False, "A picture's own alpha is its mask, where no mask picture lies beside it."
    )
    flip: bool = _option(False, "Cache each picture mirrored too.")
    crops: int = _option(0, "Cache this many random crops of each picture, not its centre.")
    long_captions: int = _option(1, "Captions have this many chunks of 77 tokens.")
    vae: str | None = _option(None, "Another VAE: its folder or file, or a base with it.")
    tokenizers: Path | None = _option(None, TOKENIZERS_HELP)
    vae_dtype: Dtype = _option("fp32", "Precision of the VAE; non-finite latents: again in fp32.")
    dtype: Dtype = _option("fp16", "Precision of the stored tensors.")
    mean_only: bool = _option(False, "Store only the mean of the VAE's posterior.")
    preview_prompts: Path | None = _option(
        None, "Prompt file to draw from while training; default: the prompts the cache has."
    )
    device: str = _option("auto", "auto, cuda, cuda:N, mps or cpu.")
    gpus: str | None = _option(None, "Processes, one for each GPU of this machine: N, or auto.")
    batch_size: int | None = _option(
        None,
        "Pictures encoded at a time; 1024² takes about 3 GB for each. Default: as the cache was "
        "encoded so far, else 2.",
    )
    threads: int | None = _option(
        None, "CPU threads of each process. Default: as the cache was encoded so far, else all."
    )
    shard_size: int = _option(512, "Most samples in one shard.")
    rehash: bool = _option(
        False, "Read all files again, also those whose size and time are as they were."
    )
    repack: bool = _option(
        False, "Put the samples where a fresh encode would, copying what is still right."
    )
    max_rejected: float = _option(
        0.5,
        "Most images that may be rejected, as a share. What can be known before encoding is judged "
        "before anything is written; the rest at the end, with exit code 1.",
    )
    max_removed: float | None = _option(
        None,
        "Most samples that may be removed from a cache, as a share of them; more is refused before "
        "anything is written. Default: 0.1, and 0.5 for a cache of fewer than 100 samples.",
    )
    allow_other_dataset: bool = _option(
        False, "Replace a cache that was made from another dataset."
    )

    dry_run: bool = _option(
        False,
        "Print what would be encoded, removed, cropped and rejected and its size, then exit.",
    )

    def __post_init__(self) -> None:
        if self.square and self.squash:
            raise ValueError("--square and --squash exclude each other")
        check_gpus(self.gpus)
        least = {"batch_size": 1, "shard_size": 1, "resolution": 1}
        least |= {"shuffle_tags": 0, "keep_tokens": 0, "min_size": 0, "crops": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {smallest}, not {value}")
        if not 1 <= self.long_captions <= 32:
            raise ValueError(f"--long-captions must be from 1 to 32, not {self.long_captions}")
        if self.crops > MOST_CROPS:
            raise ValueError(f"--crops must be at most {MOST_CROPS}, not {self.crops}")
        if self.shuffle_tags * self.long_captions > MOST_CHUNKS:
            raise ValueError(
                f"--shuffle-tags {self.shuffle_tags} of --long-captions {self.long_captions} are "
                f"more than {MOST_CHUNKS} chunks a picture"
            )
        if self.keep_tokens and not self.shuffle_tags:
            raise ValueError("--keep-tokens goes with --shuffle-tags")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"--threads must be from 1 to 1024, not {self.threads}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected must be in 0..1, not {self.max_rejected}")
        if self.max_removed is not None and not 0 <= self.max_removed <= 1:
            raise ValueError(f"--max-removed must be in 0..1, not {self.max_removed}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"--val-share must be in 0..1, 1 excluded, not {self.val_share}")
        if self.resolution % 8:
            raise ValueError(f"--resolution must be a multiple of 8, not {self.resolution}")
