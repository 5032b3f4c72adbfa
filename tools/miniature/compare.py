"""Shows what a fine-tune changed in one image: the same prompts and seeds, before above after."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TILE = 128  # pixels
GAP = 8
SIDE = 70  # for the words before and after
LINE = 15
MAX_LINES = 4
INK, PAPER = (30, 30, 30), (255, 255, 255)


def before_and_after(
    prompts: Sequence[str], before: Sequence[Path], after: Sequence[Path], footer: str
) -> Image.Image:
    """A column for each prompt, with the prompt above it; ``footer`` may have several lines."""
    font = ImageFont.load_default(12)
    head = MAX_LINES * LINE + 2 * GAP
    width = SIDE + len(prompts) * (TILE + GAP)
    foot = len(footer.splitlines()) * LINE + 2 * GAP
    sheet = Image.new("RGB", (width, head + 2 * (TILE + GAP) + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        x = SIDE + column * (TILE + GAP)
        lines = textwrap.wrap(prompt, width=21)[:MAX_LINES]
        pen.multiline_text((x, head - GAP), "\n".join(lines), INK, font, anchor="ld", spacing=2)
        for row, paths in enumerate((before, after)):
            with Image.open(paths[column]) as image:
                tile = _fitted(image.convert("RGB"))
            sheet.paste(tile, (x, head + row * (TILE + GAP)))
    for row, word in enumerate(("before", "after")):
        pen.text((GAP, head + row * (TILE + GAP) + TILE / 2), word, INK, font, anchor="lm")
    pen.multiline_text((GAP, head + 2 * (TILE + GAP) + GAP), footer, INK, font, spacing=3)
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    """Enlarged to a tile, its pixels left visible, on paper where it is not square."""
    scale = TILE / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(
        image.resize(size, Image.Resampling.BICUBIC),
        ((TILE - size[0]) // 2, (TILE - size[1]) // 2),
    )
    return tile
