"""The epoch plan: which samples make batch t of epoch e, computed and never stored.

A keyed permutation inside each bucket and one over the batches: O(batch) time and O(1) memory at
any size, so a resumed run seeks. Nothing here depends on the number of processes.

G is the global batch: batch size x accumulation x world size.
"""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from shards.buckets import Size
from shards.manifest import content_digest

NUM_ROUNDS = 12  # of the Feistel network; small domains need more than the usual 4
Array = npt.NDArray[np.uint64]


def derive_key(*parts: int | str) -> int:
    """128 bits that depend on every part, in order."""
    return xxhash.xxh3_128_intdigest(repr(parts).encode())


def sample_generator(
    purpose: str, seed: int, epoch: int, cache: int, key: str, pass_: int
) -> np.random.Generator:
    """The random stream of one sample in one pass of one epoch, for one purpose.

    Keyed, not drawn in turn: the same on every device, at any world size, after any resume.
    """
    bits = derive_key(purpose, seed, epoch, cache, key, pass_)
    return np.random.Generator(np.random.Philox(key=bits))


def permute(positions: Array, size: int, key: int) -> Array:
    """Where each position goes in a keyed permutation of 0..size-1.

    A balanced Feistel network on the next power of four, walked until it is inside (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = np.random.Generator(np.random.Philox(key=key)).integers(
        0, 2**64, NUM_ROUNDS, np.uint64
    )
    values = _feistel(positions.astype(np.uint64), half, round_keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, round_keys)
    return values


def _feistel(values: Array, half: np.uint64, round_keys: Array) -> Array:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half) | right


def _mix(values: Array) -> Array:
    """The finalizer of MurmurHash3: every input bit flips each output bit with chance 1/2."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of one cache that share a bucket and a number of repeats."""

    cache: int
    bucket: Size
    repeats: int
    count: int


@dataclass(frozen=True)
class Entry:
    """One sample in one of its passes: ``pass_`` counts its repeats within the epoch."""

    group: int
    row: int
    pass_: int


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """Batch ``number`` of ``epoch``: up to G entries of one bucket."""

    epoch: int
    number: int
    bucket: Size
    entries: tuple[Entry, ...]


class Plan:
    """Every sample exactly ``repeats`` times an epoch, in batches of one bucket.

    The last batch of a bucket is short: nothing is padded by repetition, nothing is dropped.
    """

    def __init__(self, groups: list[Group], seed: int, global_batch: int) -> None:
        if global_batch < 1:
            raise ValueError(f"the global batch must be at least 1, not {global_batch}")
        self.groups = groups
        self.seed = seed
        self.global_batch = global_batch
        self.buckets = sorted({group.bucket for group in groups})
        # Per bucket: its groups, and where each one's entries end.
        self._members = [[i for i, g in enumerate(groups) if g.bucket == b] for b in self.buckets]
        self._ends = [
            np.cumsum([groups[i].count * groups[i].repeats for i in members])
            for members in self._members
        ]
        self._batch_ends = np.cumsum([-(-int(ends[-1]) // global_batch) for ends in self._ends])
        self.num_batches = int(self._batch_ends[-1]) if groups else 0
        self.num_entries = sum(group.count * group.repeats for group in groups)
        if self.num_entries == 0:
            raise ValueError("there is no sample to train on: the cache is empty")
        self.digest = content_digest([[asdict(g) for g in groups], seed, global_batch])

    def batch(self, epoch: int, number: int) -> GlobalBatch:
        """Batch ``number`` in 0..num_batches-1 of an epoch; equal arguments, equal answer."""
        key = derive_key("batches", self.seed, epoch)
        slot = int(permute(np.array([number], np.uint64), self.num_batches, key)[0])
        which = int(np.searchsorted(self._batch_ends, slot, side="right"))
        first = slot - (int(self._batch_ends[which - 1]) if which else 0)
        ends, bucket = self._ends[which], self.buckets[which]
        size = int(ends[-1])
        start = first * self.global_batch
        positions = np.arange(start, min(start + self.global_batch, size), dtype=np.uint64)
        places = permute(positions, size, derive_key("samples", self.seed, epoch, *bucket))
        entries = tuple(self._entry(which, int(place)) for place in places)
        return GlobalBatch(epoch=epoch, number=number, bucket=bucket, entries=entries)

    def _entry(self, which: int, place: int) -> Entry:
        ends = self._ends[which]
        member = int(np.searchsorted(ends, place, side="right"))
        group = self._members[which][member]
        inside = place - (int(ends[member - 1]) if member else 0)
        pass_, row = divmod(inside, self.groups[group].count)
        return Entry(group, row, pass_)


@dataclass(frozen=True, kw_only=True)
class Share:
    """How global batches are cut among ranks and accumulation steps."""

    batch_size: int
    world: int
    rank: int

    def num_micros(self, batch: GlobalBatch) -> int:
        """Micro-batches that any rank needs: the same number on every rank."""
        return -(-len(batch.entries) // (self.batch_size * self.world))

    def entries(self, batch: GlobalBatch, micro: int) -> tuple[Entry, ...]:
        """This rank's part of micro-batch ``micro``; empty where the batch is short."""
        start = (micro * self.world + self.rank) * self.batch_size
        return batch.entries[start : start + self.batch_size]
