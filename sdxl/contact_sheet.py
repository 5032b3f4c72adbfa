"""One image that shows many, with their prompts below."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels
LINE = 18  # pixels under each tile, for its prompt
MAX_TILES = 100  # images on one sheet


def contact_sheet(
    images: Sequence[tuple[Path | Image.Image, str]], tile: int = TILE
) -> Image.Image:
    """The first images (at least one), each fitted in a tile, with the start of its prompt below.

    ``tile`` is a tile's side in pixels; tiles are lower where all images are. A file is opened
    when its turn comes.
    """
    shown = [(_fit(image, tile), prompt) for image, prompt in images[:MAX_TILES]]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    high = max(fitted.height for fitted, _ in shown)
    sheet = Image.new("RGB", (columns * tile, rows * (high + LINE)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (fitted, prompt) in enumerate(shown):
        row, column = divmod(number, columns)
        x, y = column * tile, row * (high + LINE)
        sheet.paste(fitted, (x + (tile - fitted.width) // 2, y + (high - fitted.height) // 2))
        pen.text((x + 3, y + high + 1), _cut(prompt, tile - 6, pen, font), fill="black", font=font)
    return sheet


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
    """As much of a prompt's start as fits in ``width`` pixels, on one line."""
    # A prompt may be as long as a book; at a pixel a letter this is more than fits.
    line = " ".join(prompt[: 20 * width].split())[:width]
    num = bisect_right(
        range(1, len(line) + 1), width, key=lambda n: math.ceil(pen.textlength(line[:n], font))
    )
    return line[:num]
