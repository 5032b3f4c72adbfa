"""What a run reads of a sample: its variant, its caption or none, its mask; of several caches."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import BUCKET, epoch_of, made_sample, reader_of, write_cache

from runtime.devices import DTYPES
from shards.batches import UNCONDITIONAL, Batch, Reader
from shards.format import CacheError, Layout, Sample
from shards.plan import Entry, GlobalBatch
from shards.reader import Cache
from shards.writer import write_shard

SMALL: dict[str, Any] = {"prompt": (6, 3), "pooled": 2}  # text is copied, whatever its size


def written(
    folder: Path, samples: list[Sample], **settings: Any
) -> tuple[Cache, dict[str, Sample]]:
    return Cache(write_cache(folder, samples, **settings)), {
        sample.key: sample for sample in samples
    }


def rows(batches: Any) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Every sample read, by its key."""
    names = ("latents", "prompt", "pooled", "time_ids", "noise", "times", "weights", "mask")
    return [
        (key, {n: getattr(b, n)[row] for n in names if getattr(b, n) is not None})
        for b in batches
        for row, key in enumerate(b.keys)
    ]


def which(value: torch.Tensor, among: torch.Tensor) -> int:
    """The place of ``value`` in ``among``, bit for bit; it must be there once."""
    (results,) = [
        number for number, candidate in enumerate(among) if torch.equal(value, candidate.float())
    ]
    return results


def chi_square(counts: list[int]) -> float:
    """Against equal counts, in standard deviations."""
    table = np.array(counts, float)
    freedom = len(table) - 1
    statistic = ((table - table.mean()) ** 2 / table.mean()).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


# Dropped captions.


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, Sample]]:
    """40 samples with two captions each."""
    torch.manual_seed(2)
    samples = [made_sample(f"{number}.png", captions=2, **SMALL) for number in range(40)]
    return written(tmp_path_factory.mktemp("forty") / "cache", samples)


def dropped(reader: Reader, epoch: int) -> set[str]:
    """The keys whose text is the unconditional one; of the others it must be their own."""
    kind = reader.options.unconditional
    result = set()
    for batch in epoch_of(reader, epoch):
        unconditional = reader.caches[0].side_tensors(UNCONDITIONAL)
        prompt = unconditional[f"{kind}.prompt_embeds"][0]
        pooled = unconditional[f"{kind}.pooled_prompt_embeds"][0]
        for row, key in enumerate(batch.keys):
            if torch.equal(batch.prompt[row], prompt):
                assert torch.equal(batch.pooled[row], pooled)
                result.add(key)
            else:
                assert not torch.equal(batch.pooled[row], pooled)
    return result


@pytest.mark.parametrize("kind", ["zeros", "empty"])
def test_captions_are_dropped_at_the_rate_asked_for(
    forty: tuple[Cache, dict[str, Sample]], kind: str
) -> None:
    cache, samples = forty
    reader = reader_of([cache], 8, caption_dropout=0.3, unconditional=kind)
    drops, kept = Counter[str](), 0
    for epoch in range(40):
        drops.update(dropped(reader, epoch))
    for key, row in rows(epoch_of(reader, 3)):
        if key not in dropped(reader, 3):
            caption = which(row["prompt"], samples[key].tensors["prompt_embeds"])
            assert which(row["pooled"], samples[key].tensors["pooled_prompt_embeds"]) == caption
            kept += 1
    assert kept == 40 - len(dropped(reader, 3)) > 0
    assert drops.total() == pytest.approx(1600 * 0.3, abs=4 * np.sqrt(1600 * 0.3 * 0.7))
    assert len(drops) == 40 and abs(chi_square([*drops.values()])) < 4  # none is always dropped


def test_the_unconditional_is_the_one_named(forty: tuple[Cache, dict[str, Sample]]) -> None:
    cache, _ = forty
    stored = cache.side_tensors(UNCONDITIONAL)
    assert stored["empty.prompt_embeds"].abs().min() > 0 and not stored["zeros.prompt_embeds"].any()
    texts = {}
    for kind in ("zeros", "empty"):
        reader = reader_of([cache], 40, caption_dropout=0.999999, unconditional=kind)
        (batch,) = epoch_of(reader)
        texts[kind] = batch.prompt, batch.pooled
        for text, name in zip(texts[kind], ("prompt_embeds", "pooled_prompt_embeds"), strict=True):
            assert torch.equal(text, stored[f"{kind}.{name}"].expand_as(text))
    assert not torch.equal(texts["zeros"][0], texts["empty"][0])


