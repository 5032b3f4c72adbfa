"""Whatever happens to a byte of a cache is found, and named: file by file, sample by sample."""

import json
import random
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import commands
from runtime.files import canonical_json, content_digest
from shards.batches import Reader
from shards.format import VERSION, CacheError
from shards.manifest import MANIFEST, read_manifest
from shards.plan import Plan, RankShare
from shards.reader import Cache
from shards.verify import Fault, verify
from tools.draw_images import draw_images

ROOT = Path(__file__).parent.parent
NUM_FLIPS, LEAST_FLIPS_OF_A_FILE = 1000, 30
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Flip:
    """One bit of one byte of one file."""

    name: str
    offset: int
    bit: int


@dataclass(frozen=True)
class Member:
    """Where a sample's data lies in a tar, by Python's own tarfile."""

    key: str
    start: int
    stop: int
    tensors: int  # first byte that is a tensor's; stop where there is none


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage-images")
    draw_images(folder, count=6, size=64)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("an image that cannot be read")
    return folder


@pytest.fixture(scope="module")
def intact(
    tmp_path_factory: pytest.TempPathFactory, dataset: Path, encode_to: Callable[..., Path]
) -> Path:
    """3 shards of 2 samples, and one rejected image. Not to be changed."""
    folder: Path = encode_to(dataset, tmp_path_factory.mktemp("damage") / "whole")
    assert len(list(folder.glob("*.tar"))) == 3
    assert (folder / "rejected.jsonl").stat().st_size > 0
    return folder


@pytest.fixture(scope="module")
def other(intact: Path, dataset: Path, encode_to: Callable[..., Path]) -> Path:
    """The same images in bf16: files of the same names and sizes."""
    return encode_to(dataset, intact.with_name("other"), dtype="bf16")


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact, tmp_path / "cache")


@pytest.fixture
def tars(copy: Path) -> list[Path]:
    return sorted(copy.glob("*.tar"))


def faults_of(folder: Path) -> list[Fault]:
    """All that verify finds; a manifest that is refused counts as its fault."""
    try:
        manifest = read_manifest(folder)
    except CacheError as error:
        return [Fault(path=folder / MANIFEST, kind="damaged", message=str(error))]
    return [fault for faults in verify(folder, manifest) for fault in faults]


def assert_named(faults: list[Fault], *paths: Path) -> None:
    """The faults are of ``paths``, and each line begins with its path."""
    assert {fault.path for fault in faults} == {*paths}, faults
    for fault in faults:
        assert fault.message.startswith(f"{fault.path}: ") and "\n" not in fault.message


def draw_flips(folder: Path) -> list[Flip]:
    """Uniform over the bytes of the folder, and some more in each file, however small."""
    choices = random.Random(0)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    names = choices.choices(list(sizes), list(sizes.values()), k=NUM_FLIPS)
    names += [name for name in sizes for _ in range(LEAST_FLIPS_OF_A_FILE)]
    return [Flip(name, choices.randrange(sizes[name]), choices.randrange(8)) for name in names]


@contextmanager
def flipped(folder: Path, flip: Flip) -> Iterator[None]:
    def turn() -> None:
        with open(folder / flip.name, "r+b") as file:
            file.seek(flip.offset)
            (byte,) = file.read(1)
            file.seek(flip.offset)
            file.write(bytes([byte ^ 1 << flip.bit]))

    turn()
    try:
        yield
    finally:
        turn()


def members_of(tar: Path) -> list[Member]:
    members = []
    with tarfile.open(tar) as archive:
        for info in archive:
            start, stop = info.offset_data, info.offset_data + info.size
            tensors = stop
            if info.name.endswith(".safetensors"):
                file = archive.extractfile(info)
                assert file is not None
                (length,) = struct.unpack("<Q", file.read(8))
                tensors = start + 8 + length
            members.append(Member(info.name.split(".")[0], start, stop, tensors))
    return members


