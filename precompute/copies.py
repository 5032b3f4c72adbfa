"""Halves of samples from shards that were set aside, every byte checked."""

import functools
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from precompute.halves import Half
from precompute.pictures.masks import shows_anything
from precompute.planning.work import Found
from sdxl.latent_rgb import LatentSums
from shards.format import CAPTION_TENSORS, VARIANT_TENSORS, CacheError
from shards.index import Index
from shards.manifest import REPLACED
from shards.reader import MAX_OPEN_SHARDS, Shard


class Copies:
    """Reads from ``replaced/`` of a cache and, of a sample that moved between train and val, of
    the other one. What is damaged or gone is None, and to be encoded again."""

    def __init__(self, folder: Path) -> None:
        self._cache = folder
        self._open = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    def latents(self, found: Found) -> Half | None:
        half = self._half(found, VARIANT_TENSORS, "latents", ("picture", "mask"))
        masks = half.tensors.get("mask", ()) if half else ()
        if not all(shows_anything(mask, mask.dtype) for mask in masks):
            return None  # of an earlier version, which did not drop such variants
        return half

    def text(self, found: Found) -> Half | None:
        return self._half(found, CAPTION_TENSORS, "text", ("captions",))

    def _half(
        self, found: Found, names: tuple[str, ...], half: str, digested: tuple[str, ...]
    ) -> Half | None:
        try:
            shard = self._open(found.shard, found.cache)
            if found.row >= len(shard.index) or shard.index.key(found.row) != found.key:
                return None  # another shard of that name
            members = shard.members(found.row)
        except CacheError:
            return None
        try:
            tensors = safetensors.torch.load(members["safetensors"])
            about = shard.about(found.row)
            notes = about["notes"][half]
            if half == "latents":
                LatentSums.from_json(notes["sums"])
        except (SafetensorError, ValueError, KeyError, TypeError):
            return None  # it has its digests, and is not what encode writes
        kept = {name: tensors[name] for name in names if name in tensors}
        digests = {name: about["digests"][name] for name in digested if name in about["digests"]}
        return Half(kept, notes, shard.index.header["made_with"], digests)

    def _open_shard(self, name: str, cache: str) -> Shard:
        folder = (self._cache.parent / cache if cache else self._cache) / REPLACED
        return Shard(folder, name, Index(folder / f"{name}.index").sha256)
