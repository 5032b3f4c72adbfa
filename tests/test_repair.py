"""``verify --repair`` drops what is damaged and nothing else; the next encode makes it again."""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cli_caches
import shards.verify
from cli import commands
from precompute.plan.reuse import read_existing, recover_retirement
from runtime.files import canonical_json, content_digest, file_sha256
from shards.format import CacheError
from shards.index import Index, IndexRecord
from shards.manifest import LOCK, MANIFEST, REPLACED, read_manifest
from shards.reader import Shard
from shards.verify import Fault, drop_damaged, verify
from tests.conftest import Encode
from tests.encodes import counted, samples_of
from tools.draw_images import draw_images

Verify = Callable[..., Result]
SIDE = ["unconditional.safetensors", "rejected.jsonl"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair-images")
    draw_images(folder, count=9, size=64)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("an image that cannot be read")
    return folder


@pytest.fixture(scope="module")
def intact(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path, encode_to: Callable[..., Path]
) -> Path:
    """5 shards in 3 buckets. Not to be changed."""
    return encode_to(dataset, tmp_path_factory.mktemp("repair") / "whole", shard_size=2)


@pytest.fixture
def cache(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "cache")


@pytest.fixture
def run_verify() -> Verify:
    return lambda *arguments: CliRunner().invoke(commands, ["verify", *map(str, arguments)])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """All that is of the cache, not of this machine."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "scan.json"}


@pytest.mark.parametrize("end", ["tar", "index"])
def test_a_damaged_shard_is_dropped_and_made_again(
    end: str, cache: Path, intact: Path, dataset: Path, run_verify: Verify, encode_to: Encode
) -> None:
    damage(cache / f"64x64-000001.{end}")
    run = run_verify(cache, "--repair")
    assert run.exit_code == 1
    lines = run.stdout.splitlines()
    assert lines[0].startswith(f"{cache}/64x64-000001.{end}: ")
    assert lines[1:] == [
        f"{cache}/64x64-000001: dropped, with its 1 sample",
        "next: run the same encode again, it makes what was dropped",
    ]
    removed = {f"64x64-000001.{item}" for item in ("tar", "index")} | {MANIFEST}
    assert contents(intact).keys() - contents(cache).keys() == removed
    with pytest.raises(CacheError, match="unfinished; run the same encode again"):
        read_manifest(cache)
    encode_to(dataset, cache, shard_size=2)
    assert contents(cache) == contents(intact)
    assert run_verify(cache, "--repair").exit_code == 0


@pytest.mark.parametrize("name", [*SIDE, MANIFEST])
@pytest.mark.parametrize("harm", [damage, Path.unlink], ids=["damaged", "missing"])
def test_side_files_are_made_again(
    name: str,
    harm: Callable[[Path], None],
    cache: Path,
    intact: Path,
    dataset: Path,
    run_verify: Verify,
    encode_to: Encode,
) -> None:
    harm(cache / name)
    run = run_verify(cache, "--repair")
    missing = name == MANIFEST and harm is Path.unlink
    assert run.exit_code == (2 if missing else 1)
    assert ("dropped" in run.stdout) == (not missing)
    encode_to(dataset, cache, shard_size=2)
    assert contents(cache) == contents(intact)


def test_under_a_damaged_manifest_shards_are_checked_too(
    cache: Path, intact: Path, dataset: Path, run_verify: Verify, encode_to: Encode
) -> None:
    """Encode alone would trust a tar of the right size."""
    damage(cache / MANIFEST)
    damage(cache / "64x64-000000.tar")
    damage(cache / "48x80-000000.index")
    run = run_verify(cache, "--repair")
    assert run.exit_code == 1
    for name in ("64x64-000000", "48x80-000000", MANIFEST):
        assert f"{cache}/{name}: dropped" in run.stdout
    encode_to(dataset, cache, shard_size=2)
    assert samples_of(cache) == samples_of(intact)  # new ones fill the last shard of their bucket


def test_a_whole_cache_is_left_alone(cache: Path, intact: Path, run_verify: Verify) -> None:
    run = run_verify(cache, "--repair")
    assert (run.exit_code, "all whole" in run.stdout) == (0, True)
    assert contents(cache) == contents(intact)


def test_what_is_not_of_the_cache_stays(cache: Path, run_verify: Verify) -> None:
    before = contents(cache)
    (cache / "notes.txt").write_text("mine")
    run = run_verify(cache, "--repair")
    assert run.exit_code == 1
    assert "dropped" not in run.stdout
    assert contents(cache) == before | {"notes.txt": b"mine"}


def test_without_the_flag_nothing_is_dropped(cache: Path, run_verify: Verify) -> None:
    damage(cache / "64x64-000001.tar")
    before = contents(cache)
    assert run_verify(cache).exit_code == 1
    assert contents(cache) == before


def turn(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def first_sample(cache: Path, name: str = "64x64-000000") -> IndexRecord:
    return Index(cache / f"{name}.index").record(0)


PLACES: dict[str, Callable[[IndexRecord, bytes], int]] = {
    "caption": lambda first, data: data.index(b'"captions": ["') + 14,
    "path": lambda first, data: data.index(b'"path": "') + 9,
    "tensors": lambda first, data: first.offset + first.size - 1,
}


@pytest.mark.parametrize("place", PLACES)
def test_of_a_shard_only_the_damaged_sample_is_dropped(
    place: str, cache: Path, intact: Path, dataset: Path, run_verify: Verify, encode_to: Encode
) -> None:
    tar = cache / "64x64-000000.tar"
    before = samples_of(cache)
    turn(tar, PLACES[place](first_sample(cache), tar.read_bytes()))
    run = run_verify(cache, "--repair")
    assert (run.exit_code, f"{cache}/64x64-000000: dropped 1 of its 2 samples" in run.stdout) == (
        1,
        True,
    )
    left = samples_of(cache)
    assert len(left) == 8 and left.items() < before.items()
    assert not (cache / MANIFEST).exists() and not (cache / REPLACED).exists()
    with counted() as count:
        encode_to(dataset, cache, shard_size=2)
    assert count == (1, 1)
    assert samples_of(cache) == before
    if place != "path":  # which is not known then, so that the sample is a new one
        assert contents(cache) == contents(intact)


@pytest.mark.parametrize("place", ["tar header", "padding", "end", "cut"])
def test_where_no_sample_is_damaged_none_is_dropped(
    place: str, cache: Path, intact: Path, run_verify: Verify
) -> None:
    tar = cache / "64x64-000000.tar"
    size, first = tar.stat().st_size, first_sample(cache)
    if place == "cut":
        os.truncate(tar, size - 1)
    else:
        places = {
            "tar header": 5,
            "padding": first.json_offset + first.json_size + 1,
            "end": size - 1,
        }
        turn(tar, places[place])
    run = run_verify(cache, "--repair")
    assert run.exit_code == 1
    assert run.stdout.splitlines()[-1] == f"{cache}/64x64-000000: repaired, no sample was lost"
    assert contents(cache) == contents(intact)
    assert run_verify(cache).exit_code == 0


def test_the_sums_of_a_repaired_shard_are_those_of_its_samples(
    cache: Path, tmp_path: Path, dataset: Path, run_verify: Verify, encode_to: Encode
) -> None:
    """Where the dropped sample has left the dataset meanwhile, the shard stays as it is."""
    data = shutil.copytree(dataset, tmp_path / "data")
    tar = cache / "64x64-000000.tar"
    path = json.loads(samples_at(cache)[0]["json"])["path"]
    turn(tar, tar.read_bytes().index(b'"path": "') + 9)
    run_verify(cache, "--repair")
    (data / path).unlink()
    (data / path).with_suffix(".txt").unlink()
    encode_to(data, cache, shard_size=2)
    encode_to(data, tmp_path / "fresh", shard_size=2)
    actual, fresh = (read_manifest(item) for item in (cache, tmp_path / "fresh"))
    for name in ("mean", "std"):
        assert actual["latents"][name] == pytest.approx(fresh["latents"][name], rel=1e-9)
    assert actual["latents"]["channels"] == fresh["latents"]["channels"]


def samples_at(cache: Path, name: str = "64x64-000000") -> list[dict[str, bytes]]:
    shard = Shard(cache, name, Index(cache / f"{name}.index").sha256)
    return [shard.members(row) for row in range(len(shard.index))]


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_repair_that_is_killed_loses_no_whole_sample(
    cache: Path,
    intact: Path,
    dataset: Path,
    encode_to: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before each change of the folder in turn: encode finds all but the damaged sample, and
    what the repair had not reached is still known as damaged and repaired the next time."""
    turn(cache / "64x64-000000.tar", PLACES["tensors"](first_sample(cache), b""))
    damage(cache / "rejected.jsonl")
    at_first = read_manifest(cache)
    keys = {key for shard in read_existing(cache).values() for key in shard.rows}
    keys.remove(first_sample(cache).key.decode())
    for number in itertools.count():
        folder = shutil.copytree(cache, tmp_path / f"killed-{number}")
        left = number

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def change(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*arguments, **named)

            return change

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for owner, name in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            drop_damaged(folder, at_first, chain.from_iterable(verify(folder, at_first)))
        recover_retirement(folder)
        shards = [*read_existing(folder).values(), *read_existing(folder / REPLACED).values()]
        assert {key for shard in shards for key in shard.rows} >= keys
        assert not (folder / MANIFEST).exists() or (folder / "64x64-000000.index").exists()
        encode_to(dataset, folder, shard_size=2)
        manifest = read_manifest(folder)
        if drop_damaged(folder, manifest, chain.from_iterable(verify(folder, manifest))):
            encode_to(dataset, folder, shard_size=2)
        assert samples_of(folder) == samples_of(intact)
        if left >= 0:
            break
    assert number > 8


def test_what_the_disk_fails_to_read_is_named_and_dropped(
    cache: Path, run_verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        if path.name in ("64x64-000001.tar", "rejected.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return file_sha256(path)

    monkeypatch.setattr(shards.verify, "file_sha256", read)
    damage(cache / "64x64-000000.tar")
    run = run_verify(cache, "--repair")
    assert run.exit_code == 1
    for name in ("64x64-000001.tar", "rejected.jsonl"):
        assert f"{cache / name}: cannot be read (Input/output error)" in run.stdout
    for name in ("64x64-000000", "rejected.jsonl"):
        assert f"{cache / name}: dropped" in run.stdout
    assert f"{cache}/64x64-000001: repaired, no sample was lost" in run.stdout


def test_what_is_not_damaged_but_foreign_is_not_dropped(
    cache: Path, tmp_path: Path, run_verify: Verify
) -> None:
    foreign = tmp_path / "web"
    foreign.mkdir()
    (foreign / MANIFEST).write_text('{"name": "a page", "digest": "none"}')
    newer = read_manifest(cache)
    del newer["digest"]
    newer["version"] += 1
    newer["digest"] = content_digest(newer)
    (cache / MANIFEST).write_text(canonical_json(newer))
    for folder in (foreign, cache):
        before = contents(folder)
        run = run_verify(folder, "--repair")
        assert (run.exit_code, run.stdout) == (2, "")
        assert contents(folder) == before


def test_what_is_verified_to_repair_it_is_not_encoded_meanwhile(
    cache: Path, run_verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whole shards might be dropped, for what those before them had."""
    is_locked = []

    def verify_locked(folder: Path, manifest: dict[str, Any]) -> Iterator[list[Fault]]:
        is_locked.append((folder / LOCK).exists())
        yield from verify(folder, manifest)

    monkeypatch.setattr(cli_caches, "verify", verify_locked)
    damage(cache / "64x64-000000.tar")
    for flags in ([], ["--repair"]):
        run_verify(cache, *flags)
    assert is_locked == [False, True]
    assert not (cache / LOCK).exists()


def test_a_cache_that_is_written_is_not_repaired(cache: Path, run_verify: Verify) -> None:
    fcntl = pytest.importorskip("fcntl")
    damage(cache / "64x64-000000.tar")
    before = contents(cache)
    with open(cache / "encode.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = run_verify(cache, "--repair")
        assert run.exit_code == 2
        assert "another encode writes to it" in run.stderr
    (cache / "encode.lock").unlink()
    assert contents(cache) == before
