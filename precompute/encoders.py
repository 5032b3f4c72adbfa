"""The VAE and the text encoders, loaded on first use; encodes images to scaled latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from precompute.images.variants import normalize
from precompute.settings import EncodeSettings
from runtime.devices import DTYPES, check_bf16, check_tf32, fetch, pick_device, tf32, to_device
from sdxl.base import Base, ModelSource
from sdxl.load import load_vae
from sdxl.sampling import scale_mean, scale_std
from sdxl.text_encoders import TextEncoders


@dataclass(frozen=True, eq=False)
class Posterior:
    """The scaled posterior of N images: ``mean`` and ``std`` [N, C, h, w] fp32, on the CPU."""

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def is_finite(self) -> torch.Tensor:
        """[N] bool: whether all numbers of an image are finite."""
        both = torch.stack([self.mean, self.std])
        return both.isfinite().all(dim=0).flatten(1).all(dim=1)


class LatentEncoder:
    """Encodes images with the VAE, at one fixed batch size; if ``in_tf32``, an fp32 one in TF32."""

    def __init__(
        self,
        vae: ModelSource,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        in_tf32: bool = False,
    ) -> None:
        self._in_tf32 = in_tf32
        self._vae: Any = load_vae(vae, dtype).to(device)
        self._source = vae
        self._fp32_vae: Any = None
        self.batch_size = batch_size

    @property
    def channels(self) -> int:
        return int(self._vae.config.latent_channels)

    @property
    def fp32_vae(self) -> Any:
        """The VAE in fp32: itself, or loaded again from its files, since weights in half precision
        are rounded, or even infinite."""
        if self._vae.dtype == torch.float32:
            return self._vae
        if self._fp32_vae is None:
            self._fp32_vae = load_vae(self._source, torch.float32).to(self._vae.device)
        return self._fp32_vae

    def encode(self, images: Sequence[torch.Tensor]) -> Posterior:
        """The posterior of up to ``batch_size`` images [3, H, W] of one size, uint8."""
        return self.start(images)()

    def start(self, images: Sequence[torch.Tensor]) -> Callable[[], Posterior]:
        """Start to encode up to ``batch_size`` images; what is returned waits for the posterior.

        On CUDA nothing here waits for the device: 8-bit pixels go there from pinned memory and are
        normalized there, and the host may start the next batch before it waits for this one.

        The batch is always filled up: a VAE's last bits change with the batch size, but not with
        what else is in the batch. An image whose latents are not finite is encoded again in fp32.
        """
        wait = self._start(self._vae, images)
        return wait if self._vae.dtype == torch.float32 else lambda: self._mended(wait(), images)

    def _mended(self, posterior: Posterior, images: Sequence[torch.Tensor]) -> Posterior:
        """With the images that are not finite encoded again, in fp32."""
        if bool(posterior.is_finite.all()):
            return posterior
        in_fp32 = self._start(self.fp32_vae, images)()
        is_finite = posterior.is_finite.view(-1, 1, 1, 1)
        return Posterior(
            torch.where(is_finite, posterior.mean, in_fp32.mean),
            torch.where(is_finite, posterior.std, in_fp32.std),
        )

    @torch.inference_mode()
    def _start(self, vae: Any, images: Sequence[torch.Tensor]) -> Callable[[], Posterior]:
        count, device = len(images), vae.device
        shape = (self.batch_size, *images[0].shape)
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        torch.stack([*images], out=pixels[:count])
        filled = normalize(to_device(pixels, device))
        filled[count:] = 0
        with tf32(self._in_tf32):
            posterior = vae.encode(filled.to(vae.dtype)).latent_dist
        wait = fetch({"mean": posterior.mean[:count].float(), "std": posterior.std[:count].float()})

        def scaled() -> Posterior:
            arrived = wait()
            return Posterior(
                scale_mean(vae.config, arrived["mean"]), scale_std(vae.config, arrived["std"])
            )

        return scaled


def load_text(base: Base, device: torch.device, num_chunks: int) -> TextEncoders:
    """The base's text encoders, in the precision that captions are encoded in."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return TextEncoders(base, dtype, device, num_chunks)


class Encoders:
    """The VAE and the text encoders on one device, always at the same ``batch_size``."""

    def __init__(self, settings: EncodeSettings, base: Base, batch_size: int) -> None:
        self.settings, self.base, self.batch_size = settings, base, batch_size
        self.device = pick_device(settings.device)
        # How many batches are started before the host waits for one. With one ahead it sums, hashes
        # and writes while a GPU computes; a CPU would only hold more in memory.
        self.num_ahead = 1 if self.device.type == "cuda" else 0
        self.drawing_measures: dict[str, Any] | None = None  # kept for ``precompute.sanity``
        self._latents: LatentEncoder | None = None
        self._text: TextEncoders | None = None

    @property
    def made_with(self) -> dict[str, Any]:
        """The run settings that decide the last bits besides the recipe; on a GPU threads do
        not."""
        made_with = {"batch_size": self.batch_size, "device": self.device.type}
        if self.device.type == "cpu":
            made_with["threads"] = torch.get_num_threads()
        return made_with

    @property
    def channels(self) -> int:
        """The number of latent channels, from the config: the VAE need not be loaded."""
        return int(self.base.vae.config.get("latent_channels", 4))

    @property
    def latents(self) -> LatentEncoder:
        if self._latents is None:
            name = self.settings.vae_dtype
            if name == "bf16":
                check_bf16("--vae-dtype bf16", self.device)
            if name == "tf32":
                check_tf32("--vae-dtype tf32", self.device)
            dtype = DTYPES["fp32" if name == "tf32" else name]
            self._latents = LatentEncoder(
                self.base.vae, dtype, self.device, self.batch_size, in_tf32=name == "tf32"
            )
        return self._latents

    @property
    def text(self) -> TextEncoders:
        if self._text is None:
            self._text = load_text(self.base, self.device, self.settings.long_captions)
        return self._text
