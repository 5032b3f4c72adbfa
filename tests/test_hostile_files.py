"""One bad thing in a dataset is one rejected entry with its reason, and the rest is encoded."""

import io
import json
import os
import signal
import socket
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from precompute.dataset import metadata_files, tars
from precompute.dataset.records import Blob
from tests.folders import captions, put, put_list, read_one, reasons


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What waits for ever on a pipe fails instead."""
    signal.alarm(120)
    yield
    signal.alarm(0)


# What is no regular file.


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # a whole path may be too long for a socket


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (a_pipe, "a named pipe"),
        (a_socket, "a socket"),
        (link_to("/dev/zero"), "a device"),
        (a_loop, "a link that leads to itself"),
        (link_to("gone"), "a link that leads nowhere"),
    ],
    ids=["pipe", "socket", "device", "self-link", "lost link"],
)
@pytest.mark.parametrize("name", ["x.txt", "x.png", "x.tar", "captions.jsonl", "x.mask.png"])
def test_what_is_no_file_is_never_opened(
    tmp_path: Path, make: Callable[[Path], None], problem: str, name: str
) -> None:
    put(tmp_path / "good.png", "good")
    put(tmp_path / "x.png", "x" if name != "x.txt" else None)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    source = read_one(tmp_path)
    assert "good.png" in captions(source)
    named = "x.png" if name == "x.txt" else name
    assert problem in reasons(source)[named]


def test_a_file_that_becomes_a_pipe_or_goes_is_no_hang(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    blob = Blob.of(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no such file"):
        blob.read()
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is a named pipe"):
        blob.read()
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.png").symlink_to("a.png")
    with pytest.raises(ValueError, match="cannot be read: Too many levels"):
        blob.read()


# Depth and size.


def test_a_folder_too_deep_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    put(tmp_path.joinpath(*["d"] * 100) / "deep.png", "deep")
    put(tmp_path.joinpath(*["d"] * 120) / "deeper.png", "deeper")
    source = read_one(tmp_path)
    assert set(captions(source)) == {"good.png", "d/" * 100 + "deep.png"}
    assert reasons(source) == {"d/" * 101: "a folder in more than 100 others: not read"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    put(tmp_path / "closed" / "x.png", "x")
    (tmp_path / "closed").chmod(0)
    source = read_one(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert reasons(source) == {"closed/": "a folder that cannot be read: Permission denied"}


def sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def test_files_of_20_gb_are_not_read(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    for name in ("a", "b", "c"):
        put(tmp_path / f"{name}.png", "x")
    sparse(tmp_path / "a.txt", 20 * 10**9)
    (tmp_path / "b.txt").write_bytes(b"x" * ((1 << 20) + 1))
    sparse(tmp_path / "c.png", 20 * 10**9)
    sparse(tmp_path / "captions.jsonl", 20 * 10**9)
    source = read_one(tmp_path)
    assert captions(source) == {"good.png": ("good",)}
    assert reasons(source) == {
        "a.png": "no caption: a.txt has 20.0 GB, where at most 1.05 MB are read",
        "b.png": "no caption: b.txt has 1.05 MB, where at most 1.05 MB are read",
        "c.png": "20.0 GB, where at most 2.00 GB are read",
        "captions.jsonl": "20.0 GB, where at most 8.00 GB are read",
    }


def test_a_line_without_end_is_one_rejected_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata_files, "MAX_LINE", 1000)
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    long = {"file_name": "a.png", "text": "x" * 5000}
    put_list(
        tmp_path, {"file_name": "a.png", "text": "a"}, long, {"file_name": "b.png", "text": "b"}
    )
    source = read_one(tmp_path)
    assert captions(source) == {"a.png": ("a",), "b.png": ("b",)}
    assert reasons(source) == {"captions.jsonl:2": "a line of more than 1,000 characters"}


@pytest.mark.parametrize("repeats", [10**6 + 1, 10**30, -1])
def test_repeats_have_a_bound(tmp_path: Path, repeats: int) -> None:
    for name in ("a", "b", "10_x/c"):
        put(tmp_path / f"{name}.png")
    rows: list[dict[str, Any]] = [
        {"file_name": "a.png", "text": "a", "repeats": repeats},
        {"file_name": "b.png", "text": "b", "repeats": 10**6},
        {"file_name": "10_x/c.png", "text": "c", "repeats": 10**6},
    ]
    put_list(tmp_path, *rows)
    source = read_one(tmp_path, repeat_folders=True)
    assert {record.path: record.repeats for record in source.records} == {"b.png": 10**6}
    why = reasons(source)
    assert set(why) == {"a.png", "10_x/c.png"} and str(repeats) in why["a.png"]


def test_what_a_message_quotes_is_short(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    long = "x" * 100_000
    rows = [{"file_name": long, "text": "x"}, {"file_name": "a.png", "text": "x", "mask": long}]
    put_list(tmp_path, *rows, {"file_name": "a.png", "weight": [long]}, f'{{"{long}')
    for item in read_one(tmp_path).rejected:
        assert len(item.path) + len(item.reason) < 400


def test_a_list_does_not_lead_out_of_the_set(tmp_path: Path) -> None:
    """Behind a link, ".." leads to where the link's folder lies."""
    folder = tmp_path / "set"
    for path in (folder / "good.png", tmp_path / "outside" / "in" / "x.png"):
        put(path, "x")
    put(tmp_path / "outside" / "good.png")
    put(tmp_path / "outside" / "only.png")
    (folder / "link").symlink_to(tmp_path / "outside" / "in")
    names = ["link/../good.png", "link/../only.png", "../outside/only.png", "link/x.png"]
    put_list(folder, *({"file_name": name, "text": "x"} for name in [*names, "good.png"]))
    source = read_one(folder)
    assert set(captions(source)) == {"link/x.png", "good.png"}, "links themselves are the user's"
    assert set(reasons(source)) == set(names[:3])
    assert all("lies outside the dataset" in why for why in reasons(source).values())


