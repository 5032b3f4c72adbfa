"""Captions between the file and the text encoders: each rule, and the same in every run."""

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from precompute.dataset.captions import expand_wildcards, shuffled_tags
from precompute.settings import EncodeSettings
from tests.folders import captions, put, put_list, read_one, read_set, reasons
from tests.test_tars import put_tar


def test_caption_files_are_texts_too(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a")
    for name in ("b", "sub/c", "both"):
        put(tmp_path / f"{name}.png", "a" if name == "both" else None)
        (tmp_path / f"{name}.caption").write_text(f" {name}\n")
    texts = {"a.png": ("a",), "b.png": ("b",), "sub/c.png": ("sub/c",)}
    expected = r"1 image with texts .* first of \.txt \.caption is taken, e\.g\. of both\.png"
    with pytest.warns(UserWarning, match=expected):
        source = read_one(tmp_path)
    assert captions(source) == texts | {"both.png": ("a",)} and not reasons(source)
    assert source.unused == [], "both are sidecars"
    with pytest.warns(UserWarning, match="first of .caption .txt"):
        source = read_one(tmp_path, caption_extension="CAPTION, .txt")
    assert captions(source) == texts | {"both.png": ("both",)}
    (tmp_path / "both.caption").write_text("a\n")
    assert captions(read_one(tmp_path)) == texts | {"both.png": ("a",)}, "equal: no warning"


@pytest.mark.parametrize("packed", [False, True])
def test_texts_may_have_any_ending(tmp_path: Path, packed: bool) -> None:
    files = {"a.png": b"unread", "a.Tags": b"x, y", "b.png": b"unread", "b.png.txt": b"full name"}
    files |= {"b.txt.md": b"", "c.png": b"unread", "c.txt": b"c", "c.png.txt": b"not this"}
    if packed:
        put_tar(tmp_path / "x.tar", files)
    else:
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
    source = read_one(tmp_path, caption_extension="tags,txt")
    assert {*captions(source).values()} == {("x, y",), ("full name",), ("c",)}
    assert {name.rpartition("/")[2] for name in source.unused} == {"b.txt.md", "c.png.txt"}
    assert {*captions(read_one(tmp_path)).values()} == {("full name",), ("c",)}


def test_json_beside_an_image_may_have_its_caption(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "a": {"caption": " a cat ", "tags": ["not", "these"]},
        "b": {"tags": ["one", "two"], "weight": "any tool's"},
        "c": {"prompt": ["x", "y"]},
        "d": {"tags": "one, two"},
        "beside": {"caption": "not this"},
        "other": {"score": 3},
        "list": ["x"],
        "number": {"caption": 5},
    }
    for name, row in rows.items():
        put(tmp_path / f"{name}.png", "a text" if name == "beside" else None)
        (tmp_path / f"{name}.json").write_text(json.dumps(row))
    source = read_one(tmp_path)
    assert captions(source) == {
        "a.png": ("a cat",),
        "b.png": ("one, two",),
        "c.png": ("x", "y"),
        "d.png": ("one, two",),
        "beside.png": ("a text",),
    }
    assert source.unused == ["beside.json", "list.json", "number.json", "other.json"]
    why = reasons(source)
    assert why["other.png"].startswith("no caption: other.txt is missing, and other.json has no ")
    assert "list.json is no JSON of a caption: not a JSON object" in why["list.png"]
    kept = captions(read_one(tmp_path, missing_caption="any"))
    assert kept["other.png"] == kept["number.png"] == ("any",), "another tool's JSON says nothing"


def test_the_metadata_of_kohya_is_a_list(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("cats/a.png", "b.png", "c.webp", "d.jpg", "d.png", "e.png"):
        put(folder / name)
    entries: dict[str, Any] = {
        "C:\\sets\\all\\cats\\a.png": {"caption": "a cat", "tags": "one, two"},
        "b": {"tags": ["x", "y"], "train_resolution": [1024, 1024]},
        "/home/someone/c": {"caption": "sea"},
        "d": {"caption": "which?"},
        "e": {"train_resolution": [64, 64]},
        "gone": {"caption": "x"},
        "odd": 5,
    }
    (folder / "meta_cap.json").write_text('{"b": {"caption": "older"}}')
    (folder / "meta_lat.json").write_text(json.dumps(entries))
    source = read_one(folder)
    assert captions(source) == {
        "cats/a.png": ("a cat, one, two",),
        "b.png": ("x, y",),
        "c.webp": ("sea",),
    }
    why = reasons(source)
    assert {*why} == {"meta_lat.json:4", "d.jpg", "d.png", "e.png", "gone", "meta_lat.json:7"}
    assert "'d' is both d.jpg and d.png" in why["meta_lat.json:4"]
    assert source.unused == ["meta_cap.json"]
    put(folder / "b.png", "a text")
    assert captions(read_one(folder)) == {"b.png": ("a text",)}, "as for a .csv"
    (folder / "b.txt").unlink()
    (folder / "meta_lat.json").write_text("[" * 9)
    assert "not valid JSON" in reasons(read_one(folder))["meta_lat.json:1"]


def test_names_may_be_captions(tmp_path: Path) -> None:
    put(tmp_path / "10_ohwx man" / "a.b.png")
    put(tmp_path / "10_ohwx man" / "told.png", "a text")
    put(tmp_path / "top.png")
    with pytest.warns(UserWarning, match="give --repeat-folders"):
        by_file = captions(read_one(tmp_path, caption_from="filename"))
    with pytest.warns(UserWarning, match="give --repeat-folders"):
        by_folder = read_one(tmp_path, caption_from="folder")
    written = {"10_ohwx man/told.png": ("a text",)}
    assert by_file == written | {"10_ohwx man/a.b.png": ("a.b",), "top.png": ("top",)}
    assert captions(by_folder) == written | {"10_ohwx man/a.b.png": ("ohwx man",)}
    assert set(reasons(by_folder)) == {"top.png"}


@pytest.mark.parametrize(
    ("suffix", "text"), [("photo", "p x photo"), (", photo", "p x, photo"), ("\tz", "p x\tz")]
)
def test_a_suffix_never_joins_two_words(tmp_path: Path, suffix: str, text: str) -> None:
    put(tmp_path / "a.png", "x")
    put(tmp_path / "b.png", "")
    settings: dict[str, Any] = {"caption_suffix": suffix, "empty_captions": True}
    result = captions(read_one(tmp_path, caption_prefix="p", **settings))
    assert result == {"a.png": (text,), "b.png": ("",)}


def test_each_line_may_be_a_caption(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "\ufeff one\r\n\n  two \nthree\u2028still three\n")
    put(tmp_path / "blank.png", " \n\n")
    source = read_one(tmp_path, caption_lines=True)
    assert captions(source) == {"a.png": ("one", "two", "three\u2028still three")}
    assert reasons(source) == {"blank.png": "its caption is empty"}


def test_a_list_may_give_several_captions(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        put(tmp_path / f"{name}.png")
    put_list(
        tmp_path,
        {"file_name": "a.png", "text": [" one ", "two", "one"]},
        {"file_name": "b.png", "text": None, "caption": ["x"]},
        {"file_name": "c.png", "text": ["x", 5]},
        {"file_name": "d.png", "text": []},
        {"file_name": "e.png", "text": ["x", " "]},
    )
    source = read_one(tmp_path)
    assert captions(source) == {
        "a.png": ("one", "two", "one"),
        "b.png": ("x",),
        "e.png": ("x",),  # the blank one beside it is dropped
    }
    assert {path: why.partition(": no caption")[0] for path, why in reasons(source).items()} == {
        "c.png": "captions.jsonl:3",
        "d.png": "captions.jsonl:4",
    }
    kept = read_one(tmp_path, missing_caption="any", empty_captions=True)
    assert captions(kept)["d.png"] == ("any",), "it has none"
    assert captions(kept)["e.png"] == ("x", ""), "it has an empty one"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, {"full.png": ("p full",)}),
        ({"empty_captions": True}, {"full.png": ("p full",), "empty.png": ("",)}),
        (
            {"missing_caption": "empty"},
            {"full.png": ("p full",), "empty.png": ("",), "none.png": ("",)},
        ),
        (
            {"missing_caption": "a thing"},
            {"full.png": ("p full",), "empty.png": ("p a thing",), "none.png": ("p a thing",)},
        ),
        (
            {"missing_caption": "a thing", "empty_captions": True},
            {"full.png": ("p full",), "empty.png": ("",), "none.png": ("p a thing",)},
        ),
    ],
    ids=["reject", "keep empty", "empty", "text", "text, keep empty"],
)
@pytest.mark.parametrize("listed", [False, True])
def test_images_without_a_caption(
    tmp_path: Path, rule: dict[str, Any], expected: dict[str, tuple[str, ...]], listed: bool
) -> None:
    texts = {"full": "full", "empty": "", "none": None}
    for name, text in texts.items():
        put(tmp_path / f"{name}.png", None if listed else text)
    put(tmp_path / "latin.png", b"caf\xe9")
    if listed:
        put_list(tmp_path, *({"file_name": f"{n}.png", "text": t} for n, t in texts.items()))
    source = read_one(tmp_path, caption_prefix="p", **rule)
    assert captions(source) == expected
    rejected = {"full.png", "empty.png", "none.png", "latin.png"} - set(expected)
    assert set(reasons(source)) == rejected, "what cannot be read is not missing"


