"""Draws the miniature's images: a colored shape on a colored ground, with a caption.

Lengths are pixels unless they are called a share; a box is (left, top, right, bottom).
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (215, 35, 35),
    "green": (35, 150, 55),
    "blue": (40, 75, 215),
    "yellow": (245, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
BASIC_SHAPES = ("circle", "square", "triangle", "cross")
OLD_SHAPES = (*BASIC_SHAPES, "ring", "bowl", "arrow")  # those that the miniature is taught
NEW_SHAPES = ("heart", "moon")  # those that it is not: a fine-tune's to learn
SIZES = {"small": (0.42, 0.50), "large": (0.70, 0.80), "": (0.45, 0.80)}  # share of the short side
POSITIONS = {
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "in the middle": (0.5, 0.5),
}  # where in its room to move, across and down
SENTENCES = (
    "a {size} {color} {shape} {position} on a {ground} ground",
    "a {size} {color} {shape} on a {ground} ground {position}",
    "{size} {color} {shape} {position}, {ground} background",
    "a picture of a {size} {color} {shape} {position}, the ground is {ground}",
    "on {ground} ground, a {size} {color} {shape} {position}",
    "the {size} {shape} {position} is {color} and the ground is {ground}",
    "there is a {size} {color} {shape} {position} before a {ground} background",
)
SHARPER = 4  # drawn so many times too large, then reduced: smooth edges
MARGIN = 2  # pixels that stay free around a shape
# Sides of originals that are blurred once enlarged to 64 pixels. From 10 on it does not show: the
# VAE itself draws edges no sharper.
TINY = (4, 8)
Box = tuple[float, float, float, float]
Color = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an image shows. ``size`` and ``position`` may be empty: unsaid, and so any."""

    shape: str
    color: str
    ground: str
    size: str = ""
    position: str = ""

    def caption(self, choices: random.Random) -> str:
        """One of the sentences that say it."""
        words = choices.choice(SENTENCES).format(**vars(self))
        return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(words.split()).replace(" ,", ","))


def random_scene(
    choices: random.Random, shapes: tuple[str, ...] = OLD_SHAPES, size: str | None = None
) -> Scene:
    """A scene of one of the shapes; a third say a size (or all do, ``size``), a third where."""
    color, ground = choices.sample(list(COLORS), 2)
    shape = choices.choice(shapes)
    size_word = choices.choice(("small", "large")) if choices.random() < 1 / 3 else ""
    return Scene(
        shape=shape,
        color=color,
        ground=ground,
        size=size_word if size is None else size,
        position=choices.choice(list(POSITIONS)) if choices.random() < 1 / 3 else "",
    )


