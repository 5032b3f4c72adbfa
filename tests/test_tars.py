"""A tar of images is what its files would be, unpacked; damage is named, never passed over."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from precompute.dataset.records import Memory, SourceImage
from precompute.dataset.sources import read_dataset
from precompute.settings import EncodeSettings
from shards.reader import Cache
from tests.conftest import Encode
from tests.folders import captions, image_bytes, put, read_one, reasons


def put_tar(path: Path, members: dict[str, bytes], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def as_downloaded(number: int, caption: str | None, **more: Any) -> dict[str, bytes]:
    """A sample as img2dataset writes it."""
    key = f"{number:09d}"
    row = {"caption": caption, "url": "x", "key": key, "status": "success", "error_message": None}
    return {
        f"{key}.jpg": image_bytes("JPEG", 16 + number),
        f"{key}.txt": (caption or "").encode(),
        f"{key}.json": json.dumps(row | more, indent=4).encode(),
    }


def test_a_tar_as_it_is_downloaded(tmp_path: Path) -> None:
    members = as_downloaded(0, "zero") | as_downloaded(1, None) | as_downloaded(2, "two", width=5)
    failed = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    members["000000003.json"] = json.dumps({"caption": "gone", **failed}).encode()
    put_tar(tmp_path / "00000.tar", members)
    put(tmp_path / "00000_stats.json")
    source = read_one(tmp_path)
    assert captions(source) == {
        "00000.tar/000000000.jpg": ("zero",),
        "00000.tar/000000002.jpg": ("two",),
    }
    assert reasons(source) == {
        "00000.tar/000000001.jpg": "its caption is empty",
        "00000.tar/000000003": "failed_to_download: HTTP Error 404: Not Found",
    }
    for record in source.records:
        assert record.image.read() == members[record.path.partition("/")[2]]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_read_as_its_files_would_be(tmp_path: Path, kind: int) -> None:
    names = ["a.b.png", "caf\u00e9.webp", "sub/x.JPG", "10_x/y.png", "x" * 90 + ".png", "none.png"]
    files = {name: name.encode() * 50 for name in names}
    texts = {name.rpartition(".")[0] + ".txt": f"about {name}\nmore".encode() for name in names[:5]}
    texts["a.b.caption"] = b"another"
    texts["x" * 90 + ".txt"] = b"caf\xe9"
    more = {"a.b.mask.png": b"1", "sub/x-masklabel.png": b"2", "notes.md": b"3"}
    for name, data in (files | texts | more).items():
        (tmp_path / "loose" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / name).write_bytes(data)
    put_tar(tmp_path / "packed" / "p.tar", {f"./{n}": d for n, d in (files | texts | more).items()})
    settings = {"caption_lines": True, "repeat_folders": True}
    with pytest.warns(UserWarning, match="1 image with texts beside them that differ") as caught:
        loose, packed = (read_one(tmp_path / name, **settings) for name in ("loose", "packed"))
    assert sum("differ" in str(warning.message) for warning in caught) == 2

    def plain(record: SourceImage) -> tuple[Any, ...]:
        mask = record.mask and record.mask.read()
        return record.image.read(), record.captions, record.repeats, mask

    assert {f"p.tar/{record.path}": plain(record) for record in loose.records} == {
        record.path: plain(record) for record in packed.records
    }
    assert {f"p.tar/{path}": why for path, why in reasons(loose).items()} == reasons(packed)
    assert len(loose.records) == 4 and len(loose.rejected) == 2


def test_weight_repeats_and_captions_from_json(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "a": {"text": ["one", "two"], "weight": 0.5, "repeats": 3},
        "b": {"caption": "b", "weight": None},
        "c": {"caption": "c", "weight": "heavy"},
        "d": ["no object"],
    }
    members = {f"{name}.json": json.dumps(row).encode() for name, row in rows.items()}
    members |= {f"{name}.png": b"1" for name in "abcde"} | {"b.txt": b"of b", "e.json": b"{"}
    put_tar(tmp_path / "x.tar", members)
    source = read_one(tmp_path)
    results = {
        record.path: (record.captions, record.weight, record.repeats) for record in source.records
    }
    assert results == {
        "x.tar/a.png": (("one", "two"), 0.5, 3),
        "x.tar/b.png": (("of b",), 1.0, 1),
    }
    why = reasons(source)
    assert why["x.tar/c.png"] == "its weight must be a number from 0 to 1e+06, not 'heavy'"
    assert why["x.tar/d.png"] == "d.json: not a JSON object"
    assert why["x.tar/e.png"].startswith("e.json: not valid JSON")


def test_links_and_twins_in_a_tar(tmp_path: Path) -> None:
    """GNU tar packs the second name of a file as a link to the first."""
    (tmp_path / "in").mkdir()
    put(tmp_path / "in" / "a.png", "a")
    for ending in ("png", "txt"):
        os.link(tmp_path / "in" / f"a.{ending}", tmp_path / "in" / f"b.{ending}")
    (tmp_path / "in" / "c.png").symlink_to("a.png")
    (tmp_path / "set").mkdir()
    names = ["a.png", "a.txt", "b.png", "b.txt", "c.png", "a.png"]
    subprocess.run(
        ["tar", "cf", "../set/x.tar", "--hard-dereference", *names], cwd=tmp_path / "in", check=True
    )
    subprocess.run(["tar", "cf", "../set/y.tar", *names[:5]], cwd=tmp_path / "in", check=True)
    source = read_one(tmp_path / "set")
    assert set(captions(source)) == {"x.tar/a.png", "x.tar/b.png", "y.tar/a.png", "y.tar/b.png"}
    assert all(record.image.read() == b"unread" for record in source.records)
    why = reasons(source)
    assert why["x.tar/a.png"] == "in its tar a second time"
    assert "not a plain file" in why["x.tar/c.png"] and "not a plain file" in why["y.tar/c.png"]


SAMPLES = {
    name: data
    for number in range(3)
    for name, data in as_downloaded(number, f"caption {number}").items()
}


def damage(how: str, data: bytes) -> bytes:
    """The bytes of a tar of SAMPLES, changed behind its first sample."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        header = archive.getmember("000000001.jpg").offset
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    return {
        "cut in a header": data[: header + 100],
        "cut in an image": data[: header + 700],
        "cut before the end": data[:end],
        "flipped": data[: header + 5] + b"\xff" + data[header + 6 :],
        "zeros": data[:header] + bytes(512) + data[header + 512 :],
        "joined": data + data,
    }[how]


