"""Caches that someone forged, with every digest right: our own error, with the file's name."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import CacheError
from shards.manifest import read_manifest
from shards.reader import Cache
from tests.fuzz_caches import forge_index, make_cache, sign_all, use


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_cache(tmp_path_factory.mktemp("forged") / "whole")


def test_a_cache_that_is_not_forged_is_read(whole: Path) -> None:
    assert use(whole) == "read"


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one["shards"][0].update(name="../../x"),
        lambda one: one["shards"][0].update(count=10**400),
        lambda one: one["shards"][0].update(bucket=[64]),
        lambda one: one.update(side_files={"../x": "0" * 64}),
        lambda one: one["shards"].append(one["shards"][0]),
        lambda one: one.pop("text"),
        lambda one: one.pop("recipe"),
    ],
)
def test_a_forged_manifest_is_named(whole: Path, tmp_path: Path, change: Any) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    sign_all(folder, lambda manifest: change(manifest) and None)
    with pytest.raises(CacheError, match=r"manifest\.json: not a manifest that shardtune writes: "):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offset", 2**63),
        ("size", 2**40),
        ("json_size", 2**31),
        ("first_digest", 2**60),
        ("num_variants", 65535),
        ("num_captions", 0),
        ("weight", np.nan),
        ("tensors", 0),
        ("header_size", 2**31),
        ("key", b"../../x"),
    ],
)
def test_a_forged_record_does_not_lead_out_of_the_file(
    whole: Path, tmp_path: Path, name: str, value: Any
) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")

    def change(_: Any, records: Any) -> None:
        records[name][0] = value

    path = sorted(folder.glob("*.index"))[0]
    forge_index(path, change)
    sign_all(folder, lambda manifest: None)
    with pytest.raises(CacheError, match=r"\.index: not an index that shardtune writes: "):
        for shard in Cache(folder).shards():
            shard.members(0)