@pytest.mark.parametrize(("prefix", "text"), [("sks,", "sks, x"), ("sks\t", "sks\tx"), ("", "x")])
def test_a_prefix_never_joins_two_words(tmp_path: Path, prefix: str, text: str) -> None:
    put(tmp_path / "a.png", "x")
    assert captions(read_one(tmp_path, caption_prefix=prefix)) == {"a.png": (text,)}


def test_shuffles_are_all_different_and_keep_the_first() -> None:
    caption = "one, two ,three,, four, five"
    orders = shuffled_tags(caption, 8, 2, "key")
    assert len(set(orders)) == 8 - 2, "three tags have six orders"
    assert set(orders) == {
        ", ".join(["one", "two", *rest]) for rest in permutations(["three", "four", "five"])
    }
    assert len(set(shuffled_tags(caption, 100, 0, "key"))) == 100
    assert sorted(shuffled_tags("a, a, b", 9, 0, "key")) == ["a, a, b", "a, b, a", "b, a, a"]
    for alone in ("no commas", "", "a,"):
        assert shuffled_tags(alone, 3, 0, "key") == [alone.strip(",")]


def test_shuffles_depend_on_the_sample_alone() -> None:
    caption = ", ".join(map(str, range(9)))
    assert shuffled_tags(caption, 3, 1, "a") == shuffled_tags(caption, 5, 1, "a")[:3], (
        "a larger N only adds"
    )
    assert shuffled_tags(caption, 3, 1, "a") != shuffled_tags(caption, 3, 1, "b")
    first = [shuffled_tags(caption, 1, 0, str(key))[0][0] for key in range(900)]
    counts = [first.count(str(tag)) for tag in range(9)]
    assert all(abs(count - 100) < 5 * math.sqrt(100 * 8 / 9) for count in counts), counts


