"""Any image: taken whole and in the right colors, or refused with the true reason."""

import io
import json
import struct
import subprocess
import sys
import threading
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

import cli
import precompute.images.decode
from precompute.images.decode import (
    LARGE_PIXELS,
    image_size,
    limit_large_images,
    open_image,
    to_srgb,
)
from precompute.images.masks import open_alpha
from precompute.images.rejections import ImageError, explain, unidentified
from shards.reader import Cache
from tests.image_files import (
    SIZE,
    bad_files,
    good_files,
    linear_profile,
    png_16,
    png_part,
    saved,
    scene,
    srgb_profile,
)

LYING = {f"turned-{turned}.jpg" for turned in range(5, 9)}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 good images and 42 that are none."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, data, *_ in (*good_files(), *bad_files()):
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"about {name}")
    return folder


def run_encode(dataset: Path, out: Path, base: Path, *flags: str) -> Result:
    """``cli.py encode`` in this process."""
    settings = ["--resolution", "64", "--bucket-step", "16", "--batch-size", "4", "--threads", "1"]
    command = ["encode", str(dataset), "--base", str(base), "--out", str(out), *settings, *flags]
    return CliRunner().invoke(cli.commands, command)


def rejected(cache: Path) -> dict[str, str]:
    lines = (cache / "rejected.jsonl").read_text().splitlines()
    return {row["path"]: row["reason"] for row in map(json.loads, lines)}


def test_60_are_encoded_and_42_rejected_for_their_true_reasons(
    mixed: Path, tmp_path: Path, base: Path
) -> None:
    run = run_encode(mixed, tmp_path / "cache", base)
    assert run.exit_code == 0, run.output
    cache = Cache(tmp_path / "cache")
    paths = {s.metadata(row)["path"] for s in cache.shards() for row in range(len(s.index))}
    assert paths == {name for name, _ in good_files()}
    assert len(paths) == 60
    reasons = {name: reason for name, _, reason in bad_files()}
    assert len(reasons) == 42
    assert rejected(tmp_path / "cache") == reasons
    assert "Warning: 42 rejected, see" in run.stderr
    assert "60 images in" in run.stdout
    again = run_encode(mixed, tmp_path / "cache", base, "--max-rejected", "0.3")
    assert again.exit_code == 1
    assert "41% of the images were rejected" in again.stderr
    assert Cache(tmp_path / "cache").manifest == cache.manifest


def test_good_files_keep_their_pixels() -> None:
    """As Pillow alone makes them RGB, where no profile, depth or transparency is in the way."""
    num_alike = 0
    for name, data in good_files():
        image = open_image(data)
        assert image.mode == "RGB"
        size = SIZE[::-1] if name in LYING else SIZE
        assert image.size == image_size(data) == size, name
        with Image.open(io.BytesIO(data)) as plain:
            plain.load()
            turned = plain.getexif().get(0x0112, 1) != 1
            is_plain = plain.mode in ("1", "L", "P", "RGB", "CMYK") and "profile" not in name
            if is_plain and not turned and not plain.has_transparency_data:
                num_alike += 1
                assert image.tobytes() == plain.convert("RGB").tobytes(), name
    assert num_alike > 25


@pytest.mark.parametrize("name", ["animated.png", "animated.gif", "animated.webp", "pages.tif"])
def test_of_several_images_the_first_is_taken(name: str) -> None:
    image = np.asarray(open_image(dict(good_files())[name])).astype(int)
    assert abs(image - np.asarray(scene())).mean() < 8
    assert abs(image - np.asarray(scene(seed=1))).mean() > 20


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_keep_their_levels(channels: int) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16, 1).repeat(channels, axis=2) * 257
    if channels in (2, 4):
        levels[..., -1] = 65535
    image = np.asarray(open_image(png_16(levels))).astype(int)
    assert abs(image - (levels[..., :1] >> 8)).max() <= 1


# Color profiles.


