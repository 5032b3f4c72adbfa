"""The folder of generated images: PNGs that record how they were made, captions, contact sheet."""

import json
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from infer.requests import ImageRequest
from runtime.documents import open_regular, parse_json, read_bounded
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

MAX_BYTES = 1_000_000_000
DESCRIPTION = "pictures drawn by shardtune"  # a mark in files that exist: it stays
NAME = re.compile(r"[0-9]{6,}\.png")


@dataclass(frozen=True)
class CaptionRow:
    """An image's file name, its caption, and its size in pixels."""

    file_name: str
    text: str
    width: int
    height: int


def lines(rows: Iterable[CaptionRow]) -> str:
    """``captions.jsonl``."""
    records = ({"file_name": row.file_name, "text": row.text} for row in rows)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def coco(rows: Iterable[CaptionRow]) -> str:
    """COCO's layout of captions (https://cocodataset.org/#format-data)."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        size = {"width": row.width, "height": row.height}
        images.append({"id": number, "file_name": row.file_name, **size})
        annotations.append({"id": number, "image_id": number, "caption": row.text})
    info = {"description": DESCRIPTION}
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations}
    return json.dumps(content, ensure_ascii=False) + "\n"


def read_listing(path: Path, is_coco: bool) -> dict[str, str]:
    """The caption of each file that a listing of ours names.

    Raises:
        ValueError: not a listing that generate wrote, or edited since.
    """
    data = read_bounded(path, MAX_BYTES)
    try:
        pairs = dict(_coco_pairs(parse_json(data)) if is_coco else _line_pairs(data))
        if not all(NAME.fullmatch(name) and isinstance(text, str) for name, text in pairs.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError):  # TypeError: also a list where an object must be
        raise ValueError(
            f"{path}: not written by generate, or changed since; move it away, or give another "
            "--out"
        ) from None
    return pairs


def _line_pairs(data: bytes) -> Iterator[tuple[str, str]]:
    for line in data.decode().split("\n"):
        row = parse_json(line) if line else None
        if isinstance(row, dict) and row.keys() == {"file_name", "text"}:
            yield row["file_name"], row["text"]
        elif line:
            raise ValueError


def _coco_pairs(listing: Any) -> Iterator[tuple[str, str]]:
    if listing["info"] != {"description": DESCRIPTION}:
        raise ValueError
    names = {image["id"]: image["file_name"] for image in listing["images"]}
    for annotation in listing["annotations"]:
        yield names[annotation["image_id"]], annotation["caption"]


# One image's file: a PNG that records how it was generated. It appears complete or not at all.

SETTINGS_KEY = "shardtune"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MARK = b"tEXt" + SETTINGS_KEY.encode() + b"\0"
MAX_RECORD_BYTES = 2_000_000
SIDES = ("without", "with")
COMPARED = ("config_without", "unet_without")  # in a record: what --compare compares with
STILL_GOOD = "The images that are there are whole; the same command continues with the others."

About = dict[str, Any]  # "weights": their digests; "samplers": each one's class and config


def record_of(request: ImageRequest, provenance: About) -> dict[str, Any]:
    """All that decides the image, as plain JSON."""
    sampler = provenance["samplers"][request.sampler or ""]
    return {**asdict(request), "sampler": sampler, "weights": provenance["weights"]}


def read_record(path: Path, to_the_end: bool = True) -> tuple[dict[str, Any] | None, bool]:
    """What a PNG says of how it was drawn, and whether the file is whole.

    None where nothing in it is of this program; empty where that itself is damaged. The checksums
    of the format are checked, and no pixel is decoded, so that an image of any size, or one that
    claims it, costs no memory. ``to_the_end`` False: no further than the first pixels.

    Raises:
        ValueError: not a regular file, or a whole file of another format.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(MAX_RECORD_BYTES if to_the_end else 65_536)
        file.seek(len(SIGNATURE))
        # Where a length in the file is damaged, what comes after it is not found chunk by chunk.
        record: dict[str, Any] | None = {} if MARK in head else None
        is_whole = is_png = head.startswith(SIGNATURE) or not head
        if not is_png and record is None:
            raise ValueError(f"{path}: no PNG file; move it away, or give another --out")
        for kind, data, sound in _chunks(file):
            if kind == b"IDAT" and not to_the_end:
                return record, is_whole
            is_whole = is_whole and sound
            if sound and (kind + data).startswith(MARK):
                record = _parse_record(data)
            if kind == b"IEND":
                return record, is_whole
    return record, False


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes, bool]]:
    """Of each chunk of a PNG the kind, the data where it is text, and whether it is sound."""
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        checksum, kept = zlib.crc32(kind), b""
        is_text = kind == b"tEXt" and length <= MAX_RECORD_BYTES
        if kind == b"IDAT":
            yield kind, b"", True  # before its bytes are read
        while length and (data := file.read(min(length, MAX_RECORD_BYTES))):
            checksum, length = zlib.crc32(data, checksum), length - len(data)
            kept = data if is_text else b""
        yield kind, kept, file.read(4) == checksum.to_bytes(4, "big")


