"""Captions with roles: where they are from, how often each is drawn, and what a rerun encodes."""

import itertools
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from encodes import again, assert_as_fresh, counted
from folders import put, put_list, read_one
from made import epoch_of, made_sample, reader_of, write_cache

from cli import commands
from precompute.encoders import load_text
from sdxl.base import open_base
from shards.format import CacheError, Sample
from shards.index import Index
from shards.plan import Draws, pick_caption
from shards.reader import Cache
from train.caches import check_roles
from train.option_values import CaptionShares

SHARES = (("tags", 0.5), ("short", 0.3), ("long", 0.2))
SMALL: dict[str, Any] = {"prompt": (6, 3), "pooled": 2}


def roles_of(folder: Path, **settings: Any) -> dict[str, list[tuple[str, str]]]:
    """Role and text of each caption."""
    return {
        record.path: [*zip(record.roles or itertools.repeat(""), record.captions, strict=False)]
        for record in read_one(folder, **settings).records
    }


# Where roles are from.


def test_files_beside_an_image_have_the_roles_of_their_endings(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a cat")
    (tmp_path / "a.tags").write_text("cat, {red|blue}")
    (tmp_path / "a.json").write_text('{"prose": ["A cat.", "It sits."], "tags": 7}')
    put(tmp_path / "b.png", "a dog")
    put(tmp_path / "c.png")
    (tmp_path / "c.caption").write_text("only this")
    roles = "tags=.tags,short=.txt,long=prose"
    expected = [("tags", "cat, red"), ("tags", "cat, blue"), ("short", "a cat")]
    expected += [("long", "A cat."), ("long", "It sits.")]
    by_path = roles_of(tmp_path, caption_roles=roles, wildcards=2)
    assert sorted(by_path["a.png"]) == sorted(expected)
    assert by_path["b.png"] == [("short", "a dog")]
    source = read_one(tmp_path, caption_roles=roles)
    (c,) = (record for record in source.records if record.path == "c.png")
    assert (c.captions, c.roles) == (("only this",), ()), "what it would have without roles"
    with tarfile.open(tmp_path / "pack.tar", "w") as archive:
        for name in ("a.png", "a.txt", "a.tags", "a.json"):
            archive.add(tmp_path / name, name)
            (tmp_path / name).unlink()
    again = roles_of(tmp_path, caption_roles=roles, wildcards=2)
    assert sorted(again["pack.tar/a.png"]) == sorted(expected)


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_columns_of_a_list_are_roles(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    if name.endswith("csv"):
        (tmp_path / name).write_text("file_name,Tags,long\na.png,x,Long x\nb.png,y,\n")
    else:
        rows = [{"file_name": "a.png", "Tags": "x", "long": "Long x"}]
        put_list(tmp_path, *rows, {"file_name": "b.png", "Tags": "y", "long": ""})
    expected = {"a.png": [("Tags", "x"), ("long", "Long x")], "b.png": [("Tags", "y")]}
    assert roles_of(tmp_path, caption_column=("Tags", "long")) == expected
    named = roles_of(tmp_path, caption_roles="t=Tags,long=long")
    assert named["a.png"] == [("t", "x"), ("long", "Long x")]
    assert not any(r.roles for r in read_one(tmp_path, caption_column=("Tags",)).records)


@pytest.mark.parametrize("text", ["tags", "=.txt", "a=.txt,a=.tags", "a=.txt,b=.txt", "a=.json"])
def test_other_forms_of_roles_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="--caption-roles"):
        read_one(tmp_path, caption_roles=text)


# How often each is drawn.


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("tags", "short", "long"), (0.5, 0.3, 0.2)),
        (("tags", "tags", "long", "tags", "long"), (5 / 21, 5 / 21, 1 / 7, 5 / 21, 1 / 7)),
        (("", "short", "short"), (0, 0.5, 0.5)),
        (("", "other"), (0.5, 0.5)),
    ],
)
def test_roles_are_drawn_by_their_shares(
    roles: tuple[str, ...], expected: tuple[float, ...]
) -> None:
    """Chi-squared of 10^5 draws, renormalized where a sample lacks a role."""
    draws, num = Draws(), 100_000
    counts: Counter[int] = Counter()
    for sample in range(num):
        draws.start(0, 1, 0, str(sample), 0)
        counts[pick_caption(roles, SHARES, draws.role, draws.caption)] += 1
    table = np.array([counts[place] for place in range(len(roles))])
    wanted = np.array(expected) * num
    assert not table[wanted == 0].any() and table.sum() == num
    kept = wanted > 0
    statistic = ((table[kept] - wanted[kept]) ** 2 / wanted[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), (table, wanted)


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cache, dict[str, Sample]]:
    """40 samples of two or three captions; the last ones without roles."""
    torch.manual_seed(2)
    kinds = (("tags", "short", "long"), ("tags", "long"), ("short", "short", ""), ())
    samples = []
    for number in range(40):
        roles = kinds[number // 12]
        sample = made_sample(f"{number}.png", captions=len(roles) or 2, **SMALL)
        object.__setattr__(sample, "roles", roles)
        samples.append(sample)
    folder = write_cache(tmp_path_factory.mktemp("forty") / "cache", samples)
    return Cache(folder), {sample.key: sample for sample in samples}


def drawn(
    forty: tuple[Cache, dict[str, Sample]], epochs: range, world: int = 1, **reading: Any
) -> dict[tuple[int, str], int]:
    """Which caption each sample has in each epoch."""
    cache, samples = forty
    results = {}
    for rank in range(world):
        reader = reader_of([cache], 8, batch_size=4, world=world, rank=rank, **reading)
        for epoch in epochs:
            for batch in epoch_of(reader, epoch):
                for key, prompt in zip(batch.keys, batch.prompt, strict=True):
                    texts = samples[key].tensors["prompt_embeds"]
                    results[epoch, key] = next(n for n, t in enumerate(texts) if t.equal(prompt))
    return results


def test_a_run_draws_by_role_at_any_world_size_and_from_any_epoch(
    forty: tuple[Cache, dict[str, Sample]],
) -> None:
    alone = drawn(forty, range(4), captions=SHARES)
    assert drawn(forty, range(4), world=2, captions=SHARES) == alone
    assert drawn(forty, range(2, 4), captions=SHARES) == {
        k: v for k, v in alone.items() if k[0] > 1
    }
    for (_, key), number in alone.items():
        assert (forty[1][key].roles or ("-",) * 2)[number], "a caption without a role is not drawn"
    plain = drawn(forty, range(4))
    tags_only = drawn(forty, range(4), captions=(("tags", 1.0),))
    for place, number in tags_only.items():
        roles = forty[1][place[1]].roles
        if "tags" in roles:
            assert roles[number] == "tags"
        else:
            assert number == plain[place], "as without shares"


def test_all_else_of_a_batch_is_as_without_shares(forty: tuple[Cache, dict[str, Sample]]) -> None:
    cache, _ = forty
    plain, shared = (
        [*epoch_of(reader_of([cache], 8, **reading))] for reading in ({}, {"captions": SHARES})
    )
    for first, other in zip(plain, shared, strict=True):
        assert first.keys == other.keys
        for name in ("latents", "noise", "times", "time_ids", "weights"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


def test_a_role_that_no_image_has_is_refused(forty: tuple[Cache, dict[str, Sample]]) -> None:
    with pytest.raises(ValueError, match=r"in the role prose: there are long, short, tags$"):
        check_roles([forty[0]], CaptionShares.parse("tags=1,prose=1"))
    with pytest.warns(UserWarning, match=r"16 of 40 images have no caption in any of its roles"):
        check_roles([forty[0]], CaptionShares.parse("tags=1,long=0.5,short=0"))


def test_a_cache_without_roles_is_told(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"there are none; encode with --caption-roles"):
        check_roles([Cache(cache)], CaptionShares.parse("tags=1"))
    assert "caption_roles" not in next(Cache(cache).shards()).index.header


@pytest.mark.parametrize("text", ["tags=-1", "tags=0", "tags=x", "tags=nan", "tags", "a=1,a=2"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"share|twice"):
        CaptionShares.parse(text)


def test_shares_are_the_same_when_read_again() -> None:
    shares = CaptionShares.parse("tags=0.1, a b=3e-1,short=2")
    assert shares.shares == (("tags", 0.1), ("a b", 0.3), ("short", 2.0))
    assert CaptionShares.parse(str(shares)) == shares
    assert not CaptionShares.parse("")


def test_roles_of_another_number_than_captions_are_refused(tmp_path: Path) -> None:
    sample = made_sample("a.png", captions=2, **SMALL)
    object.__setattr__(sample, "roles", ("tags",))
    with pytest.raises(CacheError, match="roles are not as many as its captions"):
        Index(next(write_cache(tmp_path / "cache", [sample]).glob("*.index")))


# What encode makes of them, and makes again.


def test_a_new_column_encodes_its_texts_alone(work: Path, base: Path) -> None:
    paths = sorted(path for path in (work / "data").iterdir() if path.suffix == ".txt")
    for number, path in enumerate(paths):
        path.with_suffix(".tags").write_text(f"tag {number}, another")
    with counted() as count:
        again(work, base, caption_roles="short=.txt,tags=.tags")
    assert count.images == 0
    assert 0 < count.captions == len(paths)
    with counted() as count:
        again(work, base, caption_roles="short=.txt,t=.tags")
    assert count == (0, 0), "a role alone has another name"
    again(work, base, caption_roles="short=.txt,tags=.tags")
    assert_as_fresh(work, base, caption_roles="short=.txt,tags=.tags")
    text = load_text(open_base(str(base)), torch.device("cpu"), 1)
    cache = Cache(work / "cache")
    for shard in cache.shards():
        for row in range(len(shard.index)):
            sample = Sample.from_members(shard.index.key(row), shard.members(row))
            assert sample.roles == shard.index.caption_roles(shard.index.record(row))
            assert sample.roles == ("short", "tags")
            fresh = text.encode([*sample.captions], 2).prompt  # in fp32, and stored in fp16
            stored = sample.tensors["prompt_embeds"].float()
            torch.testing.assert_close(stored, fresh, atol=2e-3, rtol=2e-3)


def test_inspect_shows_roles(forty: tuple[Cache, dict[str, Sample]]) -> None:
    result = CliRunner().invoke(commands, ["inspect", str(forty[0].folder)])
    assert (
        "roles of captions: (none) 20 (of 16 samples), long 24 (of 24 samples), "
        "short 36 (of 24 samples), tags 24 (of 24 samples)"
    ) in result.stdout
