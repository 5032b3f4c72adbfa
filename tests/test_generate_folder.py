"""generate's folder: what is there goes when the new stands, and nobody's work is lost."""

import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from drawing import PROMPTS, draw
from PIL import Image

import infer.generate
from infer.outputs import SETTINGS_KEY, ImageFolder, read_record, why_stale
from runtime.files import aside_of, set_aside
from sdxl.contact_sheet import contact_sheet

SHORT: dict[str, Any] = {"num_steps": 1}


def png(width: int, height: int, *texts: bytes) -> bytes:
    """A PNG whose header claims a size, with hardly any pixels in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    own = b"".join(chunk(b"tEXt", text) for text in texts)
    return (
        b"\x89PNG\r\n\x1a\n" + head + own + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def captions(out: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (out / "captions.jsonl").read_text().splitlines()]


def test_a_run_that_fails_leaves_the_folder_as_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first new image nothing has changed; after it captions are of what is there."""
    out = tmp_path / "out"
    draw(base, out, PROMPTS, **SHORT)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real, good = infer.generate.save_image, set[str]()

    def fail(path: Path, *args: Any) -> None:
        if path.name not in good:
            raise OSError("no more")
        real(path, *args)

    monkeypatch.setattr(infer.generate, "save_image", fail)
    with pytest.warns(UserWarning, match="generated again: prompt"), pytest.raises(OSError):
        draw(base, out, ["a new one", *PROMPTS[1:]], **SHORT)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    good.add("000000.png")
    with pytest.warns(UserWarning, match="generated again: prompt"), pytest.raises(OSError):
        draw(base, out, ["a new one", "another", PROMPTS[2]], **SHORT)
    assert captions(out) == ["a new one", *PROMPTS[1:]]
    assert not aside_of(out / "captions.jsonl").exists()


@pytest.mark.slow
def test_captions_set_aside_by_a_run_that_was_killed_come_back(base: Path, tmp_path: Path) -> None:
    for layout, name in (("simple", "captions.jsonl"), ("coco", "annotations.json")):
        out = tmp_path / layout
        draw(base, out, PROMPTS[:2], **SHORT, format=layout)
        complete = (out / name).read_bytes()
        set_aside(out / name)
        with ImageFolder(out, layout).open():
            assert (out / name).read_bytes() == complete
        assert not aside_of(out / name).exists()


def test_somebody_elses_files_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    out, foreign = tmp_path / "out", Image.new("RGB", (8, 8))
    for name, content in (
        ("000000.png", png(30_000, 30_000)),
        ("000000.png", b"\xff\xd8\xff\xe0 a photograph"),
        ("captions.jsonl", b'{"file_name": "photo.jpg", "text": "mine"}\n'),
        ("captions.jsonl", b'{"file_name": "000000.png", "text": "a", "weight": 2}\n'),
        ("captions.jsonl", b"[" * 100_000),
        ("contact-sheet.png", png(8, 8)),
    ):
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*give another --out"):
            draw(base, out, PROMPTS[:1], **SHORT)
        assert (out / name).read_bytes() == content
        (out / name).unlink()
    draw(base, out, PROMPTS[:1], **SHORT)
    foreign.save(out / "photo.png")
    (out / "captions.jsonl").write_text('{"file_name": "000000.png", "text": "edited"}\n')
    with pytest.raises(ValueError, match=r"the caption of 000000.png is not the prompt"):
        draw(base, out, PROMPTS[:1], **SHORT)
    assert captions(out) == ["edited"] and (out / "photo.png").exists()


def test_a_damaged_file_that_says_nothing_is_kept_beside(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    half = png(64, 64)[:-20]
    (out / "000000.png").write_bytes(half)
    with pytest.warns(UserWarning, match=r"000000.png: to be generated again: damaged"):
        draw(base, out, PROMPTS[:1], **SHORT)
    assert (out / "000000.png.damaged").read_bytes() == half
    assert read_record(out / "000000.png")[0]


def test_an_image_of_ours_of_any_size_is_read_without_its_pixels(tmp_path: Path) -> None:
    path, record = tmp_path / "000000.png", {"compare": False, "seed": 1}
    mark = SETTINGS_KEY.encode() + b"\0"
    path.write_bytes(png(60_000, 60_000, mark + json.dumps(record).encode()))
    assert why_stale(path, record) is None
    assert why_stale(path, record | {"seed": 2}) == "seed changed"
    path.write_bytes(png(8, 8, mark + b"[" * 100_000))
    assert why_stale(path, record) == "compare, seed changed"


def test_compare_alone_is_all_that_changed(tmp_path: Path) -> None:
    plain = {"compare": False, "sampler": {"name": "Euler"}, "weights": {"unet": "a"}}
    both = {
        "compare": True,
        "sampler": {"name": "Euler", "config_without": "b"},
        "weights": {"unet": "a", "unet_without": "c"},
    }
    path, mark = tmp_path / "000000.png", SETTINGS_KEY.encode() + b"\0"
    for recorded, requested in ((plain, both), (both, plain)):
        path.write_bytes(png(8, 8, mark + json.dumps(recorded).encode()))
        assert why_stale(path, requested) == "compare changed"
        other = requested | {"weights": {"unet": "d"}}
        assert why_stale(path, other) == "compare, weights changed"


def test_images_that_do_not_fit_on_the_disk_are_warned_of(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infer.outputs.free_bytes", lambda _: 1000)
    with pytest.warns(UserWarning, match=r"1 images may take 0.01 MB, and the disk has 0.00 MB"):
        draw(base, tmp_path / "out", PROMPTS[:1], **SHORT)


def test_a_sheet_of_long_prompts() -> None:
    """Linear in the prompt: a million letters are no more work than a line."""
    image = Image.new("RGB", (8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet = contact_sheet([(image, "word " * 200_000), (image, "x" * 1_000_000)])
    assert sheet.size == (2 * 256 + 4, 256 + 18 + 4)
    cut = contact_sheet([(image, "one two three four five six seven eight nine ten")], 128)
    assert sheet.size[1] == 278 and cut.size == (128, 128 + 22)
