"""Batches by plan: one rank's samples of a global batch, with everything random about them.

Legend: B samples, C latent channels, h w latent size, T tokens (77 a chunk), D width of the prompt
embeddings, P width of the pooled ones.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, Literal

import torch

from shards.manifest import UNCONDITIONAL
from shards.plan import Entry, GlobalBatch, Plan, Share, sample_generator
from shards.reader import Cache, read_ahead


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of one rank; the tensors of a dummy have weight 0.

    ``weights`` are the samples' weights, ``total_weight`` their sum over the whole global batch,
    all ranks and micro-batches.
    """

    latents: torch.Tensor  # [B, C, h, w] fp32, scaled, drawn from the cached posterior
    prompt: torch.Tensor  # [B, T, D] as cached, or the unconditional one where it was dropped
    pooled: torch.Tensor  # [B, P] likewise
    time_ids: torch.Tensor  # [B, 6] fp32
    noise: torch.Tensor  # [B, C, h, w] fp32, N(0, 1)
    times: torch.Tensor  # [B] fp32, uniform in [0, 1): where on the noise schedule
    weights: torch.Tensor  # [B] fp32
    offsets: torch.Tensor | None = None  # [B, C, 1, 1] fp32, N(0, 1): for noise offset
    mask: torch.Tensor | None = None  # [B, 1, h, w] fp32 in 0..1: where the loss counts
    keys: tuple[str, ...]
    total_weight: float
    num_entries: int  # of the global batch
    epoch: int
    number: int  # of the global batch in its epoch
    micro: int
    num_micros: int

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with ``function`` applied to each tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            name: function(value)
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is random about one sample in one pass, each drawn from a stream of its own."""

    seed: int
    epoch: int
    cache: int
    key: str
    pass_: int

    def _stream(self, purpose: str) -> Any:
        return sample_generator(purpose, self.seed, self.epoch, self.cache, self.key, self.pass_)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal fp32."""
        return torch.from_numpy(self._stream(purpose).standard_normal(shape, "float32"))

    def uniform(self, purpose: str) -> float:
        """Uniform in [0, 1)."""
        return float(self._stream(purpose).random(dtype="float32"))

    def choice(self, purpose: str, size: int) -> int:
        """Uniform in 0..size-1."""
        return int(self._stream(purpose).integers(size)) if size > 1 else 0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a run reads of its samples beside latents and text."""

    caption_dropout: float = 0.0  # chance that a sample's text is the unconditional one
    unconditional: Literal["zeros", "empty"] = "empty"  # zeros, or the encoded ""
    offsets: bool = False
    masks: bool = False


PLAIN = Reading()


class Reader:
    """Reads the micro-batches of one rank.

    Raises:
        CacheError: from every method: the data read is damaged; names the shard and the sample.
    """

    def __init__(
        self, caches: Sequence[Cache], plan: Plan, share: Share, reading: Reading = PLAIN
    ) -> None:
        self.caches, self.plan, self.share, self.reading = caches, plan, share, reading
        self._unconditional: list[dict[str, torch.Tensor]] = []
        if reading.caption_dropout:
            self._unconditional = [cache.side_tensors(UNCONDITIONAL) for cache in caches]
        self._totals = functools.lru_cache(maxsize=64)(self._sum_weights)

    def epochs(
        self, start: tuple[int, int] = (0, 0), *, threads: int = 4, pin: bool = False
    ) -> Generator[Batch, None, None]:
        """Micro-batches without end, in plan order, read ahead by ``threads`` threads.

        ``start`` is (epoch, batches done in it). ``pin`` puts tensors in page-locked memory, so
        that ``Batch.to`` a GPU does not wait.
        """

        def places() -> Iterator[tuple[GlobalBatch, int]]:
            epoch, done = start
            for number in count(epoch * self.plan.num_batches + done):
                batch = self.plan.batch(*divmod(number, self.plan.num_batches))
                yield from ((batch, micro) for micro in range(self.share.num_micros(batch)))

        def read(place: tuple[GlobalBatch, int]) -> Batch:
            batch = self.read(*place)
            return batch.map(torch.Tensor.pin_memory) if pin else batch

        return read_ahead(read, places(), threads, ahead=2 * threads)

    def read(self, batch: GlobalBatch, micro: int) -> Batch:
        """One micro-batch, with its noise and times. A dummy of weight 0 where it has none."""
        entries = self.share.entries(batch, micro)
        real = bool(entries)
        entries = entries or batch.entries[:1]
        tensors = self._empty(entries)
        keys = []
        for number, entry in enumerate(entries):
            row = {name: tensor[number] for name, tensor in tensors.items()}
            keys.append(self._read_sample(batch.epoch, entry, row))
        if not real:
            tensors["weights"].zero_()
        return Batch(
            **tensors,
            keys=tuple(keys) if real else (),
            total_weight=self._totals(batch),
            num_entries=len(batch.entries),
            epoch=batch.epoch,
            number=batch.number,
            micro=micro,
            num_micros=self.share.num_micros(batch),
        )

    def _sum_weights(self, batch: GlobalBatch) -> float:
        total = 0.0
        for entry in batch.entries:
            cache, shard, row = self._locate(entry)
            total += cache.weight * float(shard.index.records[row]["weight"])
        return total or 1.0  # where all weigh nothing, so does their loss

    def _locate(self, entry: Entry) -> tuple[Cache, Any, int]:
        group = self.plan.groups[entry.group]
        cache = self.caches[group.cache]
        return cache, *cache.locate(group, entry.row)

    def paths(self, epoch: int, number: int, micro: int) -> list[str]:
        """Where the pictures of a micro-batch of this rank lay in their data sets."""
        found = []
        for entry in self.share.entries(self.plan.batch(epoch, number), micro):
            _, shard, row = self._locate(entry)
            found.append(str(shard.about(row)["path"]))
        return found

    def _empty(self, entries: Sequence[Entry]) -> dict[str, torch.Tensor]:
        """Where the samples go, so that each is copied once."""
        layouts = [self._locate(entry)[1].index.layout for entry in entries]
        latent, prompt, pooled = layouts[0].latent, layouts[0].prompt, layouts[0].pooled
        dtype = functools.reduce(torch.promote_types, {one.torch_dtype("mask") for one in layouts})
        num = len(entries)
        tensors = {
            "latents": torch.empty(num, *latent),
            "prompt": torch.empty(num, *prompt, dtype=dtype),
            "pooled": torch.empty(num, pooled, dtype=dtype),
            "time_ids": torch.empty(num, 6),
            "noise": torch.empty(num, *latent),
            "times": torch.empty(num),
            "weights": torch.empty(num),
        }
        if self.reading.offsets:
            tensors["offsets"] = torch.empty(num, latent[0], 1, 1)
        if self.reading.masks:
            tensors["mask"] = torch.empty(num, 1, *latent[1:])
        return tensors

    def _read_sample(self, epoch: int, entry: Entry, into: dict[str, torch.Tensor]) -> str:
        """Fill one row of each tensor; returns the sample's key."""
        reading, number = self.reading, self.plan.groups[entry.group].cache
        cache, shard, row = self._locate(entry)
        record, key = shard.index.records[row], shard.index.key(row)
        draws = Draws(seed=self.plan.seed, epoch=epoch, cache=number, key=key, pass_=entry.pass_)
        variant = draws.choice("variant", int(record["num_variants"]))
        shape = shard.index.layout.latent
        shard.read_into(into["latents"], row, "latents.mean", variant)
        if shard.index.slice(row, "latents.std", variant) is not None:
            std = torch.empty(shape)
            shard.read_into(std, row, "latents.std", variant)
            into["latents"] += std * draws.normal("latents", shape)
        shard.read_into(into["time_ids"], row, "sizes", variant)
        if reading.caption_dropout and draws.uniform("dropout") < reading.caption_dropout:
            unconditional = self._unconditional[number]
            into["prompt"].copy_(unconditional[f"{reading.unconditional}.prompt_embeds"][0])
            into["pooled"].copy_(unconditional[f"{reading.unconditional}.pooled_prompt_embeds"][0])
        else:
            caption = draws.choice("caption", int(record["num_captions"]))
            shard.read_into(into["prompt"], row, "prompt_embeds", caption)
            shard.read_into(into["pooled"], row, "pooled_prompt_embeds", caption)
        into["noise"].copy_(draws.normal("noise", shape))
        into["times"].fill_(draws.uniform("times"))
        into["weights"].fill_(cache.weight * float(record["weight"]))
        if reading.offsets:
            into["offsets"].copy_(draws.normal("offsets", (shape[0], 1, 1)))
        if reading.masks:
            if shard.index.slice(row, "mask", variant) is None:
                into["mask"].fill_(1.0)
            else:
                shard.read_into(into["mask"], row, "mask", variant)
        return str(key)