def as_srgb(linear: Any) -> Any:
    """Shares of light to sRGB's levels (IEC 61966-2-1)."""
    return 255 * np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    )


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_a_linear_profile_has_its_known_effect(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(scene(), form, icc_profile=linear_profile(), **options)
    expected = as_srgb(np.asarray(scene()) / 255)
    assert abs(np.asarray(open_image(data)) - expected).max() <= 2
    assert abs(np.asarray(scene()) - expected).max() > 50


def test_a_grey_profile_has_its_known_effect() -> None:
    gray = scene().convert("L")
    data = saved(gray, "PNG", icc_profile=linear_profile(b"GRAY"))
    expected = as_srgb(np.asarray(gray)[..., None] / 255)
    assert abs(np.asarray(open_image(data)) - expected).max() <= 2


def test_a_profile_does_what_imagecms_does() -> None:
    profile = linear_profile()
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(scene(), source, target, outputMode="RGB")
    assert expected is not None
    opened = open_image(saved(scene(), "PNG", icc_profile=profile))
    assert opened.tobytes() == expected.tobytes()


def test_a_profile_is_applied_below_the_transparency() -> None:
    image = scene().convert("RGBA")
    image.putalpha(128)
    data = saved(image, "PNG", icc_profile=linear_profile())
    expected = (as_srgb(np.asarray(scene()) / 255) + 255) / 2
    assert abs(np.asarray(open_image(data)) - expected).max() <= 3


def test_a_grey_image_may_have_a_profile_of_colors() -> None:
    gray = scene().convert("L")
    data = saved(gray, "PNG", icc_profile=linear_profile())
    expected = as_srgb(np.asarray(gray)[..., None] / 255)
    assert abs(np.asarray(open_image(data)) - expected).max() <= 2


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", srgb_profile()),
        ("RGB", srgb_profile()[:200]),
        ("RGB", b"no profile"),
        ("RGB", linear_profile(b"GRAY")),
        ("CMYK", linear_profile()),
    ],
    ids=["sRGB", "cut", "none", "of grays", "of light"],
)
def test_a_profile_that_says_nothing_changes_nothing(mode: str, profile: bytes) -> None:
    image = scene().convert(mode)
    image.info["icc_profile"] = profile
    assert to_srgb(image).tobytes() == image.convert("RGB").tobytes()


