"""One JSON file about all images: COCO's captions, and what generate writes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from infer.outputs import CaptionRow, coco_listing, jsonl_listing
from tests.folders import captions, put, put_list, read_one, read_set, reasons


def put_coco(path: Path, images: list[Any], annotations: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations}
    path.write_text(json.dumps(content), encoding="utf-8")


def test_coco_as_its_archives_are_unpacked(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        put(tmp_path / split / "000000000009.jpg")
        images = [{"id": 9, "file_name": "000000000009.jpg"}]
        notes = [{"image_id": 9, "caption": f"{split} {text}"} for text in ("one", "two \n")]
        put_coco(tmp_path / "annotations" / f"captions_{split}.json", images, notes)
    boxes = [{"image_id": 9, "bbox": [0, 0, 1, 1]}]
    put_coco(tmp_path / "annotations" / "instances_val2017.json", [], boxes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = read_set(tmp_path)
    assert {name: captions(source) for name, source in sources.items()} == {
        "train": {"train2017/000000000009.jpg": ("train2017 one", "train2017 two")},
        "val": {"val2017/000000000009.jpg": ("val2017 one", "val2017 two")},
    }
    assert sources["train"].unused == ["annotations/instances_val2017.json"]


def test_each_bad_entry_of_a_coco_file_is_rejected_with_its_reason(tmp_path: Path) -> None:
    for name in ("a.png", "x/b.png", "x/twice.png", "y/twice.png", "none.png"):
        put(tmp_path / name)
    images = [
        {"id": 1, "file_name": "a.png"},
        {"id": "b", "file_name": "b.png"},
        {"id": 3, "file_name": "twice.png"},
        {"id": 4, "file_name": "none.png"},
        {"id": [5], "file_name": "a.png"},
        {"id": 6},
        "no object",
        {"id": 8, "file_name": "gone.png"},
    ]
    notes: list[Any] = [{"image_id": n, "caption": f"text {n}"} for n in (1, "b", 3)]
    notes += [
        {"image_id": 8, "caption": "x"},
        {"image_id": 99, "caption": "x"},
        7,
        {"caption": "x"},
    ]
    put_coco(tmp_path / "annotations.json", images, notes)
    source = read_one(tmp_path)
    assert captions(source) == {"a.png": ("text 1",), "x/b.png": ("text b",)}
    assert reasons(source) == {
        "annotations.json:3": "'twice.png' is both x/twice.png and y/twice.png",
        "none.png": "annotations.json:4: no caption: none of text is text",
        "annotations.json:5": "an image without an id",
        "annotations.json:6": "an image without a file_name",
        "annotations.json:7": "an image without an id",
        "gone.png": "annotations.json:8: no such file, nor in images/",
        "annotations.json:9": "has captions of 1 images that it does not list: 99",
        "x/twice.png": "not named in annotations.json, so it has no caption",
        "y/twice.png": "not named in annotations.json, so it has no caption",
    }
    (tmp_path / "annotations.json").write_text('{"annotations": [{"caption"')
    assert "not valid JSON" in reasons(read_one(tmp_path))["annotations.json:1"]


def test_annotations_without_captions_and_other_files_are_not_lists(tmp_path: Path) -> None:
    put(tmp_path / "a.png", "a text")
    put(tmp_path / "captions_b.png")
    put_coco(tmp_path / "annotations.json", [], [{"image_id": 1, "bbox": []}])
    (tmp_path / "captions_b.json").write_text('{"caption": "beside it", "annotations": 1}')
    assert captions(read_one(tmp_path)) == {"a.png": ("a text",), "captions_b.png": ("beside it",)}
    (tmp_path / "a.txt").unlink()
    assert captions(read_one(tmp_path)) == {"captions_b.png": ("beside it",)}


@pytest.mark.parametrize("layout", ["simple", "coco"])
def test_what_generate_writes_is_read_as_a_dataset(tmp_path: Path, layout: str) -> None:
    rows = [CaptionRow(f"{number:06d}.png", f"text {number}", 8, 8) for number in range(3)]
    write, name = (
        (coco_listing, "annotations.json")
        if layout == "coco"
        else (jsonl_listing, "captions.jsonl")
    )
    folder = "images/" if layout == "coco" else ""
    for row in rows:
        put(tmp_path / "drawn" / folder / row.file_name)
    put_list(tmp_path / "drawn", write(rows), name=name)
    put(tmp_path / "drawn" / "contact-sheet.png")
    expected = {f"{folder}{row.file_name}": (row.text,) for row in rows}
    assert captions(read_one(tmp_path / "drawn")) == expected
    put(tmp_path / "own.png", "own")
    more = {f"drawn/{path}": text for path, text in expected.items()}
    assert captions(read_one(tmp_path)) == {**more, "own.png": ("own",)}, "among other images"
