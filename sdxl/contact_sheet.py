"""One image that shows many: with their prompts below, or as a grid with labels."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels
LINE = 18  # pixels under each tile, for its prompt
MAX_TILES = 100  # images on one sheet


GAP = 4  # pixels between images
MAX_GRID_PIXELS = 60_000_000  # of a grid: tiles get smaller where there are many
LINEAR_COLORS = "colors by the cache's linear map, not by the VAE"


def contact_sheet(
    images: Sequence[tuple[Path | Image.Image, str]], tile: int = TILE, title: str = ""
) -> Image.Image:
    """The first images (at least one), each fitted in a tile, with the start of its prompt below,
    and a title above all.

    ``tile`` is a tile's side in pixels; tiles are lower where all images are. A file is opened
    when its turn comes.
    """
    shown = [(_fit(image, tile), prompt) for image, prompt in images[:MAX_TILES]]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    high = max(fitted.height for fitted, _ in shown)
    top = LINE if title else 0
    step, step_down = tile + GAP, high + LINE + GAP
    size = columns * step - GAP, top + rows * step_down
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((3, 1), _cut(title, size[0] - 6, pen, font), fill="black", font=font)
    for number, (fitted, prompt) in enumerate(shown):
        row, column = divmod(number, columns)
        x, y = column * step, top + row * step_down
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
    images = [[[_fit(path, tile) for path in row] for row in block.images] for block in blocks]
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


def _fit(image: Path | Image.Image, tile: int) -> Image.Image:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return _fit(opened, tile)
    scale = tile / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height))


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
