"""Read batches by plan: memory-mapped shards, every slice hashed before it is used."""

import functools
import json
import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash

from shards import CacheError
from shards.buckets import Size
from shards.index import Index, Part
from shards.manifest import data_digest, read_manifest
from shards.plan import Entry, GlobalBatch, Group, Plan, Share, sample_generator

MAX_OPEN_SHARDS = 256  # each holds a file; the usual limit is 1024
T = TypeVar("T")
R = TypeVar("R")


class Shard:
    """One tar, mapped into memory, with its index.

    Raises:
        CacheError: missing, damaged, truncated, or another shard than the manifest names.
    """

    def __init__(self, folder: Path, name: str, index_sha256: str) -> None:
        self.path = folder / f"{name}.tar"
        self.index = Index(folder / f"{name}.index")
        if self.index.sha256 != index_sha256:
            raise CacheError(f"{folder / name}.index: not the one that the manifest names")
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CacheError(f"{self.path}: cannot be read ({error})") from None
        if len(self._map) != self.index.header["tar_bytes"]:
            raise CacheError(
                f"{self.path}: truncated or replaced: {len(self._map)} bytes where "
                f"{self.index.header['tar_bytes']} were written; encode again"
            )

    def read_into(self, target: torch.Tensor, row: int, name: str, number: int = 0) -> None:
        """Copy one checked slice into ``target`` (contiguous, of the slice's dtype and shape)."""
        found = self.index.slice(row, name, number)
        assert found is not None, f"{self.path} has no {name}"
        source = self._checked(row, *found)
        target.view(torch.uint8).view(-1).numpy()[:] = source

    def about(self, row: int) -> dict[str, Any]:
        """The sample's JSON: path, captions, digests."""
        return dict(json.loads(bytes(self._checked(row, *next(self.index.parts(row))))))

    def _checked(self, row: int, part: Part, digest: int) -> Any:
        data = np.frombuffer(self._map, np.uint8, part.size, part.offset)
        if xxhash.xxh3_64_intdigest(data.data) != digest:
            raise CacheError(
                f"{self.path}: sample {self.index.key(row)}: {part.what} is damaged (xxh3 "
                "differs); `python cli.py verify` names all damage"
            )
        return data


class Cache:
    """A finished cache: its manifest, and its shards by group (bucket, repeats)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._index_sha256 = {s["name"]: s["index_sha256"] for s in self.manifest["shards"]}
        self._groups: dict[tuple[Size, int], list[dict[str, Any]]] = {}
        for shard in self.manifest["shards"]:
            if shard["count"]:
                bucket: Size = (shard["bucket"][0], shard["bucket"][1])
                self._groups.setdefault((bucket, shard["repeats"]), []).append(shard)
        self._ends = {
            group: np.cumsum([shard["count"] for shard in shards])
            for group, shards in self._groups.items()
        }
        self._open = functools.lru_cache(maxsize=MAX_OPEN_SHARDS)(self._open_shard)

    @property
    def data_digest(self) -> str:
        """sha256 of all that a run learns from; other preview prompts leave it as it is."""
        return data_digest(self.manifest)

    def groups(self, number: int = 0) -> list[Group]:
        """What a ``Plan`` needs to know of this cache, which is the ``number``-th of the run."""
        return [
            Group(cache=number, bucket=bucket, repeats=repeats, count=int(ends[-1]))
            for (bucket, repeats), ends in sorted(self._ends.items())
        ]

    def locate(self, group: Group, row: int) -> tuple[Shard, int]:
        """The shard that holds sample ``row`` of a group, and its row there."""
        ends = self._ends[group.bucket, group.repeats]
        which = int(np.searchsorted(ends, row, side="right"))
        shard = self._groups[group.bucket, group.repeats][which]
        return self._open(shard["name"]), row - (int(ends[which - 1]) if which else 0)

    def _open_shard(self, name: str) -> Shard:
        return Shard(self.folder, name, self._index_sha256[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of one rank. B samples; the tensors of a dummy have weight 0.

    ``weights`` are the samples' weights, ``total_weight`` their sum over the whole global batch,
    all ranks and micro-batches.
    """

    latents: torch.Tensor  # [B, 4, h, w] fp32, scaled, drawn from the cached posterior
    prompt: torch.Tensor  # [B, 77k, D] as cached
    pooled: torch.Tensor  # [B, P] as cached
    time_ids: torch.Tensor  # [B, 6] fp32
    noise: torch.Tensor  # [B, 4, h, w] fp32, N(0, 1)
    times: torch.Tensor  # [B] fp32, uniform in [0, 1): where on the noise schedule
    weights: torch.Tensor  # [B] fp32
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

    def _stream(self, purpose: str) -> np.random.Generator:
        return sample_generator(purpose, self.seed, self.epoch, self.cache, self.key, self.pass_)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal fp32."""
        return torch.from_numpy(self._stream(purpose).standard_normal(shape, np.float32))

    def uniform(self, purpose: str) -> float:
        """Uniform in [0, 1)."""
        return float(self._stream(purpose).random(dtype=np.float32))

    def choice(self, purpose: str, size: int) -> int:
        """Uniform in 0..size-1."""
        return int(self._stream(purpose).integers(size)) if size > 1 else 0


def read_batch(
    caches: Sequence[Cache],
    plan: Plan,
    batch: GlobalBatch,
    share: Share,
    micro: int,
    total: float | None = None,
) -> Batch:
    """One rank's micro-batch, with its noise and times. A dummy of weight 0 where it has none.

    ``total`` is the batch's ``total_weight``, where it is known already.

    Raises:
        CacheError: the data read is damaged; names the shard and the sample.
    """
    entries = share.entries(batch, micro)
    real = bool(entries)
    entries = entries or batch.entries[:1]
    rows = [_read_sample(caches, plan, batch.epoch, entry) for entry in entries]
    stacked = {n: torch.stack([tensors[n] for _, tensors in rows]) for n in rows[0][1]}
    if not real:
        stacked["weights"] = torch.zeros_like(stacked["weights"])
    return Batch(
        **stacked,
        keys=tuple(key for key, _ in rows) if real else (),
        total_weight=total_weight(caches, plan, batch) if total is None else total,
        num_entries=len(batch.entries),
        epoch=batch.epoch,
        number=batch.number,
        micro=micro,
        num_micros=share.num_micros(batch),
    )


def total_weight(caches: Sequence[Cache], plan: Plan, batch: GlobalBatch) -> float:
    """The samples' weights over all ranks and micro-batches of a global batch."""
    total = 0.0
    for entry in batch.entries:
        group = plan.groups[entry.group]
        shard, row = caches[group.cache].locate(group, entry.row)
        total += float(shard.index.records[row]["weight"])
    return total


