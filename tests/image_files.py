"""Image files of every kind that is taken, and of many that are not, each made on the spot."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

SIZE = (96, 64)
Values = npt.NDArray[Any]


def scene(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    """Smooth colors, none of them gray at the lower right."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 255, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    blocks[-1, -1] = (200, 40, 90)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def linear_profile(space: bytes = b"RGB ") -> bytes:
    """An ICC profile (version 2) of sRGB's primaries with a gamma of 1: its effect is known.

    Primaries are those of sRGB adapted to D50, as in the standard's own profile.
    """

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = fixed(0.9642, 1.0, 0.82491)
    curve = b"curv" + bytes(4) + struct.pack(">I", 0)  # no entries: identity
    tags = {b"wtpt": b"XYZ " + bytes(4) + white, b"desc": _description(), b"cprt": _text()}
    if space == b"RGB ":
        primaries = {
            b"rXYZ": (0.43607, 0.22249, 0.01392),
            b"gXYZ": (0.38515, 0.71687, 0.09708),
            b"bXYZ": (0.14307, 0.06061, 0.71410),
        }
        tags |= {name: b"XYZ " + bytes(4) + fixed(*xyz) for name, xyz in primaries.items()}
        tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    else:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I", start + len(body)) + bytes(4) + bytes([2, 0x40, 0, 0]) + b"mntr"
    header += space + b"XYZ " + bytes(12) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + table + body


def _description() -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", 7) + b"linear\0" + bytes(78)


def _text() -> bytes:
    return b"text" + bytes(4) + b"none\0"


