"""One image that shows many: with their prompts below, or as a grid with labels."""

import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
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


GAP = 4  # pixels between images
MAX_GRID_PIXELS = 60_000_000  # of a grid: tiles get smaller where there are many
MAP_COLORS = "colors by the cache's color map, not by the VAE"


def contact_sheet(
    images: Sequence[tuple[Path | Image.Image, str]], tile: int = TILE, title: str = ""
) -> Image.Image:
    """The first images (at least one), each fitted in a tile, with the start of its prompt below,
    and a title above all.

    ``tile`` is a tile's side in pixels; tiles are lower where all images are. A file is opened
    when its turn comes.
    """
    shown = [(fit_tile(image, tile), prompt) for image, prompt in images[:MAX_TILES]]
    size, high, corners = _layout([fitted.size for fitted, _ in shown], tile, bool(title))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((3, 1), _cut(title, size[0] - 6, pen, font), fill="black", font=font)
    for (fitted, prompt), (x, y) in zip(shown, corners, strict=True):
        sheet.paste(fitted, (x + (tile - fitted.width) // 2, y + (high - fitted.height) // 2))
        pen.text((x + 3, y + high + 1), _cut(prompt, tile - 6, pen, font), fill="black", font=font)
    return sheet


@dataclass(frozen=True)
class GridBlock:
    """The images of one prompt, by row and column."""

    title: str
    images: list[list[Path]]


def grid_sheet(
    columns: Sequence[str], rows: Sequence[str], blocks: Sequence[GridBlock], tile: int = TILE
) -> Image.Image:
    """Blocks of images below each other, each under its title, with the columns' labels above and
    the rows' at the left. ``tile`` is the side of an image in pixels, at most."""
    font = ImageFont.load_default(12)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(math.ceil(pen.textlength(text, font)) for text in rows) + 2 * GAP
    margin = margin if any(rows) else GAP
    num = len(blocks) * len(rows) * len(columns)
    tile = max(32, min(tile, math.isqrt(MAX_GRID_PIXELS // num) - GAP))
    images = [[[fit_tile(path, tile) for path in row] for row in block.images] for block in blocks]
    heights = [max(image.height for row in block for image in row) for block in images]
    step = tile + GAP
    size = (
        margin + len(columns) * step,
        sum(3 * LINE + len(rows) * (height + GAP) for height in heights),
    )
    sheet = Image.new("RGB", size, "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for block, shown, height in zip(blocks, images, heights, strict=True):
        title = _cut(block.title, size[0] - 2 * GAP, pen, font)
        pen.text((GAP, y + LINE), title, fill="black", font=font, anchor="lm")
        for number, label in enumerate(columns):
            place = (margin + number * step, y + 2 * LINE)
            pen.text(place, _cut(label, tile, pen, font), fill="black", font=font)
        y += 3 * LINE
        for label, row in zip(rows, shown, strict=True):
            pen.text((GAP, y + height / 2), label, fill="black", font=font, anchor="lm")
            for number, image in enumerate(row):
                x = margin + number * step + (tile - image.width) // 2
                sheet.paste(image, (x, y + (height - image.height) // 2))
            y += height + GAP
    return sheet


def of_all(num_shown: int, num: int) -> str:
    """``the first 100 of 186 images``, or ``12 images``."""
    return f"{num:,} images" if num_shown == num else f"the first {num_shown} of {num:,} images"


def _layout(sizes: Sequence[Size], tile: int, has_title: bool) -> tuple[Size, int, list[Size]]:
    """A sheet's size, its tiles' height without the prompt, and the upper left corner of each."""
    columns = math.ceil(math.sqrt(len(sizes)))
    rows = math.ceil(len(sizes) / columns)
    high = max(height for _, height in sizes)
    step, step_down, top = tile + GAP, high + LINE + GAP, LINE if has_title else 0
    places = (divmod(number, columns) for number in range(len(sizes)))
    corners = [(column * step, top + row * step_down) for row, column in places]
    return (columns * step - GAP, top + rows * step_down), high, corners


def sheet_record(
    images: Sequence[tuple[Image.Image, str]], tile: int = TILE, title: str = ""
) -> PngImagePlugin.PngInfo:
    """What the PNG of a sheet of ``images`` must say, so that ``read_sheet`` can read it; their
    texts may be others than those below them."""
    shown = images[:MAX_TILES]
    record = {
        "tile": tile,
        "title": bool(title),
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
        stated, high, corners = _layout(sizes, tile, record["title"] is True)
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
    """As many words of a prompt's start as fit in ``width`` pixels, on one line; an ellipsis stands
    for the others."""
    # A prompt may be as long as a book; at a pixel a letter this is more than fits.
    line = " ".join(prompt[: 20 * width].split())
    is_whole = len(prompt) <= 20 * width and len(line) <= width
    line = line[:width]
    if is_whole and pen.textlength(line, font) <= width:
        return line
    num = bisect_right(
        range(1, len(line) + 1),
        width,
        key=lambda n: math.ceil(pen.textlength(f"{line[:n]}…", font)),
    )
    words, _, _ = line[: num + 1].rpartition(" ")
    return f"{(words if len(words) > num // 2 else line[:num]).rstrip(' ,.;')}…"