def _read_sample(
    caches: Sequence[Cache], plan: Plan, epoch: int, entry: Entry
) -> tuple[str, dict[str, torch.Tensor]]:
    group = plan.groups[entry.group]
    shard, row = caches[group.cache].locate(group, entry.row)
    record, layout, key = shard.index.records[row], shard.index.layout, shard.index.key(row)
    draws = Draws(seed=plan.seed, epoch=epoch, cache=group.cache, key=key, pass_=entry.pass_)
    variant = draws.choice("variant", int(record["num_variants"]))
    caption = draws.choice("caption", int(record["num_captions"]))

    def read(name: str, number: int) -> torch.Tensor:
        tensor = torch.empty(layout.shape(name), dtype=layout.torch_dtype(name))
        shard.read_into(tensor, row, name, number)
        return tensor

    latents = read("latents.mean", variant).float()
    if shard.index.slice(row, "latents.std", variant) is not None:
        std = read("latents.std", variant).float()
        latents = latents + std * draws.normal("latents", layout.latent)
    return key, {
        "latents": latents,
        "prompt": read("prompt_embeds", caption),
        "pooled": read("pooled_prompt_embeds", caption),
        "time_ids": read("sizes", variant).float(),
        "noise": draws.normal("noise", layout.latent),
        "times": torch.tensor(draws.uniform("times")),
        "weights": torch.tensor(float(record["weight"])),
    }


def read_epochs(
    caches: Sequence[Cache],
    plan: Plan,
    share: Share,
    *,
    start: tuple[int, int] = (0, 0),
    threads: int = 4,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """Micro-batches without end, in plan order, read ahead by ``threads`` threads.

    ``start`` is (epoch, batches done in it). ``pin`` puts tensors in page-locked memory, so that
    ``Batch.to`` a GPU does not wait.
    """

    totals = functools.lru_cache(maxsize=64)(functools.partial(total_weight, caches, plan))

    def places() -> Iterator[tuple[GlobalBatch, int]]:
        epoch, done = start
        for number in count(epoch * plan.num_batches + done):
            batch = plan.batch(*divmod(number, plan.num_batches))
            yield from ((batch, micro) for micro in range(share.num_micros(batch)))

    def read(place: tuple[GlobalBatch, int]) -> Batch:
        batch = read_batch(caches, plan, place[0], share, place[1], totals(place[0]))
        return batch.map(torch.Tensor.pin_memory) if pin else batch

    return read_ahead(read, places(), threads, ahead=2 * threads)


def read_ahead(
    function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int
) -> Generator[R, None, None]:
    """``map`` in order by a pool of threads that is at most ``ahead`` items in front."""
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