@pytest.mark.parametrize(
    ("how", "num_read"),
    [
        ("cut in a header", 1),
        ("cut in an image", 1),
        ("cut before the end", 3),
        ("flipped", 1),
        ("zeros", 1),
        ("joined", 3),
    ],
)
def test_a_damaged_tar_is_named_and_what_lies_before_is_read(
    tmp_path: Path, how: str, num_read: int
) -> None:
    path = put_tar(tmp_path / "good.tar", SAMPLES)
    (tmp_path / "bad.tar").write_bytes(damage(how, path.read_bytes()))
    source = read_one(tmp_path)
    of_bad = [record.path for record in source.records if record.path.startswith("bad.tar/")]
    assert len(of_bad) == num_read and len(source.records) == 3 + num_read
    why = reasons(source).pop("bad.tar")
    assert why.startswith("damaged tar: ") and "byte" in why


def test_what_is_no_tar_or_holds_no_images(tmp_path: Path) -> None:
    put_tar(tmp_path / "good.tar", SAMPLES)
    (tmp_path / "text.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    put_tar(tmp_path / "notes.tar", {"a.md": b"x"})
    with pytest.warns(UserWarning, match=r"notes\.tar: no images in this tar"):
        source = read_one(tmp_path)
    assert len(source.records) == 3
    assert set(reasons(source)) == {"text.tar", "empty.tar", "x.tar.gz"}
    assert "make it a plain .tar" in reasons(source)["x.tar.gz"]


def test_shards_of_a_cache_are_none_of_the_users(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a")
    for folder in (tmp_path / "old", tmp_path / "out"):
        put_tar(folder / "64x64-000000.tar", {"k.json": b"{}", "k.safetensors": b""})
        put(folder / "sheet.png")
    (tmp_path / "old" / "unconditional.safetensors").write_bytes(b"")
    settings = EncodeSettings(dataset=tmp_path, base="", out=tmp_path / "out")
    with pytest.warns(UserWarning, match=r"not used, .* \(1\): old/$"):
        (source,) = read_dataset(settings).values()
    assert set(captions(source)) == {"a.png"}
    assert set(reasons(source)) == {"old/sheet.png"}


def test_a_tar_is_not_opened_again(tmp_path: Path) -> None:
    path = put_tar(tmp_path / "x.tar", SAMPLES)
    os.utime(path, ns=(1, 1))
    settings = EncodeSettings(dataset=tmp_path, base="", out=tmp_path / "out")
    first = Memory()
    expected = read_dataset(settings, first)
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, ns=(1, 1))
    assert read_dataset(settings, Memory(json.loads(json.dumps(first.seen)))) == expected
    os.utime(path, ns=(2, 2))
    (changed,) = read_dataset(settings, Memory(first.seen)).values()
    assert changed.records == [] and set(reasons(changed)) == {"x.tar"}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves tars open
def test_webdatasets_own_tars_are_encoded(tmp_path: Path, encode_to: Encode) -> None:
    (tmp_path / "set").mkdir()
    with webdataset.TarWriter(str(tmp_path / "set" / "a.tar"), encoder=False) as writer:
        for number in range(3):
            sample = {"png": image_bytes(side=64), "txt": f"caption {number}".encode()}
            writer.write({"__key__": f"{number:05d}", **sample})
    cache = Cache(encode_to(tmp_path / "set", tmp_path / "cache"))
    (group,) = cache.groups()
    abouts = [shard.metadata(row) for shard, row in (cache.locate(group, n) for n in range(3))]
    assert {item["path"]: item["captions"] for item in abouts} == {
        f"a.tar/{number:05d}.png": [f"caption {number}"] for number in range(3)
    }
    digest = hashlib.sha256(image_bytes(side=64)).hexdigest()
    assert {item["digests"]["picture"] for item in abouts} == {digest}


def test_names_and_messages_that_are_no_text_are_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"x\xff.tar.gz")).write_bytes(b"")
    put_tar(tmp_path / "a.tar", {"1.json": b'{"status": "failed", "error_message": "\\ud800"}'})
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        link = tarfile.TarInfo(os.fsdecode(b"l\xff.png"))
        link.type, link.linkname = tarfile.SYMTYPE, "x.png"
        archive.addfile(link)
    put(tmp_path / "good.png", "good")
    with pytest.warns(UserWarning, match="no images in this tar"):
        rejected = reasons(read_one(tmp_path))
    assert {*rejected} == {"x\\xff.tar.gz", "a.tar/1", "b.tar/l\\xff.png"}
    assert rejected["a.tar/1"] == "failed: \\ud800"
    assert all(text.encode() for text in [*rejected, *rejected.values()])


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "PNG", "webp", "avif", "bmp"])
def test_members_of_every_ending_and_every_place_of_a_caption(tmp_path: Path, ending: str) -> None:
    rows: dict[str, Any] = {
        "txt": b"of txt",
        "caption": b"of caption",
        "json": json.dumps({"text": "of text", "caption": "not this", "weight": 0.5}).encode(),
        "JSON": json.dumps({"caption": "of caption", "tags": ["a"]}).encode(),
        "json ": json.dumps({"prompt": "of prompt", "tags": "a, b"}).encode(),
        " json": json.dumps({"caption": "", "tags": ["one", "two"]}).encode(),
    }
    members = {f"{number}.{ending}": bytes([number]) for number in range(len(rows))}
    members |= {f"{n}.{name.strip()}": data for n, (name, data) in enumerate(rows.items())}
    members |= {f"9.{ending}": b"9", "9.txt": b"its text"}
    members["9.json"] = json.dumps({"prompt": {"3": "a workflow"}, "tags": 5}).encode()
    put_tar(tmp_path / "x.tar", members)
    expected = ["of txt", "of caption", "of text", "of caption", "of prompt", "one, two"]
    texts = {f"x.tar/{n}.{ending}": (text,) for n, text in enumerate(expected)}
    source = read_one(tmp_path)
    assert captions(source) == {**texts, f"x.tar/9.{ending}": ("its text",)}
    assert {r.path[6]: r.weight for r in source.records if r.weight != 1} == {"2": 0.5}
