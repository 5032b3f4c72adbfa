"""Reads the samples that the epoch plan names, and makes one rank's batch of tensors of them.

Legend: B samples, C latent channels, h w latent size, T tokens (77 a chunk), D width of the prompt
embeddings, P width of the pooled ones.
"""

import functools
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from runtime.devices import DTYPES, to_device
from shards.format import CAPTION_TENSORS, TENSORS, Layout, SampleSpan
from shards.manifest import UNCONDITIONAL
from shards.plan import (
    Draws,
    Entry,
    GlobalBatch,
    Plan,
    RankShare,
    RoleShares,
    pick,
    pick_caption,
)
from shards.reader import Cache, Shard, read_ahead


class BatchBuffer:
    """One tensor per name, with a row per sample; uninitialized at first.

    Samples of several dtypes lose nothing: fp16 and bf16 together are promoted to fp32.
    """

    def __init__(self, names: Sequence[str], layouts: Sequence[Layout]) -> None:
        self._dtypes = [DTYPES[layout.dtype] for layout in layouts]
        self._dtype = functools.reduce(torch.promote_types, set(self._dtypes))
        self.tensors = {}
        for name in names:
            dtype = torch.int32 if name == "sizes" else self._dtype
            self.tensors[name] = torch.empty(len(layouts), *layouts[0].shape(name), dtype=dtype)
        self._bytes = {
            name: tensor.view(torch.uint8).view(-1).numpy().data
            for name, tensor in self.tensors.items()
        }

    def fill(self, number: int, spans: Iterable[tuple[SampleSpan, memoryview]]) -> None:
        """Fill row ``number`` from the bytes of a sample's spans; slices of tensors that the buffer
        does not have are skipped."""
        sample_dtype, into = self._dtypes[number], self._bytes
        same = sample_dtype == self._dtype
        for span, source in spans:
            for name, start, stop in span.slices:
                if name not in into:
                    continue
                if same or name == "sizes":
                    at, size = number * (stop - start), stop - start
                    into[name][at : at + size] = source[start:stop]
                else:
                    row = self.tensors[name][number].view(-1)
                    row.copy_(torch.frombuffer(bytearray(source[start:stop]), dtype=sample_dtype))


