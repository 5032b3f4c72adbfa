"""Embeds images in a page as data URIs, scaled down so that all of them fit into its size."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

MAX_IMAGES = 40
MAX_BYTES = 9_000_000  # of all images of a page; base64 makes 12 MB of them
MAX_DECODED = 400_000_000  # pixels that are decoded for a page: some seconds
MAX_SIDE = 1536  # pixels: what a large screen shows
T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """An image as it stands in a page, in pixels."""

    uri: str
    width: int
    height: int


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of them, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return [*items]
    if most < 2:
        return [*items[-1:]]
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def embed_images(paths: Sequence[Path]) -> tuple[dict[Path, Embedded], list[str]]:
    """At most ``MAX_IMAGES`` of the images, evenly spaced; and notes on those that are left out.

    What is damaged is noted by its name. Metadata stays behind.
    """
    sizes, notes = {}, []
    for path in thinned(paths, 10 * MAX_IMAGES):
        try:
            with Image.open(path) as image:
                sizes[path] = image.width * image.height
        except Exception as error:  # Pillow raises whatever a damaged file brings about
            notes.append(_damaged(path, error))
    largest = max(sizes.values(), default=1)
    chosen = thinned([*sizes], max(1, min(MAX_IMAGES, MAX_DECODED // largest)))
    embedded = {}
    for path in chosen:
        try:
            embedded[path] = _embed(path, MAX_BYTES // len(chosen))
        except Exception as error:
            notes.append(_damaged(path, error))
    if len(chosen) < len(paths) - len(notes):
        notes.append(f"{len(chosen)} of {len(paths)} previews are shown, evenly spaced.")
    return embedded, notes


def embed_all(paths: Sequence[Path]) -> tuple[dict[Path, Embedded], list[str]]:
    """All of the images, as small as their number makes it necessary; notes on damaged ones."""
    embedded, notes = {}, []
    for path in paths:
        try:
            embedded[path] = _embed(path, MAX_BYTES // len(paths))
        except Exception as error:
            notes.append(_damaged(path, error))
    return embedded, notes


def _damaged(path: Path, error: Exception) -> str:
    return f"{path.name} cannot be read ({type(error).__name__}), and is left out."


def _embed(path: Path, max_bytes: int) -> Embedded:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    while True:
        kind, data = _encode(image, max_bytes)
        if len(data) <= max_bytes or min(image.size) < 16:
            text = base64.b64encode(data).decode()
            return Embedded(f"data:image/{kind};base64,{text}", *image.size)
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def _encode(image: Image.Image, max_bytes: int) -> tuple[str, bytes]:
    """Without loss where that is small, as with drawn images; else as WebP."""
    if image.width * image.height * 3 < 4 * max_bytes:
        file = io.BytesIO()
        image.save(file, format="PNG")
        if file.tell() <= min(max_bytes, 100_000):
            return "png", file.getvalue()
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=82, method=2)
    return "webp", file.getvalue()
