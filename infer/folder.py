"""The folder of the images: which are there, and what lies beside them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import PngImagePlugin

from infer.listing import NAME, Row, coco, lines, read_listing
from infer.pictures import (
    SETTINGS_KEY,
    STILL_GOOD,
    About,
    picture_size,
    read_record,
    record_of,
    row_of_record,
    stale_because,
)
from infer.plan import Drawing
from runtime.files import (
    PARTIAL,
    aside_of,
    durable_file,
    format_bytes,
    free_bytes,
    remove_path,
    set_aside,
    write_durable,
    writing,
)
from runtime.locks import locked
from sdxl.contact_sheet import contact_sheet

SHEET = "contact-sheet.png"
LOCK = "generate.lock"  # while a run draws into the folder
TILE, WIDE_TILE = 256, 512  # pixels, on the sheet
COCO_FOLDER = "images"
DAMAGED = ".damaged"
BYTES_A_PIXEL = 1.5  # of a PNG; of photographs it is 1.3 to 2


class PictureFolder:
    """``out``: images 000000.png on and ``captions.jsonl``; or, as COCO has it, images
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
                    if NAME.fullmatch(name := left.name.removesuffix(PARTIAL)) or name == SHEET:
                        left.unlink()
            self._relist()
            self._check_listing()
            self._check_sheet()
            try:
                yield
            finally:
                self._relist()

    def _check_listing(self) -> None:
        """Refuse to replace captions that somebody else wrote, or changed."""
        if not self.listing.exists():
            return
        for name, text in read_listing(self.listing, self.is_coco).items():
            if not (path := self.pictures / name).exists():
                continue
            record, _ = read_record(path, to_the_end=False)
            if record is not None and record.get("prompt", text) != text:
                raise ValueError(
                    f"{self.listing}: the caption of {name} is not the prompt that it was drawn "
                    "from; move it away, or give another --out"
                )

    def _check_sheet(self) -> None:
        """Likewise of the contact sheet; those of earlier versions say nothing of themselves."""
        sheet = self.out / SHEET
        if self.listing.exists() or not sheet.exists() or read_record(sheet, False)[0] is not None:
            return
        if not any(read_record(path, False)[0] is not None for path in self._there()):
            raise ValueError(
                f"{sheet}: not drawn by shardtune; move it away, or give another --out"
            )

    def _there(self) -> list[Path]:
        """The images that are there, by their names."""
        return sorted(path for path in self.pictures.glob("*.png") if NAME.fullmatch(path.name))

    def missing(self, drawings: list[Drawing], about: About) -> list[Drawing]:
        """The drawings that are not there as asked; warns of those that are there otherwise."""
        stale = {one: stale_because(self.path(one), record_of(one, about)) for one in drawings}
        for reason in sorted({why for why in stale.values() if why}):
            paths = [self.path(one) for one, why in stale.items() if why == reason]
            warnings.warn(f"{_first_of(paths)}: to be generated again: {reason}", stacklevel=2)
        asked = {self.path(one) for one in drawings}
        if others := [path for path in self._there() if path not in asked]:
            warnings.warn(
                f"{_first_of(others)}: not asked for this time; left as it is", stacklevel=2
            )
        wanted = [one for one, why in stale.items() if why is not None]
        num_pixels = [width * height for width, height in map(picture_size, wanted)]
        needed, free = int(BYTES_A_PIXEL * sum(num_pixels)), free_bytes(self.out)
        if needed > free:
            warnings.warn(
                f"{self.out}: {len(wanted)} images may take {format_bytes(needed)}, and the disk "
                f"has {format_bytes(free)} left",
                stacklevel=2,
            )
        return wanted

    def before_replacing(self, drawing: Drawing) -> None:
        """To be called before an image is written: the captions of what is replaced are set aside,
        and no sooner, since whatever fails before that leaves the folder as it was. A damaged file
        that does not say whose it was is kept under another name."""
        path = self.path(drawing)
        if path.exists():
            set_aside(self.listing)
            if read_record(path, to_the_end=False)[0] is None:
                set_aside(path, path.with_name(path.name + DAMAGED))

    def finish(self, drawings: list[Drawing]) -> Path:
        """Write the captions and the contact sheet, when all images are there; returns the
        sheet."""
        sizes = map(picture_size, drawings)
        self._write_listing(
            [
                Row(self.name(one), one.prompt, *size)
                for one, size in zip(drawings, sizes, strict=True)
            ]
        )
        tile = WIDE_TILE if drawings[0].compare else TILE
        sheet = contact_sheet([(self.path(one), one.prompt) for one in drawings], tile)
        path, info = self.out / SHEET, PngImagePlugin.PngInfo()
        info.add_text(SETTINGS_KEY, "{}")
        with writing(path, STILL_GOOD), durable_file(path) as file:
            sheet.save(file, format="PNG", compress_level=1, pnginfo=info)
        return path

    def _relist(self) -> None:
        """After a run that failed or was killed while it replaced images: captions of what is
        there now, by the images' own records."""
        if aside_of(self.listing).exists():
            rows = (row_of_record(path, read_record(path, False)[0]) for path in self._there())
            self._write_listing([row for row in rows if row is not None])

    def _write_listing(self, rows: list[Row]) -> None:
        text = coco(rows) if self.is_coco else lines(rows)
        with writing(self.listing, STILL_GOOD):
            write_durable(self.listing, text.encode())
        remove_path(aside_of(self.listing))


def _first_of(paths: list[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
