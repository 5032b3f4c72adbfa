"""Draws captioned images of colored shapes, so that a demo or test needs no download."""

import random
from pathlib import Path

import click
from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "yellow", "purple", "pink", "white", "black")
ASPECTS = ((3, 3), (4, 2.5), (2.5, 4))  # thirds of `size`: 96 gives 96x96, 128x80 and 80x128
Box = tuple[int, int, int, int]  # left, top, right, bottom


def draw_images(folder: Path, count: int = 24, size: int = 96, seed: int = 0) -> None:
    """Write ``000.png``, its caption ``000.txt`` and so on; ``size`` is a square one's side."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = random.Random(seed)
    for index in range(count):
        width, height = (round(size * side / 3) for side in ASPECTS[index % len(ASPECTS)])
        color, ground = choices.sample(COLORS, 2)
        shape = choices.choice(("circle", "square", "triangle"))
        image = Image.new("RGB", (width, height), ground)
        _draw_shape(image, shape, color, _random_box(width, height, choices))
        image.save(folder / f"{index:03}.png")
        caption = f"a {color} {shape} on a {ground} ground\n"
        (folder / f"{index:03}.txt").write_text(caption, encoding="utf-8")


def _random_box(width: int, height: int, choices: random.Random) -> Box:
    """A square of 40 to 80 % of the shorter side, wholly inside the image."""
    side = round(min(width, height) * choices.uniform(0.4, 0.8))
    left, top = choices.randint(0, width - side), choices.randint(0, height - side)
    return left, top, left + side, top + side


def _draw_shape(image: Image.Image, shape: str, color: str, box: Box) -> None:
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    else:
        left, top, right, bottom = box
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=color)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=24, show_default=True)
@click.option("--size", type=click.IntRange(min=8), default=96, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(folder: Path, count: int, size: int, seed: int) -> None:
    """Draws captioned images of colored shapes into FOLDER."""
    draw_images(folder, count, size, seed)


if __name__ == "__main__":
    main()
