"""An encode that dies anywhere: a rerun ends with the bytes of one that did not die."""

import functools
import os
import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disk import fork_for_each_operation
from encodes import contents, copy_old, encode, make_old

import precompute.encoders
from shards.format import CacheError
from shards.manifest import read_manifest
from shards.verify import verify

RUN = Path("run")  # below the working folder, so that a forked run can be sent elsewhere


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loaded once for all runs of a test."""
    for name in ("LatentEncoder", "load_text"):
        real = getattr(precompute.encoders, name)
        monkeypatch.setattr(precompute.encoders, name, functools.cache(real))
    yield


@pytest.fixture(scope="module")
def few(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of two buckets."""
    folder = tmp_path_factory.mktemp("few")
    for number in (0, 1, 3, 6, 7):
        for end in ("png", "txt"):
            shutil.copy(images / f"{number:03}.{end}", folder)
    make_old(folder)
    return folder


def edit(data: Path) -> None:
    """A caption in one shard, an image less in the other, and a new one."""
    (data / "000.txt").write_text("an edited caption")
    (data / "001.png").unlink()
    shutil.copy(data / "000.png", data / "new.png")
    shutil.copy(data / "003.txt", data / "new.txt")
    make_old(data)


KINDS: dict[str, dict[str, Any]] = {"fresh": {}, "changed": {}, "repacked": {"repack": True}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_encode_that_dies_in_any_file_operation_ends_as_if_it_had_not(
    few: Path, base: Path, tmp_path: Path, models: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With and without a power cut. Where several deaths leave the same files, one of them is
    resumed."""
    monkeypatch.chdir(tmp_path)
    data = copy_old(few, tmp_path / "data")
    RUN.mkdir()
    if kind != "fresh":
        encode(data, base, RUN)
        edit(data)
    if kind == "repacked":
        encode(data, base, RUN)
    parent = os.getpid()
    expected = Path("expected")
    shutil.copytree(RUN, expected)
    encode(data, base, expected, **KINDS[kind])
    try:
        if fork_for_each_operation(RUN, Path("crashed").absolute(), writes=True):
            encode(data, base, RUN, **KINDS[kind])
            os._exit(0)
    finally:
        if os.getpid() != parent:
            traceback.print_exc()
            os._exit(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power will fail from here on
    complete, seen = contents(expected), set[frozenset[tuple[str, bytes]]]()
    folders = sorted(Path("crashed").glob("*/*"))
    assert len(folders) > 2 * 50
    for folder in folders:
        assert_nothing_half_is_vouched_for(folder)
        left = frozenset((name, data) for name, data in contents(folder).items())
        if left not in seen:
            seen.add(left)
            encode(data, base, folder, **KINDS[kind])
            assert contents(folder) == complete, folder


def assert_nothing_half_is_vouched_for(folder: Path) -> None:
    """A cache that says it is finished is whole."""
    try:
        manifest = read_manifest(folder)
    except CacheError:
        return
    faults = [fault for faults in verify(folder, manifest) for fault in faults]
    assert [str(fault) for fault in faults if fault.kind != "foreign"] == [], folder