def _parse_record(data: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(record := parse_json(data.partition(b"\0")[2]), dict):
            return record
    return {}


def row_of_record(path: Path, record: dict[str, Any] | None) -> CaptionRow | None:
    """What an image's own record says of it for the listing; None where it has none."""
    try:
        values = {field.name: (record or {})[field.name] for field in fields(ImageRequest)}
        request = ImageRequest(**values | {"sampler": None})
        prompt = str(request.prompt)
        prompt.encode()  # JSON may hold half a character, which no file of captions can
        size = output_size(request)
    except (KeyError, TypeError, UnicodeEncodeError):
        return None
    return CaptionRow(path.name, prompt, *size) if all(type(n) is int for n in size) else None


def stale_because(path: Path, asked: dict[str, Any]) -> str | None:
    """Why an image must be drawn (again); empty where it is missing, None where it is as asked.

    Raises:
        ValueError: an image that someone else made.
    """
    if not path.exists():
        return ""
    recorded, is_whole = read_record(path)
    if recorded is None and is_whole:
        raise ValueError(f"{path}: not drawn by shardtune; move it away, or give another --out")
    if recorded is None or not is_whole:
        return "damaged"
    if recorded.get("compare") != asked["compare"]:  # of which all that compares follows
        recorded, asked = _without_comparison(recorded), _without_comparison(asked)
    changed = sorted(name for name in asked if recorded.get(name) != asked[name])
    return f"{', '.join(changed)} changed" if changed else None


def _without_comparison(record: dict[str, Any]) -> dict[str, Any]:
    """A record less what only ``--compare`` puts in it, but for ``compare`` itself."""
    kept = dict(record)
    for name in ("sampler", "weights"):
        if isinstance(part := record.get(name), dict):
            kept[name] = {key: value for key, value in part.items() if key not in COMPARED}
    return kept


def output_size(request: ImageRequest) -> tuple[int, int]:
    """(width, height) of the file's image."""
    if request.compare:
        label, gap = _margins(request)
        return 2 * request.width + gap, request.height + label
    return request.width, request.height


def _margins(request: ImageRequest) -> tuple[int, int]:
    """Pixels above two images, for what they are, and between them: to be read on a sheet too."""
    return max(20, request.height // 16), max(4, request.width // 128)


def save_image(
    path: Path, sides: list[torch.Tensor], request: ImageRequest, provenance: About, loras: str
) -> None:
    """Write the image [3, H, W] in 0..1; or two of them, the one without the fine-tune first.

    ``loras`` is for the line that web UIs show: names and weights, or empty.
    """
    images = [_to_image(side) for side in sides]
    image = images[0] if len(images) == 1 else _side_by_side(images, request)
    info = PngImagePlugin.PngInfo()
    record = record_of(request, provenance)
    info.add_text("parameters", _parameters(request, record["sampler"]["name"], loras))
    info.add_text(SETTINGS_KEY, json.dumps(record))
    with writing(path, STILL_GOOD), durable_file(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def _to_image(image: torch.Tensor) -> Image.Image:
    levels = (image * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _side_by_side(images: list[Image.Image], request: ImageRequest) -> Image.Image:
    both = Image.new("RGB", output_size(request), "white")
    label, gap = _margins(request)
    pen, font = ImageDraw.Draw(both), ImageFont.load_default(0.6 * label)
    for side, image in enumerate(images):
        left = side * (request.width + gap)
        pen.text((left + gap, label / 2), SIDES[side], fill="black", font=font, anchor="lm")
        both.paste(image, (left, label))
    return both


def _parameters(request: ImageRequest, sampler: str, loras: str) -> str:
    """The line that web UIs show and read."""
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    used = f", Lora weights: {json.dumps(loras)}" if loras else ""
    return (
        f"{request.prompt}{negative}\nSteps: {request.num_steps}, Sampler: {sampler}, "
        f"CFG scale: {request.guidance_scale}, Seed: {request.seed}, "
        f"Size: {request.width}x{request.height}{used}"
    )


# The folder: which images it has, and what lies beside them.

SHEET = "contact-sheet.png"
LOCK = "generate.lock"  # while a run draws into the folder
TILE, WIDE_TILE = 256, 512  # pixels, on the sheet
COCO_FOLDER = "images"
DAMAGED = ".damaged"
BYTES_A_PIXEL = 1.5  # of a PNG; of photographs it is 1.3 to 2


class ImageFolder:
    """``out``: images 000000.png on and ``captions.jsonl``; or, as COCO has it, images
    images/000000000001.png on and ``annotations.json``; and a contact sheet of the first."""

    def __init__(self, out: Path, layout: str) -> None:
        self.out, self.is_coco = out, layout == "coco"
        self.image_folder = out / COCO_FOLDER if self.is_coco else out

    def name(self, request: ImageRequest) -> str:
        return f"{request.number + 1:012d}.png" if self.is_coco else f"{request.number:06d}.png"

    def path(self, request: ImageRequest) -> Path:
        return self.image_folder / self.name(request)

    @property
    def listing(self) -> Path:
        """The file with the captions."""
        return self.out / ("annotations.json" if self.is_coco else "captions.jsonl")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of it; what a killed one left half is removed.

        Raises:
            ValueError: it is no folder, or another run is generating into it.
        """
        for part in (self.image_folder, *self.image_folder.parents):
            if part.exists() and not part.is_dir():
                raise ValueError(f"{part}: not a folder")
        self.image_folder.mkdir(parents=True, exist_ok=True)
        with locked(self.out / LOCK):
            for folder in {self.out, self.image_folder}:
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
            if not (path := self.image_folder / name).exists():
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
        if not any(read_record(path, False)[0] is not None for path in self._existing_images()):
            raise ValueError(
                f"{sheet}: not drawn by shardtune; move it away, or give another --out"
            )

    def _existing_images(self) -> list[Path]:
        """The images that are there, by their names."""
        return sorted(path for path in self.image_folder.glob("*.png") if NAME.fullmatch(path.name))

    def missing(self, requests: list[ImageRequest], provenance: About) -> list[ImageRequest]:
        """The images that are not there as requested; warns of those that are there otherwise."""
        stale = {
            request: stale_because(self.path(request), record_of(request, provenance))
            for request in requests
        }
        for reason in sorted({why for why in stale.values() if why}):
            paths = [self.path(request) for request, why in stale.items() if why == reason]
            warnings.warn(f"{_first_of(paths)}: to be generated again: {reason}", stacklevel=2)
        asked = {self.path(request) for request in requests}
        if others := [path for path in self._existing_images() if path not in asked]:
            warnings.warn(
                f"{_first_of(others)}: not asked for this time; left as it is", stacklevel=2
            )
        wanted = [request for request, why in stale.items() if why is not None]
        num_pixels = [width * height for width, height in map(output_size, wanted)]
        needed, free = int(BYTES_A_PIXEL * sum(num_pixels)), free_bytes(self.out)
        if needed > free:
            warnings.warn(
                f"{self.out}: {len(wanted)} images may take {format_bytes(needed)}, and the disk "
                f"has {format_bytes(free)} left",
                stacklevel=2,
            )
        return wanted

    def before_replacing(self, request: ImageRequest) -> None:
        """To be called before an image is written: the captions of what is replaced are set aside,
        and no sooner, since whatever fails before that leaves the folder as it was. A damaged file
        that does not say whose it was is kept under another name."""
        path = self.path(request)
        if path.exists():
            set_aside(self.listing)
            if read_record(path, to_the_end=False)[0] is None:
                set_aside(path, path.with_name(path.name + DAMAGED))

    def finish(self, requests: list[ImageRequest]) -> Path:
        """Write the captions and the contact sheet, when all images are there; returns the
        sheet."""
        sizes = map(output_size, requests)
        self._write_listing(
            [
                CaptionRow(self.name(request), request.prompt, *size)
                for request, size in zip(requests, sizes, strict=True)
            ]
        )
        tile = WIDE_TILE if requests[0].compare else TILE
        sheet = contact_sheet([(self.path(request), request.prompt) for request in requests], tile)
        path, info = self.out / SHEET, PngImagePlugin.PngInfo()
        info.add_text(SETTINGS_KEY, "{}")
        with writing(path, STILL_GOOD), durable_file(path) as file:
            sheet.save(file, format="PNG", compress_level=1, pnginfo=info)
        return path

    def _relist(self) -> None:
        """After a run that failed or was killed while it replaced images: captions of what is
        there now, by the images' own records."""
        if aside_of(self.listing).exists():
            rows = (
                row_of_record(path, read_record(path, False)[0]) for path in self._existing_images()
            )
            self._write_listing([row for row in rows if row is not None])

    def _write_listing(self, rows: list[CaptionRow]) -> None:
        text = coco(rows) if self.is_coco else lines(rows)
        with writing(self.listing, STILL_GOOD):
            write_durable(self.listing, text.encode())
        remove_path(aside_of(self.listing))


def _first_of(paths: list[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
