"""Halves of samples from shards that were set aside, every byte checked."""

import functools
import json
from pathlib import Path

import safetensors.torch

from precompute.halves import Half
from precompute.planning.work import Found
from shards import CacheError
from shards.index import Index
from shards.manifest import REPLACED
from shards.reader import MAX_OPEN_SHARDS, Shard
from shards.sample import CAPTION_TENSORS, VARIANT_TENSORS


class Copies:
    """Reads from ``replaced/``. What is damaged or gone is None, and to be encoded again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / REPLACED
        self._open = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    def latents(self, found: Found) -> Half | None:
        return self._half(found, VARIANT_TENSORS, "latents")

    def text(self, found: Found) -> Half | None:
        return self._half(found, CAPTION_TENSORS, "text")

    def _half(self, found: Found, names: tuple[str, ...], half: str) -> Half | None:
        try:
            shard = self._open(found.shard)
            members = shard.members(found.row)
        except CacheError:
            return None
        tensors = safetensors.torch.load(members["safetensors"])
        notes = json.loads(members["json"])["notes"][half]
        kept = {name: tensors[name] for name in names if name in tensors}
        return Half(kept, notes, shard.index.header["made_with"])

    def _open_shard(self, name: str) -> Shard:
        return Shard(self._folder, name, Index(self._folder / f"{name}.index").sha256)