def png_16(values: Values) -> bytes:
    """[H, W, channels] of 16 bits; Pillow cannot write all of these."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_part(*part) for part in parts)


def png_part(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def good_files() -> Iterator[tuple[str, bytes]]:
    """60 files, by name."""
    image = scene()
    wide = np.asarray(image).astype(np.uint16) * 257
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        yield f"{mode}.png", saved(image.convert(mode), "PNG")
    for channels, name in ((1, "gray"), (2, "gray-alpha"), (3, "rgb"), (4, "rgba")):
        values = np.concatenate([wide, np.full_like(wide[..., :1], 40000)], axis=-1)
        picked = values[..., [0, 3]] if channels == 2 else values[..., :channels]
        yield f"16-{name}.png", png_16(picked)
    yield "clear-palette.png", saved(image.convert("P"), "PNG", transparency=3)
    yield "clear-color.png", saved(image, "PNG", transparency=(200, 40, 90))
    yield "animated.png", saved(image, "PNG", save_all=True, append_images=[scene(seed=1)])
    yield "profile.png", saved(image, "PNG", icc_profile=linear_profile())
    yield "gray-profile.png", saved(image.convert("L"), "PNG", icc_profile=linear_profile(b"GRAY"))
    for mode in ("L", "RGB", "CMYK"):
        yield f"{mode}.jpg", saved(image.convert(mode), "JPEG")
        yield f"{mode}-progressive.jpg", saved(image.convert(mode), "JPEG", progressive=True)
    for turned in range(3, 9):
        exif = Image.Exif()
        exif[0x0112] = turned
        yield f"turned-{turned}.jpg", saved(image, "JPEG", exif=exif)
    yield "444.jpg", saved(image, "JPEG", subsampling=0, quality=100)
    yield "restarts.jpg", saved(image, "JPEG", restart_marker_rows=1)
    yield "rgb.jpg", saved(image, "JPEG", keep_rgb=True)
    yield "gray-corner.jpg", saved(Image.new("RGB", SIZE, (128, 128, 128)), "JPEG")
    yield "profile.jpg", saved(image, "JPEG", icc_profile=linear_profile())
    yield "srgb.jpg", saved(image, "JPEG", icc_profile=srgb_profile())
    yield "damaged-profile.jpg", saved(image, "JPEG", icc_profile=srgb_profile()[:200])
    yield "several.jpg", saved(image, "MPO", save_all=True, append_images=[scene(seed=1)])
    yield "gray.gif", saved(image.convert("L"), "GIF")
    yield "animated.gif", saved(image, "GIF", save_all=True, append_images=[scene(seed=1)])
    yield "clear.gif", saved(image.convert("P"), "GIF", transparency=3)
    yield "lossy.webp", saved(image, "WEBP")
    yield "lossless.webp", saved(image, "WEBP", lossless=True)
    yield "alpha.webp", saved(image.convert("RGBA"), "WEBP")
    yield "animated.webp", saved(image, "WEBP", save_all=True, append_images=[scene(seed=1)])
    for mode in ("L", "RGB", "RGBA"):
        yield f"{mode}.avif", saved(image.convert(mode), "AVIF")
    for mode in ("RGB", "RGBA"):
        yield f"{mode}.jp2", saved(image.convert(mode), "JPEG2000")
    yield "16.jp2", saved(Image.fromarray(wide[..., 0]), "JPEG2000")
    for mode in ("1", "L", "CMYK", "LAB"):
        yield f"{mode}.tif", saved(_in_mode(image, mode), "TIFF")
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
        yield f"{packing}.tif", saved(image, "TIFF", compression=packing)
    yield "16.tif", saved(Image.fromarray(wide[..., 0]), "TIFF")
    yield "float.tif", saved(Image.fromarray(np.float32(wide[..., 0] / 65535)), "TIFF")
    yield "pages.tif", saved(image, "TIFF", save_all=True, append_images=[scene(seed=1)])
    yield "RGB.bmp", saved(image, "BMP")
    yield "RGB.ppm", saved(image, "PPM")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "LAB":
        return image.convert(mode)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    result = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert result is not None
    return result


def _gif_bomb() -> bytes:
    screen = struct.pack("<HHBBB", 60000, 60000, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\0;"


CUT = "truncated: the file ends before the image does"
GLUED = "truncated: it has an end mark, but a part before it is missing"
UNKNOWN = "not an image that Pillow can read"
DAMAGED = "damaged or truncated: its data cannot be decoded"
ZEROS = "truncated: its end is all zeros, as of an unfinished download"
LARGE = "{} pixels are more than 180 million: scale it down"
LONG = "{} pixels are longer than 8:1, and most of it would be cut away: crop it"
BEGINS = "damaged or truncated: it begins like {}, but cannot be opened"


def bad_files() -> Iterator[tuple[str, bytes, str]]:
    """40 files, by name, each with the reason it is refused for."""
    image = scene()
    jpeg, png = saved(image, "JPEG"), saved(image, "PNG")
    progressive = saved(image, "JPEG", progressive=True)
    restarts = saved(image, "JPEG", restart_marker_rows=1)
    for name, data in (("plain", jpeg), ("progressive", progressive), ("restarts", restarts)):
        for share in (0.6, 0.85):
            kept = data[: int(len(data) * share)]
            yield f"{name}-{share}.jpg", kept, CUT
            yield f"{name}-{share}-ended.jpg", kept + b"\xff\xd9", GLUED
    yield "start.jpg", jpeg[:3], BEGINS.format("JPEG")
    yield "cut.png", png[:-200], CUT
    yield (
        "flipped.png",
        png[:-60] + bytes([png[-60] ^ 4]) + png[-59:],
        "damaged: a checksum differs",
    )
    yield "ended.png", png[:-300] + png_part(b"IEND", b""), CUT
    webp, avif = saved(image, "WEBP", lossless=True), saved(image, "AVIF", quality=95)
    yield "cut.webp", webp[:-100], "truncated: the file is shorter than it says"
    yield "zeros.webp", webp[:-1500] + bytes(1500), ZEROS
    yield "zeros.avif", avif[:-520] + bytes(520), ZEROS
    yield "cut.avif", avif[:200], BEGINS.format("AVIF")
    yield "cut.gif", saved(image, "GIF")[:-300], CUT
    yield "cut.jp2", saved(image, "JPEG2000")[:-500], DAMAGED
    yield "cut.bmp", saved(image, "BMP")[:-500], CUT
    yield "cut.ppm", saved(image, "PPM")[:-500], CUT
    yield "cut.tif", saved(image, "TIFF")[:-500], CUT
    packed = saved(image, "TIFF", compression="tiff_lzw")
    yield "cut-packed.tif", packed[: len(packed) // 2], BEGINS.format("TIFF")
    yield "long.png", saved(Image.new("L", (820, 100)), "PNG"), LONG.format("820 x 100")
    yield "tall.png", saved(Image.new("L", (10, 81)), "PNG"), LONG.format("10 x 81")
    yield "bomb.png", saved(Image.new("1", (20000, 10000)), "PNG"), LARGE.format("20000 x 10000")
    yield "bomb.ppm", b"P6 40000 40000 255\n", LARGE.format("40000 x 40000")
    yield "bomb.gif", _gif_bomb(), LARGE.format("60000 x 60000")
    yield "empty.png", b"", "the file is empty"
    yield "zeros.jpg", bytes(5000), "the file holds only zeros"
    yield "page.jpg", b"<!DOCTYPE html><title>404</title>", f"{UNKNOWN}: a web page"
    yield "drawing.png", b'<?xml version="1.0"?>\n<svg/>', f"{UNKNOWN}: an SVG drawing"
    yield "script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n", f"{UNKNOWN}: a PostScript drawing"
    yield "document.jpg", b"%PDF-1.7\n", f"{UNKNOWN}: a PDF document"
    yield "film.jpg", b"\0\0\0\x20ftypisom" + bytes(20), f"{UNKNOWN}: a film"
    yield "archive.jpg", b"PK\x03\x04" + bytes(20), f"{UNKNOWN}: an archive"
    heic = "a HEIC image, which Pillow cannot read alone: `pip install '.[heif]'`, or save it as"
    yield "phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", f"{heic} JPEG or PNG"
    jxl = "a JPEG XL image, which Pillow cannot read alone: `pip install '.[jxl]'`, or save it as"
    yield "naked.jxl", b"\xff\x0a" + bytes(20), f"{jxl} JPEG or PNG"
    yield "boxed.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), f"{jxl} JPEG or PNG"
