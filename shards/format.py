"""The cache format: its specification, a sample, its two tar members, and their parts.

Format ``shardtune-cache``, version 2
=====================================

A cache is a folder::

    manifest.json               what the cache is; derived from the indexes, written last
    832x1216-000000.tar         a plain webdataset tar; all its samples have one bucket
    832x1216-000000.index       marks a complete shard, written after the tar is in place
    unconditional.safetensors   the empty prompt both ways: zeros, and the encoded ""
    prompts.safetensors         preview prompts, if there are any (see ``shards.previews``)
    rejected.jsonl              each image that was not encoded, and why; sorted by key

Legend: V variants (crops, flips), C captions, k chunks of 77 tokens, h w latent height and width,
D width of the prompt embeddings (SDXL: 2048), P width of the pooled embedding (SDXL: 1280).

Sample: two tar members, ``KEY.json`` and ``KEY.safetensors``. KEY is the first 20 hex digits of
sha256(relative posix path, with its extension, as UTF-8): webdataset ends a key at the first dot,
so no name of the user's can be one. The JSON holds ``path``, ``captions``, ``weight``, ``digests``
(sha256 of the image's bytes, of the captions, of its mask's) and ``notes`` (for ``latents``
and for ``text``: what the statistics of a shard are summed up from, and ``imported`` where another
trainer made them); where captions have roles (tags, short, long: see ``encode --caption-roles``)
also ``roles``, one per caption. The tensors are

    latents.mean           [V, 4, h, w]     scaled as the UNet sees them
    latents.std            [V, 4, h, w]     of the VAE's posterior, scaled; absent in mean-only
    prompt_embeds          [C, 77k, D]
    pooled_prompt_embeds   [C, P]
    sizes                  [V, 6]  int32    original h, w; crop top, left (after resize, and
                                            of a mirrored variant in the mirrored image);
                                            target h, w
    mask                   [V, 1, h, w]     optional; 0..1, the mean over each latent's area

in one of float16, bfloat16, float32 (``sizes`` apart).

Index: binary, little endian, made to be memory-mapped (see ``shards.index``)::

    16 bytes   b"shardtune-index2"
    8 bytes    u64, length n of the header
    n bytes    header: JSON (sorted keys), padded with spaces so that the records start at 64
    records    one of RECORD_DTYPE per sample, in key order: where its members and tensors are
    digests    u64 each: xxh3-64 of every part that is read alone; a record names its first
    32 bytes   sha256 of everything before

The parts of a sample, in digest order: the JSON; the safetensors header (with its length); each
variant's slices of latents and sizes; each variant's mask; each caption's slices. Slices of one
variant, or of one caption, that are adjacent in the file are one part, and parts are in file
order: with one variant, one caption and no mask there are two in half precision, and three in
float32, where safetensors puts the sizes last. A mask is a part of its own: not every run reads it.

The index header carries the shard's name, bucket, repeats, the tar's size and sha256, the recipe
(settings and digests of weights that made it), ``members`` (a row for each sample that was
assigned to it: its key and fingerprint), ``rejected`` (those of them that failed: path, reason),
``dropped_variants`` (path, number: crops that the mask hides all over; only where there are any),
``imported`` (how many samples have ``latents`` and ``text`` that another trainer made, if any),
``caption_roles`` (the different lists of roles that its samples have; a record names its own, so
that no JSON is read in training; only where there are any, and earlier versions ignore it),
``made_with`` (batch size and the like: they decide last bits) and sums from which the manifest's
statistics and color maps come (``sdxl.latent_rgb``; those of earlier versions lack some).

While an encode is under way there are also these, which are no part of the cache::

    plan.jsonl        where each sample goes (see ``precompute.plan.plan_file``)
    replaced/         shards that are being written anew: what is still valid is copied from them
    encode.lock       locked by the process that writes

Manifest: canonical JSON (sorted keys, two spaces, one newline at the end) with a ``digest`` over
the rest, so that any changed byte shows. It lists each shard with its index's sha256, and the
sha256 of each side file: whoever trusts the manifest can check every byte of the folder.
``data_digest`` identifies what a run learns from: it is over the same without the preview prompts,
which may be replaced in a finished cache (``cli.py prompts``).
"""

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors.torch
import torch

from runtime.devices import DTYPES

FORMAT = "shardtune-cache"
VERSION = 2
# TENSORS is their order in an index record.
VARIANT_TENSORS = ("latents.mean", "latents.std", "mask", "sizes")
MASK_TENSORS = ("mask",)
LATENT_TENSORS = tuple(name for name in VARIANT_TENSORS if name not in MASK_TENSORS)
CAPTION_TENSORS = ("prompt_embeds", "pooled_prompt_embeds")
TENSORS = VARIANT_TENSORS + CAPTION_TENSORS
NUM_FIXED_DIGESTS = 2  # of a sample, before those of its slices: the JSON's, the header's


class CacheError(ValueError):
    """A cache that is missing, damaged, unfinished or of another version. One clear line."""


class OtherFormat(CacheError):
    """The cache is not damaged, but of another version or program."""

    @classmethod
    def version(cls, path: object, version: object) -> "OtherFormat":
        return cls(
            f"{path}: cache format version {version}; this shardtune reads version {VERSION}. "
            "Encode the dataset again, into a new folder, or use the shardtune that made it"
        )


