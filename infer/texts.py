"""The embeddings that a window of batches needs, each text encoded once."""

import warnings
from collections.abc import Iterable
from typing import Any

from infer.models import TEXT, Models
from infer.plan import Batch
from infer.weights import enable_loras, has_loras
from sdxl.conditioning import Conditioning, TextEncoders

Known = dict[str | None, Conditioning]


class Texts:
    """Embeddings on the CPU, by text; None is the base's unconditional.

    They are kept as long as a later window needs them. With ``compare`` and a LoRA that changes the
    text encoders there are two of each: without it and with it. ``plain`` names the text encoders
    without it, where it cannot be taken off the others.
    """

    def __init__(self, batch_size: int, compare: bool, plain: str | None = None) -> None:
        self.batch_size, self.compare, self.plain = batch_size, compare, plain
        self._known: dict[bool, Known] = {}

    def of(self, text: str | None, with_loras: bool) -> Conditioning:
        return self._known.get(with_loras, self._known[True])[text]

    def encode(self, models: Models, window: list[Batch], later: Iterable[Batch]) -> None:
        """Encode what ``window`` needs and is not known; forget what no batch needs any more."""
        needed, still = _texts(window), _texts(later)
        known = self._known.get(True, {})
        if new := sorted(needed - known.keys()):
            encoders: TextEncoders = models.at_work(TEXT)
            for with_loras in self._variants(encoders):
                model = TEXT if with_loras or self.plain is None else self.plain
                self._encode(models.at_work(model), new, with_loras)
            if cut := [text for text in new if encoders.is_cut(text)]:
                most = 77 * encoders.num_chunks
                warnings.warn(
                    f"{len(cut)} prompts are cut at {most} tokens, e.g. {cut[0][:60]!r}",
                    stacklevel=2,
                )
        keep = needed | still | {None}
        for with_loras, found in self._known.items():
            self._known[with_loras] = {text: one for text, one in found.items() if text in keep}

    def _variants(self, encoders: TextEncoders) -> tuple[bool, ...]:
        changed = self.plain is not None or any(has_loras(one) for one in encoders.models)
        return (False, True) if self.compare and changed else (True,)

    def _encode(self, encoders: TextEncoders, texts: list[str], with_loras: bool) -> None:
        for model in encoders.models:
            enable_loras(model, with_loras)
        known = self._known.setdefault(with_loras, {})
        if None not in known:
            known |= encoders.encode_each(texts, self.batch_size)
            return
        rows = encoders.encode(texts, self.batch_size)
        known |= {text: rows[row : row + 1] for row, text in enumerate(texts)}


def _texts(batches: Iterable[Batch]) -> set[Any]:
    every = [one for batch in batches for one in batch]
    texts = [text for one in every for text in (one.prompt, one.negative)]
    return {text for text in texts if text is not None}
