"""The epoch plan against counting, sorting and chi-square; the reader against itself, seeking."""

import itertools
import math
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch

from shards.batches import Batch, Reader
from shards.plan import Draws, Entry, GlobalBatch, Group, Plan, RankShare, derive_key, permute, pick
from shards.reader import Cache

A, B, C, D, E = (64, 64), (96, 48), (48, 96), (80, 56), (56, 80)
SEVEN_OVER_FIVE = [
    Group(cache=0, bucket=bucket, repeats=1, count=count)
    for bucket, count in zip((A, B, C, D, E), (1, 2, 1, 2, 1), strict=True)
]
RAGGED = [
    Group(cache=0, bucket=A, repeats=1, count=13),
    Group(cache=0, bucket=A, repeats=3, count=5),
    Group(cache=0, bucket=B, repeats=2, count=1),
    Group(cache=1, bucket=A, repeats=1, count=4),
    Group(cache=1, bucket=B, repeats=1, count=0),
    Group(cache=1, bucket=C, repeats=4, count=7),
    Group(cache=2, bucket=C, repeats=1, count=8),
]
ONE_BUCKET = {"cache": 0, "bucket": A, "repeats": 1}


def batches(plan: Plan, epoch: int) -> list[GlobalBatch]:
    return [plan.batch(epoch, number) for number in range(plan.num_batches)]


def order(plan: Plan, epoch: int) -> list[int]:
    """The rows of a plan of one group, in the order of an epoch."""
    return [entry.row for batch in batches(plan, epoch) for entry in batch.entries]


def shares(batch: GlobalBatch, batch_size: int, world: int) -> Iterator[tuple[Entry, ...]]:
    """What each rank does in each micro-batch, micro by micro."""
    ranks = [RankShare(batch_size=batch_size, world=world, rank=rank) for rank in range(world)]
    (num_micros,) = {share.num_micros(batch) for share in ranks}
    for micro in range(num_micros):
        yield from (share.entries(batch, micro) for share in ranks)


@pytest.mark.parametrize("groups", [SEVEN_OVER_FIVE, RAGGED], ids=["seven", "ragged"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (3, 2), (5, 4), (64, 1)])
def test_every_sample_comes_as_often_as_its_repeats(
    groups: list[Group], world: int, batch_size: int, accumulation: int
) -> None:
    plan = Plan(groups, seed=3, global_batch=batch_size * accumulation * world)
    expected = Counter(
        (group.cache, group.bucket, group.repeats, row, pass_)
        for group in groups
        for row in range(group.count)
        for pass_ in range(group.repeats)
    )
    assert plan.num_entries == expected.total()
    for epoch in range(3):
        seen = Counter[Any]()
        for batch in batches(plan, epoch):
            for part in shares(batch, batch_size, world):
                assert len(part) <= batch_size
                for entry in part:
                    group = plan.groups[entry.group]
                    assert group.bucket == batch.bucket
                    place = (group.cache, group.bucket, group.repeats, entry.row, entry.repeat)
                    seen[place] += 1
        assert seen == expected


@pytest.mark.parametrize("global_batch", [1, 4, 7, 12, 100])
def test_only_the_last_batch_of_a_bucket_is_short(global_batch: int) -> None:
    entries = Counter[Any]()
    for group in RAGGED:
        entries[group.bucket] += group.count * group.repeats
    sizes: dict[Any, list[int]] = {}
    for batch in batches(Plan(RAGGED, seed=0, global_batch=global_batch), epoch=5):
        sizes.setdefault(batch.bucket, []).append(len(batch.entries))
    for bucket, total in entries.items():
        num_full, rest = divmod(total, global_batch)
        assert sorted(sizes[bucket]) == [rest] * bool(rest) + [global_batch] * num_full
    assert set(sizes) == set(entries)


