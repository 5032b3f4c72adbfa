"""What the user has comes through by name: none lost, none merged, each refusal with its reason."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from precompute.images import open_picture
from precompute.records import Source
from precompute.settings import EncodeSettings
from precompute.sources import read_data_set, split
from shards.reader import Cache
from tests.conftest import Encode

NAMES = [
    "plain.png",
    "UPPER.PNG",
    "a.b.c.png",
    "a.b.png",
    "a..png",
    ".hidden.png",
    "twin.jpg",
    "twin.png",
    "one/same.png",
    "two/same.png",
    "one/two/same.png",
    "dir.with.dots/same.png",
    ".hidden/same.png",
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


def picture(form: str = "PNG", side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, form)
    return file.getvalue()


def put(path: Path, text: str | bytes | None = None, data: bytes = b"unread") -> None:
    """A picture, and the text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (path.parent / (path.name.rpartition(".")[0] + ".txt")).write_bytes(data)


def put_list(folder: Path, *lines: Any, name: str = "captions.jsonl") -> None:
    """Lines as they are if text, else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text, encoding="utf-8")


def read_set(folder: Path, **settings: Any) -> dict[str, Source]:
    return read_data_set(EncodeSettings(dataset=folder, base="", out=folder, **settings))


def read_one(folder: Path, **settings: Any) -> Source:
    (source,) = read_set(folder, **settings).values()
    return source


def key_of(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    found = {record.path: record.captions for record in source.records}
    assert len(found) == len(source.records)
    return found


def reasons(source: Source) -> dict[str, str]:
    found = {rejected.path: rejected.reason for rejected in source.rejected}
    assert len(found) == len(source.rejected)
    return found


def files_in(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
        if not name.endswith((".txt", ".jsonl"))
    }


@pytest.fixture(scope="module")
def many_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    for name in NAMES:
        put(folder / name, f"about {name}", picture("JPEG" if name.endswith("jpg") else "PNG"))
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
    assert all(record.picture.file == many_names / record.path for record in source.records)


def test_no_name_in_a_list_is_lost_or_merged(many_names: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    for name in NAMES:
        put(folder / name)
    put_list(folder, *({"file_name": name, "text": f"about {name}"} for name in NAMES))
    source = read_one(folder)
    assert reasons(source) == {}
    assert captions(source) == {name: (f"about {name}",) for name in NAMES}
    assert [r.key for r in source.records] == sorted(map(key_of, NAMES))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves tars open
def test_every_name_is_in_the_cache(many_names: Path, tmp_path: Path, encode_to: Encode) -> None:
    folder = encode_to(many_names, tmp_path / "cache")
    cache = Cache(folder)
    ours: dict[str, str] = {}
    for group in cache.groups():
        for row in range(group.count):
            shard, inside = cache.locate(group, row)
            ours[shard.index.key(inside)] = shard.about(inside)["path"]
    assert ours == {key_of(name): name for name in NAMES}

    theirs: dict[str, str] = {}
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        assert set(sample) >= {"json", "safetensors"}
        theirs[sample["__key__"]] = json.loads(sample["json"])["path"]
    assert theirs == ours
    assert (folder / "rejected.jsonl").read_bytes() == b""


# Captions.


def test_texts_beside_pictures(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", "  a cat\n")
    put(tmp_path / "b.webp", b"\xef\xbb\xbfa dog\r\n")
    put(tmp_path / "c.JPEG", "two\nlines")
    put(tmp_path / "notes.md", "no picture")
    assert captions(read_one(tmp_path)) == {
        "a.jpg": ("a cat",),
        "b.webp": ("a dog",),
        "c.JPEG": ("two\nlines",),
    }


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("text", ["text", "caption"])
@pytest.mark.parametrize("file", ["file_name", "file", "image"])
def test_lists_and_their_fields(tmp_path: Path, name: str, text: str, file: str) -> None:
    put(tmp_path / "a.png", "not this text")
    put_list(tmp_path, {file: "a.png", text: " a cat ", "other": 1}, name=name)
    assert captions(read_one(tmp_path)) == {"a.png": ("a cat",)}


def test_a_list_looks_beside_itself_then_in_images(tmp_path: Path) -> None:
    for name in ("a.png", "both.png", "sub/b.png", "images/both.png", "images/c.png"):
        put(tmp_path / name)
    names = ["a.png", "both.png", "sub/b.png", "c.png", "./images/both.png"]
    put_list(tmp_path, *({"file_name": name, "text": name} for name in names))
    source = read_one(tmp_path)
    assert captions(source) == {
        "a.png": ("a.png",),
        "both.png": ("both.png",),
        "sub/b.png": ("sub/b.png",),
        "images/c.png": ("c.png",),
        "images/both.png": ("./images/both.png",),
    }
    assert reasons(source) == {}


def test_a_list_may_have_a_mark_blank_lines_and_line_separators(tmp_path: Path) -> None:
    """U+2028 ends a line for str.splitlines, not for JSON lines."""
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    lines = '\ufeff{"file_name": "a.png", "text": "x\u2028y\u0085z"}\r\n\r\n  \n'
    put_list(tmp_path, lines + '{"file_name": "b.png", "text": "b"}\n')
    source = read_one(tmp_path)
    assert captions(source) == {"a.png": ("x\u2028y\u0085z",), "b.png": ("b",)}
    assert reasons(source) == {}


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


def test_one_list_beside_train_and_val_makes_one_set(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png")
    put(tmp_path / "val" / "a.png")
    put_list(tmp_path, *({"file_name": f"{n}/a.png", "text": n} for n in ("train", "val")))
    (source,) = read_set(tmp_path).values()
    assert captions(source) == {"train/a.png": ("train",), "val/a.png": ("val",)}


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
def test_a_side_without_pictures_is_an_error(tmp_path: Path, share: float, empty: str) -> None:
    put(tmp_path / "a.png", "a")
    with pytest.raises(ValueError, match=f"--val-share .* leaves no picture for {empty}$"):
        split(read_one(tmp_path), share)


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
        "folder.png": "no caption: folder.txt: Is a directory",
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


def test_a_link_is_a_picture_like_any_other(tmp_path: Path) -> None:
    """In a list as in a folder: big sets are often made of links to one store."""
    put(tmp_path / "store" / "x.png", data=picture("PNG", 8))
    for name in ("listed", "loose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link.png").symlink_to(tmp_path / "store" / "x.png")
    put_list(tmp_path / "listed", {"file_name": "link.png", "text": "x"})
    (tmp_path / "loose" / "link.txt").write_text("x")
    for name in ("listed", "loose"):
        assert [record.path for record in read_one(tmp_path / name).records] == ["link.png"]


BAD_LINES: list[tuple[Any, str, str]] = [
    ('{"file_name": "a.png", ', "captions.jsonl:{}", "not valid JSON: "),
    ("a.png a cat", "captions.jsonl:{}", "not valid JSON: "),
    (["a.png", "a cat"], "captions.jsonl:{}", "not a JSON object"),
    ({"text": "a cat"}, "captions.jsonl:{}", "names no picture: none of file_name, file, image"),
    ({"file_name": 5, "text": "x"}, "captions.jsonl:{}", "names no picture"),
    ({"file_name": "", "text": "x"}, "captions.jsonl:{}", "names no picture"),
    ({"file_name": "none.png", "text": "x"}, "none.png", "captions.jsonl:{}: no such file"),
    ({"file_name": "sub", "text": "x"}, "sub", "captions.jsonl:{}: no such file"),
    ({"file_name": "no\0.png", "text": "x"}, "no\0.png", "captions.jsonl:{}: no such file"),
    ({"file_name": "a.png", "text": "x"}, "captions.jsonl:{}", "a.png is named a second time"),
    ({"file_name": "./a.png", "text": "x"}, "captions.jsonl:{}", "a.png is named a second time"),
    ({"file_name": "empty.png", "text": " "}, "empty.png", "its caption is empty"),
    ({"file_name": "null.png", "text": None}, "null.png", "captions.jsonl:{}: no caption"),
    ({"file_name": "bare.png"}, "bare.png", "captions.jsonl:{}: no caption"),
    ({"file_name": "../x.png", "text": "x"}, "../x.png", "lies outside the data set"),
    ({"file_name": "broken.png", "text": "x"}, "broken.png", "not a picture that Pillow can read"),
    ({"file_name": "text.md", "text": "x"}, "text.md", "not a picture that Pillow can read"),
    ({"file_name": "half.jpg", "text": "x"}, "half.jpg", "truncated"),
    ({"file_name": "half.png", "text": "x"}, "half.png", "truncated"),
]


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """BAD_LINES after two good ones, and a picture that no line names."""
    folder = tmp_path / "set"
    whole = picture("PNG", 64)
    for name in ("a.png", "b.png", "null.png", "bare.png", "empty.png", "unnamed.png"):
        put(folder / name, data=whole)
    put(tmp_path / "x.png", data=whole)
    (folder / "sub").mkdir()
    put(folder / "broken.png", data=b"\x89P and then nothing of the kind")
    put(folder / "text.md", data=b"# Not a picture")
    for name, form in (("half.jpg", "JPEG"), ("half.png", "PNG")):
        data = picture(form, 64)
        put(folder / name, data=data[: len(data) * 3 // 4])
    good = [{"file_name": name, "text": "good"} for name in ("a.png", "b.png")]
    put_list(folder, *good, *(line for line, _, _ in BAD_LINES))
    return folder


def test_every_refusal_has_its_reason_and_stops_nothing(
    refused: Path, tmp_path: Path, encode_to: Encode
) -> None:
    out = encode_to(refused, tmp_path / "cache")
    text = (out / "rejected.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [row["key"] for row in rows] == sorted(key_of(row["path"]) for row in rows)
    assert all(row["key"] == key_of(row["path"]) for row in rows)
    found = {row["path"]: row["reason"] for row in rows}
    assert found.pop("unnamed.png") == "not named in captions.jsonl, so it has no caption"
    expected = {path.format(n): why.format(n) for n, (_, path, why) in enumerate(BAD_LINES, 3)}
    assert set(found) == set(expected)
    for path, why in expected.items():
        assert why.lower() in found[path].lower(), path
        assert "\n" not in found[path]
    cache = Cache(out)
    (group,) = cache.groups()
    places = [cache.locate(group, row) for row in range(group.count)]
    assert {shard.about(row)["path"] for shard, row in places} == {"a.png", "b.png"}


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(tmp_path: Path, progressive: bool) -> None:
    """Not half grey. Down to the last byte: the mark of the end is part of it."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(file, "JPEG", progressive=progressive)
    data = file.getvalue()
    assert open_picture(data).size == (64, 64)
    for kept in (len(data) - 1, len(data) - 2, len(data) * 3 // 4, len(data) // 2):
        with pytest.raises(OSError, match="truncated"):
            open_picture(data[:kept])


def test_a_list_of_refused_lines_only_is_no_error(tmp_path: Path) -> None:
    put_list(tmp_path, {"file_name": "gone.png", "text": "x"})
    source = read_one(tmp_path)
    assert (source.records, set(reasons(source))) == ([], {"gone.png"})
    assert len(source.records) + len(source.rejected) == 1


# Not yet as they should be.


def one_more(folder: Path, line: str) -> Source:
    """A good picture and one bad line."""
    put(folder / "good.png")
    put_list(folder, {"file_name": "good.png", "text": "good"}, line)
    source = read_one(folder)
    assert "good.png" in captions(source)
    return source


def test_a_name_too_long_for_the_file_system_is_refused(tmp_path: Path) -> None:
    """As when a line has its caption in the place of its name."""
    line = json.dumps({"file_name": "a cat " * 50, "text": "cat.png"})
    assert "no such file" in reasons(one_more(tmp_path, line))["a cat " * 50]


def test_half_a_surrogate_pair_in_a_name_is_refused(tmp_path: Path) -> None:
    source = one_more(tmp_path, '{"file_name": "\\ud83d.png", "text": "x"}')
    assert [item.key for item in source.rejected] == [key_of(item) for item in reasons(source)]


def test_half_a_surrogate_pair_in_a_caption_is_refused(tmp_path: Path) -> None:
    """As a tool writes it that cuts captions inside an emoji."""
    put(tmp_path / "cut.png")
    source = one_more(tmp_path, '{"file_name": "cut.png", "text": "x \\ud83d"}')
    assert set(captions(source)) == {"good.png"}


def test_endless_brackets_are_no_json(tmp_path: Path) -> None:
    assert "JSON" in reasons(one_more(tmp_path, "[" * 200_000))["captions.jsonl:2"]


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"")
    source = read_one(tmp_path)
    assert set(captions(source)) == {"good.png"}
    assert "UTF-8" in next(iter(reasons(source).values()))


