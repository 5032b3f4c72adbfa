"""What the user has comes through by name: none lost, none merged, each refusal with its reason."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from precompute.dataset.sources import split_by_share
from precompute.images.decode import open_image
from shards.reader import Cache
from tests.conftest import Encode
from tests.folders import (
    captions,
    files_in,
    image_bytes,
    key_of,
    put,
    put_list,
    read_one,
    read_set,
    reasons,
)

NAMES = [
    "plain.png",
    "UPPER.PNG",
    "a.b.c.png",
    "a.b.png",
    "a..png",
    "twin.jpg",
    "twin.png",
    "one/same.png",
    "two/same.png",
    "one/two/same.png",
    "dir.with.dots/same.png",
    "caf\u00e9.png",  # composed
    "cafe\u0301.png",  # decomposed
    "\U0001f642\u200d\u2603.png",
    "with space .png",
    "new\nline.png",
    "%20#?*{}'\".png",
    "\u65e5\u672c/\u8a9e.png",
    "x" * 200 + ".png",
    "x" * 199 + "y.png",
]
HIDDEN = [".hidden.png", ".hidden/same.png", ".png"]  # taken where a list names them


@pytest.fixture(scope="module")
def many_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    for name in NAMES:
        put(folder / name, f"about {name}", image_bytes("JPEG" if name.endswith("jpg") else "PNG"))
    if len(files_in(folder)) < len(NAMES):
        pytest.skip("this file system merges names")
    return folder


# Names.


def test_no_name_is_lost_or_merged(many_names: Path) -> None:
    source = read_one(many_names)
    expected = {name: (f"about {name}".strip(),) for name in NAMES}
    expected["twin.jpg"] = expected["twin.png"]  # they share their text
    assert reasons(source) == {}
    assert captions(source) == expected
    assert [r.key for r in source.records] == sorted(map(key_of, NAMES))
    assert all(record.key == key_of(record.path) for record in source.records)
    assert all(record.image.file == many_names / record.path for record in source.records)


def test_no_name_in_a_list_is_lost_or_merged(many_names: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    names = [*NAMES, *HIDDEN]
    for name in names:
        put(folder / name)
    put_list(folder, *({"file_name": name, "text": f"about {name}"} for name in names))
    source = read_one(folder)
    assert reasons(source) == {}
    assert captions(source) == {name: (f"about {name}",) for name in names}
    assert [r.key for r in source.records] == sorted(map(key_of, names))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves tars open
@pytest.mark.filterwarnings("ignore:.*are enlarged more than 2 times")
def test_every_name_is_in_the_cache(many_names: Path, tmp_path: Path, encode_to: Encode) -> None:
    folder = encode_to(many_names, tmp_path / "cache")
    cache = Cache(folder)
    actual: dict[str, str] = {}
    for group in cache.groups():
        for row in range(group.count):
            shard, inside = cache.locate(group, row)
            actual[shard.index.key(inside)] = shard.metadata(inside)["path"]
    assert actual == {key_of(name): name for name in NAMES}

    expected: dict[str, str] = {}
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        assert set(sample) >= {"json", "safetensors"}
        expected[sample["__key__"]] = json.loads(sample["json"])["path"]
    assert expected == actual
    assert (folder / "rejected.jsonl").read_bytes() == b""


# Captions.


def test_texts_beside_images(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", "  a cat\n")
    put(tmp_path / "b.webp", b"\xef\xbb\xbfa dog\r\n")
    put(tmp_path / "c.JPEG", "two\nlines")
    put(tmp_path / "notes.md", "no image")
    assert captions(read_one(tmp_path)) == {
        "a.jpg": ("a cat",),
        "b.webp": ("a dog",),
        "c.JPEG": ("two\nlines",),
    }


# Train and val.


def test_a_set_may_come_split(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png", "train a")
    put(tmp_path / "train" / "b.png", "train b")
    put(tmp_path / "val" / "images" / "a.png")
    put_list(tmp_path / "val", {"file_name": "a.png", "text": "val a"})
    sources = read_set(tmp_path)
    assert {name: captions(source) for name, source in sources.items()} == {
        "train": {"a.png": ("train a",), "b.png": ("train b",)},
        "val": {"images/a.png": ("val a",)},
    }


def test_a_set_alone_has_no_name(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a")
    put(tmp_path / "train" / "b.png", "b")  # no val/ beside it: a folder like any other
    assert {n: set(captions(s)) for n, s in read_set(tmp_path).items()} == {
        "": {"a.png", "train/b.png"}
    }


def sides(folder: Path, share: float) -> dict[str, str]:
    return {
        item.path: name
        for name, source in read_set(folder, val_share=share).items()
        for item in [*source.records, *source.rejected]
    }


def expected_side(path: str, share: float) -> str:
    """The key, read as a binary fraction."""
    return "val" if int(key_of(path), 16) / 16**20 < share else "train"


def test_val_share_is_by_key_and_stable(tmp_path: Path) -> None:
    few = [f"{n}.png" for n in range(100)]
    more = [f"{n}.jpg" for n in range(100)] + [f"sub/{n}.png" for n in range(100)]
    for name in few:
        put(tmp_path / name, "text" if name != "7.png" else None)
    before = sides(tmp_path, 0.3)
    assert before == {name: expected_side(name, 0.3) for name in few}
    for name in more:
        put(tmp_path / name, "text")
    (tmp_path / "0.png").unlink()
    after = sides(tmp_path, 0.3)
    assert after == {name: expected_side(name, 0.3) for name in [*few[1:], *more]}
    assert 0.2 < [*after.values()].count("val") / len(after) < 0.4
    assert {n for n, side in before.items() if side == "val"} <= {
        n for n, side in sides(tmp_path, 0.5).items() if side == "val"
    } | {"0.png"}, "a larger share only adds"


@pytest.mark.parametrize(("share", "empty"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_a_side_without_images_is_an_error(tmp_path: Path, share: float, empty: str) -> None:
    put(tmp_path / "a.png", "a")
    with pytest.raises(ValueError, match=f"--val-share .* leaves no image for {empty}$"):
        split_by_share(read_one(tmp_path), share)


# Refusals.


def test_refused_texts(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    put(tmp_path / "missing.png")
    put(tmp_path / "empty.png", "")
    put(tmp_path / "blank.png", " \n\t")
    put(tmp_path / "latin.png", "caf\u00e9".encode("latin-1"))
    put(tmp_path / "folder.png")
    (tmp_path / "folder.txt").mkdir()
    source = read_one(tmp_path)
    assert set(captions(source)) == {"good.png"}
    assert reasons(source) == {
        "missing.png": "no caption: missing.txt is missing",
        "empty.png": "its caption is empty",
        "blank.png": "its caption is empty",
        "latin.png": "no caption: latin.txt is not UTF-8 text",
        "folder.png": "no caption: folder.txt is a folder",
    }
    assert [r.key for r in source.rejected] == sorted(map(key_of, reasons(source)))


def test_empty_captions_are_kept_where_they_are_meant(tmp_path: Path) -> None:
    for name in ("listed", "loose"):
        put(tmp_path / name / "empty.png", " ")
        put(tmp_path / name / "missing.png")
    put_list(tmp_path / "listed", {"file_name": "empty.png", "text": ""})
    for name in ("listed", "loose"):
        source = read_one(tmp_path / name, empty_captions=True)
        assert captions(source) == {"empty.png": ("",)}
        assert set(reasons(source)) == {"missing.png"}


def test_a_link_is_an_image_like_any_other(tmp_path: Path) -> None:
    """In a list as in a folder: big sets are often made of links to one store."""
    put(tmp_path / "store" / "x.png", data=image_bytes("PNG", 8))
    for name in ("listed", "loose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link.png").symlink_to(tmp_path / "store" / "x.png")
    put_list(tmp_path / "listed", {"file_name": "link.png", "text": "x"})
    (tmp_path / "loose" / "link.txt").write_text("x")
    for name in ("listed", "loose"):
        assert [record.path for record in read_one(tmp_path / name).records] == ["link.png"]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(tmp_path: Path, progressive: bool) -> None:
    """Not half gray. Down to the last byte: the mark of the end is part of it."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(file, "JPEG", progressive=progressive)
    data = file.getvalue()
    assert open_image(data).size == (64, 64)
    for kept in (len(data) - 1, len(data) - 2, len(data) * 3 // 4, len(data) // 2):
        with pytest.raises(OSError, match="truncated"):
            open_image(data[:kept])


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"")
    source = read_one(tmp_path)
    assert set(captions(source)) == {"good.png"}
    assert "UTF-8" in next(iter(reasons(source).values()))


