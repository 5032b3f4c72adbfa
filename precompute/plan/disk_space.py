"""Estimates the bytes that a cache will take, and whether the disk has room for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from precompute.plan.placement import PlannedSample
from precompute.plan.plan_file import ShardTask
from precompute.settings import EncodeSettings
from runtime.files import format_bytes, free_bytes
from sdxl.base import Base
from shards.format import Layout
from shards.manifest import REPLACED

OVERHEAD = 5000  # bytes of a sample besides tensors and captions: tar and safetensors headers, JSON


@dataclass(frozen=True)
class Sizer:
    """Knows from the base's configs how large the tensors of a sample will be."""

    settings: EncodeSettings
    channels: int
    prompt: tuple[int, int]
    pooled: int

    @classmethod
    def of(cls, settings: EncodeSettings, base: Base) -> "Sizer":
        """
        Raises:
            ValueError: no such base.
        """
        text_config, text_config_2 = base.text_encoder.config, base.text_encoder_2.config
        return cls(
            settings,
            int(base.vae.config.get("latent_channels", 4)),
            (
                77 * settings.long_captions,
                text_config["hidden_size"] + text_config_2["hidden_size"],
            ),
            text_config_2["projection_dim"],
        )

    def bytes_of(self, planned: PlannedSample) -> int:
        """The bytes that one sample takes, to within about 1 %."""
        width, height = planned.bucket
        layout = Layout(
            dtype=self.settings.dtype,
            latent=(self.channels, height // 8, width // 8),
            prompt=self.prompt,
            pooled=self.pooled,
        )
        names = ["latents.mean", "sizes"]
        if not self.settings.mean_only:
            names.append("latents.std")
        if planned.record.mask is not None or self.settings.mask_from_alpha:
            names.append("mask")
        variant = sum(map(layout.slice_bytes, names))
        caption = sum(map(layout.slice_bytes, ("prompt_embeds", "pooled_prompt_embeds")))
        captions = planned.record.captions
        texts = sum(len(text.encode()) for text in captions)
        return len(planned.variants) * variant + len(captions) * caption + texts + OVERHEAD


def check_disk_space(
    out: Path, shard_tasks: Mapping[Path, Sequence[ShardTask]], sizer: Sizer
) -> None:
    """Refuse to begin what cannot be finished; ``shard_tasks`` are the shards to be written, by
    folder.

    A shard that is written anew takes its space twice, but only one shard at a time.

    Raises:
        OSError: the disk has too little room; says how much.
    """
    needed = largest = 0
    for folder, shards in shard_tasks.items():
        for shard_task in shards:
            size = sum(sizer.bytes_of(task.planned) for task in shard_task.tasks)
            needed += size - sum(_tar_bytes(folder, name) for name in shard_task.releases)
            largest = max(largest, size)
    needed, free = max(0, needed) + largest, free_bytes(out)
    if largest and needed > free:
        raise OSError(
            f"{out}: needs about {format_bytes(needed)} of disk, where {format_bytes(free)} are "
            "free: make room, or give another --out, --mean-only, or fewer variants or captions"
        )


def _tar_bytes(folder: Path, name: str) -> int:
    tars = (place / f"{name}.tar" for place in (folder, folder / REPLACED))
    return next((tar.stat().st_size for tar in tars if tar.exists()), 0)