@pytest.mark.parametrize(
    ("batch_size", "world"), [(12, 1), (1, 1), (6, 2), (3, 2), (4, 3), (1, 3), (3, 4), (1, 4)]
)
def test_the_shares_of_any_world_make_the_same_batches(batch_size: int, world: int) -> None:
    plan, alone = (Plan(RAGGED, seed=1, global_batch=12) for _ in range(2))
    assert plan.digest == alone.digest
    for epoch in (0, 1):
        for batch, reference in zip(batches(plan, epoch), batches(alone, epoch), strict=True):
            assert sum(shares(batch, batch_size, world), start=()) == reference.entries


def test_no_micro_batch_is_empty_on_all_ranks() -> None:
    for batch in batches(Plan(RAGGED, seed=1, global_batch=12), 0):
        parts = [*shares(batch, batch_size=2, world=3)]
        assert all(any(parts[i : i + 3]) for i in range(0, len(parts), 3))


def test_a_batch_does_not_depend_on_the_ones_before() -> None:
    stepped = {
        (epoch, batch.number): batch
        for epoch in range(3)
        for batch in batches(Plan(RAGGED, seed=9, global_batch=4), epoch)
    }
    places = np.random.default_rng(0).permutation(sorted(stepped))
    for epoch, number in places.tolist():
        again = Plan(list(RAGGED), seed=9, global_batch=4).batch(epoch, number)
        assert again == stepped[epoch, number]
        assert (again.epoch, again.number) == (epoch, number)


