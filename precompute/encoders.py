"""The VAE and the text encoders, each loaded when it is first needed."""

from functools import cached_property
from typing import Any

import torch

from precompute.latents import LatentEncoder
from precompute.sanity import measure_drawings
from precompute.settings import EncodeSettings
from precompute.text_encoding import load_text
from runtime.devices import DTYPES, check_bf16, pick_device
from sdxl.base import Base
from sdxl.text_encoders import TextEncoders


class Encoders:
    """The VAE and the text encoders on one device, always at the same ``batch_size``."""

    def __init__(self, settings: EncodeSettings, base: Base, batch_size: int) -> None:
        self.settings, self.base, self.batch_size = settings, base, batch_size
        self.device = pick_device(settings.device)
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
            dtype = DTYPES[self.settings.vae_dtype]
            if dtype == torch.bfloat16:
                check_bf16("--vae-dtype bf16", self.device)
            self._latents = LatentEncoder(self.base.vae, dtype, self.device, self.batch_size)
        return self._latents

    @cached_property
    def drawings(self) -> dict[str, Any]:
        """The measures of the built-in drawings, encoded by this stage (see
        ``precompute.sanity``)."""
        return measure_drawings(self.latents)

    @property
    def text(self) -> TextEncoders:
        if self._text is None:
            self._text = load_text(self.base, self.device, self.settings.long_captions)
        return self._text
