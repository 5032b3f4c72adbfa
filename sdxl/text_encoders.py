"""Prompts to embeddings, as SDXL's pipeline encodes them; longer ones in several chunks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from runtime.devices import fetch, to_device
from sdxl.base import Base
from sdxl.load import load_text_encoders, load_tokenizers


@dataclass(frozen=True, eq=False)
class Conditioning:
    """``prompt`` [N, T, D]: the penultimate hidden states of both encoders side by side;
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
    """Both text encoders of a base, on one device, and its tokenizers.

    A prompt is ``num_chunks`` chunks of 77 tokens (BOS, 75 of the text's, EOS), each encoded alone:
    1 is what SDXL's own pipeline does. T is 77 x ``num_chunks``.
    """

    def __init__(
        self,
        base: Base,
        dtype: torch.dtype,
        device: torch.device,
        num_chunks: int = 1,
    ) -> None:
        self.zeros_for_empty = base.zeros_for_empty_prompt
        self.tokenizers = load_tokenizers(base)
        self.device, self.num_chunks = device, num_chunks
        self.models = [encoder.to(device) for encoder in load_text_encoders(base, dtype)]

    def to(self, device: torch.device) -> None:
        """Move both encoders."""
        self.device = device
        for model in self.models:
            model.to(device)

    def encode(self, prompts: list[str], batch_size: int) -> Conditioning:
        """N prompts to embeddings on the CPU, in batches of exactly ``batch_size``."""
        empty: list[Conditioning] = []  # of this call alone: adapters come and go
        return Conditioning.cat(
            self.start(prompts[first : first + batch_size], batch_size, empty)()
            for first in range(0, len(prompts), batch_size)
        )

    @torch.inference_mode()
    def start(
        self, prompts: list[str], batch_size: int, empty: list[Conditioning] | None = None
    ) -> Callable[[], Conditioning]:
        """Start to encode up to ``batch_size`` prompts; what is returned waits for the embeddings,
        on the CPU. On CUDA nothing here waits for the device.

        A short batch is filled with empty prompts, and short prompts with empty chunks: the last
        bits of a text encoder depend on the batch size, but not on who else is in the batch. The
        chunks' hidden states follow one another, the pooled embedding is the first one's. Text
        that is longer is cut. ``empty`` keeps an empty chunk's encoding for the next call.
        """
        empty, rows = [] if empty is None else empty, []
        for ids in self._chunks(prompts + [""] * (batch_size - len(prompts))):
            is_empty = self._is_empty(*ids)
            row = empty[0] if is_empty and empty else self._encode_chunk(*ids)
            if is_empty and not empty:
                empty.append(row)
            rows.append(row)
        prompt, pooled = torch.cat([row.prompt for row in rows], dim=1), rows[0].pooled
        wait = fetch({"prompt": prompt[: len(prompts)], "pooled": pooled[: len(prompts)]})
        return lambda: Conditioning(**wait())

    def _chunks(self, prompts: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each chunk the token ids of both tokenizers, [N, 77] each."""
        pairs = (_chunked(tokenizer, prompts, self.num_chunks) for tokenizer in self.tokenizers)
        return list(zip(*(ids.unbind(dim=1) for ids in pairs), strict=True))

    def _is_empty(self, *both: torch.Tensor) -> bool:
        """Whether no prompt has text in this chunk."""
        return all(
            bool((ids == _chunked(tokenizer, [""], 1)[0]).all())
            for tokenizer, ids in zip(self.tokenizers, both, strict=True)
        )

    def _encode_chunk(self, *both: torch.Tensor) -> Conditioning:
        """One chunk of each prompt, on the device; as ``StableDiffusionXLPipeline.encode_prompt``
        encodes it."""
        if self.device.type == "cuda":
            both = tuple(ids.pin_memory() for ids in both)
        outs = [
            encoder(to_device(ids, self.device), output_hidden_states=True)
            for encoder, ids in zip(self.models, both, strict=True)
        ]
        prompt = torch.cat([out.hidden_states[-2] for out in outs], dim=-1)
        return Conditioning(prompt, outs[1].text_embeds)

    def encode_each(
        self, texts: Iterable[str | None], batch_size: int
    ) -> dict[str | None, Conditioning]:
        """Encode each different text once, as one row; None, always included, is the unconditional.

        That is zeros or the encoded "", by the base's ``force_zeros_for_empty_prompt``.
        """
        distinct = sorted({text for text in texts if text is not None} | {""})
        encoded = self.encode(distinct, batch_size)
        conditionings: dict[str | None, Conditioning] = {
            text: encoded[row : row + 1] for row, text in enumerate(distinct)
        }
        conditionings[None] = (
            conditionings[""].zeros_like() if self.zeros_for_empty else conditionings[""]
        )
        return conditionings

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than fit in its chunks."""
        return count_tokens(self.tokenizers[0], prompt) > self.num_chunks * max_text_tokens(
            self.tokenizers[0]
        )


def max_text_tokens(tokenizer: Any) -> int:
    """The number of text tokens that fit in one chunk: 75."""
    return int(tokenizer.model_max_length) - 2


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """The number of tokens of the text alone, without BOS and EOS."""
    return len(tokenizer(prompt, add_special_tokens=False).input_ids)


def _chunked(tokenizer: Any, prompts: list[str], num_chunks: int) -> torch.Tensor:
    """Token ids [N, ``num_chunks``, 77]: BOS, the text's, EOS, padding."""
    size = max_text_tokens(tokenizer)
    token_ids = torch.full((len(prompts), num_chunks, size + 2), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        for chunk in range(num_chunks):
            part = ids[chunk * size : (chunk + 1) * size]
            chunk_ids = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
            token_ids[row, chunk, : len(chunk_ids)] = torch.tensor(chunk_ids)
    return token_ids
