"""Finds a base's tokenizers, and reads what decides their token ids. Imports no torch."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.messages import first_line
from runtime.safe_parsing import MAX_JSON_BYTES, read_bounded, read_json_object
from sdxl import BaseError
from sdxl.hub import Snapshot, cached_component

HUB_ID = "stabilityai/stable-diffusion-xl-base-1.0"  # whose tokenizers every SDXL has
PADS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}  # the one thing they differ in
VOCAB_SIZE = 49408
NUM_TOKENS = 77  # of CLIP's text encoders; a folder may say nothing, or 1e30
_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": NUM_TOKENS,
}


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's folder; ``pad_token`` replaces the folder's own if set.

    Raises:
        BaseError: it has no vocabulary.
    """

    folder: Path
    pad_token: str | None = None

    def __post_init__(self) -> None:
        if not has_vocabulary(self.folder):
            raise BaseError(
                f"{self.folder}: no tokenizer can be read from it: it has neither vocab.json and "
                "merges.txt nor tokenizer.json"
            )

    def parts(self) -> dict[str, Any]:
        """Everything that decides token ids: vocabulary, merges, special tokens.

        They are read as transformers does: tokenizer.json takes precedence, and normalization is
        always CLIP's.

        Raises:
            BaseError: a file cannot be read.
        """
        folder, tokenizer_file = self.folder, self.folder / "tokenizer.json"
        try:
            if tokenizer_file.is_file():
                model = read_json_object(tokenizer_file)["model"]
                vocabulary = model["vocab"]
                merges = [
                    merge if isinstance(merge, str) else " ".join(merge)
                    for merge in model["merges"]
                ]
            else:
                vocabulary = read_json_object(folder / "vocab.json")
                text = read_bounded(folder / "merges.txt", MAX_JSON_BYTES).decode()
                merges = [
                    line for line in text.splitlines() if line and not line.startswith("#version")
                ]
            config: dict[str, Any] = {}
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (folder / name).is_file():
                    config |= read_json_object(folder / name)
            special = {name: _content(config.get(name, value)) for name, value in _SPECIAL.items()}
            max_length = special["model_max_length"] or NUM_TOKENS
            if not isinstance(max_length, int | float) or not max_length >= 3:
                raise ValueError(f"its model_max_length is {str(max_length)[:60]}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = first_line(error)
            raise BaseError(f"{folder}: no tokenizer can be read from it ({reason})") from None
        special["model_max_length"] = int(min(max_length, NUM_TOKENS))
        if self.pad_token is not None:
            special["pad_token"] = self.pad_token
        return {"vocabulary": vocabulary, "merges": merges, **special}


def _content(token: Any) -> Any:
    """The text of a special token, or the number ``model_max_length``.

    Raises:
        ValueError, KeyError: neither.
    """
    token = token["content"] if isinstance(token, dict) else token
    if not isinstance(token, str | int | float | None):
        raise ValueError("a special token is not text")
    return token


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary."""
    pair = (folder / "vocab.json", folder / "merges.txt")
    return (folder / "tokenizer.json").is_file() or all(path.is_file() for path in pair)


def tokenizer_override(folder: Path, name: str) -> TokenizerFiles:
    """``tokenizer`` or ``tokenizer_2`` in the folder of ``--tokenizers``.

    Raises:
        BaseError: it holds none.
    """
    if (folder / name).is_dir():
        return TokenizerFiles(folder / name)
    if has_vocabulary(folder):
        return TokenizerFiles(folder, PADS[name])
    raise BaseError(
        f"--tokenizers {folder}: holds neither {name}/ nor a CLIP tokenizer (vocab.json and "
        "merges.txt, or tokenizer.json)"
    )


class SharedTokenizers:
    """SDXL's own tokenizers, for the single file ``name_or_path``, which has none: from the hub's
    local cache, or else from the hub."""

    def __init__(self, name_or_path: str) -> None:
        self._name_or_path = name_or_path
        self._snapshot: Snapshot | None = None

    def find(self, name: str) -> TokenizerFiles:
        """``tokenizer`` or ``tokenizer_2``.

        Raises:
            BaseError: it cannot be found or downloaded.
        """
        cached = cached_component(HUB_ID, name)
        if cached is not None and has_vocabulary(cached):
            return TokenizerFiles(cached)
        warnings.warn(
            f"{self._name_or_path} has no tokenizers: fetching {name} of {HUB_ID}", stacklevel=2
        )
        try:
            self._snapshot = self._snapshot or Snapshot(HUB_ID)
            return TokenizerFiles(self._snapshot.fetch(name))
        except BaseError as error:
            raise BaseError(
                f"{self._name_or_path}: a single file has no tokenizers, and those of {HUB_ID} are "
                f"not at hand; give --tokenizers DIR ({error})"
            ) from error