@pytest.mark.parametrize("global_batch", [0, -1])
def test_no_batch_size_is_an_error(global_batch: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, not {global_batch}"):
        Plan(RAGGED, seed=0, global_batch=global_batch)


@pytest.mark.parametrize("groups", [[], [Group(count=0, **ONE_BUCKET)]])
def test_no_samples_are_an_error(groups: list[Group]) -> None:
    with pytest.raises(ValueError, match="no sample"):
        Plan(groups, seed=0, global_batch=1)


@pytest.mark.parametrize("global_batch", [1, 4, 12])
def test_how_many_batches_are_computed_at_once_changes_none(
    monkeypatch: pytest.MonkeyPatch, global_batch: int
) -> None:
    groups = [*RAGGED, Group(cache=0, bucket=E, repeats=1, count=1500)]
    results = []
    for size in (1, 7, 1024, 10**6):
        monkeypatch.setattr("shards.plan.BLOCK_SIZE", size)
        results.append(batches(Plan(groups, seed=2, global_batch=global_batch), 1))
    assert results[0] == results[1] == results[2] == results[3]


def test_the_digest_tells_plans_apart() -> None:
    plans = [
        Plan(RAGGED, seed=0, global_batch=4),
        Plan(RAGGED, seed=1, global_batch=4),
        Plan(RAGGED, seed=0, global_batch=8),
        Plan(RAGGED[:-1], seed=0, global_batch=4),
        Plan([*RAGGED[:-1], Group(cache=2, bucket=C, repeats=2, count=4)], 0, 4),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


# How well it is shuffled.


def chi_square(counts: npt.NDArray[np.float64]) -> float:
    """Against equal counts, in standard deviations; the sum along each axis is given."""
    expected = counts.mean()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = math.prod(side - 1 for side in counts.shape)
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("global_batch", [16, 1], ids=["in a batch", "of batches"])
def test_every_sample_comes_at_every_place_equally_often(global_batch: int) -> None:
    size, epochs = 16, {16: 800, 1: 160}[global_batch]
    plan = Plan([Group(count=size, **ONE_BUCKET)], seed=0, global_batch=global_batch)
    table = np.zeros((size, size))
    for epoch in range(epochs):
        table[np.arange(size), order(plan, epoch)] += 1
    assert abs(chi_square(table)) < 4


def test_neighbours_part_and_samples_travel() -> None:
    size, epochs = 1000, 5
    plan = Plan([Group(count=size, **ONE_BUCKET)], seed=0, global_batch=10)
    orders = [np.array(order(plan, epoch)) for epoch in range(epochs)]
    for before, after in itertools.pairwise([np.arange(size), *orders]):
        place = np.argsort(before)  # of each sample in the epoch before
        moved = abs(place[after] - np.arange(size)).mean()
        assert moved == pytest.approx(size / 3, rel=0.1)
        still_neighbours = (abs(np.diff(place[after])) == 1).sum()  # by chance: 2
        assert still_neighbours < 12


def test_batches_are_made_of_other_samples_each_epoch() -> None:
    plan = Plan([Group(count=400, **ONE_BUCKET)], seed=0, global_batch=4)
    together = [
        {
            pair
            for batch in batches(plan, epoch)
            for pair in itertools.combinations(sorted(e.row for e in batch.entries), 2)
        }
        for epoch in range(3)
    ]
    for first, second in itertools.combinations(together, 2):
        assert len(first) == 600
        assert len(first & second) < 20  # by chance: 4.5


def test_buckets_take_turns() -> None:
    groups = [Group(cache=0, bucket=bucket, repeats=1, count=160) for bucket in (A, B, C)]
    for epoch in range(3):
        buckets = [batch.bucket for batch in batches(Plan(groups, 0, global_batch=4), epoch)]
        turns = sum(first != other for first, other in itertools.pairwise(buckets))
        assert 65 < turns < 95  # by chance: 79.3


def test_buckets_take_other_turns_each_epoch_and_seed() -> None:
    groups = [Group(cache=0, bucket=bucket, repeats=1, count=40) for bucket in (A, B)]
    turns = {
        tuple(batch.bucket for batch in batches(Plan(groups, seed, global_batch=4), epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(turns) == 16


def test_repeats_of_a_sample_are_spread() -> None:
    plan = Plan([Group(cache=0, bucket=A, repeats=10, count=30)], seed=0, global_batch=1)
    rows = order(plan, 0)
    assert sum(first == other for first, other in itertools.pairwise(rows)) < 25  # by chance: 9


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    group = Group(count=50, **ONE_BUCKET)
    orders = {
        (seed, epoch): tuple(order(Plan([group], seed, global_batch=5), epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(set(orders.values())) == 25
    sets = {
        place: frozenset(frozenset(rows[i : i + 5]) for i in range(0, 50, 5))
        for place, rows in orders.items()
    }
    assert len(set(sets.values())) == 25, "not only the order of the batches differs"


def test_buckets_of_equal_size_are_shuffled_apart() -> None:
    groups = [Group(cache=0, bucket=bucket, repeats=1, count=30) for bucket in (A, B)]
    first, second = batches(Plan(groups, seed=0, global_batch=30), 0)
    assert [e.row for e in first.entries] != [e.row for e in second.entries]


# The permutation.


def test_permute_is_a_bijection() -> None:
    for size in range(1, 201):
        for key in (0, 2**127 + size):
            permuted = permute(np.arange(size, dtype=np.uint64), size, key)
            assert sorted(permuted.tolist()) == [*range(size)]


@pytest.mark.parametrize("size", [10**6 + 3, 2**20, 2**40 + 12345, 2**62 + 1])
def test_permute_is_one_to_one_at_large_sizes(size: int) -> None:
    random = np.random.default_rng(0)
    positions = np.unique(random.integers(0, size, 50_000, np.uint64))
    permuted = permute(positions, size, key=5)
    assert len(np.unique(permuted)) == len(positions)
    assert int(permuted.max()) < size
    assert float((permuted / size).mean()) == pytest.approx(0.5, abs=0.01)
    assert abs(np.corrcoef(positions.astype(float), permuted.astype(float))[0, 1]) < 0.03


@pytest.mark.parametrize("size", [5, 1000, 2**40 + 1])
def test_permute_takes_positions_alone_or_together(size: int) -> None:
    positions = np.array([size - 1, 0, size // 2, 3], np.uint64)
    kept = positions.copy()
    together = permute(positions, size, key=1).tolist()
    assert (positions == kept).all()
    assert together == [int(permute(positions[i : i + 1], size, key=1)[0]) for i in range(4)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_permute_makes_every_order_equally_often(size: int) -> None:
    """Small sizes are where a Feistel network is weak."""
    orders = [*itertools.permutations(range(size))]
    positions = np.arange(size, dtype=np.uint64)
    seen = Counter(tuple(permute(positions, size, key).tolist()) for key in range(8 * len(orders)))
    assert abs(chi_square(np.array([float(seen[order]) for order in orders]))) < 4


def test_ten_million_entries_need_no_memory() -> None:
    groups = [
        Group(cache=0, bucket=A, repeats=3, count=2_000_000),
        Group(cache=1, bucket=A, repeats=1, count=1_500_001),
        Group(cache=1, bucket=B, repeats=1, count=2_500_000),
    ]
    tracemalloc.start()
    try:
        plan = Plan(groups, seed=0, global_batch=16)
        numbers = np.random.default_rng(0).integers(0, plan.num_batches, 50).tolist()
        results = [plan.batch(7, number) for number in [0, plan.num_batches - 1, *numbers]]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5e6
    assert plan.num_entries == 10_000_001
    for batch in results:
        for entry in batch.entries:
            group = groups[entry.group]
            assert group.bucket == batch.bucket
            assert 0 <= entry.row < group.count
            assert 0 <= entry.repeat < group.repeats
    distinct = {batch.number: batch.entries for batch in results}
    every = sum(distinct.values(), start=())
    assert len(set(every)) == len(every)


# The random streams.

STREAM = {"seed": 0, "epoch": 0, "cache": 0, "key": "a" * 20, "repeat": 0}
OTHERS = [
    {"seed": 1},
    {"epoch": 1},
    {"cache": 1},
    {"key": "a" * 19 + "b"},
    {"repeat": 1},
    {"seed": 1, "epoch": 1},
    {"epoch": 11},
    {"epoch": 1, "cache": 1},
]


def draw(change: dict[str, Any], count: int = 20_000, draws: Draws | None = None) -> Any:
    draws = draws or Draws()
    draws.start(**(STREAM | change))
    result = np.empty(count, np.float32)
    draws.normal(result)
    return result


def test_equal_arguments_draw_equal_noise() -> None:
    """Whatever was drawn before, and however far."""
    draws = Draws()
    for count in (1, 3, 20_000, 5):
        assert np.array_equal(draw({}, count, draws), draw({})[:count])
        draw({"epoch": count}, 7, draws)


def test_a_stream_is_philox_by_its_key() -> None:
    draws = Draws()
    for change in [{}, *OTHERS]:
        key = derive_key("sample", *(STREAM | change).values())
        reference = np.random.Generator(np.random.Philox(key=key))
        uniforms = reference.random(8, np.float32)
        noise = draw(change, 1001, draws)
        results = [draws.variant, draws.caption, draws.dropout, draws.time]
        assert results == uniforms[:4].tolist()
        assert np.array_equal(noise, reference.standard_normal(1001, np.float32))


def test_every_argument_gives_a_stream_of_its_own() -> None:
    streams = np.stack([draw(change) for change in [{}, *OTHERS]])
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert abs(correlations).max() < 5 / math.sqrt(streams.shape[1])


def test_noise_is_standard_normal_across_keys() -> None:
    """The first number of each stream: what an image's corner gets."""
    firsts = np.array([draw({"key": f"{n:020x}"}, count=1)[0] for n in range(10_000)])
    assert abs(firsts.mean()) < 0.04
    assert firsts.std() == pytest.approx(1, abs=0.03)
    assert np.mean(abs(firsts) < 1) == pytest.approx(0.6827, abs=0.02)


def test_noise_is_standard_normal_within_a_stream() -> None:
    noise = draw({}, count=200_000)
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01


def test_choices_are_uniform_across_passes_and_apart() -> None:
    draws, results = Draws(), []
    for pass_ in range(5000):
        draws.start(**(STREAM | {"repeat": pass_}))
        noise = np.empty(1, np.float32)
        draws.normal(noise)
        results.append([draws.variant, draws.caption, draws.dropout, draws.time, float(noise[0])])
    table = np.array(results)
    for column in table[:, :4].T:
        gap = abs(np.sort(column) - np.arange(5000) / 5000).max()
        assert gap < 1.95 / math.sqrt(5000), "Kolmogorov-Smirnov, one in a thousand"
    assert abs(np.corrcoef(table.T) - np.eye(5)).max() < 5 / math.sqrt(5000)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 65535])
def test_a_pick_is_inside(size: int) -> None:
    assert [pick(u, size) for u in (0.0, 1 - 2.0**-24)] == [0, size - 1]
    assert {pick(u / 97, size) for u in range(97)} == {u * size // 97 for u in range(97)}


# Reading by plan: the cache has 5, 5 and 4 samples.


@pytest.fixture(scope="module")
def opened(cache: Path) -> Cache:
    return Cache(cache)


def read(
    opened: Cache, plan: Plan, count: int, start: tuple[int, int] = (0, 0), **options: Any
) -> list[Batch]:
    share = RankShare(
        batch_size=options.pop("batch_size", 2),
        world=options.pop("world", 1),
        rank=options.pop("rank", 0),
    )
    stream = Reader([opened], plan, share).epochs(start, **options)
    try:
        return [*itertools.islice(stream, count)]
    finally:
        stream.close()


def assert_same(first: Batch, other: Batch) -> None:
    for field in fields(Batch):
        actual, expected = getattr(first, field.name), getattr(other, field.name)
        if isinstance(actual, torch.Tensor):
            assert actual.dtype == expected.dtype, field.name
            assert torch.equal(actual, expected), field.name
        else:
            assert actual == expected, field.name


@pytest.fixture(scope="module")
def plan(opened: Cache) -> Plan:
    """5 batches an epoch: 4 and 1, 4 and 1, 4."""
    plan = Plan(opened.groups(), seed=4, global_batch=4)
    assert sorted(len(b.entries) for b in batches(plan, 0)) == [1, 1, 4, 4, 4]
    return plan


@pytest.fixture(scope="module")
def stepped(opened: Cache, plan: Plan) -> list[Batch]:
    """Three epochs of 5 batches, in 8 micro-batches of 2 or 1."""
    return read(opened, plan, count=24, threads=2)


def test_epochs_follow_each_other(plan: Plan, stepped: list[Batch]) -> None:
    expected = [
        (epoch, batch.number, micro, -(-len(batch.entries) // 2))
        for epoch in range(3)
        for batch in batches(plan, epoch)
        for micro in range(-(-len(batch.entries) // 2))
    ]
    assert [(b.epoch, b.number, b.micro, b.num_micros) for b in stepped] == expected
    for epoch in range(3):
        keys = [key for batch in stepped if batch.epoch == epoch for key in batch.keys]
        assert len(keys) == len(set(keys)) == 14


@pytest.mark.parametrize(
    "start", [(0, 0), (0, 1), (0, 3), (0, 4), (0, 5), (1, 0), (1, 2), (2, 1), (2, 4)]
)
def test_seeking_finds_what_stepping_finds(
    opened: Cache, plan: Plan, stepped: list[Batch], start: tuple[int, int]
) -> None:
    epoch, done = start
    rest = [batch for batch in stepped if batch.epoch * 5 + batch.number >= epoch * 5 + done]
    batches = read(opened, plan, count=len(rest), start=start)
    for first, other in zip(batches, rest, strict=True):
        assert_same(first, other)


def test_a_second_resume_in_an_epoch_keeps_its_place(
    opened: Cache, plan: Plan, stepped: list[Batch]
) -> None:
    complete: list[Batch] = []
    for done in range(5):
        following = [b for b in stepped if (b.epoch, b.number) == (0, done)]
        complete += read(opened, plan, count=len(following), start=(0, done), threads=1)
    for first, other in zip(complete, stepped, strict=False):
        assert_same(first, other)
    assert len(complete) == 8


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(
    opened: Cache, plan: Plan, stepped: list[Batch], threads: int
) -> None:
    batches = read(opened, plan, count=len(stepped), threads=threads)
    for first, other in zip(batches, stepped, strict=True):
        assert_same(first, other)


def joined(parts: list[Batch], name: str) -> torch.Tensor:
    return torch.cat([getattr(part, name) for part in parts if part.keys])


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (2, 1), (2, 2), (1, 3), (1, 4)])
def test_every_world_trains_on_the_same_tensors(
    opened: Cache, plan: Plan, batch_size: int, world: int
) -> None:
    """And short batches are filled with dummies that weigh nothing and have no keys."""
    num_dummies = 0
    for number in range(plan.num_batches):
        batch = plan.batch(0, number)
        alone = RankShare(batch_size=4, world=1, rank=0)
        complete = Reader([opened], plan, alone).read(batch, 0)
        ranks = [RankShare(batch_size=batch_size, world=world, rank=r) for r in range(world)]
        parts = [
            Reader([opened], plan, share).read(batch, micro)
            for micro in range(ranks[0].num_micros(batch))
            for share in ranks
        ]
        for name in ("latents", "prompt", "pooled", "time_ids", "noise", "times", "weights"):
            assert torch.equal(joined(parts, name), getattr(complete, name)), name
        assert sum((part.keys for part in parts), start=()) == complete.keys
        assert {part.num_entries for part in parts} == {len(batch.entries)}
        assert sum(part.weights.sum().item() for part in parts) == len(batch.entries)
        for dummy in [part for part in parts if not part.keys]:
            num_dummies += 1
            assert dummy.weights.tolist() == [0.0]
            assert dummy.noise.shape == dummy.latents.shape == complete.latents[:1].shape
            assert dummy.latents.isfinite().all()
    assert bool(num_dummies) == (world > 1)


def test_the_tensors_are_those_in_the_tars(cache: Path, stepped: list[Batch]) -> None:
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for path in cache.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".safetensors"):
                    key = member.name.removesuffix(".safetensors")
                    stored[key] = safetensors.torch.load(file.read())
    assert len(stored) == 14
    drawn = []
    for batch in stepped:
        for row, key in enumerate(batch.keys):
            sample = stored[key]
            assert torch.equal(batch.prompt[row], sample["prompt_embeds"][0])
            assert torch.equal(batch.pooled[row], sample["pooled_prompt_embeds"][0])
            assert batch.time_ids[row].tolist() == sample["sizes"][0].tolist()
            mean, std = sample["latents.mean"][0], sample["latents.std"][0]
            drawn.append(((batch.latents[row] - mean) / std).flatten())
            shared = np.corrcoef(drawn[-1], batch.noise[row].flatten())[0, 1]
            assert abs(shared) < 0.4, "the posterior's noise is not the training noise"
    every = torch.cat(drawn)
    assert abs(every.mean().item()) < 0.05
    assert every.std().item() == pytest.approx(1, abs=0.05)
    assert len({tuple(image[:4].tolist()) for image in drawn}) == 42, "drawn anew each epoch"


def test_each_pass_draws_anew(opened: Cache, plan: Plan) -> None:
    """The same sample in pass 0, in pass 1, and in pass 0 again."""
    entries = (Entry(0, 1, 0), Entry(0, 1, 1), Entry(0, 1, 0))
    batch = GlobalBatch(epoch=0, number=0, bucket=plan.groups[0].bucket, entries=entries)
    batches = Reader([opened], plan, RankShare(batch_size=3, world=1, rank=0)).read(batch, 0)
    assert len(set(batches.keys)) == 1
    for name in ("noise", "latents", "times"):
        first, second, again = getattr(batches, name)
        assert not torch.equal(first, second), name
        assert torch.equal(first, again), name
    assert torch.equal(batches.prompt[0], batches.prompt[1])
