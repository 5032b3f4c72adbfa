"""One picture's file: a PNG that says how it was drawn, there whole or not at all."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from infer.plan import Drawing

SETTINGS_KEY = "shardtune"
PARTIAL = ".partial"
SIDES = ("without", "with")

About = dict[str, Any]  # "weights": their digests; "samplers": each one's class and config


def record_of(drawing: Drawing, about: About) -> dict[str, Any]:
    """All that decides the picture, as plain JSON."""
    sampler = about["samplers"][drawing.sampler or ""]
    return {**asdict(drawing), "sampler": sampler, "weights": about["weights"]}


def stale_because(path: Path, asked: dict[str, Any]) -> str | None:
    """Why a picture must be drawn (again); empty where it is missing, None where it is as asked.

    Every byte is checked against the checksums that a PNG has, and no pixel is decoded.

    Raises:
        ValueError: a picture that someone else made.
    """
    if not path.exists():
        return ""
    try:
        with Image.open(path) as image:
            text = image.info.get(SETTINGS_KEY)
            image.verify()
            recorded = dict(json.loads(text)) if text is not None else None
    except (OSError, SyntaxError, ValueError, TypeError):
        return "damaged"
    if recorded is None:
        raise ValueError(f"{path}: not drawn by shardtune; give another --out")
    changed = sorted(name for name in asked if recorded.get(name) != asked[name])
    return f"{', '.join(changed)} changed" if changed else None


def picture_size(drawing: Drawing) -> tuple[int, int]:
    """(width, height) of the file's picture."""
    if drawing.compare:
        label, gap = _margins(drawing)
        return 2 * drawing.width + gap, drawing.height + label
    return drawing.width, drawing.height


def _margins(drawing: Drawing) -> tuple[int, int]:
    """Pixels above two pictures, for what they are, and between them: to be read on a sheet too."""
    return max(20, drawing.height // 16), max(4, drawing.width // 128)


def save_picture(
    path: Path, sides: list[torch.Tensor], drawing: Drawing, about: About, loras: str
) -> None:
    """Write the picture [3, H, W] in 0..1; or two of them, the one without the fine-tune first.

    ``loras`` is for the line that web UIs show: names and weights, or empty.
    """
    images = [_to_image(side) for side in sides]
    image = images[0] if len(images) == 1 else _side_by_side(images, drawing)
    info = PngImagePlugin.PngInfo()
    record = record_of(drawing, about)
    info.add_text("parameters", _parameters(drawing, record["sampler"]["name"], loras))
    info.add_text(SETTINGS_KEY, json.dumps(record))
    with_replacement(path, lambda partial: image.save(partial, format="PNG", pnginfo=info))


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


def with_replacement(path: Path, write: Any) -> None:
    """``write`` a partial file, and put it in the place of ``path`` when it is whole."""
    partial = path.with_name(path.name + PARTIAL)
    write(partial)
    os.replace(partial, path)
