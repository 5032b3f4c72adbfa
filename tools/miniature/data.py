"""Makes the datasets: one that trains the miniature, and a sample of shapes that it does not know.

Each is a folder of PNGs with a ``captions.jsonl``. The same seed draws the same images.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from PIL import Image
from tqdm import tqdm

from tools.miniature.drawing import (
    NEW_SHAPES,
    OLD_SHAPES,
    TINY,
    Scene,
    draw_scene,
    random_scene,
    shrink,
)

NUM_TRAINING = 8500
NUM_CROPPED = 2000
EMPTY_SHARE = 0.05  # of the training captions: they teach the encoded empty prompt
LIST = "captions.jsonl"


def write_training_set(folder: Path, num: int = NUM_TRAINING, seed: int = 10) -> None:
    """Old shapes, most 64x64; of the others the size numbers must say how sharp they can be."""
    _write_training(folder, _any_size, num, seed)


def write_cropped_set(folder: Path, num: int = NUM_CROPPED, seed: int = 11) -> None:
    """Old shapes in wide and in high images, to be encoded with ``--square``: what stands at an
    end of one is cut off, and the crop numbers say so."""
    _write_training(folder, _oblong, num, seed)


def _write_training(
    folder: Path, draw: Callable[[Scene, random.Random], Image.Image], num: int, seed: int
) -> None:
    choices = random.Random(seed)

    def captioned_images() -> Iterator[tuple[Image.Image, str]]:
        for _ in range(num):
            scene = random_scene(choices)
            caption = "" if choices.random() < EMPTY_SHARE else scene.caption(choices)
            yield draw(scene, choices), caption

    _write(folder, captioned_images(), num)


def _any_size(scene: Scene, choices: random.Random) -> Image.Image:
    """Mostly as it will be trained; else wide or high; or too small, so blurred; or too large."""
    kind = choices.random()
    if kind < 0.6:
        return draw_scene(scene, choices)
    if kind < 0.74:
        return draw_scene(scene, choices, *choices.choice(((80, 48), (48, 80))))
    if kind < 0.9:
        return shrink(draw_scene(scene, choices), choices.randint(*TINY))
    side = choices.randint(66, 128)
    return draw_scene(scene, choices, side, side)


def _oblong(scene: Scene, choices: random.Random) -> Image.Image:
    """Up to 1.75 times as long as high, for of longer ones some shapes would be cropped whole."""
    short = choices.choice((64, 64, choices.randint(64, 96)))  # else crop and size say the same
    long = round(short * choices.uniform(1.2, 1.75))
    return draw_scene(scene, choices, *choices.choice(((long, short), (short, long))))


def write_sample_set(folder: Path, num: int = 120, seed: int = 20) -> None:
    """The two new shapes, by turns and all large, in squares and in 5:3 both ways."""
    _write_scenes(folder, NEW_SHAPES, num, seed, size="large")


def write_prior_set(folder: Path, num: int = 120, seed: int = 30) -> None:
    """The old shapes: trained on with the new, they keep the model from forgetting."""
    _write_scenes(folder, OLD_SHAPES, num, seed)


def _write_scenes(
    folder: Path, shapes: tuple[str, ...], num: int, seed: int, size: str | None = None
) -> None:
    choices = random.Random(seed)

    def captioned_images() -> Iterator[tuple[Image.Image, str]]:
        for number in range(num):
            scene = random_scene(choices, (shapes[number % len(shapes)],), size)
            sides = choices.choice(((64, 64), (64, 64), (80, 48), (48, 80)))
            yield draw_scene(scene, choices, *sides), scene.caption(choices)

    _write(folder, captioned_images(), num)


def _write(folder: Path, images: Iterator[tuple[Image.Image, str]], num: int) -> None:
    """The list comes last: a folder that has it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, caption) in enumerate(tqdm(images, desc="draw", total=num, unit="img")):
        name = f"{number:05d}.png"
        image.save(folder / name)
        rows.append({"file_name": name, "text": caption})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / LIST).write_text("".join(lines), encoding="utf-8")


def fresh_prompts(
    num: int, shapes: tuple[str, ...], seed: int, size: str | None = None
) -> tuple[list[Scene], list[str]]:
    """Scenes and their captions, the shapes by turns; other seeds than the datasets'."""
    choices = random.Random(seed)
    scenes = [random_scene(choices, (shapes[number % len(shapes)],), size) for number in range(num)]
    return scenes, [scene.caption(choices) for scene in scenes]


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--num", type=click.IntRange(min=1), default=120, show_default=True)
def main(folder: Path, num: int) -> None:
    """Draw the sample dataset: FOLDER/new, of two shapes that the miniature does not know, and
    FOLDER/old, of those that it does."""
    write_sample_set(folder / "new", num)
    write_prior_set(folder / "old", num)


if __name__ == "__main__":
    main()