def test_what_is_dropped_depends_on_seed_epoch_sample_and_pass(
    forty: tuple[Cache, dict[str, Sample]],
) -> None:
    cache, _ = forty
    cached = {"caption_dropout": 0.5}
    results = {
        (seed, epoch): dropped(reader_of([cache], 8, seed=seed, **cached), epoch)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    for first, other in itertools.combinations(results.values(), 2):
        assert 8 <= len(first ^ other) <= 32  # by chance: 20, give or take 3
    assert dropped(reader_of([cache], 5, seed=1, **cached), 2) == results[1, 2]
    reader = reader_of([cache], 8, **cached)
    passes = []
    for pass_ in (0, 1, 0):
        entries = tuple(Entry(0, row, pass_) for row in range(40))
        batch = GlobalBatch(epoch=0, number=0, bucket=BUCKET, entries=entries)
        complete = reader_of([cache], 40, **cached).read(batch, 0)
        empty = cache.side_tensors(UNCONDITIONAL)["empty.prompt_embeds"][0]
        passes.append(
            {k for k, t in zip(complete.keys, complete.prompt, strict=True) if t.equal(empty)}
        )
    assert passes[0] == passes[2] == dropped(reader, 0)
    assert 8 <= len(passes[0] ^ passes[1]) <= 32


@pytest.mark.parametrize(("world", "batch_size"), [(2, 4), (3, 1), (4, 2), (1, 2)])
def test_a_sample_is_read_alike_at_any_world_size(
    forty: tuple[Cache, dict[str, Sample]], world: int, batch_size: int
) -> None:
    cache, _ = forty
    alone = dict(rows(epoch_of(reader_of([cache], 24, caption_dropout=0.5), 1)))
    shared = {}
    for rank in range(world):
        reader = reader_of(
            [cache], 24, batch_size=batch_size, world=world, rank=rank, caption_dropout=0.5
        )
        shared |= dict(rows(epoch_of(reader, 1)))
    assert alone.keys() == shared.keys() and len(alone) == 40
    for key, tensors in alone.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, shared[key][name]), name


@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_damaged_unconditional_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    cache, _ = written(tmp_path / "cache", [made_sample("a.png", **SMALL)])
    path = cache.folder / UNCONDITIONAL
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink()
    if fault != "gone":
        path.write_bytes(data if fault == "flipped" else data[:-8])
    assert len(rows(epoch_of(reader_of([cache], 1)))) == 1  # nobody asks for it
    with pytest.raises(CacheError, match=f"{UNCONDITIONAL}: (damaged|cannot be read)"):
        reader_of([cache], 1, caption_dropout=0.1)


# Captions, variants and masks.


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, Sample]]:
    """12 samples of 4 variants and 3 captions: half with masks, half with a std."""
    torch.manual_seed(3)
    samples = [
        made_sample(f"{n}.png", variants=4, captions=3, mask=n % 2 == 0, std=n % 3 == 0, **SMALL)
        for n in range(12)
    ]
    return written(tmp_path_factory.mktemp("many") / "cache", samples)


def test_captions_and_variants_are_drawn_evenly_and_apart(
    many: tuple[Cache, dict[str, Sample]],
) -> None:
    """A variant brings its own latents, sizes and mask; a caption both of its embeddings."""
    cache, samples = many
    reader = reader_of([cache], 12, masks=True)
    counts = Counter[tuple[int, int]]()
    for key, row in itertools.chain(*(rows(epoch_of(reader, epoch)) for epoch in range(120))):
        stored = samples[key].tensors
        variant = which(row["time_ids"], stored["sizes"])
        caption = which(row["prompt"], stored["prompt_embeds"])
        counts[variant, caption] += 1
        assert which(row["pooled"], stored["pooled_prompt_embeds"]) == caption
        if "mask" in stored:
            assert torch.equal(row["mask"], stored["mask"][variant])
        else:
            assert torch.equal(row["mask"], torch.ones(1, 2, 4))
        mean = stored["latents.mean"][variant]
        if "latents.std" not in stored:
            assert torch.equal(row["latents"], mean)
        else:
            assert ((row["latents"] - mean).abs() < 6 * stored["latents.std"][variant]).all()
    assert counts.total() == 1440 and len(counts) == 12
    assert abs(chi_square([*counts.values()])) < 4


@pytest.mark.parametrize("variants", [1, 2])
def test_a_damaged_mask_stops_those_who_read_masks(tmp_path: Path, variants: int) -> None:
    samples = [made_sample(f"{n}.png", variants=variants, mask=True, **SMALL) for n in range(6)]
    folder = write_cache(tmp_path / "cache", samples)
    (shard,) = Cache(folder).shards()
    with open(shard.path, "r+b") as file:
        for row in range(len(samples)):
            for part, _ in shard.index.parts(row):
                if "mask" in part.label:
                    file.seek(part.offset)
                    file.write(b"\xff")
    (batch,) = epoch_of(reader_of([Cache(folder)], 6))
    assert len(batch.keys) == 6
    with pytest.raises(CacheError, match=r"variant \d \(mask\) is damaged"):
        [*epoch_of(reader_of([Cache(folder)], 6, masks=True))]


@pytest.mark.parametrize("name", ["mask", "latents.std", "latents.maen"])
def test_a_tensor_that_is_not_there_is_not_read(tmp_path: Path, name: str) -> None:
    (shard,) = Cache(write_cache(tmp_path / "cache", [made_sample("1.png")])).shards()
    with pytest.raises(ValueError, match="values to unpack"):
        shard.read_into(torch.zeros(1), 0, name)