# Errors: nothing can be read, and one line says why.


def both_lists(folder: Path) -> None:
    for name in ("captions.jsonl", "metadata.jsonl"):
        put_list(folder, {"file_name": "a.png", "text": "a"}, name=name)


def loose_images(folder: Path) -> None:
    for name in ("train/a.png", "val/a.png", "loose.png"):
        put(folder / name, "a")


def empty_val(folder: Path) -> None:
    put(folder / "train" / "a.png", "a")
    (folder / "val").mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.rmdir(), "set: no such folder"),
        (lambda folder: None, "set: no images in it"),
        (lambda folder: put(folder / "a.md", "a"), "set: no images in it"),
        (both_lists, "both captions.jsonl and metadata.jsonl"),
        (loose_images, "loose.png lies beside train/ and val/"),
        (empty_val, "val: no images in it"),
    ],
    ids=["gone", "empty", "no images", "both lists", "loose", "empty val"],
)
def test_what_cannot_be_read_is_an_error(
    tmp_path: Path, make: Callable[[Path], Any], words: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError) as caught:
        read_set(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: a file; give its folder$"):
        read_set(tmp_path / "a.png")


def test_a_set_with_a_val_of_its_own_takes_no_share(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png", "a")
    put(tmp_path / "val" / "b.png", "b")
    with pytest.raises(ValueError, match="remove --val-share"):
        read_set(tmp_path, val_share=0.1)