def test_dropout_draws_from_orders_and_subsets() -> None:
    caption = "k, " + ", ".join("abcdefgh")
    texts = shuffled_tags(caption, 200, 1, "key", 0.25)
    assert len(set(texts)) == 200 and texts[:50] == shuffled_tags(caption, 50, 1, "key", 0.25)
    assert texts != shuffled_tags(caption, 200, 1, "other", 0.25)
    tails = [text.split(", ")[1:] for text in texts]
    assert all(text.startswith("k") for text in texts)
    assert all(len(set(tail)) == len(tail) and set(tail) <= set("abcdefgh") for tail in tails)
    share = sum(map(len, tails)) / (8 * 200)
    assert abs(share - 0.75) < 5 * math.sqrt(0.25 * 0.75 / (8 * 200)), share
    assert any(sorted(tail) != tail for tail in tails), "shuffled too"
    assert shuffled_tags("a, b", 9, 0, "key", 0.999) != [""]
    assert set(shuffled_tags("a, b", 99, 0, "key", 0.5)) == {"a", "b", "a, b", "b, a"}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_separator_keeps_what_stands_before_it(dropout: float) -> None:
    texts = shuffled_tags("x, y ||| a, b, c ||| z", 30, 0, "key", dropout)
    assert all(text.startswith("x, y") and text.endswith(", z") for text in texts), texts
    assert not any("|" in text for text in texts)
    orders = {", ".join(["x, y", *order, "z"]) for order in permutations("abc")}
    assert orders == set(texts) if not dropout else len(set(texts)) > 6
    assert shuffled_tags("x, y ||| a", 3, 0, "key") == ["x, y, a"]


