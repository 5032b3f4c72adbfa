"""Prompts to embeddings, by the SDXL pipeline's own ``encode_prompt``."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdxl.base import zeros_for_empty_prompt
from sdxl.load import load_text_encoders, load_tokenizers


@dataclass(frozen=True, eq=False)
class Conditioning:
    """``prompt`` [N, 77, D]: the penultimate hidden states of both encoders side by side;
    ``pooled`` [N, P]: the second encoder's projected embedding."""

    prompt: torch.Tensor
    pooled: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, rows: Any) -> "Conditioning":
        return Conditioning(self.prompt[rows], self.pooled[rows])

    @classmethod
    def cat(cls, parts: "Iterable[Conditioning]") -> "Conditioning":
        """The rows of all parts, in their order."""
        rows = list(parts)
        return cls(torch.cat([part.prompt for part in rows]), torch.cat([p.pooled for p in rows]))

    def zeros_like(self) -> "Conditioning":
        return Conditioning(torch.zeros_like(self.prompt), torch.zeros_like(self.pooled))

    def to(self, *args: Any, **kwargs: Any) -> "Conditioning":
        return Conditioning(self.prompt.to(*args, **kwargs), self.pooled.to(*args, **kwargs))


class TextEncoders:
    """Both text encoders of a base, and its tokenizers or those in the folder ``tokenizers``, on
    one device."""

    def __init__(
        self,
        base: str,
        dtype: torch.dtype,
        device: torch.device,
        tokenizers: Path | None = None,
    ) -> None:
        from diffusers import StableDiffusionXLPipeline

        one, two = load_text_encoders(base, dtype)
        self.zeros_for_empty = zeros_for_empty_prompt(base)
        self.tokenizers = load_tokenizers(base, tokenizers)
        self.device = device
        self._pipeline: Any = StableDiffusionXLPipeline(
            vae=None,
            unet=None,
            scheduler=None,
            text_encoder=one.to(device),
            text_encoder_2=two.to(device),
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            add_watermarker=False,
        )

    @torch.inference_mode()
    def encode(self, prompts: list[str], batch_size: int) -> Conditioning:
        """N prompts to embeddings on the CPU, in batches of exactly ``batch_size``.

        Short batches are filled with empty prompts: the last bits of a text encoder depend on the
        batch size, but not on who else is in the batch. Text beyond 77 tokens is cut.
        """
        found = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            padded = part + [""] * (batch_size - len(part))
            prompt, _, pooled, _ = self._pipeline.encode_prompt(
                padded, device=self.device, do_classifier_free_guidance=False
            )
            found.append(Conditioning(prompt[: len(part)].cpu(), pooled[: len(part)].cpu()))
        return Conditioning.cat(found)

    def encode_each(
        self, texts: Iterable[str | None], batch_size: int
    ) -> dict[str | None, Conditioning]:
        """Each different text once, as one row; None is the base's unconditional, always there.

        That is zeros or the encoded "", by the base's ``force_zeros_for_empty_prompt``.
        """
        distinct = sorted({text for text in texts if text is not None} | {""})
        encoded = self.encode(distinct, batch_size)
        found: dict[str | None, Conditioning] = {
            text: encoded[row : row + 1] for row, text in enumerate(distinct)
        }
        found[None] = found[""].zeros_like() if self.zeros_for_empty else found[""]
        return found

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than the encoders take."""
        tokenizer = self.tokenizers[0]
        return bool(len(tokenizer(prompt).input_ids) > tokenizer.model_max_length)
