"""All pictures of a run at a glance."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 256  # pixels
LINE = 18  # pixels under each tile, for its prompt
MOST = 100  # pictures on one sheet


def contact_sheet(pictures: list[tuple[Path, str]]) -> Image.Image:
    """The first pictures, each fitted in a tile, with the start of its prompt below."""
    shown = pictures[:MOST]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + LINE)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (path, prompt) in enumerate(shown):
        row, column = divmod(number, columns)
        x, y = column * TILE, row * (TILE + LINE)
        with Image.open(path) as picture:
            scale = TILE / max(picture.size)
            size = [max(1, round(side * scale)) for side in picture.size]
            tile = picture.convert("RGB").resize((size[0], size[1]))
        sheet.paste(tile, (x + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2))
        pen.text((x + 3, y + TILE + 1), _cut(prompt, pen, font), fill="black", font=font)
    return sheet


def _cut(
    prompt: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    line = prompt
    while line and pen.textlength(line, font=font) > TILE - 6:
        line = line[:-2]
    return line