def test_wildcards_are_expanded_by_key_and_weight(tmp_path: Path) -> None:
    caption = "a {red|{dark|light} blue|2::green} {cat} {0::x|y}"
    texts = expand_wildcards(caption, 9, "key")
    assert set(texts) == {
        f"a {color} {{cat}} y" for color in ("red", "dark blue", "light blue", "green")
    }
    assert texts[:2] == expand_wildcards(caption, 2, "key")
    first = [expand_wildcards("{a|3::b}", 1, str(key))[0] for key in range(900)]
    assert abs(first.count("b") - 675) < 5 * math.sqrt(900 * 0.75 * 0.25)
    for plain in ("no braces", "{one}", "a | b", "{a|b", ""):
        assert expand_wildcards(plain, 5, "key") == [plain]
    put(tmp_path / "a.png", "{a|b}, c")
    assert captions(read_one(tmp_path)) == {"a.png": ("{a|b}, c",)}, "only if asked for"
    assert {*captions(read_one(tmp_path, wildcards=4))["a.png"]} == {"a, c", "b, c"}
    both = captions(read_one(tmp_path, wildcards=4, shuffle_tags=4))["a.png"]
    assert {*both} == {"a, c", "c, a", "b, c", "c, b"}


def test_lists_of_wildcards(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    (lists / "clothes").mkdir(parents=True)
    (lists / "color.txt").write_text("# colors\nred\n\n3::{dark|light} blue\r\n")
    (lists / "clothes/hat.txt").write_text("a __color__ hat\n")
    texts = expand_wildcards("__clothes/hat__, {x|y}", 9, "key", lists)
    hats = ("red", "dark blue", "light blue")
    assert set(texts) == {f"a {color} hat, {other}" for color in hats for other in "xy"}
    assert texts[:2] == expand_wildcards("__clothes/hat__, {x|y}", 2, "key", lists)
    first = [expand_wildcards("__color__", 1, str(key), lists)[0] for key in range(900)]
    assert abs(first.count("red") - 225) < 5 * math.sqrt(900 * 0.75 * 0.25)
    (lists / "color.txt").write_text("green")  # a list that was changed is read again
    assert expand_wildcards("__color__", 9, "key", lists) == ["green"]
    for plain in ("a__b", "______", "__ x __"):
        assert expand_wildcards(plain, 5, "key", lists) == [plain]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("__shape__", "its caption has __shape__, and no shape.txt can be read"),
        ("__a/../../secret__", "and no a/../../secret.txt can be read"),
        ("__self__", "wildcards hold wildcards, 20 deep"),
        ("__twice__", "more than 100,000 characters"),
        ("__empty__", "the list empty.txt is empty"),
        ("__binary__", "the list binary.txt holds NUL characters"),
    ],
)
def test_a_list_that_cannot_be_used_rejects_the_image(
    tmp_path: Path, caption: str, reason: str
) -> None:
    lists = tmp_path / "lists"
    (lists / "a").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("private")
    for name, text in (
        ("self", "__self__"),
        ("twice", "__twice__ and __twice__"),
        ("empty", "# nothing\n"),
        ("binary", "a\0\0b"),
    ):
        (lists / f"{name}.txt").write_text(text)
    put(tmp_path / "data/a.png", caption)
    put(tmp_path / "data/b.png", "plain")
    scanned = read_one(tmp_path / "data", wildcards=2, wildcard_lists=lists)
    assert captions(scanned) == {"b.png": ("plain",)}
    assert [rejected.path for rejected in scanned.rejected] == ["a.png"]
    assert reason in scanned.rejected[0].reason
    without = read_one(tmp_path / "data", wildcards=2)
    assert "give --wildcard-lists FOLDER with" in without.rejected[0].reason


