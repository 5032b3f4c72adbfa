"""What a rerun encodes when masks, weights, repeats, variants, tars or rules of captions change."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from precompute.report import summarize
from tests.encodes import contents, counted, encode, make_old, samples_of
from tests.folders import put_list
from tests.test_tars import put_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*settings changed")
ROWS: dict[str, dict[str, Any]] = {
    "a.png": {"text": ["one, two, three", "a"], "weight": 0.5, "mask": "mask.png"},
    "b.png": {"text": "b, c, d", "repeats": 2},
    "c.png": {"text": "c"},
    "d.png": {"text": "d"},
}


def draw(seed: int, form: str = "RGBA") -> Image.Image:
    """With an alpha of its own."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 8, len(form)), np.uint8)
    return Image.fromarray(values).resize((90, 70))


def lay_out(folder: Path) -> None:
    """Four images of a list, two in a tar."""
    folder.mkdir()
    for number, name in enumerate(ROWS):
        draw(number).save(folder / name)
    draw(9, "RGB").convert("L").save(folder / "mask.png")
    put_list(folder, *({"file_name": name} | row for name, row in ROWS.items()))
    pack(folder, 10)
    make_old(folder)


def pack(folder: Path, seed: int) -> None:
    members: dict[str, bytes] = {}
    for number in range(2):
        draw(seed + number).save(folder.parent / "member.png")
        members[f"{number}.png"] = (folder.parent / "member.png").read_bytes()
        members[f"{number}.json"] = json.dumps({"caption": f"member {number}"}).encode()
    put_tar(folder / "x.tar", members)


def relist(folder: Path, name: str, **changes: Any) -> None:
    rows = ROWS | {name: ROWS[name] | changes}
    put_list(folder, *({"file_name": name} | row for name, row in rows.items()))


def new_mask(folder: Path) -> None:
    draw(20, "RGB").convert("L").save(folder / "mask.png")


CHANGES: dict[str, tuple[Callable[[Path], Any], dict[str, Any], tuple[int, int], str]] = {
    "mask": (new_mask, {}, (1, 0), "1 mask changed, 5 unchanged"),
    "no mask": (
        lambda folder: relist(folder, "a.png", mask=None),
        {},
        (1, 0),
        "1 mask changed, 5 unchanged",
    ),
    "weight": (
        lambda folder: relist(folder, "a.png", weight=2),
        {},
        (0, 0),
        "1 weight changed, 5 unchanged",
    ),
    "repeats": (
        lambda folder: relist(folder, "a.png", repeats=2),
        {},
        (0, 0),
        "repeats changed for 1, 5 unchanged",
    ),
    "second caption": (
        lambda folder: relist(folder, "c.png", text=["c", "and more"]),
        {},
        (0, 1),  # the other one is copied
        "1 caption changed, 5 unchanged",
    ),
    "tar": (lambda folder: pack(folder, 11), {}, (2, 0), "2 images changed, 4 unchanged"),
    "flip": (lambda folder: None, {"flip": True}, (6, 0), ""),
    "crops": (lambda folder: None, {"crops": 3}, (18, 0), ""),
    "alpha": (lambda folder: None, {"mask_from_alpha": True}, (6, 0), ""),
    "chunks": (lambda folder: None, {"long_captions": 2}, (0, 7), "number of chunks"),
    "prefix": (lambda folder: None, {"caption_prefix": "x"}, (0, 7), "6 captions changed"),
    "shuffles": (lambda folder: None, {"shuffle_tags": 2}, (0, 3), "2 captions changed"),
}


QUICK = ("tar", "flip", "prefix")  # the rest is marked slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CHANGES]
)
def test_what_changed_is_encoded_and_no_more(name: str, base: Path, tmp_path: Path) -> None:
    change, settings, expected, words = CHANGES[name]
    data, out = tmp_path / "data", tmp_path / "out"
    lay_out(data)
    encode(data, base, out)
    change(data)
    with counted() as count:
        report = encode(data, base, out, **settings)
    assert count == expected
    assert words in summarize(report.changes)
    encode(data, base, tmp_path / "fresh", **settings)
    assert samples_of(out) == samples_of(tmp_path / "fresh")
    with counted() as count:
        encode(data, base, out, repack=True, **settings)
    assert count == (0, 0)
    assert contents(out) == contents(tmp_path / "fresh")


def test_nothing_changed_opens_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the tar and the mask, whose bytes are others now at the same size and time."""
    data, out = tmp_path / "data", tmp_path / "out"
    lay_out(data)
    encode(data, base, out, flip=True)
    before = contents(out)
    for name in ("x.tar", "mask.png", "a.png"):
        stat = (data / name).stat()
        (data / name).write_bytes(bytes(stat.st_size))
        os.utime(data / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert summarize(encode(data, base, out, flip=True).changes) == "6 unchanged"
    assert contents(out) == before
