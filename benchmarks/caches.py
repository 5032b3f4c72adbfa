"""Makes caches of SDXL's real sample sizes, of random numbers or as sparse files."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import xxhash

from sdxl.base import open_base
from shards.format import TENSORS, Layout, Sample, make_sample_layout, sample_key
from shards.index import RECORD_DTYPE, Index, write_index
from shards.manifest import UNCONDITIONAL, write_manifest
from shards.writer import shard_name, write_shard

TOKENS = 77
SHARD_SIZE = 512
TAR_BLOCK = 512
JSON_BYTES = 300
HEADER_BYTES = 520  # of a safetensors file of five tensors, about


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the samples of a cache are: square images in fp16, one variant, one caption."""

    pixels: int
    mean_only: bool = False
    width: int = 2048  # of the prompt embeddings
    pooled: int = 1280

    @property
    def layout(self) -> Layout:
        latent = (4, self.pixels // 8, self.pixels // 8)
        return Layout(dtype="fp16", latent=latent, prompt=(TOKENS, self.width), pooled=self.pooled)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of a sample."""
        absent = {"mask", "latents.std"} if self.mean_only else {"mask"}
        return tuple(name for name in TENSORS if name not in absent)

    @property
    def sample_bytes(self) -> int:
        return sum(self.layout.slice_bytes(name) for name in self.names)


KINDS = {
    "449 kB": Kind(pixels=1024, mean_only=True),
    "580 kB": Kind(pixels=1024),
}


def kind_for(base: str, pixels: int) -> Kind:
    """Samples as the UNet of a base takes them."""
    unet = open_base(base).unet.config
    added = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    return Kind(pixels=pixels, width=unet["cross_attention_dim"], pooled=added)


def random_samples(kind: Kind, count: int) -> list[Sample]:
    """In key order; the tensors of all are cut from one random array, each from another place."""
    noise = torch.randn(4 * kind.sample_bytes // 2 + count).half()
    samples = []
    for number in range(count):
        tensors, start = {}, number
        for name in kind.names:
            shape = (1, *kind.layout.shape(name))
            size = int(torch.Size(shape).numel())
            if name == "sizes":
                tensors[name] = torch.tensor([[kind.pixels] * 6], dtype=torch.int32)
            else:
                tensors[name] = noise[start : start + size].reshape(shape)
                start += size
        path = f"{number}.png"
        samples.append(
            Sample(key=sample_key(path), path=path, captions=("an image",), tensors=tensors)
        )
    return sorted(samples, key=lambda sample: sample.key)


def write_random(folder: Path, kind: Kind, samples: list[Sample]) -> None:
    """A real cache of these samples."""
    folder.mkdir(parents=True)
    names = []
    for number, start in enumerate(range(0, len(samples), SHARD_SIZE)):
        names.append(shard_name((kind.pixels, kind.pixels), number))
        part = samples[start : start + SHARD_SIZE]
        write_shard(folder, names[-1], part, kind.layout, _header_fields(kind))
    _finish(folder, kind, names)


def write_sparse(folder: Path, kind: Kind, count: int) -> None:
    """A cache whose indexes are real, and whose tars are holes: all tensors read as zeros.

    The digests are those of zeros, so that every check passes; the tars have no headers, and are
    not what their sha256 says.
    """
    folder.mkdir(parents=True)
    names = []
    for number, start in enumerate(range(0, count, SHARD_SIZE)):
        names.append(shard_name((kind.pixels, kind.pixels), number))
        _write_hole(folder, names[-1], kind, min(SHARD_SIZE, count - start), number)
    _finish(folder, kind, names)


def _write_hole(folder: Path, name: str, kind: Kind, count: int, seed: int) -> None:
    size = HEADER_BYTES + kind.sample_bytes
    stride = 3 * TAR_BLOCK + -(-JSON_BYTES // TAR_BLOCK) * TAR_BLOCK + size
    stride = -(-stride // TAR_BLOCK) * TAR_BLOCK
    starts = np.arange(count, dtype=np.uint64) * np.uint64(stride)
    records = np.zeros(count, RECORD_DTYPE)
    text = np.random.default_rng(seed).bytes(10 * count).hex()
    records["key"] = sorted(text[20 * n : 20 * n + 20].encode() for n in range(count))
    records["num_variants"], records["num_captions"], records["weight"] = 1, 1, 1.0
    records["json_size"], records["json_offset"] = JSON_BYTES, starts + np.uint64(TAR_BLOCK)
    records["offset"] = starts + np.uint64(3 * TAR_BLOCK)
    records["size"], records["header_size"] = size, HEADER_BYTES
    at = HEADER_BYTES
    for tensor in kind.names:
        records["tensors"][:, TENSORS.index(tensor)] = at
        at += kind.layout.slice_bytes(tensor)
    form = make_sample_layout((1, 1), records["tensors"][0].tolist(), kind.layout)
    parts = [JSON_BYTES, HEADER_BYTES, *(span.stop - span.start for span in form.spans())]
    per_sample = [xxhash.xxh3_64_intdigest(bytes(size)) for size in parts]
    records["first_digest"] = np.arange(count, dtype=np.uint64) * np.uint64(len(per_sample))
    with open(folder / f"{name}.tar", "wb") as file:
        os.truncate(file.fileno(), count * stride)
    layout = kind.layout
    header = {
        "shard": name,
        "count": count,
        "tar_bytes": count * stride,
        "tar_sha256": "0" * 64,
        "dtype": layout.dtype,
        "latent": layout.latent,
        "prompt": layout.prompt,
        "pooled": layout.pooled,
        **_header_fields(kind),
    }
    write_index(folder / f"{name}.index", header, records, per_sample * count)


def _header_fields(kind: Kind) -> dict[str, object]:
    return {"bucket": [kind.pixels, kind.pixels], "repeats": 1}


def _finish(folder: Path, kind: Kind, names: list[str]) -> None:
    """The side file and the manifest, with what ``cli.py train`` wants to know of a cache."""
    unconditional = {
        f"{which}.{name}": torch.zeros(1, *kind.layout.shape(name), dtype=torch.float16)
        for which in ("zeros", "empty")
        for name in TENSORS[-2:]
    }
    safetensors.torch.save_file(unconditional, folder / UNCONDITIONAL)
    encoders = ("vae", "text_encoder", "text_encoder_2")
    metadata = {
        "recipe": {name: {"digest": "made", "of_base": True} for name in encoders},
        "text": {"depth": kind.width, "pooled": kind.pooled, "tokens": TOKENS},
        "latents": {"channels": 4},
    }
    write_manifest(folder, metadata, [Index(folder / f"{name}.index") for name in names])
