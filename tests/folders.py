"""Datasets as users have them, made small: images, texts, lists; and what is read of them."""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from precompute.dataset.records import Source
from precompute.dataset.sources import read_dataset
from precompute.settings import EncodeSettings


def image_bytes(form: str = "PNG", side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, form)
    return file.getvalue()


def put(path: Path, text: str | bytes | None = None, data: bytes = b"unread") -> None:
    """An image, and the text beside it."""
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
    return read_dataset(EncodeSettings(dataset=folder, base="", out=folder, **settings))


def read_one(folder: Path, **settings: Any) -> Source:
    (source,) = read_set(folder, **settings).values()
    return source


def key_of(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:20]


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    results = {record.path: record.captions for record in source.records}
    assert len(results) == len(source.records)
    return results


def reasons(source: Source) -> dict[str, str]:
    results = {rejected.path: rejected.reason for rejected in source.rejected}
    assert len(results) == len(source.rejected)
    return results


def files_in(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
        if not name.endswith((".txt", ".jsonl"))
    }