SampleLocation = tuple[Cache, Shard, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of one rank; the tensors of a dummy have weight 0."""

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
    num_entries: int  # of the whole global batch, all ranks and micro-batches
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
        return self.map(lambda tensor: to_device(tensor, device))


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a run reads of its samples besides latents and text."""

    caption_dropout: float = 0.0  # chance that a sample's text is the unconditional one
    unconditional: Literal["zeros", "empty"] = "empty"  # zeros, or the encoded ""
    captions: RoleShares = ()  # the share of each role; empty: all captions equally often
    offsets: bool = False
    masks: bool = False


DEFAULT_OPTIONS = ReadOptions()


class Reader:
    """Reads the micro-batches of one rank.

    Raises:
        CacheError: from every method: the data read is damaged; names the shard and the sample.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        plan: Plan,
        share: RankShare,
        options: ReadOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.caches, self.plan, self.share, self.options = caches, plan, share, options
        self._unconditional: list[dict[str, torch.Tensor]] = []
        if options.caption_dropout:
            self._unconditional = [cache.side_tensors(UNCONDITIONAL) for cache in caches]

    def epochs(
        self, start: tuple[int, int] = (0, 0), *, threads: int = 4, pin: bool = False
    ) -> Generator[Batch, None, None]:
        """Micro-batches without end, in plan order, read ahead by ``threads`` threads.

        ``start`` is (epoch, batches done in it). ``pin`` puts tensors in page-locked memory, so
        that ``Batch.to`` a GPU does not wait.
        """

        def micro_batches() -> Iterator[tuple[GlobalBatch, int]]:
            epoch, done = start
            for number in count(epoch * self.plan.num_batches + done):
                batch = self.plan.batch(*divmod(number, self.plan.num_batches))
                yield from ((batch, micro) for micro in range(self.share.num_micros(batch)))

        def read(micro_batch: tuple[GlobalBatch, int]) -> Batch:
            batch = self.read(*micro_batch)
            return batch.map(torch.Tensor.pin_memory) if pin else batch

        return read_ahead(read, micro_batches(), threads, ahead=2 * threads)

    def read(self, batch: GlobalBatch, micro: int) -> Batch:
        """One micro-batch of this rank, with its noise and times; a dummy of weight 0 if this rank
        has no sample in it."""
        entries = self.share.entries(batch, micro)
        real = bool(entries)
        entries = entries or batch.entries[:1]
        locations = [self._locate(entry) for entry in entries]
        into = _BatchBuilder(self.options, [shard.index.layout for _, shard, _ in locations])
        draws = Draws()
        keys = [
            self._read_sample(batch.epoch, number, entry, location, draws, into)
            for number, (entry, location) in enumerate(zip(entries, locations, strict=True))
        ]
        tensors = into.tensors()
        if not real:
            tensors["weights"].zero_()
        return Batch(
            **tensors,
            keys=tuple(keys) if real else (),
            num_entries=len(batch.entries),
            epoch=batch.epoch,
            number=batch.number,
            micro=micro,
            num_micros=self.share.num_micros(batch),
        )

    def _locate(self, entry: Entry) -> SampleLocation:
        group = self.plan.groups[entry.group]
        cache = self.caches[group.cache]
        return cache, *cache.locate(group, entry.row)

    def paths(self, epoch: int, number: int, micro: int) -> list[str]:
        """The paths of a micro-batch's images (this rank's) in their datasets."""
        paths = []
        for entry in self.share.entries(self.plan.batch(epoch, number), micro):
            _, shard, row = self._locate(entry)
            paths.append(str(shard.metadata(row)["path"]))
        return paths

    def _read_sample(
        self,
        epoch: int,
        number: int,
        entry: Entry,
        location: SampleLocation,
        draws: Draws,
        into: "_BatchBuilder",
    ) -> str:
        """Fill row ``number`` of each tensor; returns the sample's key."""
        options, cache_number = self.options, self.plan.groups[entry.group].cache
        cache, shard, row = location
        record = shard.index.record(row)
        key = record.key.decode()
        draws.start(self.plan.seed, epoch, cache_number, key, entry.repeat)
        sample_layout = shard.index.sample_layout(record)
        variant = pick(draws.variant, len(sample_layout.variants))
        wanted = sample_layout.variants[variant]
        if options.masks:
            wanted += sample_layout.masks[variant]
        if not options.caption_dropout or draws.dropout >= options.caption_dropout:
            roles = shard.index.caption_roles(record) if options.captions else ()
            wanted += sample_layout.captions[
                pick_caption(roles, options.captions, draws.role, draws.caption)
                if roles
                else pick(draws.caption, len(sample_layout.captions))
            ]
        else:
            for name in CAPTION_TENSORS:
                dropped = self._unconditional[cache_number][f"{options.unconditional}.{name}"]
                into.rows.tensors[name][number] = dropped[0]
        into.rows.fill(number, shard.checked(record, sample_layout, wanted))
        into.draw(number, draws, sample_layout.tensors)
        into.weights[number] = cache.weight * record.weight
        return key


class _BatchBuilder:
    """Collects the samples of one micro-batch."""

    def __init__(self, options: ReadOptions, layouts: Sequence[Layout]) -> None:
        names = [name for name in TENSORS if name != "mask" or options.masks]
        self.rows = BatchBuffer(names, layouts)
        num, self._latent = len(layouts), layouts[0].latent
        self._noise, self._posterior, self._offsets = (
            np.empty((num, *shape), np.float32)
            for shape in (self._latent, self._latent, (self._latent[0], 1, 1))
        )
        self.weights, self.times = np.empty(num, np.float32), np.empty(num, np.float32)
        self._without_std: list[int] = []
        self._options = options

    def draw(self, number: int, draws: Draws, tensors: Container[str]) -> None:
        """Draw all that is random about row ``number``, in a fixed order; ``tensors`` are the
        tensors that its sample has."""
        self.times[number] = draws.time
        draws.normal(self._offsets[number])
        draws.normal(self._noise[number])
        if "latents.std" in tensors:
            draws.normal(self._posterior[number])
        else:
            self._without_std.append(number)
        if self._options.masks and "mask" not in tensors:
            self.rows.tensors["mask"][number] = 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a ``Batch``, with latents drawn from the posterior."""
        rows = self.rows.tensors
        latents = rows["latents.mean"].float()
        if len(self._without_std) < len(latents):
            spread = rows["latents.std"].float() * torch.from_numpy(self._posterior)
            spread[self._without_std] = 0.0
            latents = latents + spread
        tensors = {
            "latents": latents,
            "prompt": rows["prompt_embeds"],
            "pooled": rows["pooled_prompt_embeds"],
            "time_ids": rows["sizes"].float(),
            "noise": torch.from_numpy(self._noise),
            "times": torch.from_numpy(self.times),
            "weights": torch.from_numpy(self.weights),
        }
        if self._options.offsets:
            tensors["offsets"] = torch.from_numpy(self._offsets)
        if self._options.masks:
            tensors["mask"] = rows["mask"].float()
        return tensors
