"""An encode that is stopped, or cannot write, damages nothing; a rerun goes on."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from encodes import (
    again,
    assert_as_fresh,
    contents,
    copy_old,
    counted,
    make_old,
    samples_of,
    stamps,
)

import precompute.encode_shard
import runtime.files
from cli import commands
from precompute.prompts import change_prompts
from precompute.report import summarize
from shards.manifest import ENCODE_FILES, LOCK, read_manifest

ROOT = Path(__file__).parent.parent


def command(*arguments: Any) -> tuple[int, str]:
    """The command line's exit code, and all that it prints."""
    from click.testing import CliRunner

    result = CliRunner().invoke(commands, [str(argument) for argument in arguments])
    return result.exit_code, result.output


# Images that fail.


def test_an_image_that_fails_is_tried_again_when_it_changes(work: Path, base: Path) -> None:
    data, cache = work / "data", work / "cache"
    good = (data / "003.png").read_bytes()
    (data / "003.png").write_bytes(good[:-30])  # its header is whole
    make_old(data)
    again(work, base)
    assert "003.png" not in samples_of(cache)
    again(work, base)  # it is tried once as a new one, and noted
    before = stamps(cache)
    with counted() as count:
        report = again(work, base)
    assert summarize(report.changes) == "14 unchanged" and len(report.rejected) == 1
    assert count == (0, 0) and stamps(cache) == before
    (data / "004.txt").write_text("the hole stays where it is when its shard is written anew")
    (data / "006.txt").write_text("likewise")
    (data / "007.txt").write_text("likewise")
    with counted() as count:
        assert len(again(work, base).rejected) == 1
    assert count == (0, 3)
    (data / "003.png").write_bytes(good)
    with counted() as count:
        report = again(work, base)
    assert count == (1, 1) and not report.rejected
    assert_as_fresh(work, base)


def test_an_image_that_changes_under_way_is_tried_again(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it then is again what it was when its header was read."""
    data = work / "data"
    (data / "003.txt").unlink()
    again(work, base)
    (data / "003.txt").write_text("back again")
    real = os.fstat

    def touched(descriptor: int) -> Any:
        path = Path(f"/proc/self/fd/{descriptor}")
        reads.append(path.exists() and path.resolve().name == "003.png")
        if reads[-1] and sum(reads) == 2:
            os.utime(data / "003.png")
        return real(descriptor)

    reads: list[bool] = []
    make_old(data)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", touched)
        report = again(work, base, rehash=True)
    assert [rejection.path for rejection in report.rejected] == ["003.png"]
    assert "changed while" in report.rejected[0].reason
    assert not again(work, base).rejected
    assert_as_fresh(work, base)


def test_a_damaged_half_is_encoded_again(work: Path, base: Path) -> None:
    """What is copied is checked: here every sample of a shard is damaged in its latents."""
    tar = work / "cache" / "64x64-000000.tar"
    damaged = bytearray(tar.read_bytes())
    for path, members in samples_of(work / "cache").items():
        at = damaged.find(members["safetensors"][-1000:])
        if at >= 0:
            damaged[at + 999] ^= 1
            changed = path
    tar.write_bytes(damaged)
    (work / "data" / changed).with_suffix(".txt").write_text("an edited caption")
    with counted() as count:
        again(work, base)
    assert count == (3, 3)
    assert_as_fresh(work, base)


def test_too_many_rejected_are_refused_as_soon_as_they_are_known(
    images: Path, base: Path, tmp_path: Path
) -> None:
    """By their headers before anything is written; by their data when the rest is finished."""
    data, out = copy_old(images, tmp_path / "data"), tmp_path / "cache"
    complete = (data / "000.png").read_bytes()
    for number in range(8):
        (data / f"{number:03}.png").write_bytes(b"no image")
    given = ["encode", data, "--base", base, "--out", out, "--resolution", 64]
    given += ["--bucket-step", 16, "--threads", 1, "--device", "cpu"]
    code, output = command(*given)
    assert code == 2 and "57% of the images were rejected (8 of 14; --max-rejected" in output
    assert "8 rejected: not an image that Pillow can read: 000.png, 001.png" in output
    assert not [*out.glob("*.*")]
    for number in range(8):
        (data / f"{number:03}.png").write_bytes(complete[: len(complete) // 2])
    code, output = command(*given)
    assert code == 1 and "57% of the images were rejected (--max-rejected 0.5)" in output
    assert read_manifest(out)["num_samples"] == 6
    code, output = command(*given, "--max-rejected", 0.6)
    assert code == 0 and "so nothing was encoded" in output and "8 rejected" in output


# Signals.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_inside_a_destructor_is_not_lost(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Loose:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = contents(work / "cache")
    (work / "data" / "003.txt").write_text("an edited caption")
    real = precompute.encode_shard.text_shape
    monkeypatch.setattr(precompute.encode_shard, "text_shape", lambda *a: (Loose(), real(*a))[1])
    handler = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            again(work, base)
    finally:
        signal.signal(number, handler)
    assert caught.value.__notes__ == [
        "5 of 6 shards are whole; the same command goes on from there"
    ]
    monkeypatch.undo()
    again(work, base)
    assert contents(work / "cache").keys() == before.keys()


# The machine.


@pytest.mark.parametrize("last", [1, 2, 4, 9, 14])
def test_a_full_disk_is_one_line_and_a_rerun_goes_on(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """The disk is full from the ``last``-th durable file on."""
    (work / "data" / "003.txt").write_text("an edited caption")
    (work / "data" / "004.txt").write_text("an edited caption")
    (work / "data" / "001.png").unlink()
    real, files = os.fsync, []

    def fsync(descriptor: int) -> None:
        files.append(descriptor)
        if len(files) >= last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.files.os, "fsync", fsync)
        with pytest.raises(OSError, match="the disk is full"):
            again(work, base)
    assert not list((work / "cache").rglob("*.partial"))
    with counted() as count:
        again(work, base)
    assert count.captions <= 2 and count.images == 0
    assert_as_fresh(work, base)


def test_a_folder_that_cannot_be_written_is_one_line(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(work / "cache")
    (work / "data" / "003.txt").write_text("an edited caption")
    real = os.open

    def read_only(path: Any, *more: Any, **named: Any) -> int:
        if Path(path).name == LOCK:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    code, output = command(
        "encode",
        work / "data",
        "--base",
        base,
        "--out",
        work / "cache",
        "--resolution",
        64,
        "--bucket-step",
        16,
    )
    assert (code, output) == (1, f"Error: {work / 'cache'}: cannot be written: Permission denied\n")
    assert contents(work / "cache") == before


def test_a_second_encode_into_one_cache_is_refused(work: Path, base: Path, tmp_path: Path) -> None:
    before = contents(work / "cache")
    (tmp_path / "prompts.txt").write_text("a cat")
    with open(work / "cache" / LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (work / "data" / "003.txt").write_text("an edited caption")
        with pytest.raises(ValueError, match="cache: another encode writes to it; wait for that"):
            again(work, base)
        with pytest.raises(ValueError, match="another encode writes to it"):
            change_prompts(work / "cache", tmp_path / "prompts.txt", str(base), "cpu")
    assert {n: data for n, data in contents(work / "cache").items() if n != LOCK} == before
    again(work, base)  # a lock file that nobody holds, as a kill leaves it
    assert not any((work / "cache" / name).exists() for name in ENCODE_FILES if name != "scan.json")


def test_a_file_system_without_locks_is_a_warning(
    work: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="locks no files .*see to it yourself"):
        again(work, base)