def sample_key(path: str) -> str:
    """20 hex digits that name an image by its relative posix path, extension included."""
    return hashlib.sha256(path.encode()).hexdigest()[:20]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shapes and dtype that every sample of one shard has in common."""

    dtype: str  # fp16, bf16 or fp32
    latent: tuple[int, int, int]  # (channels, h, w)
    prompt: tuple[int, int]  # (77k, D)
    pooled: int  # P

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one slice (one variant or one caption) of the tensor ``name``."""
        return {
            "latents.mean": self.latent,
            "latents.std": self.latent,
            "mask": (1, *self.latent[1:]),
            "sizes": (6,),
            "prompt_embeds": self.prompt,
            "pooled_prompt_embeds": (self.pooled,),
        }[name]

    def torch_dtype(self, name: str) -> torch.dtype:
        return torch.int32 if name == "sizes" else DTYPES[self.dtype]

    def slice_bytes(self, name: str) -> int:
        return int(torch.Size(self.shape(name)).numel()) * self.torch_dtype(name).itemsize


class TensorSlice(NamedTuple):
    """One variant or caption of a tensor; its bytes within its span."""

    name: str
    start: int
    stop: int


class SampleSpan(NamedTuple):
    """Adjacent slices of one variant or caption, which share a digest; their bytes within the
    safetensors member."""

    label: str
    start: int
    stop: int
    slices: tuple[TensorSlice, ...]
    digest: int  # which of the sample's


class SampleLayout(NamedTuple):
    """Where a sample's slices are; most samples of a shard share one layout."""

    variants: tuple[tuple[SampleSpan, ...], ...]  # of each, but for its mask
    masks: tuple[tuple[SampleSpan, ...], ...]  # of each variant; empty without one
    captions: tuple[tuple[SampleSpan, ...], ...]
    digests: struct.Struct  # of all its parts
    tensors: frozenset[str]  # those that the sample has

    def spans(self) -> Iterator[SampleSpan]:
        """All spans, in the order of their digests."""
        for group in (*self.variants, *self.masks, *self.captions):
            yield from group


def make_sample_layout(
    counts: Sequence[int], offsets: Sequence[int], layout: Layout
) -> SampleLayout:
    """The layout of a sample with ``counts`` (of variants, of captions) and its tensors at
    ``offsets``."""
    where = dict(zip(TENSORS, offsets, strict=True))
    digests = itertools.count(NUM_FIXED_DIGESTS)

    def of_each(label: str, count: int, names: Sequence[str]) -> Iterator[tuple[SampleSpan, ...]]:
        present = sorted((where[name], name) for name in names if where[name])
        for position in range(count):
            places = []
            for offset, name in present:
                size = layout.slice_bytes(name)
                start = offset + position * size
                places.append((name, start, start + size))
            runs = _adjacent_runs(places)
            yield tuple(_span(f"{label} {position}", run, next(digests)) for run in runs)

    variants = tuple(of_each("variant", counts[0], LATENT_TENSORS))
    masks = tuple(of_each("variant", counts[0], MASK_TENSORS))
    captions = tuple(of_each("caption", counts[1], CAPTION_TENSORS))
    tensors = frozenset(name for name, offset in where.items() if offset)
    return SampleLayout(variants, masks, captions, struct.Struct(f"<{next(digests)}Q"), tensors)


SliceSpan = tuple[str, int, int]  # of a slice in the member


def _adjacent_runs(places: Sequence[SliceSpan]) -> list[list[SliceSpan]]:
    runs: list[list[SliceSpan]] = []
    for place in places:
        if runs and runs[-1][-1][2] == place[1]:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs


def _span(label: str, run: Sequence[SliceSpan], digest: int) -> SampleSpan:
    description = f"{label} ({', '.join(name for name, _, _ in run)})"
    first, last = run[0][1], run[-1][2]
    slices = tuple(TensorSlice(name, start - first, stop - first) for name, start, stop in run)
    return SampleSpan(description, first, last, slices, digest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A sample: tensors as in the specification above, and what they were made from."""

    key: str
    path: str  # relative posix path in the dataset
    captions: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    digests: dict[str, str] = field(default_factory=dict)  # cause -> sha256
    notes: dict[str, Any] = field(default_factory=dict)  # what encode notes of latents and text
    weight: float = 1.0  # of the loss, not of the sampling
    roles: tuple[str, ...] = ()  # of each caption, "" for one without; empty if none has any

    def members(self) -> dict[str, bytes]:
        """The tar members by extension, the same bytes in every process."""
        fields = {
            "path": self.path,
            "captions": list(self.captions),
            "weight": self.weight,
            "digests": self.digests,
            "notes": self.notes,
        }
        if self.roles:
            fields["roles"] = list(self.roles)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        return {
            "json": json.dumps(fields, sort_keys=True, ensure_ascii=False).encode(),
            "safetensors": safetensors.torch.save(tensors),
        }

    @classmethod
    def from_members(cls, key: str, members: dict[str, bytes]) -> "Sample":
        """The way back, e.g. from a plain webdataset stream."""
        fields: dict[str, Any] = json.loads(members["json"])
        return cls(
            key=key,
            path=fields["path"],
            captions=tuple(fields["captions"]),
            tensors=safetensors.torch.load(members["safetensors"]),
            digests=fields["digests"],
            notes=fields["notes"],
            weight=fields["weight"],
            roles=tuple(fields.get("roles", ())),
        )