# What a program notes in a file.


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with more chunks behind its header."""
    parts = b"".join(png_part(*chunk) for chunk in chunks)
    return data[:33] + parts + data[33:]


XMP = b'<x:xmpmeta tiff:Orientation="6">'
LONG = b"{" + b"x" * 1_200_000
BOMB = zlib.compress(bytes(200_000_000))


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"tEXt", b"workflow\0" + LONG)],
        [(b"zTXt", b"workflow\0\0" + zlib.compress(LONG))],
        [(b"zTXt", b"workflow\0\0" + BOMB)],
        [(b"zTXt", b"workflow\0\7" + LONG)],
        [(b"iTXt", b"workflow\0\0\0en\0\0" + LONG)],
        [(b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(LONG))],
        [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG)],
        [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)],
        [(b"iCCP", b"all\0\0" + BOMB)],
        [(b"iCCP", b"all\0\0" + zlib.compress(LONG))],
        [(b"iCCP", b"all\0\3")],
        [(b"iCCP", b"all")],
        [(b"tEXt", b"")],
        [(b"pHYs", b"1"), (b"gAMA", b""), (b"cHRM", b"short"), (b"sRGB", b"")],
        [(b"tEXt", b"a%d\0" % number + bytes(700_000)) for number in range(100)],
        [(b"eXIf", b"no EXIF at all")],
    ],
)
def test_no_note_in_a_png_is_a_reason_to_reject_it(chunks: list[tuple[bytes, bytes]]) -> None:
    plain = saved(scene(), "PNG")
    noted = with_chunks(plain, *chunks)
    late = plain[:-12] + b"".join(png_part(*chunk) for chunk in chunks) + plain[-12:]
    for data in (noted, late):
        assert image_size(data) == SIZE
        assert open_image(data).tobytes() == scene().tobytes()
        assert open_alpha(data) is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_a_png_with_fewer_rows_than_its_header_says_is_truncated(mode: str) -> None:
    black = Image.new(mode, (37, 21))
    data = saved(black, "PNG")
    assert open_image(data).size == (37, 21), "black to the last row is an image"
    for height in (22, 42):
        header = data[16:20] + struct.pack(">I", height) + data[24:29]
        forged = data[:8] + png_part(b"IHDR", header) + data[33:]
        with pytest.raises(ImageError, match="truncated: its data end before its last row"):
            open_image(forged)


def test_a_note_of_a_png_with_a_wrong_checksum_is_no_damage() -> None:
    noted = bytearray(with_chunks(saved(scene(), "PNG"), (b"tEXt", b"workflow\0{}")))
    noted[noted.index(b"workflow")] ^= 1
    assert open_image(bytes(noted)).tobytes() == scene().tobytes()


@pytest.mark.parametrize(
    "chunk",
    [
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    ],
)
def test_a_png_is_turned_as_its_xmp_says(chunk: tuple[bytes, bytes]) -> None:
    data = with_chunks(saved(scene(), "PNG"), (b"tEXt", b"workflow\0" + LONG), chunk)
    assert image_size(data) == open_image(data).size == SIZE[::-1]


def test_a_large_profile_of_a_png_is_obeyed() -> None:
    """Tables of colors may take more than Pillow unpacks."""
    large = linear_profile() + bytes(2_000_000)
    large = struct.pack(">I", len(large)) + large[4:]
    chunk = (b"iCCP", b"large\0\0" + zlib.compress(large))
    expected = open_image(saved(scene(), "PNG", icc_profile=linear_profile()))
    assert open_image(with_chunks(saved(scene(), "PNG"), chunk)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG", "TIFF", "AVIF"])
def test_exif_that_cannot_be_read_turns_nothing(form: str) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(200))
    data = saved(scene(), form, **({} if form == "TIFF" else {"exif": exif}))
    assert image_size(data) == open_image(data).size == SIZE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    levels = np.full((20, 30), 0.5, np.float32)
    levels[7, 9] = value
    with pytest.raises(ImageError, match=r"no numbers \(NaN or infinity\)"):
        open_image(saved(Image.fromarray(levels), "TIFF"))


# Damage in TIFFs and BMPs that Pillow's decoders make do with.


def place_of_strip(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        assert isinstance(image, TiffImageFile)
        return image.tag_v2[273][0], image.tag_v2[279][0]


@pytest.mark.parametrize(
    "packing", ["group3", "group4", "tiff_ccitt", "packbits", "tiff_lzw", "tiff_adobe_deflate"]
)
def test_a_tiff_with_a_hole_is_refused(packing: str, capfd: pytest.CaptureFixture[str]) -> None:
    image = scene((160, 128)).convert("1")
    data = saved(image, "TIFF", compression=packing)
    assert open_image(data).tobytes() == image.convert("RGB").tobytes()
    start, size = place_of_strip(data)
    for share in (0.2, 0.5, 0.9):
        at = start + int(size * share)
        unended = data[:at] + bytes(start + size - at) + data[start + size :]
        holed = data[: at - 20] + bytes(20) + data[at:]
        # In group 3 zeros may stand between lines; in PackBits they are runs of one byte.
        for damaged in (unended,) if packing in ("group3", "packbits") else (unended, holed):
            with pytest.raises((ImageError, OSError)) as caught:
                open_image(damaged)
            assert "damaged" in explain(caught.value) or "truncated" in explain(caught.value)
    assert "Fax" not in capfd.readouterr().err


def test_a_fax_with_a_wrong_code_is_refused() -> None:
    data = bytearray(saved(scene((160, 128)).convert("1"), "TIFF", compression="group4"))
    start, size = place_of_strip(bytes(data))
    num_refused = 0
    for at in range(start, start + size - 8, size // 20):
        damaged = data.copy()
        damaged[at] ^= 0x10
        try:
            open_image(bytes(damaged))
        except ImageError:
            num_refused += 1
    assert num_refused > 15


@pytest.mark.parametrize("tag", [273, 279])
def test_a_tiff_whose_strips_lie_beyond_its_end_is_refused(tag: int) -> None:
    data = saved(scene(), "TIFF", compression="tiff_adobe_deflate")
    entry = data.index(struct.pack("<HHI", tag, 4, 1))
    moved = data[: entry + 8] + struct.pack("<I", len(data)) + data[entry + 12 :]
    with pytest.raises(ImageError, match="the file ends before the image does"):
        open_image(moved)


def rle_bmp(runs: bytes, size: tuple[int, int] = (16, 2), kind: int = 1) -> bytes:
    bits = {1: 8, 2: 4}[kind]
    palette = bytes(range(256)) * 4
    palette = palette[: 4 << bits]
    start = 54 + len(palette)
    header = b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, kind, len(runs), 0, 0, 0, 0)
    return header + palette + runs


ROW, END_OF_ROW, END = b"\x10\x07", b"\0\0", b"\0\1"


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    "runs",
    [
        ROW + END_OF_ROW + ROW + END,
        ROW + END_OF_ROW + ROW + END_OF_ROW + END,
        ROW + END_OF_ROW + b"\x08\1\x08\2" + END,
    ],
)
def test_a_bmp_in_whole_runs_is_taken(kind: int, runs: bytes) -> None:
    assert open_image(rle_bmp(runs, kind=kind)).size == (16, 2)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize(
    "runs",
    [
        b"\x11\x07" + END_OF_ROW + ROW + END,
        ROW + END_OF_ROW + b"\xff\x07" + END,
        ROW + END_OF_ROW + b"\x03",
        ROW + END_OF_ROW + b"\0\2\x20\0" + END,
        ROW + END_OF_ROW + b"\0\x20" + bytes(32),
        ROW + b"\0",
        b"",
    ],
)
def test_a_bmp_whose_runs_do_not_fit_is_refused(kind: int, runs: bytes) -> None:
    with pytest.raises((ImageError, ValueError)) as caught:
        open_image(rle_bmp(runs, kind=kind))
    assert "damaged" in explain(caught.value) or "truncated" in explain(caught.value)


# JPEGs with a part missing, and an end mark after what is left.


def cut_inside(data: bytes, num: int) -> bytes:
    assert data.endswith(b"\xff\xd9")
    return data[: -2 - num] + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 1}]
)
def test_a_cut_jpeg_is_refused_though_it_has_an_end_mark(mode: str, options: Any) -> None:
    data = saved(scene((160, 128)).convert(mode), "JPEG", **options)
    complete, num_glued = open_image(data).tobytes(), 0
    for num in (10, 11, *range(13, len(data) * 3 // 4, 59)):
        with pytest.raises((ImageError, OSError)) as caught:
            open_image(cut_inside(data, num))
        assert "truncated" in explain(caught.value), num
        num_glued += "a part before it is missing" in str(caught.value)  # Pillow alone takes it
    assert num_glued > 3
    assert open_image(data).tobytes() == complete


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_decoded_as_pillow_decodes_it_and_once(
    mode: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(scene((170, 90)).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as plain:
        expected = plain.convert("RGB").tobytes()
    made: list[str] = []
    real = Image._getdecoder
    monkeypatch.setattr(Image, "_getdecoder", lambda *args: (made.append(args[1]), real(*args))[1])
    assert open_image(data).tobytes() == expected
    assert made == ["jpeg"]


@pytest.mark.parametrize("level", range(120, 137))
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_jpegs_are_whole(level: int, progressive: bool) -> None:
    image = Image.new("RGB", (70, 50), (level, level, level))
    assert open_image(saved(image, "JPEG", progressive=progressive)).size == (70, 50)


def test_a_jpeg_with_more_behind_its_end_is_whole() -> None:
    data = saved(scene(), "JPEG", progressive=True)
    assert open_image(data + b"trailer \xff\xd8 of a phone" * 9).tobytes() == (
        open_image(data).tobytes()
    )


def test_a_jpeg_that_lacks_scans_is_refused() -> None:
    """A progressive file that is complete up to some scan: it would be blurred, not gray."""
    data = saved(scene(), "JPEG", progressive=True)
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    assert len(starts) > 5
    for start in starts[1:]:
        with pytest.raises(ImageError, match="a part before it is missing"):
            open_image(data[:start] + b"\xff\xd9")


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "BMP", "PPM", "TIFF"])
def test_other_forms_are_refused_wherever_they_are_cut(form: str) -> None:
    data = saved(scene(), form)
    for share in np.linspace(0.02, 0.98, 25):
        with pytest.raises(Exception) as caught:
            open_image(data[: int(len(data) * share)])
        reason = explain(caught.value)
        assert "truncated" in reason or "damaged" in reason or "no image" in reason, reason
        assert "\n" not in reason and "Error" not in reason and " at 0x" not in reason


# Sizes.


def test_sizes_are_refused_before_a_pixel_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_part(b"IHDR", header) + png_part(b"IDAT", b"")
    for read in (image_size, open_image):
        with pytest.raises(ImageError, match=r"^2147483647 x 2147483647 pixels are more than"):
            read(data)


def test_the_longest_that_is_taken_is_8_to_1() -> None:
    assert image_size(saved(Image.new("L", (800, 100)), "PNG")) == (800, 100)
    with pytest.raises(ImageError, match="100 x 801 pixels are longer than 8:1"):
        image_size(saved(Image.new("L", (100, 801)), "PNG"))


def test_of_large_images_one_is_in_memory() -> None:
    large, small = (LARGE_PIXELS, 2), (1000, 1000)
    with limit_large_images(large), limit_large_images(small):
        taken = threading.Event()

        def wait() -> None:
            with limit_large_images(large):
                taken.set()

        other = threading.Thread(target=wait)
        other.start()
        assert not taken.wait(0.1)
    other.join()
    assert taken.is_set()


def test_the_header_of_a_png_is_read_without_its_pixels() -> None:
    data = saved(scene(), "PNG")
    place = data.index(b"IDAT") + 4
    assert image_size(data[:place] + bytes(len(data) - place)) == SIZE


@pytest.mark.parametrize("late", [False, True])
def test_a_png_may_lie_on_its_side(late: bool) -> None:
    """Its EXIF may follow the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(scene(), "PNG", exif=exif)
    if late:
        start = data.index(b"eXIf") - 4
        (length,) = struct.unpack(">I", data[start : start + 4])
        part = data[start : start + 12 + length]
        data = data.replace(part, b"")
        end = data.index(b"IEND") - 4
        data = data[:end] + part + data[end:]
    assert image_size(data) == open_image(data).size == SIZE[::-1]


# Others.


def test_heic_is_taken_with_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pillow-heif, which is not installed: it registers an opener."""
    plugin = types.ModuleType("pillow_heif")

    def register() -> None:
        Image.register_open("HEIF", lambda file, name: open_as_ppm(file), lambda start: True)

    def open_as_ppm(file: Any) -> Any:
        return Image.open(io.BytesIO(saved(scene(), "PPM")))

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    precompute.images.decode._is_registered.cache_clear()
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50)
    try:
        assert open_image(data).tobytes() == scene().tobytes()
    finally:
        monkeypatch.undo()
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")
        precompute.images.decode._is_registered.cache_clear()
    with pytest.raises(ImageError, match="a HEIC image"):
        open_image(data)


def test_memory_that_runs_out_is_no_property_of_an_image() -> None:
    with pytest.raises(MemoryError):
        explain(MemoryError())


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    data = saved(scene(), "EPS")
    with pytest.raises(ImageError, match="a PostScript drawing"):
        open_image(data)
    assert "PostScript" in str(unidentified(data))