def test_each_caption_is_shuffled_behind_its_prefix(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "k, a, b, c\nk, d, e, f")
    put(tmp_path / "twin.png", "k, a, b, c\nk, d, e, f")
    put(tmp_path / "one.png", "lonely")
    settings: dict[str, Any] = {
        "caption_lines": True,
        "shuffle_tags": 4,
        "keep_tokens": 1,
        "caption_prefix": "my, style,",
    }
    result = captions(read_one(tmp_path, **settings))
    assert len(result["a.png"]) == len(set(result["a.png"])) == 8
    for number, caption in enumerate(result["a.png"]):
        assert caption.startswith("my, style, k, ")
        tags = caption.removeprefix("my, style, k, ").split(", ")
        assert sorted(tags) == [["a", "b", "c"], ["d", "e", "f"]][number // 4]
    assert result["one.png"] == ("my, style, lonely",)
    assert result["twin.png"] != result["a.png"], "each image has orders of its own"
    assert captions(read_one(tmp_path, **settings)) == result


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shuffle_tags": -1}, "--shuffle-tags must be at least 0, not -1"),
        ({"keep_tokens": 1}, "--keep-tokens goes with --shuffle-tags"),
        ({"crops": 1001}, "--crops must be at most 1000, not 1001"),
        ({"shuffle_tags": 500, "long_captions": 9}, "are more than 4000 chunks an image"),
        ({"caption_extension": "txt,,x"}, "--caption-extension must be endings"),
        ({"caption_extension": "txt,.JSON"}, "--caption-extension must be endings"),
        ({"tag_dropout": 0.1}, "--tag-dropout goes with --shuffle-tags"),
        ({"shuffle_tags": 2, "tag_dropout": 1.0}, "--tag-dropout must be in 0..1"),
        ({"wildcards": 99, "shuffle_tags": 99}, "of --wildcards 99 of --long-captions 1 are more"),
        ({"min_size": -1}, "--min-size must be at least 0, not -1"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EncodeSettings(dataset=Path("x"), base="", out=Path("x"), **settings)


# Encodings.


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("a red heart".encode("utf-16-le"), "a red heart"),
        ("a red heart".encode("utf-16-be"), "a red heart"),
        ("\u732b: a cat, sitting".encode("utf-16-le"), "\u732b: a cat, sitting"),
        ("\u732b".encode("utf-16"), "\u732b"),
        ("\ufeff\u732b".encode("utf-16-be"), "\u732b"),
        ("a cat".encode("utf-32"), "a cat"),
        ("\ufeffcaf\u00e9".encode(), "caf\u00e9"),
        (b"one\r\ntwo\rthree", "one\ntwo\nthree"),
    ],
    ids=["le", "be", "mixed", "marked", "marked be", "utf-32", "utf-8 mark", "line ends"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_text_is_the_same_in_any_encoding_and_place(
    tmp_path: Path, data: bytes, text: str, packed: bool
) -> None:
    files = {"a.png": b"unread", "a.txt": data}
    if packed:
        put_tar(tmp_path / "x.tar", files)
    else:
        put(tmp_path / "a.png", data)
    (result,) = captions(read_one(tmp_path)).values()
    assert result == (text,)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"a cat\0", "a.txt holds NUL characters: save it as UTF-8"),
        (b"\0\0\0\0", "a.txt holds NUL characters"),
        ("\u732b\u732b\u732b a".encode("utf-16-le"), "a.txt"),
        (b"\xff\xfea", "a.txt is not UTF-16 text"),
        (b"caf\xe9", "a.txt is not UTF-8 text"),
        (b"a\0 \0c\xd8", "a.txt is not UTF-16 text"),
    ],
)
def test_what_is_no_text_is_rejected_by_name(tmp_path: Path, data: bytes, why: str) -> None:
    put(tmp_path / "a.png", data)
    source = read_one(tmp_path, missing_caption="any")
    assert source.records == [] and reasons(source)["a.png"].startswith(f"no caption: {why}")


def test_captions_of_a_list_keep_to_the_same_rules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"{name}.png")
    put_list(
        tmp_path,
        {"file_name": "a.png", "text": "one\r\ntwo\rthree"},
        {"file_name": "b.png", "text": "a\0b"},
    )
    source = read_one(tmp_path)
    assert captions(source) == {"a.png": ("one\ntwo\nthree",)}
    assert reasons(source) == {"b.png": "its caption holds NUL characters: save it as UTF-8"}


def test_blank_captions_beside_others_are_dropped_and_counted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "a.png", "text": ["x", "", " ", "y"]},
        {"file_name": "b.png", "text": "z"},
    ]
    put_list(tmp_path, *rows)
    with pytest.warns(
        UserWarning, match=r"2 blank captions dropped beside others, e\.g\. of a\.png"
    ):
        (source,) = read_set(tmp_path, missing_caption="any").values()
    assert captions(source) == {"a.png": ("x", "y"), "b.png": ("z",)}
