"""The readers that ``benchmarks.read`` compares: each copies a sample's tensors into memory."""

import io
import mmap
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import webdataset as wds
from xxhash import xxh3_64_intdigest

from benchmarks.caches import Kind
from shards.batches import BatchBuffer, Reader
from shards.format import Sample
from shards.plan import Plan, RankShare
from shards.reader import Cache

BATCH_SIZE = 8
CACHE_LINE = 64
Work = Callable[[], object]
Bytes = npt.NDArray[np.uint8]


def places(cache: Cache) -> list[tuple[str, int]]:
    """(shard, row) of every sample, in one shuffled order that all who can seek go by."""
    results = [
        (shard.path.stem, row) for shard in cache.shards() for row in range(len(shard.index))
    ]
    random.Random(0).shuffle(results)
    return results


def _spans(cache: Cache) -> tuple[list[tuple[Bytes, int, int]], Bytes]:
    """Where the tensors of each sample lie (mapped tar, start, end), and room for one sample.

    The room begins at the same place of a cache line as they do: else some processors copy at less
    than half the speed.
    """
    maps, spans = {}, {}
    for shard in cache.shards():
        with open(shard.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        maps[shard.path.stem] = np.frombuffer(mapped, np.uint8)
        starts = shard.index.records["offset"] + shard.index.records["header_size"]
        ends = shard.index.records["offset"] + shard.index.records["size"]
        spans[shard.path.stem] = [*zip(starts.tolist(), ends.tolist(), strict=True)]
    order = [(maps[name], *spans[name][row]) for name, row in places(cache)]
    room = np.empty(max(end - start for _, start, end in order) + CACHE_LINE, np.uint8)
    data, start, _ = order[0]
    shift = (data.ctypes.data + start - room.ctypes.data) % CACHE_LINE
    return order, room[shift:]


def mmap_copy(cache: Cache) -> Work:
    """The floor: each sample's bytes from a mapped tar into a buffer, and nothing else."""
    order, buffer = _spans(cache)

    def work() -> None:
        for data, start, end in order:
            buffer[: end - start] = data[start:end]

    return work


def shards_in_order(cache: Cache, kind: Kind) -> Work:
    """All of each sample, found by its place in the plan's order, hashed, and copied into the
    tensors of a batch."""
    group = cache.groups()[0]
    order = [*range(group.count)]
    random.Random(0).shuffle(order)
    rows = BatchBuffer(kind.names, [kind.layout])

    def work() -> None:
        for place in order:
            shard, row = cache.locate(group, place)
            record = shard.index.record(row)
            form = shard.index.sample_layout(record)
            wanted = form.variants[0] + form.captions[0]
            rows.fill(0, shard.checked(record, form, wanted))

    return work


def hash_and_copy(cache: Cache) -> Work:
    """What no hash before a copy can do without: each sample hashed as a whole, then copied."""
    order, buffer = _spans(cache)
    views = [data.data for data, _, _ in order]
    target = buffer.data

    def work() -> None:
        for view, (_, start, end) in zip(views, order, strict=True):
            source = view[start:end]
            xxh3_64_intdigest(source)
            target[: end - start] = source

    return work


def training(cache: Cache) -> Work:
    """What a run does for its batches: plan, read one variant and caption, draw all that is random,
    in fp32 as the step wants it."""
    plan = Plan(cache.groups(), 0, BATCH_SIZE)
    reader = Reader([cache], plan, RankShare(batch_size=BATCH_SIZE, world=1, rank=0))

    def work() -> None:
        for number in range(plan.num_batches):
            reader.read(plan.batch(0, number), 0)

    return work


def stock_webdataset(cache: Cache) -> Work:
    """The same tars in order, each sample's file parsed by safetensors."""
    tars = sorted(str(shard.path) for shard in cache.shards())

    def work() -> None:
        for sample in wds.WebDataset(tars, shardshuffle=False):
            safetensors.torch.load(sample["safetensors"])

    return work


def write_npz(folder: Path, samples: list[Sample]) -> None:
    """One uncompressed npz per image."""
    folder.mkdir()
    for sample in samples:
        arrays = {name: tensor.numpy() for name, tensor in sample.tensors.items()}
        with io.BytesIO() as file:
            np.savez(file, allow_pickle=False, **arrays)
            (folder / f"{sample.key}.npz").write_bytes(file.getvalue())


def npz(folder: Path) -> Work:
    paths = sorted(folder.iterdir())
    random.Random(0).shuffle(paths)

    def work() -> None:
        for path in paths:
            with np.load(path) as file:
                for name in file.files:
                    file[name]

    return work
