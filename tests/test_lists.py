"""A list comes through line by line: each refusal has its reason, and stops nothing."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from precompute.dataset.records import Source
from shards.reader import Cache
from tests.conftest import Encode
from tests.folders import (
    captions,
    image_bytes,
    key_of,
    put,
    put_list,
    read_one,
    read_set,
    reasons,
)


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


BAD_LINES: list[tuple[Any, str, str]] = [
    ('{"file_name": "a.png", ', "captions.jsonl:{}", "not valid JSON: "),
    ("a.png a cat", "captions.jsonl:{}", "not valid JSON: "),
    (["a.png", "a cat"], "captions.jsonl:{}", "not a JSON object"),
    ({"text": "a cat"}, "captions.jsonl:{}", "names no image: none of file_name, file, image"),
    ({"file_name": 5, "text": "x"}, "captions.jsonl:{}", "names no image"),
    ({"file_name": "", "text": "x"}, "captions.jsonl:{}", "names no image"),
    ({"file_name": "none.png", "text": "x"}, "none.png", "captions.jsonl:{}: no such file"),
    ({"file_name": "sub", "text": "x"}, "sub", "captions.jsonl:{}: no such file"),
    ({"file_name": "no\0.png", "text": "x"}, "no\0.png", "captions.jsonl:{}: no such file"),
    ({"file_name": "a.png", "text": "x"}, "captions.jsonl:{}", "a.png is named a second time"),
    ({"file_name": "./a.png", "text": "x"}, "captions.jsonl:{}", "a.png is named a second time"),
    ({"file_name": "empty.png", "text": " "}, "empty.png", "its caption is empty"),
    ({"file_name": "null.png", "text": None}, "null.png", "captions.jsonl:{}: no caption"),
    ({"file_name": "bare.png"}, "bare.png", "captions.jsonl:{}: no caption"),
    ({"file_name": "../x.png", "text": "x"}, "../x.png", "lies outside the dataset"),
    ({"file_name": "broken.png", "text": "x"}, "broken.png", "not an image that Pillow can read"),
    ({"file_name": "text.md", "text": "x"}, "text.md", "not an image that Pillow can read"),
    ({"file_name": "half.jpg", "text": "x"}, "half.jpg", "truncated"),
    ({"file_name": "half.png", "text": "x"}, "half.png", "truncated"),
]


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """BAD_LINES after two good ones, and an image that no line names."""
    folder = tmp_path / "set"
    content = image_bytes("PNG", 64)
    for name in ("a.png", "b.png", "null.png", "bare.png", "empty.png", "unnamed.png"):
        put(folder / name, data=content)
    put(tmp_path / "x.png", data=content)
    (folder / "sub").mkdir()
    put(folder / "broken.png", data=b"\x89P and then nothing of the kind")
    put(folder / "text.md", data=b"# Not an image")
    for name, form in (("half.jpg", "JPEG"), ("half.png", "PNG")):
        data = image_bytes(form, 64)
        put(folder / name, data=data[: len(data) * 3 // 4])
    good = [{"file_name": name, "text": "good"} for name in ("a.png", "b.png")]
    put_list(folder, *good, *(line for line, _, _ in BAD_LINES))
    return folder


def test_every_refusal_has_its_reason_and_stops_nothing(
    refused: Path, tmp_path: Path, encode_to: Encode
) -> None:
    out = encode_to(refused, tmp_path / "cache", max_rejected=1)
    text = (out / "rejected.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [row["key"] for row in rows] == sorted(key_of(row["path"]) for row in rows)
    assert all(row["key"] == key_of(row["path"]) for row in rows)
    results = {row["path"]: row["reason"] for row in rows}
    assert results.pop("unnamed.png") == "not named in captions.jsonl, so it has no caption"
    expected = {path.format(n): why.format(n) for n, (_, path, why) in enumerate(BAD_LINES, 3)}
    assert set(results) == set(expected)
    for path, why in expected.items():
        assert why.lower() in results[path].lower(), path
        assert "\n" not in results[path]
    cache = Cache(out)
    (group,) = cache.groups()
    places = [cache.locate(group, row) for row in range(group.count)]
    assert {shard.metadata(row)["path"] for shard, row in places} == {"a.png", "b.png"}


def test_a_list_of_refused_lines_only_is_no_error(tmp_path: Path) -> None:
    put_list(tmp_path, {"file_name": "gone.png", "text": "x"})
    source = read_one(tmp_path)
    assert (source.records, set(reasons(source))) == ([], {"gone.png"})
    assert len(source.records) + len(source.rejected) == 1


def one_more(folder: Path, line: str) -> Source:
    """A good image and one bad line."""
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


# Encodings, and tables.


def test_a_line_that_is_not_utf8_is_one_rejected_line(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name)
    lines = [b'{"file_name": "a.png", "text": "caf\xe9"}', b'{"file_name": "b.png", "text": "b"}']
    (tmp_path / "captions.jsonl").write_bytes(b"\r".join(lines))
    source = read_one(tmp_path)
    assert captions(source) == {"b.png": ("b",)}
    assert reasons(source)["captions.jsonl:1"] == "not UTF-8 text"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-8-sig"])
@pytest.mark.parametrize("name", ["captions.jsonl", "Metadata.CSV"])
def test_lists_in_other_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    put(tmp_path / "a.png")
    row = '{"file_name": "a.png", "text": "a \u732b"}\n'
    text = "file_name,text\na.png,a \u732b\n" if name.endswith("CSV") else row
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert captions(read_one(tmp_path)) == {"a.png": ("a \u732b",)}


TABLE = """File_Name{0} text{0}weight{0}repeats
a.png{0}"a cat, ""big""
and red"{0}0.5{0}3
b.png{0}a dog{0}{0}
c.png{0}x{0}heavy{0}
d.png{0}x{0}1{0}1{0}more
e.png{0}
"""


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_a_list(tmp_path: Path, separator: str) -> None:
    for name in "abcdef":
        put(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text(TABLE.format(separator))
    source = read_one(tmp_path)
    results = {
        record.path: (record.captions, record.weight, record.repeats) for record in source.records
    }
    assert results == {
        "a.png": (('a cat, "big"\nand red',), 0.5, 3),
        "b.png": (("a dog",), 1.0, 1),
    }
    why = reasons(source)
    assert "its weight must be a number" in why["c.png"]
    assert why["metadata.csv:6"] == "5 fields in 4 columns: quote the caption"
    assert set(why) == {"c.png", "metadata.csv:6", "d.png", "e.png", "f.png"}


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("a.png,a cat\n")
    assert reasons(read_one(tmp_path))["captions.csv:1"].startswith("none of its columns is file_")
    (tmp_path / "captions.csv").write_text('file_name,text\na.png,"a cat\n')
    assert "not valid CSV" in reasons(read_one(tmp_path))["captions.csv:2"]


def test_a_table_is_not_read_beside_texts_or_a_list(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "of the text")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,of the table\n")
    source = read_one(tmp_path)
    assert (captions(source), source.unused) == ({"a.png": ("of the text",)}, ["metadata.csv"])
    put_list(tmp_path, {"file_name": "a.png", "text": "of the list"})
    source = read_one(tmp_path)
    assert captions(source) == {"a.png": ("of the list",)}
    assert source.unused == ["a.txt", "metadata.csv"]


def test_each_folder_may_have_a_list_of_its_own(tmp_path: Path) -> None:
    """As Hugging Face's imagefolder has them: names are relative to the list."""
    for name in ("cats/a.png", "cats/more/b.png", "cats/left.png", "dogs/images/a.png"):
        put(tmp_path / name)
    put(tmp_path / "plain" / "c.png", "beside it")
    put(tmp_path / "dogs" / "a-mask.png")
    cats = [{"file_name": name, "text": name} for name in ("a.png", "more/b.png", "../plain/c.png")]
    put_list(tmp_path / "cats", *cats, name="metadata.jsonl")
    put_list(tmp_path / "cats" / "more", {"file_name": "b.png", "text": "not read"})
    put_list(
        tmp_path / "dogs", "file_name,text,mask", "a.png,a dog,a-mask.png", name="metadata.csv"
    )
    source = read_one(tmp_path)
    assert captions(source) == {
        "cats/a.png": ("a.png",),
        "cats/more/b.png": ("more/b.png",),
        "plain/c.png": ("../plain/c.png",),
        "dogs/images/a.png": ("a dog",),
    }
    assert [r.path for r in source.records if r.mask] == ["dogs/images/a.png"]
    assert reasons(source) == {
        "cats/left.png": "not named in cats/metadata.jsonl, so it has no caption"
    }
    assert source.unused == ["cats/more/captions.jsonl", "plain/c.txt"]
    put_list(tmp_path / "dogs", {"file_name": "../cats/a.png", "text": "x"})
    why = reasons(read_one(tmp_path))
    assert why["dogs/captions.jsonl: cats/a.png"] == "is named in cats/metadata.jsonl already"