def test_a_sample_of_another_layout_is_not_written(tmp_path: Path) -> None:
    layout = Layout(dtype="fp16", latent=(4, 2, 4), prompt=(6, 3), pooled=2)
    single = made_sample("1.png", **SMALL)
    tensors = {n: t if n == "sizes" else t.half() for n, t in single.tensors.items()}
    half = Sample(**{**vars(single), "tensors": tensors})
    with pytest.raises(ValueError, match="not as its shard's layout"):
        write_shard(tmp_path, "32x16-000000", [single], layout, {})
    write_shard(tmp_path, "32x16-000000", [half], layout, {})


def test_masks_are_read_where_they_are_asked_for(many: tuple[Cache, dict[str, Sample]]) -> None:
    cache, _ = many
    for masks in (False, True):
        (batch,) = epoch_of(reader_of([cache], 12, masks=masks))
        assert (batch.mask is not None) == masks
    (first,), (other,) = (epoch_of(reader_of([cache], 12, masks=masks)) for masks in (False, True))
    for name in ("latents", "prompt", "time_ids", "noise", "times"):
        assert torch.equal(getattr(first, name), getattr(other, name))  # all else is as without


def test_offsets_are_one_value_a_channel(many: tuple[Cache, dict[str, Sample]]) -> None:
    (plain,) = epoch_of(reader_of([many[0]], 12))
    (batch,) = epoch_of(reader_of([many[0]], 12, offsets=True))
    assert plain.offsets is None and batch.offsets is not None
    assert batch.offsets.shape == (12, 4, 1, 1) and torch.equal(batch.noise, plain.noise)
    assert len(set(batch.offsets.flatten().tolist())) == 48


# Several caches.

USES: dict[str, tuple[float, int]] = {"fp16": (1.0, 1), "bf16": (0.5, 3), "fp32": (2.0, 2)}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Cache], list[dict[str, Sample]]]:
    """In fp16, bf16 and fp32, of two buckets; one name is in all of them."""
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("three")
    caches, samples = [], []
    for dtype, (weight, repeats) in USES.items():
        names = ["same.png", *(f"{dtype} {number}.png" for number in range(6))]
        made = [
            made_sample(name, bucket=BUCKET if n < 5 else (16, 32), weight=1 + n, **SMALL)
            for n, name in enumerate(names)
        ]
        path = write_cache(folder / dtype, made, dtype=dtype)
        caches.append(Cache(path, weight=weight, repeats=repeats))
        samples.append({sample.key: sample for sample in made})
    return caches, samples


def members(reader: Reader, batch: Batch) -> list[tuple[int, str, int]]:
    """Cache, key and repeat of each sample of a batch."""
    entries = reader.share.entries(reader.plan.batch(batch.epoch, batch.number), batch.micro)
    numbers = [reader.plan.groups[entry.group].cache for entry in entries]
    repeats = [entry.repeat for entry in entries]
    return [*zip(numbers, batch.keys, repeats, strict=True)]


def test_caches_are_mixed_and_each_is_used_as_asked(
    three: tuple[list[Cache], list[dict[str, Sample]]],
) -> None:
    caches, samples = three
    reader = reader_of(caches, 6, batch_size=3)
    seen, mixed, noises = Counter[tuple[int, str]](), 0, set()
    for batch in epoch_of(reader):
        actual = members(reader, batch)
        assert {tuple(batch.latents.shape[2:])} == {
            tuple(samples[c][key].tensors["latents.mean"].shape[2:]) for c, key, _ in actual
        }
        mixed += len({cache for cache, _, _ in actual}) > 1
        for row, (number, key, _) in enumerate(actual):
            seen[number, key] += 1
            sample, dtype = samples[number][key], DTYPES[[*USES][number]]
            for name, into in (("latents.mean", "latents"), ("prompt_embeds", "prompt")):
                expected = sample.tensors[name][0].to(dtype).float()
                assert torch.equal(getattr(batch, into)[row].float(), expected), into
            assert float(batch.weights[row]) == sample.weight * caches[number].weight
            noises.add(tuple(batch.noise[row].flatten().tolist()))
    expected = {(n, key): caches[n].repeats for n in range(3) for key in samples[n]}
    assert seen == expected and seen.total() == 7 * (1 + 3 + 2)
    assert mixed > 5
    assert len(noises) == seen.total()  # twins and repeats too draw their own


def test_text_of_mixed_precisions_is_kept_whole(
    three: tuple[list[Cache], list[dict[str, Sample]]],
) -> None:
    """fp16 and bf16 together are neither: a batch of both is fp32."""
    caches, _ = three
    for number, dtype in enumerate(USES):
        batch = next(epoch_of(reader_of([caches[number]], 4)))
        assert batch.prompt.dtype == batch.pooled.dtype == DTYPES[dtype]
        assert batch.latents.dtype == batch.noise.dtype == torch.float32
    batch = next(epoch_of(reader_of(caches[:2], 30)))
    assert batch.prompt.dtype == torch.float32
