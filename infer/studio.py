"""Drawing: in windows, all text first, then the UNet, then the VAE.

On a small card each model is alone there in its turn; on a big one all stay, and each batch is
decoded as soon as it is sampled.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from infer.models import CPU, PLAIN_TEXT, PLAIN_UNET, TEXT, UNET, VAE, Models
from infer.plan import Batch, Drawing, make_batches, make_windows
from infer.settings import GenerateSettings
from infer.texts import Texts
from infer.weights import Weights, enable_loras
from runtime.devices import exact_fp32
from runtime.workers import WorkQueue
from sdxl.conditioning import Conditioning, TextEncoders
from sdxl.lora.apply import apply_text_loras
from sdxl.sampling import decode_latents, sample_latents, starting_noise, time_ids_of

UNET_BYTES = 500  # of activations for each pixel of each row of a batch in fp16; estimated
VAE_BYTES = 3100  # for each pixel in fp32
ONE_PICTURE = 1024 * 1024  # pixels that the VAE decodes at once, at least
Keep = Callable[[Drawing, list[torch.Tensor]], None]


@dataclass(frozen=True)
class Side:
    """With which weights an image is drawn: ``plain`` without the fine-tune."""

    model: str
    with_loras: bool
    plain: bool


class Studio:
    """All that draws, on one device."""

    def __init__(
        self,
        settings: GenerateSettings,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        stays: bool = False,
    ) -> None:
        exact_fp32()
        self.settings, self.weights, self.dtype, self.device = settings, weights, dtype, device
        self.stays = stays  # its models do, after all is drawn
        self._models: Models | None = None
        self.sides = [Side(UNET, True, False)]
        if settings.compare:
            switched = weights.loras and "unet" not in weights.merged_parts
            other = UNET if switched else PLAIN_UNET
            self.sides.insert(0, Side(other, False, True))
        self._samplers: dict[tuple[str | None, bool], Any] = {}

    def draw(self, drawings: list[Drawing], queue: WorkQueue, keep: Keep) -> None:
        """Draw what this process gets of ``drawings``, the same in all; ``keep`` takes each image
        (with ``--compare`` two: without and with), [3, H, W] in 0..1, on the CPU.

        Raises:
            FloatingPointError: an image is not finite.
        """
        batches = make_batches(drawings, self.settings.batch_size)
        windows = make_windows(batches, self.settings.window)
        models = self._models or self._new_models(drawings)
        self._models = models if self.stays else None
        plain = PLAIN_TEXT if PLAIN_TEXT in models.loaders else None
        texts = Texts(self.settings.batch_size, self.settings.compare, plain)
        for number, window in enumerate(windows):
            is_last = number == len(windows) - 1 and not self.stays
            texts.encode(models, window, chain.from_iterable(windows[number + 1 :]))
            if is_last:
                models.drop(TEXT)
                models.drop(PLAIN_TEXT)
            waiting = []
            for which in queue.claim(f"window {number}", len(window)):
                batch = window[which]
                latents = [self._sample(models, side, batch, texts) for side in self.sides]
                if models.small:
                    waiting.append((batch, [one.to(CPU) for one in latents]))
                else:
                    self._decode(models, batch, latents, keep)
            if is_last:
                models.drop(UNET)
                models.drop(PLAIN_UNET)
            for batch, latents in waiting:
                self._decode(models, batch, latents, keep)

    def _new_models(self, drawings: list[Drawing]) -> Models:
        loaders: dict[str, Callable[[], Any]] = {
            TEXT: self._load_text,
            UNET: lambda: self.weights.load_unet(self.dtype),
            VAE: lambda: self.weights.load_vae(self.dtype),
        }
        if any(side.model == PLAIN_UNET for side in self.sides):
            loaders[PLAIN_UNET] = lambda: self.weights.load_plain_unet(self.dtype)
        if self.settings.compare and self.weights.merged_parts - {"unet"}:
            loaders[PLAIN_TEXT] = self._load_plain_text
        most = max(one.width * one.height for one in drawings)
        rows = 2 * min(self.settings.batch_size, len(drawings))
        unet = UNET_BYTES * most * rows * self.dtype.itemsize // 2
        vae = VAE_BYTES * max(most, ONE_PICTURE)
        return Models(self.device, loaders, max(unet, vae), self.settings.low_memory)

    def _load_plain_text(self) -> TextEncoders:
        base, tokenizers = self.settings.base, self.settings.tokenizers
        return TextEncoders(base, self.dtype, CPU, tokenizers, self.weights.num_chunks)

    def _load_text(self) -> TextEncoders:
        encoders = self._load_plain_text()
        if self.weights.loras:
            apply_text_loras(encoders.models, self.weights.loras)
            for model in encoders.models:
                model.to(dtype=self.dtype)
        return encoders

    def _sampler(self, name: str | None, plain: bool) -> Any:
        if (name, plain) not in self._samplers:
            self._samplers[name, plain] = self.weights.sampler(name, plain)
        return copy.deepcopy(self._samplers[name, plain])

    def _sample(self, models: Models, side: Side, batch: Batch, texts: Texts) -> torch.Tensor:
        """Latents [N, C, h, w] of drawings of one kind, on the device."""
        unet, first = models.at_work(side.model), batch[0]
        if self.settings.compare:
            enable_loras(unet, side.with_loras)
        generators = [torch.Generator().manual_seed(one.seed) for one in batch]
        shape = (unet.config.in_channels, first.height // 8, first.width // 8)
        return sample_latents(
            unet,
            self._sampler(first.sampler, side.plain),
            Conditioning.cat(texts.of(one.prompt, side.with_loras) for one in batch),
            Conditioning.cat(texts.of(one.negative, side.with_loras) for one in batch),
            noise=starting_noise(generators, shape),
            time_ids=torch.cat([_time_ids(one) for one in batch]),
            num_steps=first.num_steps,
            guidance_scale=first.guidance_scale,
            guidance_rescale=first.guidance_rescale,
            generators=generators,
        )

    def _decode(
        self, models: Models, batch: Batch, latents: list[torch.Tensor], keep: Keep
    ) -> None:
        vae = models.at_work(VAE)
        vae.use_tiling = batch[0].tiled
        sides = [_pictures(vae, one) for one in latents]
        for drawing, *pictures in zip(batch, *sides, strict=True):
            if not all(picture.isfinite().all() for picture in pictures):
                raise FloatingPointError(
                    f"image {drawing.number} ({drawing.prompt[:60]!r}) is not finite: are the "
                    "weights whole? --precision fp32 tells"
                )
            keep(drawing, pictures)


def _time_ids(one: Drawing) -> torch.Tensor:
    original = (one.original_width, one.original_height)
    return time_ids_of((one.width, one.height), original, (one.crop_left, one.crop_top))


def _pictures(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] in 0..1, on the CPU; in fp32 where the VAE's own dtype overflows."""
    pictures = decode_latents(vae, latents)
    if vae.dtype == torch.float32 or pictures.isfinite().all():
        return pictures
    dtype = vae.dtype
    again = decode_latents(vae.to(torch.float32), latents)
    vae.to(dtype)
    return again
