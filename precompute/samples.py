"""The members of one shard to samples: decoded ahead by threads, encoded batch by batch.

Batches are cut inside one shard and filled to one fixed size, so a sample's bytes do not depend
on who else is encoded, or in which process.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from precompute.images import open_picture, render
from precompute.latents import LatentEncoder
from precompute.placement import Planned, describe
from precompute.settings import EncodeSettings
from precompute.sources import Rejected
from precompute.text import load_text
from sdxl.conditioning import TextEncoders
from sdxl.device import PRECISIONS, pick_device
from sdxl.latent_rgb import LatentSums
from shards.reader import read_ahead
from shards.sample import DTYPES, Sample


class Encoders:
    """The VAE and the text encoders, loaded when the first shard needs them."""

    def __init__(self, settings: EncodeSettings) -> None:
        self.settings = settings
        self.device = pick_device(settings.device)
        self._latents: LatentEncoder | None = None
        self._text: TextEncoders | None = None

    def load(self) -> None:
        """Load what is not loaded yet, so that it is refused now or not at all."""
        assert self.latents and self.text

    @property
    def latents(self) -> LatentEncoder:
        if self._latents is None:
            settings = self.settings
            self._latents = LatentEncoder(
                settings.vae or settings.base,
                PRECISIONS[settings.vae_dtype],
                self.device,
                settings.batch_size,
            )
        return self._latents

    @property
    def text(self) -> TextEncoders:
        if self._text is None:
            self._text = load_text(self.settings.base, self.device, self.settings.tokenizers)
        return self._text


@dataclass
class Notes:
    """What a shard's index tells of how its samples were made."""

    sums: LatentSums
    num_cut_captions: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "sums": self.sums.to_json(),
            "num_cut_captions": self.num_cut_captions,
            "rejected": [[one.path, one.reason] for one in self.rejected],
        }


def encode_members(
    members: tuple[Planned, ...], encoders: Encoders, notes: Notes, bar: Any
) -> Iterator[Sample]:
    """Samples in the order of ``members``, less those that fail, which ``notes`` names."""
    size, threads = encoders.settings.batch_size, torch.get_num_threads()
    opened = read_ahead(_open_member, members, threads, ahead=2 * size + threads)
    for start in range(0, len(members), size):
        batch = []
        for member in members[start : start + size]:
            pixels = next(opened)
            if isinstance(pixels, str):
                notes.rejected.append(Rejected(member.record.path, pixels))
            else:
                batch.append((member, pixels))
        if batch:
            yield from _encode_batch(batch, encoders, notes)
        bar.update(min(size, len(members) - start))
        bar.set_postfix(rejected=len(notes.rejected), refresh=False)


def _open_member(planned: Planned) -> torch.Tensor | str:
    """The picture's pixels, or why there are none.

    Raises:
        OSError: the file cannot be read now. That is no property of the picture: the run ends, and
            goes on from there the next time.
    """
    data = planned.record.file.read_bytes()
    try:
        if hashlib.sha256(data).hexdigest() != planned.digest:
            return "it changed while the data set was encoded; encode again"
        return render(open_picture(data), planned.geometry)
    except Exception as error:  # Pillow raises anything of a bad file
        return describe(error)


def _encode_batch(
    batch: list[tuple[Planned, torch.Tensor]], encoders: Encoders, notes: Notes
) -> Iterator[Sample]:
    settings = encoders.settings
    pictures = torch.stack([pixels for _, pixels in batch])
    posterior = encoders.latents.encode(pictures)
    captions = [caption for planned, _ in batch for caption in planned.record.captions]
    text = encoders.text.encode(captions, settings.batch_size)
    first = 0
    for row, (planned, _) in enumerate(batch):
        record = planned.record
        mine, first = slice(first, first + len(record.captions)), first + len(record.captions)
        tensors = {
            "latents.mean": posterior.mean[row : row + 1],
            "latents.std": posterior.std[row : row + 1],
            "prompt_embeds": text.prompt[mine],
            "pooled_prompt_embeds": text.pooled[mine],
        }
        if settings.mean_only:
            del tensors["latents.std"]
        tensors = {name: tensor.to(DTYPES[settings.dtype]) for name, tensor in tensors.items()}
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            reason = f"its {bad[0]} is not finite in {settings.dtype}"
            notes.rejected.append(Rejected(record.path, reason))
            continue
        tensors["sizes"] = torch.tensor([planned.geometry.sizes], dtype=torch.int32)
        notes.sums.add(posterior.mean[row : row + 1], pictures[row : row + 1])
        notes.num_cut_captions += sum(map(encoders.text.is_cut, record.captions))
        yield Sample(
            key=record.key,
            path=record.path,
            captions=record.captions,
            tensors=tensors,
            digests=planned.digests,
        )
