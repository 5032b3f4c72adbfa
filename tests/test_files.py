"""runtime.files: what is replaced is aside until the new stands; our JSON vouches for itself."""

import errno
import json
import os
import random
import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

from runtime.files import (
    REPLACED,
    durable_file,
    recover_replaced,
    replace_path,
    replace_together,
    replacement,
    seal,
    unseal,
    writing,
)
from runtime.messages import printable


def fill(path: Path, text: str, folder: bool) -> Path:
    if folder:
        path.mkdir()
        (path / "x").write_text(text)
    else:
        path.write_text(text)
    return path


def content(path: Path) -> str:
    return (path / "x" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_replacement_that_is_cut_off_leaves_the_old_or_the_new(
    folder: bool, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = fill(tmp_path / "a", "old", folder), fill(tmp_path / "b", "new", folder)
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) - 1 == at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    num_renames = 2 if folder else 1  # of files one is atomic
    if at < num_renames:
        with pytest.raises(KeyboardInterrupt):
            replace_path(new, old)
    else:
        replace_path(new, old)
    monkeypatch.undo()
    recover_replaced(old)
    assert content(old) == ("old" if at < num_renames else "new")
    assert not old.with_name(old.name + REPLACED).exists()


def test_any_flipped_bit_of_a_sealed_file_is_found() -> None:
    value = {"captions": ["a café", ""], "files": {"x": [1, 2.5, None]}}
    data = json.dumps(seal(value)).encode()
    assert unseal(data) == value
    generator = random.Random(0)
    for _ in range(300):
        at, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
        flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
        try:
            assert unseal(flipped) == value  # a space, or another spelling of the same
        except ValueError:
            continue


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[" * 100_000, b'{"digest": 1}', b"\xff"])
def test_what_was_never_sealed_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        unseal(data)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_an_error_while_writing_names_the_file_and_what_is_good(error: Exception) -> None:
    with (
        pytest.raises(OSError, match=r"^x/y: cannot be written: the disk is full. All good$") as e,
        writing(Path("x/y"), "All good"),
        writing(Path("x/y"), "All good"),
    ):
        raise error
    assert e.value.errno == errno.ENOSPC


def test_a_write_that_fails_names_its_file_and_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(OSError, match="x'") as caught, durable_file(path) as file:
        file.write(b"half of the new")
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\x1b[2J\tb\nc\u202e\ud800é\x9b") == "a\\x1b[2J\tb\nc\\u202e\\ud800é\\x9b"


@pytest.mark.parametrize("at", range(5))
def test_what_belongs_together_is_replaced_together(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before any of the four renames both are the old ones, and after them the new ones."""
    names = ("scheduler", "unet")
    pairs = []
    for name in names:
        fill(tmp_path / name, "old", True)
        pairs.append((fill(tmp_path / f"{name}-new", "new", True), tmp_path / name))
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) - 1 == at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if at < 4:
        with pytest.raises(KeyboardInterrupt):
            replace_together(pairs)
    else:
        replace_together(pairs)
    monkeypatch.undo()
    recover_replaced(*(path for _, path in pairs))
    assert [content(tmp_path / name) for name in names] == ["old" if at < 4 else "new"] * 2
    assert not list(tmp_path.glob(f"*{REPLACED}"))


@pytest.mark.parametrize("folder", [True, False])
def test_a_replacement_that_fails_leaves_no_trace(folder: bool, tmp_path: Path) -> None:
    old = fill(tmp_path / "a", "old", folder)
    with pytest.raises(KeyError), replacement(old) as partial:
        fill(partial, "new", folder)
        raise KeyError
    assert content(old) == "old" and [*tmp_path.iterdir()] == [old]
    with replacement(old) as partial:
        fill(partial, "new", folder)
    assert content(old) == "new" and [*tmp_path.iterdir()] == [old]


@pytest.mark.parametrize("room", ["sdxl", "infer", "tools", "benchmarks"])
def test_nobody_else_renames(room: str) -> None:
    """A rename of its own would be one more place to get a kill or a full disk wrong."""
    root = Path(__file__).parents[1]
    for path in sorted((root / room).rglob("*.py")):
        assert not re.search(r"os\.(replace|rename)\(|\.rename\(", path.read_text("utf-8")), path
