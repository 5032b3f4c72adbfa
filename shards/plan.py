"""The epoch plan: which samples make batch t of epoch e, and all that is random about each.

A keyed permutation inside each bucket and one over the batches: O(batch) time and O(1) memory at
any size, so a resumed run seeks. Batches are computed in blocks, which changes none of them.
Nothing here depends on the number of processes.

G is the global batch: batch size x accumulation x world size.
"""

import functools
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from runtime.files import content_digest
from shards.buckets import Size

NUM_ROUNDS = 12  # of the Feistel network; small domains need more than the usual 4
BLOCK_SIZE = 1024  # entries computed at once: numpy takes as long for one as for a hundred
Array = npt.NDArray[np.uint64]


def derive_key(*parts: int | str) -> int:
    """128 bits that depend on every part, in order."""
    return xxhash.xxh3_128_intdigest(repr(parts).encode())


def permute(positions: Array, size: int, key: int) -> Array:
    """Where each position goes in a keyed permutation of 0..size-1.

    A balanced Feistel network on the next power of four, walked until it is inside (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    sizes = np.full(len(positions), size, np.uint64)
    return permute_each(positions, sizes, _round_keys(key)[:, None].repeat(len(positions), axis=1))


def permute_each(positions: Array, sizes: Array, round_keys: Array) -> Array:
    """``permute`` with a size [n] and keys [NUM_ROUNDS, n] for each position [n]."""
    half_bits = _half_bits(sizes)
    values = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    while len(outside := np.flatnonzero(values >= sizes)):
        values[outside] = _feistel(values[outside], half_bits[outside], round_keys[:, outside])
    return values


@functools.lru_cache(maxsize=1024)
def _round_keys(key: int) -> Array:
    return np.random.Generator(np.random.Philox(key=key)).integers(0, 2**64, NUM_ROUNDS, np.uint64)


def _half_bits(sizes: Array) -> Array:
    """Bits of each half of a Feistel network whose values cover 0..size-1."""
    unique_sizes, where = np.unique(sizes, return_inverse=True)
    half_bits = [max(1, ((int(size) - 1).bit_length() + 1) // 2) for size in unique_sizes]
    return np.array(half_bits, np.uint64)[where]


def _feistel(values: Array, half_bits: Array, round_keys: Array) -> Array:
    masks = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & masks
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & masks)
    return (left << half_bits) | right


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


class Entry(NamedTuple):
    """One occurrence of a sample in an epoch: ``repeat`` counts its repeats from 0."""

    group: int
    row: int
    repeat: int


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """Batch ``number`` of ``epoch``: up to G entries of one bucket."""

    epoch: int
    number: int
    bucket: Size
    entries: tuple[Entry, ...]


class Plan:
    """The epoch plan: every sample exactly ``repeats`` times an epoch, in batches of one bucket.

    The last batch of a bucket is short: nothing is padded by repetition, nothing is dropped.
    """

    def __init__(self, groups: list[Group], seed: int, global_batch: int) -> None:
        if global_batch < 1:
            raise ValueError(f"the global batch must be at least 1, not {global_batch}")
        self.groups = groups
        self.seed = seed
        self.global_batch = global_batch
        self.buckets = sorted({group.bucket for group in groups})
        # The groups in the buckets' order, and where each one's entries and counts end; where each
        # bucket's entries and batches end.
        self._order = sorted(range(len(groups)), key=lambda i: (groups[i].bucket, i))
        members = [groups[i] for i in self._order]
        self._counts = np.array([group.count for group in members], np.uint64)
        self._ends = np.cumsum([group.count * group.repeats for group in members], dtype=np.uint64)
        sizes = dict.fromkeys(self.buckets, 0)
        for group in members:
            sizes[group.bucket] += group.count * group.repeats
        self._sizes = np.array([*sizes.values()], np.uint64)
        self._size_ends = np.cumsum(self._sizes, dtype=np.uint64)
        batches = [-(-size // global_batch) for size in sizes.values()]
        self._batch_ends = np.cumsum(batches, dtype=np.uint64)
        self.num_batches = sum(batches)
        self.num_entries = sum(sizes.values())
        if self.num_entries == 0:
            raise ValueError("there is no sample to train on: the cache is empty")
        self.digest = content_digest([[asdict(g) for g in groups], seed, global_batch])
        self._at_once = max(1, BLOCK_SIZE // global_batch)
        self._block = functools.lru_cache(maxsize=4)(self._compute_block)

    def batch(self, epoch: int, number: int) -> GlobalBatch:
        """Batch ``number`` in 0..num_batches-1 of an epoch; equal arguments, equal answer."""
        block, place = divmod(number, self._at_once)
        bucket, entries = self._block(epoch, block)[place]
        return GlobalBatch(
            epoch=epoch, number=number, bucket=bucket, entries=tuple(map(Entry._make, entries))
        )

    def _compute_block(self, epoch: int, block: int) -> list[tuple[Size, list[list[int]]]]:
        """Bucket and entries (group, row, repeat) of each batch from ``block * _at_once`` on."""
        first = block * self._at_once
        numbers = np.arange(first, min(first + self._at_once, self.num_batches), dtype=np.uint64)
        slots = permute(numbers, self.num_batches, derive_key("batches", self.seed, epoch))
        which = np.searchsorted(self._batch_ends, slots, side="right")
        starts = (slots - _starts_from_ends(self._batch_ends)[which]) * np.uint64(self.global_batch)
        lengths = np.minimum(self._sizes[which] - starts, np.uint64(self.global_batch))
        ends = np.cumsum(lengths)
        owner = np.repeat(np.arange(len(numbers)), lengths.astype(np.intp))
        bucket = which[owner]
        positions = (
            starts[owner] + np.arange(ends[-1], dtype=np.uint64) - _starts_from_ends(ends)[owner]
        )
        keys = np.stack(
            [_round_keys(derive_key("samples", self.seed, epoch, *b)) for b in self.buckets], axis=1
        )
        places = permute_each(positions, self._sizes[bucket], keys[:, bucket])
        places += _starts_from_ends(self._size_ends)[bucket]
        member = np.searchsorted(self._ends, places, side="right")
        passes, rows = np.divmod(
            places - _starts_from_ends(self._ends)[member], self._counts[member]
        )
        groups = np.array(self._order, np.uint64)[member]
        entries = np.stack([groups, rows, passes], axis=1).tolist()
        cuts = [0, *ends.tolist()]
        return [
            (self.buckets[w], entries[cuts[i] : cuts[i + 1]]) for i, w in enumerate(which.tolist())
        ]


def _starts_from_ends(ends: Array) -> Array:
    """The starts of consecutive ranges that end at ``ends``."""
    return np.concatenate([np.zeros(1, np.uint64), ends[:-1]])


@dataclass(frozen=True, kw_only=True)
class RankShare:
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


# All randomness of a sample in one repeat comes from a stream of its own. It is keyed, not drawn in
# turn: the same on every device, at any world size and batch size, after any resume, and whatever
# else a run reads.

NUM_UNIFORMS = 8  # some are spare, so that another choice leaves the noise of all runs as it is


class Draws:
    """The random numbers of one sample after the other; for one thread.

    A stream is Philox keyed by (seed, epoch, cache, sample, repeat). One generator serves them all,
    as making one takes ten times as long as keying it anew.

    ``variant``, ``caption``, ``dropout``, ``time`` and ``role`` are uniform in [0, 1), and exact in
    fp32.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._fresh = self._bits.state
        self._stream = np.random.Generator(self._bits)

    def start(self, seed: int, epoch: int, cache: int, key: str, repeat: int) -> None:
        """Restart at the beginning of a sample's stream."""
        high, low = divmod(derive_key("sample", seed, epoch, cache, key, repeat), 2**64)
        self._fresh["state"]["key"][:] = low, high
        self._bits.state = self._fresh
        uniforms = self._stream.random(NUM_UNIFORMS, np.float32).tolist()
        self.variant, self.caption, self.dropout, self.time, self.role = uniforms[:5]

    def normal(self, out: npt.NDArray[np.float32]) -> None:
        """Fill ``out`` with the stream's next standard normals."""
        self._stream.standard_normal(out=out, dtype=np.float32)