def test_a_list_of_a_folder_yields_to_the_texts_in_it_alone(tmp_path: Path) -> None:
    """A .csv counts where no image has a text: README.txt is none, nor are those of a folder
    beside it."""
    put(tmp_path / "a" / "x.png")
    put(tmp_path / "b" / "x.png", "a text")
    (tmp_path / "a" / "README.txt").write_text("about the set")
    for folder in "ab":
        put_list(tmp_path / folder, "file_name,text", "x.png,of the list", name="metadata.csv")
    assert captions(read_one(tmp_path)) == {"a/x.png": ("of the list",), "b/x.png": ("a text",)}


@pytest.mark.parametrize("splits", [("train", "validation"), ("train", "test"), ("train",)])
def test_each_split_may_have_a_list(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        put(tmp_path / split / "a.png")
        put_list(tmp_path / split, "file_name,text", f"a.png,{split}", name="metadata.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = read_set(tmp_path)
    texts = {name: [*captions(source).values()] for name, source in sources.items()}
    assert texts == (
        {"train": [("train",)], "val": [("validation",)]}
        if "validation" in splits
        else {"": [("train",)]}
    )


def test_other_columns_that_end_in_file_name(tmp_path: Path) -> None:
    for name in ("a.png", "a-depth.png", "a-seen.png"):
        put(tmp_path / name)
    row = {"image_file_name": "a.png", "mask_file_name": "a-seen.png", "text": "x"}
    put_list(tmp_path, {**row, "depth_file_name": "a-depth.png"}, name="metadata.jsonl")
    with pytest.warns(UserWarning, match="named by its image_file_name"):
        (record,) = read_one(tmp_path).records
    assert record.path == "a.png" and record.mask and record.mask.file.name == "a-seen.png"
    put_list(tmp_path, "left_file_name,right_file_name,text", "a.png,b.png,x", name="captions.csv")
    (tmp_path / "metadata.jsonl").unlink()
    assert "none of its columns is" in reasons(read_one(tmp_path))["captions.csv:1"]
