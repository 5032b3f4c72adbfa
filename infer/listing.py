"""The file with the captions beside generated images: ``captions.jsonl``, or COCO's JSON."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.documents import parse_json, read_bounded

MAX_BYTES = 1_000_000_000
DESCRIPTION = "pictures drawn by shardtune"  # a mark in files that exist: it stays
NAME = re.compile(r"[0-9]{6,}\.png")


@dataclass(frozen=True)
class Row:
    """An image's file name, its caption, and its size in pixels."""

    file_name: str
    text: str
    width: int
    height: int


def lines(rows: Iterable[Row]) -> str:
    """``captions.jsonl``."""
    about = ({"file_name": one.file_name, "text": one.text} for one in rows)
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in about)


def coco(rows: Iterable[Row]) -> str:
    """COCO's layout of captions (https://cocodataset.org/#format-data)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, one in enumerate(rows, start=1):
        size = {"width": one.width, "height": one.height}
        images.append({"id": number, "file_name": one.file_name, **size})
        annotations.append({"id": number, "image_id": number, "caption": one.text})
    info = {"description": DESCRIPTION}
    found = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    return json.dumps(found, ensure_ascii=False) + "\n"


def read_listing(path: Path, is_coco: bool) -> dict[str, str]:
    """The caption of each file that a listing of ours names.

    Raises:
        ValueError: not a listing that generate wrote, or edited since.
    """
    data = read_bounded(path, MAX_BYTES)
    try:
        pairs = dict(_coco_pairs(parse_json(data)) if is_coco else _line_pairs(data))
        if not all(NAME.fullmatch(name) and isinstance(text, str) for name, text in pairs.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError):  # TypeError: also a list where an object must be
        raise ValueError(
            f"{path}: not written by generate, or changed since; move it away, or give another "
            "--out"
        ) from None
    return pairs


def _line_pairs(data: bytes) -> Iterator[tuple[str, str]]:
    for line in data.decode().split("\n"):
        row = parse_json(line) if line else None
        if isinstance(row, dict) and row.keys() == {"file_name", "text"}:
            yield row["file_name"], row["text"]
        elif line:
            raise ValueError


def _coco_pairs(found: Any) -> Iterator[tuple[str, str]]:
    if found["info"] != {"description": DESCRIPTION}:
        raise ValueError
    names = {one["id"]: one["file_name"] for one in found["images"]}
    for one in found["annotations"]:
        yield names[one["image_id"]], one["caption"]