def pick(uniform: float, size: int) -> int:
    """An index in 0..size-1, each equally likely, from a ``uniform`` number in [0, 1)."""
    return int(uniform * size)


RoleShares = tuple[tuple[str, float], ...]  # the share of each role in the draws of captions


def pick_caption(
    roles: tuple[str, ...], shares: RoleShares, role_uniform: float, caption_uniform: float
) -> int:
    """Which caption of a sample to take, where ``roles`` has the role of each of its captions.

    The role is drawn by its share among the roles that the sample has, and of the captions in this
    role each is equally likely. A sample without any role of a share above 0 gives each of its
    captions equally often.
    """
    ends, captions = _role_choices(roles, shares)
    which = bisect_right(ends, role_uniform * ends[-1])
    among = captions[min(which, len(captions) - 1)]
    return among[pick(caption_uniform, len(among))]


@functools.lru_cache(maxsize=4096)
def _role_choices(
    roles: tuple[str, ...], shares: RoleShares
) -> tuple[list[float], list[tuple[int, ...]]]:
    """Where each role's range of shares ends, and its captions; samples have few kinds of roles."""
    captions = {
        role: tuple(place for place, own in enumerate(roles) if own == role)
        for role, share in shares
        if share > 0 and role in roles
    }
    if not captions:
        return [1.0], [tuple(range(len(roles)))]
    return list(accumulate(dict(shares)[role] for role in captions)), [*captions.values()]