def test_an_absolute_name_in_a_relative_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "set" / "a.png")
    put_list(tmp_path / "set", {"file_name": str(tmp_path / "set" / "a.png"), "text": "a"})
    monkeypatch.chdir(tmp_path)
    assert set(captions(read_one(Path("set")))) == {"a.png"}


def test_a_detour_names_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    source = one_more(tmp_path, '{"file_name": "sub/../good.png", "text": "x"}')
    assert reasons(source) == {"captions.jsonl:2": "good.png is named a second time"}


def test_a_name_that_is_only_an_ending(tmp_path: Path) -> None:
    put(tmp_path / "good.png", "good")
    put(tmp_path / ".png")
    source = read_one(tmp_path)
    assert len(source.records) + len(source.rejected) == 2


# Errors: nothing can be read, and one line says why.


def both_lists(folder: Path) -> None:
    for name in ("captions.jsonl", "metadata.jsonl"):
        put_list(folder, {"file_name": "a.png", "text": "a"}, name=name)


def loose_pictures(folder: Path) -> None:
    for name in ("train/a.png", "val/a.png", "loose.png"):
        put(folder / name, "a")


def latin_list(folder: Path) -> None:
    put(folder / "a.png")
    (folder / "captions.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')


def empty_val(folder: Path) -> None:
    put(folder / "train" / "a.png", "a")
    (folder / "val").mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.rmdir(), "set: no such folder"),
        (lambda folder: None, "set: no pictures in it"),
        (lambda folder: put(folder / "a.md", "a"), "set: no pictures in it"),
        (both_lists, "both captions.jsonl and metadata.jsonl"),
        (loose_pictures, "loose.png lies beside train/ and val/"),
        (latin_list, "captions.jsonl: not UTF-8 text"),
        (empty_val, "val: no pictures in it"),
    ],
    ids=["gone", "empty", "no pictures", "both lists", "loose", "latin list", "empty val"],
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
    with pytest.raises(ValueError, match=r"a\.png: no folder$"):
        read_set(tmp_path / "a.png")


def test_a_set_with_a_val_of_its_own_takes_no_share(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a.png", "a")
    put(tmp_path / "val" / "b.png", "b")
    with pytest.raises(ValueError, match="leave --val-share out"):
        read_set(tmp_path, val_share=0.1)
