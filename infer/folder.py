"""The folder of the pictures: which are there, and what lies beside them."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infer.pictures import (
    PARTIAL,
    About,
    picture_size,
    record_of,
    stale_because,
    with_replacement,
)
from infer.plan import Drawing
from processes.lock import locked
from sdxl.sheet import contact_sheet

SHEET = "contact-sheet.png"
LOCK = "generate.lock"  # while a run draws into the folder
TILE, WIDE_TILE = 256, 512  # pixels, on the sheet
COCO_FOLDER = "images"


class PictureFolder:
    """``out``: pictures 000000.png on and ``captions.jsonl``; or, as COCO has it, pictures
    images/000000000001.png on and ``annotations.json``; and a contact sheet of the first."""

    def __init__(self, out: Path, layout: str) -> None:
        self.out, self.is_coco = out, layout == "coco"
        self.pictures = out / COCO_FOLDER if self.is_coco else out

    def name(self, drawing: Drawing) -> str:
        return f"{drawing.number + 1:012d}.png" if self.is_coco else f"{drawing.number:06d}.png"

    def path(self, drawing: Drawing) -> Path:
        return self.pictures / self.name(drawing)

    @property
    def listing(self) -> Path:
        """The file with the captions."""
        return self.out / ("annotations.json" if self.is_coco else "captions.jsonl")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it; what a killed one left half is removed.

        Raises:
            ValueError: it is no folder, or another run is drawing into it.
        """
        for part in (self.pictures, *self.pictures.parents):
            if part.exists() and not part.is_dir():
                raise ValueError(f"{part}: not a folder")
        self.pictures.mkdir(parents=True, exist_ok=True)
        with locked(self.out / LOCK):
            for folder in {self.out, self.pictures}:
                for left in folder.glob(f"*.png{PARTIAL}"):
                    left.unlink()
            yield

    def missing(self, drawings: list[Drawing], about: About) -> list[Drawing]:
        """The drawings that are not there as asked; warns of those that are there otherwise."""
        stale = {one: stale_because(self.path(one), record_of(one, about)) for one in drawings}
        for reason in sorted({why for why in stale.values() if why}):
            paths = [self.path(one) for one, why in stale.items() if why == reason]
            warnings.warn(f"{_first_of(paths)}: drawn again: {reason}", stacklevel=2)
        asked = {self.path(one) for one in drawings}
        if others := sorted(path for path in self.pictures.glob("0*.png") if path not in asked):
            warnings.warn(
                f"{_first_of(others)}: not asked for this time; left as it is", stacklevel=2
            )
        return [one for one, why in stale.items() if why is not None]

    def finish(self, drawings: list[Drawing]) -> Path:
        """Write the captions and the contact sheet, when all pictures are there; returns the
        sheet."""
        text = _coco(self, drawings) if self.is_coco else _lines(self, drawings)
        with_replacement(self.listing, lambda path: path.write_text(text, encoding="utf-8"))
        tile = WIDE_TILE if drawings[0].compare else TILE
        sheet = contact_sheet([(self.path(one), one.prompt) for one in drawings], tile)
        path = self.out / SHEET
        with_replacement(path, lambda partial: sheet.save(partial, format="PNG", compress_level=1))
        return path


def _first_of(paths: list[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _lines(folder: PictureFolder, drawings: list[Drawing]) -> str:
    rows = [{"file_name": folder.name(one), "text": one.prompt} for one in drawings]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _coco(folder: PictureFolder, drawings: list[Drawing]) -> str:
    """COCO's layout of captions (https://cocodataset.org/#format-data)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, one in enumerate(drawings, start=1):
        width, height = picture_size(one)
        about = {"id": number, "file_name": folder.name(one), "width": width, "height": height}
        images.append(about)
        annotations.append({"id": number, "image_id": number, "caption": one.prompt})
    info = {"description": "pictures drawn by shardtune"}
    found = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    return json.dumps(found, ensure_ascii=False) + "\n"
