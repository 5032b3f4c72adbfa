"""A cache of another version of the format is refused by its number, and nothing of it is lost."""

import hashlib
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import commands
from shards.format import CacheError
from shards.index import MAGIC, NAME, SHA_BYTES, Index
from shards.manifest import MANIFEST


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def make_old(folder: Path, mark: bytes = b"\n") -> None:
    """Whole indexes of another version, as the first had them: its mark, and a right digest."""
    for path in folder.glob("*.index"):
        body = NAME + mark + path.read_bytes()[len(MAGIC) : -SHA_BYTES]
        path.write_bytes(body + hashlib.sha256(body).digest())


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def old(cache: Path, tmp_path: Path) -> Path:
    """Unfinished."""
    folder = shutil.copytree(cache, tmp_path / "old")
    make_old(folder)
    (folder / MANIFEST).unlink()
    return folder


@pytest.mark.parametrize(("mark", "version"), [(b"\n", "1"), (b"3", "3")])
def test_an_index_of_another_version_says_which(
    cache: Path, tmp_path: Path, mark: bytes, version: str
) -> None:
    folder = shutil.copytree(cache, tmp_path / "old")
    make_old(folder, mark)
    for path in folder.glob("*.index"):
        with pytest.raises(CacheError, match=rf"cache format version {version}; .* version 2\. "):
            Index(path)


def test_a_damaged_mark_is_damage(cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cache, tmp_path / "damaged")
    path = next(folder.glob("*.index"))
    data = bytearray(path.read_bytes())
    data[len(NAME)] ^= 1  # a version of its own, were it meant
    path.write_bytes(data)
    with pytest.raises(CacheError, match="the index is damaged"):
        Index(path)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--repack"]])
def test_an_encode_refuses_it_and_touches_nothing(
    old: Path, images: Path, base: Path, more: list[str]
) -> None:
    before = state(old)
    result = run("encode", images, "--base", base, "--out", old, "--resolution", 64, *more)
    assert result.exit_code == 2
    assert "cache format version 1; this shardtune reads version 2. Encode" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"Error: {old}/")
    assert {name: state(old)[name] for name in before} == before


def test_a_repair_refuses_it_and_drops_nothing(old: Path) -> None:
    (old / MANIFEST).write_text("no manifest")
    before = state(old)
    result = run("verify", old, "--repair")
    assert result.exit_code == 2 and "cache format version 1" in result.stderr
    assert state(old) == before
