"""One image that shows many, with their prompts below."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from runtime.messages import first_line

TILE = 256  # pixels
LINE = 18  # pixels under each tile, for its prompt
MAX_TILES = 100  # images on one sheet
KEY = "shardtune-sheet"  # of a PNG's texts: what ``read_sheet`` cuts the sheet apart by
MAX_PROMPT = 2000  # characters of a prompt there
MAX_TILE = 1024  # pixels of a tile there

Size = tuple[int, int]  # pixels: width and height, or left and top
Box = tuple[int, int, int, int]  # pixels: left, top, right, bottom


def contact_sheet(
    images: Sequence[tuple[Path | Image.Image, str]], tile: int = TILE
) -> Image.Image:
    """The first images (at least one), each fitted in a tile, with the start of its prompt below.

    ``tile`` is a tile's side in pixels; tiles are lower where all images are. A file is opened
    when its turn comes.
    """
    shown = [(fit_tile(image, tile), prompt) for image, prompt in images[:MAX_TILES]]
    size, high, corners = _layout([fitted.size for fitted, _ in shown], tile)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for (fitted, prompt), (x, y) in zip(shown, corners, strict=True):
        sheet.paste(fitted, (x + (tile - fitted.width) // 2, y + (high - fitted.height) // 2))
        pen.text((x + 3, y + high + 1), _cut(prompt, tile - 6, pen, font), fill="black", font=font)
    return sheet


def _layout(sizes: Sequence[Size], tile: int) -> tuple[Size, int, list[Size]]:
    """A sheet's size, its tiles' height without the prompt, and the upper left corner of each."""
    columns = math.ceil(math.sqrt(len(sizes)))
    rows = math.ceil(len(sizes) / columns)
    high = max(height for _, height in sizes)
    places = (divmod(number, columns) for number in range(len(sizes)))
    corners = [(column * tile, row * (high + LINE)) for row, column in places]
    return (columns * tile, rows * (high + LINE)), high, corners


def sheet_record(
    images: Sequence[tuple[Image.Image, str]], tile: int = TILE
) -> PngImagePlugin.PngInfo:
    """What the PNG of a sheet of ``images`` must say, so that ``read_sheet`` can read it."""
    shown = images[:MAX_TILES]
    record = {
        "tile": tile,
        "images": [[*_fitted_size(image.size, tile), text[:MAX_PROMPT]] for image, text in shown],
    }
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(record), zip=True)
    return info


def read_sheet(path: Path) -> list[tuple[Image.Image, str]]:
    """The images on a sheet, as they were fitted, each with its prompt (up to 2,000 characters);
    none where the file has no record of them, or one that does not fit.

    Raises:
        ValueError: the file is no image that can be read.
    """
    try:
        with Image.open(path) as opened:
            boxes = _boxes(opened.info.get(KEY), opened.size)
            sheet = opened.convert("RGB") if boxes else opened
    except Exception as error:  # Pillow raises anything
        raise ValueError(f"{path}: cannot be read as an image ({first_line(error)})") from error
    return [(sheet.crop(box), prompt) for box, prompt in boxes]


def _boxes(text: Any, size: Size) -> list[tuple[Box, str]]:
    """Where the images of a sheet of ``size`` pixels lie, by its record."""
    try:
        record = json.loads(text)
        tile, entries = record["tile"], record["images"]
        sizes = [(width, height) for width, height, _ in entries]
        numbers = [tile, *(side for pair in sizes for side in pair)]
        if not all(type(number) is int and 0 < number <= MAX_TILE for number in numbers):
            return []
        stated, high, corners = _layout(sizes, tile)
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    if stated != size or len(sizes) > MAX_TILES or max(width for width, _ in sizes) > tile:
        return []
    boxes = []
    for (x, y), (width, height), (*_, prompt) in zip(corners, sizes, entries, strict=True):
        left, top = x + (tile - width) // 2, y + (high - height) // 2
        boxes.append(((left, top, left + width, top + height), str(prompt)))
    return boxes


def fit_tile(image: Path | Image.Image, tile: int) -> Image.Image:
    """The image scaled so that its longer side is ``tile`` pixels."""
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return fit_tile(opened, tile)
    return image.convert("RGB").resize(_fitted_size(image.size, tile))


def _fitted_size(size: Size, tile: int) -> Size:
    scale = tile / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _cut(
    prompt: str,
    width: int,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> str:
    """As much of a prompt's start as fits in ``width`` pixels, on one line."""
    # A prompt may be as long as a book; at a pixel a letter this is more than fits.
    line = " ".join(prompt[: 20 * width].split())[:width]
    num = bisect_right(
        range(1, len(line) + 1), width, key=lambda n: math.ceil(pen.textlength(line[:n], font))
    )
    return line[:num]