# Tars.


def header(name: str, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    field = size if isinstance(size, bytes) else b"\x80" + size.to_bytes(11, signed=True)
    if not isinstance(size, bytes) and size < 0:
        field = size.to_bytes(12, signed=True)
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


IMAGE = (
    header("a.png", 5) + b"image".ljust(512, b"\0") + header("a.txt", 3) + b"cat".ljust(512, b"\0")
)
LIES = {
    "a text of a terabyte": header("x.txt", 1 << 40) + bytes(512),
    "an image of 2**60": header("x.png", 1 << 60) + bytes(512),
    "an image of 2**80": header("x.png", 1 << 80) + bytes(512),
    "a size below zero": header("x.png", -1024),
    "a long name below zero": header("x", -1024, tarfile.GNUTYPE_LONGNAME),
    "a long name of 2**60": header("x", 1 << 60, tarfile.GNUTYPE_LONGNAME),
    "fields of 2**60": header("x", 1 << 60, tarfile.XHDTYPE) + bytes(512),
    "long names without end": (header("x", 5, tarfile.GNUTYPE_LONGNAME) + bytes(512)) * 3000,
    "a number without end": header("x", 60_000, tarfile.XHDTYPE) + b"1" * 60_416,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tar_that_lies_is_one_rejected_entry(tmp_path: Path, lie: str) -> None:
    (tmp_path / "x.tar").write_bytes(IMAGE + LIES[lie] + bytes(1024))
    source = read_one(tmp_path)
    assert captions(source) == {"x.tar/a.png": ("cat",)}
    (entry,) = source.rejected
    assert entry.path == "x.tar" and entry.reason.startswith("damaged tar: "), entry
    if lie == "a number without end":  # else a search in it takes time with its square
        assert "a number without end" in entry.reason


def test_members_and_texts_of_a_tar_have_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, size in enumerate([3, 2 << 20, 600, 600]):
            for name in (f"{number}.txt", f"{number}.png"):
                info = tarfile.TarInfo(name)
                info.size = size if name.endswith("txt") else 1
                archive.addfile(info, io.BytesIO(b"x" * info.size))
    monkeypatch.setattr(tars, "MAX_TEXTS_BYTES", (2 << 20) + 700)
    why = reasons(read_one(tmp_path))
    assert set(why) == {"x.tar/1.png", "x.tar/3.png"}
    assert "1.txt has 2.10 MB, where at most" in why["x.tar/1.png"]
    assert "3.txt is not read: the texts of its tar have" in why["x.tar/3.png"]
    monkeypatch.setattr(tars, "MAX_MEMBERS", 3)
    os.utime(tmp_path / "x.tar", ns=(1, 1))
    source = read_one(tmp_path)
    assert set(captions(source)) == {"x.tar/0.png"}
    assert "more than 3 members" in reasons(source)["x.tar"]


def test_a_text_that_goes_on_in_json_has_the_same_bounds(tmp_path: Path) -> None:
    rows = {"a": json.dumps({"text": "a"}).encode(), "b": b'"' + b"x" * (1 << 20) + b'"'}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, row in rows.items():
            for ending, data in ((".json", row), (".png", b"x")):
                info = tarfile.TarInfo(name + ending)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    source = read_one(tmp_path)
    assert captions(source) == {"x.tar/a.png": ("a",)}
    assert reasons(source)["x.tar/b.png"].startswith("b.json: has 1.05 MB, where at most")