def hits(folder: Path, flips: list[Flip]) -> Iterator[tuple[Flip, Member | None]]:
    """Each flip with the sample's data that it hits: None between them and in other files."""
    members = {tar.name: members_of(tar) for tar in folder.glob("*.tar")}
    for flip in flips:
        results = [m for m in members.get(flip.name, []) if m.start <= flip.offset < m.stop]
        yield flip, results[0] if results else None


def read_all(folder: Path) -> list[str]:
    """Read every sample as training does; their keys."""
    cache = Cache(folder)
    plan, share = Plan(cache.groups(), 0, 2), RankShare(batch_size=2, world=1, rank=0)
    batches = [plan.batch(0, number) for number in range(plan.num_batches)]
    return [key for b in batches for key in Reader([cache], plan, share).read(b, 0).keys]


def resign(folder: Path, **changes: Any) -> None:
    """Change the manifest, with a right digest."""
    manifest = json.loads((folder / MANIFEST).read_bytes()) | changes
    del manifest["digest"]
    manifest["digest"] = content_digest(manifest)
    (folder / MANIFEST).write_text(canonical_json(manifest))


def swap(first: Path, another: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(another.read_bytes())
    another.write_bytes(data)


def test_a_whole_cache_has_no_fault(intact: Path, other: Path) -> None:
    assert faults_of(intact) == faults_of(other) == []
    keys = {member.key for tar in intact.glob("*.tar") for member in members_of(tar)}
    assert len(keys) == 6
    assert sorted(read_all(intact)) == sorted(keys)


@pytest.mark.slow
def test_every_flipped_bit_is_named_with_its_file_and_sample(copy: Path) -> None:
    flips = draw_flips(copy)
    assert len(flips) >= 1000
    num_in_samples = 0
    for flip, member in hits(copy, flips):
        with flipped(copy, flip):
            faults = faults_of(copy)
        assert len(faults) == 1, (flip, faults)
        assert_named(faults, copy / flip.name)
        if member is not None:
            num_in_samples += 1
            assert f"sample {member.key}" in faults[0].message, (flip, faults)
        key = None if member is None else member.key
        shard = Path(flip.name).stem if flip.name.endswith((".tar", ".index")) else None
        result = faults[0]
        assert (result.kind, result.shard, result.sample) == ("damaged", shard, key), (flip, faults)
    assert num_in_samples > 300
    assert faults_of(copy) == []


def test_the_reader_raises_every_flipped_bit_of_a_tensor(copy: Path) -> None:
    num_raised = 0
    for flip, member in hits(copy, draw_flips(copy)):
        if member is None or flip.offset < member.tensors:
            continue
        with flipped(copy, flip), pytest.raises(CacheError) as caught:
            read_all(copy)
        line = str(caught.value)
        assert line.startswith(f"{copy / flip.name}: sample {member.key}: "), (flip, line)
        assert "\n" not in line
        num_raised += 1
    assert num_raised > 300
    assert len(read_all(copy)) == 6


def test_the_reader_refuses_every_flipped_bit_of_manifest_and_index(copy: Path) -> None:
    flips = [flip for flip in draw_flips(copy) if flip.name.endswith((".json", ".index"))]
    assert len(flips) > 100
    for flip in flips:
        with flipped(copy, flip), pytest.raises(CacheError) as caught:
            read_all(copy)
        assert str(caught.value).startswith(f"{copy / flip.name}: "), flip


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_tar(copy: Path, tars: list[Path], share: float) -> None:
    size = tars[1].stat().st_size
    left = int(size * share) if share else size - 1
    with open(tars[1], "r+b") as file:
        file.truncate(left)
    faults = faults_of(copy)
    assert_named(faults, tars[1])
    assert f"{left} bytes where {size} were written" in faults[0].message
    with pytest.raises(CacheError, match=f"{tars[1].name}: truncated") as caught:
        read_all(copy)
    assert "\n" not in str(caught.value)


def test_a_zeroed_page(copy: Path, tars: list[Path]) -> None:
    pages = range(0, tars[2].stat().st_size, PAGE_BYTES)
    data = tars[2].read_bytes()
    members = members_of(tars[2])
    for start in pages:
        stop = start + PAGE_BYTES
        if not any(data[start:stop]):
            continue  # the tar's own zeros at its end
        tars[2].write_bytes(data[:start] + bytes(PAGE_BYTES) + data[stop:])
        faults = faults_of(copy)
        assert_named(faults, tars[2])
        hit = {
            m.key for m in members if any(data[max(start, m.start) : max(start, min(stop, m.stop))])
        }
        assert hit
        assert {fault.sample for fault in faults if fault.sample} == hit


def test_swapped_tars(copy: Path, tars: list[Path]) -> None:
    swap(tars[0], tars[1])
    assert_named(faults_of(copy), tars[0], tars[1])
    with pytest.raises(CacheError, match=r"\.tar: "):
        read_all(copy)


@pytest.mark.parametrize("tars_too", [False, True])
def test_swapped_indexes(copy: Path, tars: list[Path], tars_too: bool) -> None:
    indexes = [tar.with_suffix(".index") for tar in tars]
    swap(indexes[0], indexes[1])
    if tars_too:
        swap(tars[0], tars[1])
    faults = faults_of(copy)
    assert_named(faults, indexes[0], indexes[1])
    assert f"{indexes[0]}: this is the index of another shard ({tars[1].stem})" in map(str, faults)
    with pytest.raises(CacheError, match="the index of another shard"):
        read_all(copy)


def test_a_manifest_of_another_cache(copy: Path, other: Path, tars: list[Path]) -> None:
    shutil.copy(other / MANIFEST, copy / MANIFEST)
    faults = faults_of(copy)
    indexes = [tar.with_suffix(".index") for tar in tars]
    assert_named(faults, *indexes, copy / "unconditional.safetensors")
    assert f"{indexes[0]}: whole, but not the one the manifest names" in map(str, faults)
    with pytest.raises(CacheError, match="not the one that the manifest names"):
        read_all(copy)


def test_an_index_of_another_cache(copy: Path, other: Path, tars: list[Path]) -> None:
    index = tars[0].with_suffix(".index")
    shutil.copy(other / index.name, index)
    messages = [*map(str, faults_of(copy))]
    assert messages == [f"{index}: whole, but not the one the manifest names"]
    with pytest.raises(CacheError, match="not the one that the manifest names"):
        read_all(copy)


def test_a_whole_tar_is_not_blamed_for_a_foreign_index(
    copy: Path, other: Path, tars: list[Path]
) -> None:
    index = tars[0].with_suffix(".index")
    shutil.copy(other / index.name, index)
    assert_named(faults_of(copy), index)


def test_an_index_of_another_shard(copy: Path, tars: list[Path]) -> None:
    index = tars[0].with_suffix(".index")
    shutil.copy(tars[1].with_suffix(".index"), index)
    messages = [*map(str, faults_of(copy))]
    assert messages == [f"{index}: this is the index of another shard ({tars[1].stem})"]


@pytest.mark.parametrize("end", ["tar", "index"])
def test_a_missing_part_of_a_shard(copy: Path, tars: list[Path], end: str) -> None:
    path = tars[1].with_suffix(f".{end}")
    path.unlink()
    faults = faults_of(copy)
    assert [(fault.path, fault.kind) for fault in faults] == [(path, "missing")]
    with pytest.raises(CacheError, match=path.name):
        read_all(copy)


def test_a_missing_side_file(copy: Path) -> None:
    (copy / "rejected.jsonl").unlink()
    path = copy / "rejected.jsonl"
    assert faults_of(copy) == [Fault(path=path, kind="missing", message=f"{path}: missing")]


def test_a_missing_manifest(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(CacheError, match=r"cache: the cache is unfinished; run the same encode"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["64x64-000001.tar.partial", "64x64-000001.tar", "notes.txt"])
def test_a_file_that_is_not_of_the_cache(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"left over")
    faults = faults_of(copy)
    assert [(fault.path, fault.kind) for fault in faults] == [(copy / name, "foreign")]


def test_an_unknown_version_is_refused_by_its_number(copy: Path) -> None:
    resign(copy, version=VERSION + 40)
    with pytest.raises(CacheError, match=r"manifest\.json: cache format version 42; .*version 2\."):
        read_manifest(copy)


def test_a_version_that_nobody_signed_is_damage(copy: Path) -> None:
    data = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(data.replace(f'"version": {VERSION}', f'"version": {VERSION + 1}'))
    with pytest.raises(CacheError, match=r"manifest\.json: the manifest is damaged"):
        read_manifest(copy)


def test_another_format_is_refused_by_its_name(copy: Path) -> None:
    resign(copy, format="someone-elses-cache")
    with pytest.raises(CacheError, match=r"not a shardtune cache \(format 'someone-elses-cache'\)"):
        read_manifest(copy)


def test_a_manifest_in_another_spelling_is_damage(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"manifest\.json: the manifest is damaged"):
        read_manifest(copy)


@pytest.fixture
def run_verify() -> Callable[[Path], Result]:
    """``cli.py verify`` in this process."""
    return lambda cache: CliRunner().invoke(commands, ["verify", str(cache)])


Verify = Callable[[Path], Result]


def test_verify_says_that_a_cache_is_whole(intact: Path) -> None:
    run = subprocess.run(
        [sys.executable, "cli.py", "verify", str(intact)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{intact}: 6 samples in 3 shards, all whole\n"


def test_verify_names_all_damage_and_exits_with_1(
    copy: Path, tars: list[Path], run_verify: Verify
) -> None:
    member = members_of(tars[0])[1]
    with (
        flipped(copy, Flip(tars[0].name, member.tensors, 3)),
        flipped(copy, Flip("rejected.jsonl", 5, 0)),
    ):
        run = run_verify(copy)
        expected = faults_of(copy)
    assert run.exit_code == 1
    assert_named(expected, tars[0], copy / "rejected.jsonl")
    assert run.stdout.splitlines() == [*map(str, expected)]
    assert member.key in run.stdout
    assert run_verify(copy).exit_code == 0


def test_verify_exits_with_1_for_a_damaged_manifest(copy: Path, run_verify: Verify) -> None:
    with flipped(copy, Flip(MANIFEST, 100, 0)):
        run = run_verify(copy)
    assert f"{copy / MANIFEST}: the manifest is damaged" in run.output
    assert run.exit_code == 1


@pytest.mark.parametrize("exists", [False, True])
def test_verify_exits_with_2_where_there_is_no_cache(
    tmp_path: Path, run_verify: Verify, exists: bool
) -> None:
    folder = tmp_path / "nothing"
    if exists:
        folder.mkdir()
    run = run_verify(folder)
    assert run.exit_code == 2
    errors = [line for line in run.stderr.splitlines() if line]
    assert len(errors) == 1
    assert errors[0].startswith(f"Error: {folder}: n")


def test_verify_looks_into_both_parts_of_a_split_cache(
    split_cache: Path, tmp_path: Path, run_verify: Verify
) -> None:
    folder = shutil.copytree(split_cache, tmp_path / "split")
    run = run_verify(folder)
    assert run.exit_code == 0
    assert f"{folder / 'train'}: " in run.stdout
    assert f"{folder / 'val'}: " in run.stdout
    for part in ("train", "val"):
        tar = sorted((folder / part).glob("*.tar"))[0]
        with flipped(folder / part, Flip(tar.name, members_of(tar)[0].start, 0)):
            run = run_verify(folder)
        assert run.exit_code == 1
        named = [line for line in run.stdout.splitlines() if "damaged: " in line]
        assert len(named) == 1 and named[0].startswith(f"{tar}: sample ")


@pytest.mark.parametrize("part", ["train", "val"])
def test_verify_misses_no_part_of_a_split_cache(
    split_cache: Path, tmp_path: Path, run_verify: Verify, part: str
) -> None:
    folder = shutil.copytree(split_cache, tmp_path / "split")
    (folder / part / MANIFEST).unlink()
    run = run_verify(folder)
    assert run.exit_code != 0
    assert f"{folder / part}: the cache is unfinished" in run.output
