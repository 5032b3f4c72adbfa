"""Files that someone forged, with every digest right: our own error, with the file's name."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from infer.outputs import caption_row
from precompute.plan.plan_file import read_places, write_plan_file
from runtime.files import canonical_json, seal
from shards.format import CacheError
from shards.manifest import PLAN, read_manifest
from shards.reader import Cache
from tests.fuzz_caches import forge_index, make_cache, sign_all, use
from tests.fuzz_runs import DRAWING, example_work, write_checkpoints
from train.checkpoint import newest_checkpoint, read_state


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return make_cache(tmp_path_factory.mktemp("forged") / "whole")


def test_a_cache_that_is_not_forged_is_read(intact: Path) -> None:
    assert use(intact) == "read"


@pytest.mark.parametrize(
    "change",
    [
        lambda first: first["shards"][0].update(name="../../x"),
        lambda first: first["shards"][0].update(count=10**400),
        lambda first: first["shards"][0].update(bucket=[64]),
        lambda first: first.update(side_files={"../x": "0" * 64}),
        lambda first: first["shards"].append(first["shards"][0]),
        lambda first: first.pop("text"),
        lambda first: first.pop("recipe"),
    ],
)
def test_a_forged_manifest_is_named(intact: Path, tmp_path: Path, change: Any) -> None:
    folder = shutil.copytree(intact, tmp_path / "cache")
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
    intact: Path, tmp_path: Path, name: str, value: Any
) -> None:
    folder = shutil.copytree(intact, tmp_path / "cache")

    def change(_: Any, records: Any) -> None:
        records[name][0] = value

    path = sorted(folder.glob("*.index"))[0]
    forge_index(path, change)
    sign_all(folder, lambda manifest: None)
    with pytest.raises(CacheError, match=r"\.index: not an index that shardtune writes: "):
        for shard in Cache(folder).shards():
            shard.members(0)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: {**line, "bucket": [64]},
        lambda line: {**line, "tasks": line["tasks"] + line["tasks"][:1]},
        lambda line: [],
    ],
)
def test_a_forged_plan_is_forgotten(tmp_path: Path, change: Any) -> None:
    write_plan_file(tmp_path, {"recipe": {}, "made_with": {}}, [example_work()])
    assert read_places(tmp_path)
    first, second = (line[17:] for line in (tmp_path / PLAN).read_bytes().splitlines())
    for forged in (json.dumps(change(json.loads(second))).encode(), b"[" * 100_000):
        signed = [xxhash.xxh3_64_hexdigest(text).encode() + b" " + text for text in (first, forged)]
        (tmp_path / PLAN).write_bytes(b"\n".join(signed) + b"\n")
        assert read_places(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [("files", None), ("files", {"../x": "0" * 32}), ("step", "4"), ("eval_loss", 10**400)],
)
def test_a_forged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    write_checkpoints(tmp_path, lambda state: canonical_json(seal({**state, name: value})).encode())
    path = tmp_path / "checkpoints" / "checkpoint-4"
    with pytest.raises(ValueError, match=rf"{path}/state\.json: its {name} is not what"):
        read_state(path)
    with pytest.warns(UserWarning, match="passed over: "):
        assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("forged", [{"prompt": "\ud800"}, {"width": "\ud800"}])
def test_a_forged_record_of_an_image_has_no_caption(forged: dict[str, Any]) -> None:
    assert caption_row(Path("000000.png"), asdict(DRAWING))
    assert caption_row(Path("000000.png"), asdict(DRAWING) | forged) is None
