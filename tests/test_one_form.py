"""A caption has one form, wherever it lies and however its file is encoded."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tests.folders import captions, image_bytes, put, read_one
from tests.test_arrow import put_arrow
from tests.test_tables import put_table
from tests.test_tars import put_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*are (taken from its column|named by):UserWarning")
LINES = ("ein roter W\u00fcrfel", "und \u65e5\u672c \U0001f642", "", "b")
ENCODINGS = {
    "plain": lambda text: text.encode(),
    "marked": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}


def files_of(source: str, text: str, end: str) -> tuple[str, str]:
    """The name and the content of a file that gives ``a.png`` the caption ``text``."""
    row = {"file_name": "a.png", "text": text}
    if source in ("a.txt", "a.caption"):
        return source, f" {text}{end}"
    if source.endswith(".csv"):
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator=end).writerows([[*row], [*row.values()]])
        return source, file.getvalue()
    content: Any = row
    if source == "meta_cap.json":
        content = {"a": {"caption": text}}
    elif source == "annotations.json":
        notes = [{"image_id": 1, "caption": text}]
        content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": notes}
    indent = None if source.endswith(".jsonl") else 1
    written = json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
    return source, written.replace("\n", end)


SOURCES = (
    *("a.txt", "a.caption", "a.json", "metadata.jsonl", "metadata.csv", "meta_cap.json"),
    *("annotations.json", "tar a.txt", "tar a.json"),
)


@pytest.mark.parametrize("source", SOURCES)
def test_files_in_every_encoding_with_every_line_end(tmp_path: Path, source: str) -> None:
    for encoding, encode in ENCODINGS.items():
        for end in ("\n", "\r\n", "\r"):
            folder = tmp_path / f"{encoding} {end!r}".replace("\\", "-")
            kind = source.rpartition(" ")[2]
            name, content = files_of(kind, end.join(LINES), end)
            if source.startswith("tar"):
                put_tar(folder / "x.tar", {"a.png": b"unread", name: encode(content)})
            else:
                put(folder / "a.png")
                (folder / name).write_bytes(encode(content))
            texts = [*captions(read_one(folder)).values()]
            assert texts == [("\n".join(LINES),)], (encoding, end)


@pytest.mark.parametrize("source", ["parquet", "arrow", "list.parquet", "jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_values_with_other_line_ends_and_marks(tmp_path: Path, source: str, end: str) -> None:
    text = "\ufeff" + end.join(LINES) + end
    png = image_bytes()
    if source == "parquet":
        put_table(tmp_path / "x.parquet", image=[png], text=[text])
    elif source == "arrow":
        put_arrow(tmp_path / "x.arrow", image=[png], text=[text])
    else:
        put(tmp_path / "a.png")
        if source == "jsonl":
            row = json.dumps({"file_name": "a.png", "text": [text]})
            (tmp_path / "captions.jsonl").write_text(row)
        else:
            put_table(tmp_path / "metadata.parquet", file_name=["a.png"], text=[text])
    assert [*captions(read_one(tmp_path)).values()] == [("\n".join(LINES),)]
