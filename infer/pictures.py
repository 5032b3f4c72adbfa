"""One image's file: a PNG that says how it was drawn, there whole or not at all."""

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from infer.listing import Row
from infer.plan import Drawing
from runtime.documents import open_regular, parse_json
from runtime.files import durable_file, writing

SETTINGS_KEY = "shardtune"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MARK = b"tEXt" + SETTINGS_KEY.encode() + b"\0"
MAX_RECORD_BYTES = 2_000_000
SIDES = ("without", "with")
COMPARED = ("config_without", "unet_without")  # in a record: what --compare compares with
STILL_GOOD = "The images that are there are whole; the same command continues with the others."

About = dict[str, Any]  # "weights": their digests; "samplers": each one's class and config


def record_of(drawing: Drawing, about: About) -> dict[str, Any]:
    """All that decides the image, as plain JSON."""
    sampler = about["samplers"][drawing.sampler or ""]
    return {**asdict(drawing), "sampler": sampler, "weights": about["weights"]}


def read_record(path: Path, to_the_end: bool = True) -> tuple[dict[str, Any] | None, bool]:
    """What a PNG says of how it was drawn, and whether the file is whole.

    None where nothing in it is of this program; empty where that itself is damaged. The checksums
    of the format are checked, and no pixel is decoded, so that an image of any size, or one that
    claims it, costs no memory. ``to_the_end`` False: no further than the first pixels.

    Raises:
        ValueError: not a regular file, or a whole file of another format.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(MAX_RECORD_BYTES if to_the_end else 65_536)
        file.seek(len(SIGNATURE))
        # Where a length in the file is damaged, what comes after it is not found chunk by chunk.
        record: dict[str, Any] | None = {} if MARK in head else None
        is_whole = is_png = head.startswith(SIGNATURE) or not head
        if not is_png and record is None:
            raise ValueError(f"{path}: no PNG file; move it away, or give another --out")
        for kind, data, sound in _chunks(file):
            if kind == b"IDAT" and not to_the_end:
                return record, is_whole
            is_whole = is_whole and sound
            if sound and (kind + data).startswith(MARK):
                record = _parse_record(data)
            if kind == b"IEND":
                return record, is_whole
    return record, False


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes, bool]]:
    """Of each chunk of a PNG the kind, the data where it is text, and whether it is sound."""
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        checksum, kept = zlib.crc32(kind), b""
        is_text = kind == b"tEXt" and length <= MAX_RECORD_BYTES
        if kind == b"IDAT":
            yield kind, b"", True  # before its bytes are read
        while length and (data := file.read(min(length, MAX_RECORD_BYTES))):
            checksum, length = zlib.crc32(data, checksum), length - len(data)
            kept = data if is_text else b""
        yield kind, kept, file.read(4) == checksum.to_bytes(4, "big")


def _parse_record(data: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(record := parse_json(data.partition(b"\0")[2]), dict):
            return record
    return {}


def row_of_record(path: Path, record: dict[str, Any] | None) -> Row | None:
    """What an image's own record says of it for the listing; None where it has none."""
    try:
        about = {one.name: (record or {})[one.name] for one in fields(Drawing)}
        drawing = Drawing(**about | {"sampler": None})
        prompt = str(drawing.prompt)
        prompt.encode()  # JSON may hold half a character, which no file of captions can
        size = picture_size(drawing)
    except (KeyError, TypeError, UnicodeEncodeError):
        return None
    return Row(path.name, prompt, *size) if all(type(n) is int for n in size) else None


def stale_because(path: Path, asked: dict[str, Any]) -> str | None:
    """Why an image must be drawn (again); empty where it is missing, None where it is as asked.

    Raises:
        ValueError: an image that someone else made.
    """
    if not path.exists():
        return ""
    recorded, is_whole = read_record(path)
    if recorded is None and is_whole:
        raise ValueError(f"{path}: not drawn by shardtune; move it away, or give another --out")
    if recorded is None or not is_whole:
        return "damaged"
    if recorded.get("compare") != asked["compare"]:  # of which all that compares follows
        recorded, asked = _without_comparison(recorded), _without_comparison(asked)
    changed = sorted(name for name in asked if recorded.get(name) != asked[name])
    return f"{', '.join(changed)} changed" if changed else None


def _without_comparison(record: dict[str, Any]) -> dict[str, Any]:
    """A record less what only ``--compare`` puts in it, but for ``compare`` itself."""
    kept = dict(record)
    for name in ("sampler", "weights"):
        if isinstance(part := record.get(name), dict):
            kept[name] = {key: value for key, value in part.items() if key not in COMPARED}
    return kept


def picture_size(drawing: Drawing) -> tuple[int, int]:
    """(width, height) of the file's image."""
    if drawing.compare:
        label, gap = _margins(drawing)
        return 2 * drawing.width + gap, drawing.height + label
    return drawing.width, drawing.height


def _margins(drawing: Drawing) -> tuple[int, int]:
    """Pixels above two images, for what they are, and between them: to be read on a sheet too."""
    return max(20, drawing.height // 16), max(4, drawing.width // 128)


def save_picture(
    path: Path, sides: list[torch.Tensor], drawing: Drawing, about: About, loras: str
) -> None:
    """Write the image [3, H, W] in 0..1; or two of them, the one without the fine-tune first.

    ``loras`` is for the line that web UIs show: names and weights, or empty.
    """
    images = [_to_image(side) for side in sides]
    image = images[0] if len(images) == 1 else _side_by_side(images, drawing)
    info = PngImagePlugin.PngInfo()
    record = record_of(drawing, about)
    info.add_text("parameters", _parameters(drawing, record["sampler"]["name"], loras))
    info.add_text(SETTINGS_KEY, json.dumps(record))
    with writing(path, STILL_GOOD), durable_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def _to_image(picture: torch.Tensor) -> Image.Image:
    levels = (picture * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _side_by_side(images: list[Image.Image], drawing: Drawing) -> Image.Image:
    both = Image.new("RGB", picture_size(drawing), "white")
    label, gap = _margins(drawing)
    pen, font = ImageDraw.Draw(both), ImageFont.load_default(0.6 * label)
    for side, image in enumerate(images):
        left = side * (drawing.width + gap)
        pen.text((left + gap, label / 2), SIDES[side], fill="black", font=font, anchor="lm")
        both.paste(image, (left, label))
    return both


def _parameters(drawing: Drawing, sampler: str, loras: str) -> str:
    """The line that web UIs show and read."""
    negative = f"\nNegative prompt: {drawing.negative}" if drawing.negative else ""
    used = f", Lora weights: {json.dumps(loras)}" if loras else ""
    return (
        f"{drawing.prompt}{negative}\nSteps: {drawing.num_steps}, Sampler: {sampler}, "
        f"CFG scale: {drawing.guidance_scale}, Seed: {drawing.seed}, "
        f"Size: {drawing.width}x{drawing.height}{used}"
    )
