"""Caches and batches made by hand, whose every number the test knows; learners on them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from runtime.devices import DTYPES
from sdxl.base import open_base
from shards.batches import UNCONDITIONAL, Batch, Reader, ReadOptions
from shards.format import Layout, Sample, sample_key
from shards.index import Index
from shards.manifest import write_manifest
from shards.plan import Plan, RankShare
from shards.reader import Cache
from shards.writer import shard_name, write_shard
from train.config import TrainConfig
from train.distributed import DistContext
from train.learner import Learner, build_learner
from train.option_values import CacheUse

Parameters = dict[str, torch.nn.Parameter]
CPU = torch.device("cpu")
WIDTH, POOLED, TOKENS = 80, 48, 77  # of the random base
SDXL: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
KINDS = ("epsilon", "v_prediction")
BUCKET = (32, 16)  # pixels: latents of [4, 2, 4]

BF16: dict[str, Any] = {
    "full": True,
    "pure_bf16": True,
    "precision": "bf16",
    "allow_cpu_bf16": True,
}
WAYS: dict[str, dict[str, Any]] = {
    **{kind: {"optimizer": kind} for kind in ("adamw", "adamw8bit", "adafactor", "prodigy")},
    "full": {"full": True},
    "fused adamw": {"fused_backward": True},
    "fused adafactor": {"fused_backward": True, "optimizer": "adafactor"},
    "fused adamw8bit": {"fused_backward": True, "optimizer": "adamw8bit"},
    "bf16 adamw": BF16,
    "bf16 adafactor": {**BF16, "optimizer": "adafactor"},
    "bf16 fused": {**BF16, "fused_backward": True},
}


def made_sample(
    name: str,
    *,
    bucket: tuple[int, int] = BUCKET,
    variants: int = 1,
    captions: int = 1,
    weight: float = 1.0,
    mask: bool = False,
    std: bool = False,
    prompt: tuple[int, int] = (TOKENS, WIDTH),
    pooled: int = POOLED,
) -> Sample:
    """All random; ``sizes`` differ from variant to variant."""
    width, height = bucket[0] // 8, bucket[1] // 8
    tensors = {
        "latents.mean": torch.randn(variants, 4, height, width),
        "sizes": torch.randint(1, 2000, (variants, 6), dtype=torch.int32),
        "prompt_embeds": torch.randn(captions, *prompt),
        "pooled_prompt_embeds": torch.randn(captions, pooled),
    }
    if std:
        tensors["latents.std"] = torch.rand(variants, 4, height, width)
    if mask:
        tensors["mask"] = torch.rand(variants, 1, height, width)
    texts = tuple(f"caption {number}" for number in range(captions))
    return Sample(key=sample_key(name), path=name, captions=texts, tensors=tensors, weight=weight)


def write_cache(
    folder: Path, samples: Sequence[Sample], *, dtype: str = "fp32", encoders: str = "made"
) -> Path:
    """A finished cache of these samples, in shards by bucket, with its unconditional."""
    folder.mkdir(parents=True)
    buckets: dict[tuple[int, int], list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.key):
        *_, height, width = sample.tensors["latents.mean"].shape
        tensors = {n: t if n == "sizes" else t.to(DTYPES[dtype]) for n, t in sample.tensors.items()}
        cast = Sample(**{**vars(sample), "tensors": tensors})
        buckets.setdefault((8 * width, 8 * height), []).append(cast)
    prompt, pooled = samples[0].tensors["prompt_embeds"], samples[0].tensors["pooled_prompt_embeds"]
    names = []
    for bucket, members in buckets.items():
        latent = (4, bucket[1] // 8, bucket[0] // 8)
        shape = (prompt.shape[1], prompt.shape[2])
        layout = Layout(dtype=dtype, latent=latent, prompt=shape, pooled=pooled.shape[1])
        names.append(shard_name(bucket, 0))
        write_shard(folder, names[-1], members, layout, {"bucket": list(bucket), "repeats": 1})
    unconditional = {}
    for name, stored in (("prompt_embeds", prompt), ("pooled_prompt_embeds", pooled)):
        unconditional[f"empty.{name}"] = torch.randn(1, *stored.shape[1:]).to(DTYPES[dtype])
        unconditional[f"zeros.{name}"] = torch.zeros(1, *stored.shape[1:]).to(DTYPES[dtype])
    safetensors.torch.save_file(unconditional, folder / UNCONDITIONAL)
    digests = {n: {"digest": encoders, "of_base": True} for n in ("text_encoder", "text_encoder_2")}
    metadata = {
        "recipe": {**digests, "vae": {"digest": encoders, "of_base": True}},
        "text": {"depth": prompt.shape[2], "pooled": pooled.shape[1], "tokens": prompt.shape[1]},
        "latents": {"channels": 4},
    }
    write_manifest(folder, metadata, [Index(folder / f"{name}.index") for name in names])
    return folder


def made_batch(num: int, shape: tuple[int, int, int] = (4, 2, 4), **changes: Any) -> Batch:
    """Random tensors for the random base's UNet."""
    values: dict[str, Any] = {
        "latents": torch.randn(num, *shape),
        "prompt": torch.randn(num, TOKENS, WIDTH),
        "pooled": torch.randn(num, POOLED),
        "time_ids": torch.randint(0, 2000, (num, 6)).float(),
        "noise": torch.randn(num, *shape),
        "times": torch.rand(num),
        "weights": torch.ones(num),
        "keys": tuple(str(number) for number in range(num)),
        "num_entries": num,
        "epoch": 0,
        "number": 0,
        "micro": 0,
        "num_micros": 1,
    }
    return Batch(**(values | changes))


def reader_of(
    caches: Sequence[Cache],
    size: int,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    world: int = 1,
    rank: int = 0,
    **reading: Any,
) -> Reader:
    """One rank's reader of global batches of ``size``."""
    groups = [group for number, cache in enumerate(caches) for group in cache.groups(number)]
    share = RankShare(batch_size=batch_size or size, world=world, rank=rank)
    return Reader(caches, Plan(groups, seed, size), share, ReadOptions(**reading))


def epoch_of(reader: Reader, epoch: int = 0) -> Iterator[Batch]:
    """All micro-batches of one epoch."""
    for number in range(reader.plan.num_batches):
        batch = reader.plan.batch(epoch, number)
        for micro in range(reader.share.num_micros(batch)):
            yield reader.read(batch, micro)


def config_of(
    base: Path | str = "unused", cache: Path | None = None, **settings: Any
) -> TrainConfig:
    defaults: dict[str, Any] = {"out": Path("unused"), "device": "cpu"}
    if "epochs" not in settings:
        defaults["steps"] = 1
    settings = {"caches": (CacheUse(cache or Path("unused")),), **defaults, **settings}
    return TrainConfig(base=str(base), **settings)


def learner_of(base: Path, **settings: Any) -> Learner:
    """On the CPU; a LoRA's second half is random, so that its first has gradients too."""
    torch.manual_seed(0)
    learner = learner_for(config_of(base, **settings), DistContext(CPU))
    for name, parameter in learner.optimizer.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return learner


def parameters_of(seed: int, dtype: torch.dtype = torch.float32) -> Parameters:
    """A matrix large enough for 8-bit state, a convolution, a vector and a scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (96, 64), "conv": (8, 4, 3, 3), "vector": (7,), "one": (1,)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def same(first: Parameters, other: Parameters) -> bool:
    return all(torch.equal(first[name], other[name]) for name in first)


def learner_for(config: TrainConfig, world: DistContext) -> Learner:
    """As ``train`` builds it: with the base of the settings."""
    return build_learner(config, open_base(config.base), world)