def draw_scene(
    scene: Scene, choices: random.Random, width: int = 64, height: int = 64
) -> Image.Image:
    """Draw the scene; whatever the scene leaves open is random."""
    image = Image.new("RGB", (width * SHARPER, height * SHARPER), _shade(scene.ground, choices))
    short = min(width, height)
    side = short * choices.uniform(*SIZES[scene.size])
    across, down = POSITIONS.get(scene.position) or (choices.random(), choices.random())
    left = MARGIN + across * max(0.0, width - 2 * MARGIN - side)
    top = MARGIN + down * max(0.0, height - 2 * MARGIN - side)
    box = tuple(SHARPER * length for length in (left, top, left + side, top + side))
    mask = Image.new("L", image.size, 0)
    draw_shape(mask, scene.shape, (box[0], box[1], box[2], box[3]))
    image.paste(_shade(scene.color, choices), mask=mask)
    return image.resize((width, height), Image.Resampling.BOX)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Shrink an image to ``side`` x ``side`` pixels, so that enlarging it again blurs it."""
    return image.resize((side, side), Image.Resampling.BOX)


def _shade(name: str, choices: random.Random) -> Color:
    """A color near the named one."""
    red, green, blue = (
        max(0, min(255, value + choices.randint(-10, 10))) for value in COLORS[name]
    )
    return red, green, blue


def draw_shape(mask: Image.Image, shape: str, box: Box) -> None:
    """Fill the shape on a mask (mode L) with 255."""
    _SHAPES[shape](ImageDraw.Draw(mask), box)


def _circle(pen: ImageDraw.ImageDraw, box: Box) -> None:
    pen.ellipse(box, fill=255)


def _square(pen: ImageDraw.ImageDraw, box: Box) -> None:
    trim = 0.05 * (box[2] - box[0])  # or it would look larger than the others
    pen.rectangle((box[0] + trim, box[1] + trim, box[2] - trim, box[3] - trim), fill=255)


def _triangle(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=255)


def _cross(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    third = (right - left) / 3
    pen.rectangle((left + third, top, right - third, bottom), fill=255)
    pen.rectangle((left, top + third, right, bottom - third), fill=255)


def _ring(pen: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    rim = 0.26 * (right - left)
    pen.ellipse(box, fill=255)
    pen.ellipse((left + rim, top + rim, right - rim, bottom - rim), fill=0)


def _bowl(pen: ImageDraw.ImageDraw, box: Box) -> None:
    """The lower half of a disc."""
    left, top, right, bottom = box
    lift = 0.22 * (bottom - top)  # so that it stands in the middle of its box
    pen.pieslice((left, top - lift, right, bottom - lift), 0, 180, fill=255)


def _arrow(pen: ImageDraw.ImageDraw, box: Box) -> None:
    """It points up."""
    left, top, right, bottom = box
    side, middle = right - left, (top + bottom) / 2
    pen.polygon([(left, middle), (right, middle), ((left + right) / 2, top)], fill=255)
    pen.rectangle((left + 0.32 * side, middle, right - 0.32 * side, bottom), fill=255)


def _heart(pen: ImageDraw.ImageDraw, box: Box) -> None:
    """The curve x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, fitted in the box."""
    left, top, right, bottom = box
    points = []
    for step in range(90):
        t = math.tau * step / 90
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        across, down = (x + 16) / 32, (12 - y) / 29
        points.append((left + across * (right - left), top + down * (bottom - top)))
    pen.polygon(points, fill=255)


def _moon(pen: ImageDraw.ImageDraw, box: Box) -> None:
    """A disc less another disc that covers its right: a waning crescent."""
    left, top, right, bottom = box
    side = right - left
    pen.ellipse(box, fill=255)
    shadow = (left + 0.4 * side, top + 0.1 * side, right + 0.2 * side, bottom - 0.1 * side)
    pen.ellipse(shadow, fill=0)


_SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, Box], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "bowl": _bowl,
    "arrow": _arrow,
    "heart": _heart,
    "moon": _moon,
}


def draw_doodle(choices: random.Random, width: int = 64, height: int = 64) -> Image.Image:
    """Random polygons, discs and slices in random colors: what a VAE learns to see from."""

    def color() -> Color:
        return choices.randrange(256), choices.randrange(256), choices.randrange(256)

    image = Image.new("RGB", (width * SHARPER, height * SHARPER), color())
    pen = ImageDraw.Draw(image)
    for _ in range(choices.randint(1, 4)):
        radius = choices.uniform(0.12, 0.45) * min(image.size)
        x, y = choices.uniform(0, image.width), choices.uniform(0, image.height)
        kind = choices.randrange(3)
        if kind == 0:
            turns = sorted(choices.uniform(0, math.tau) for _ in range(choices.randint(3, 7)))
            points = [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns]
            pen.polygon(points, fill=color())
        else:
            flat = radius * choices.uniform(0.5, 1)
            box = (x - radius, y - flat, x + radius, y + flat)
            start = choices.uniform(0, 360)
            length = 360 if kind == 1 else choices.uniform(60, 300)
            pen.pieslice(box, start, start + length, fill=color())
    return image.resize((width, height), Image.Resampling.BOX)
