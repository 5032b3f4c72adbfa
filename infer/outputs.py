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
from runtime.safe_parsing import open_regular, parse_json, read_bounded
from sdxl.contact_sheet import MAX_TILES, contact_sheet, of_all

MAX_BYTES = 1_000_000_000
DESCRIPTION = "pictures drawn by shardtune"  # existing files are recognized by it: never changed
NAME = re.compile(r"[0-9]{6,}\.png")


@dataclass(frozen=True)
class CaptionRow:
    """An image's file name, its caption, and its size in pixels."""

    file_name: str
    text: str
    width: int
    height: int


def jsonl_listing(rows: Iterable[CaptionRow]) -> str:
    """``captions.jsonl``."""
    records = ({"file_name": row.file_name, "text": row.text} for row in rows)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def coco_listing(rows: Iterable[CaptionRow]) -> str:
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
    """The caption of each file in a listing that generate wrote.

    Raises:
        ValueError: something else wrote the listing, or it was edited since.
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
RECORD_START = b"tEXt" + SETTINGS_KEY.encode() + b"\0"
MAX_RECORD_BYTES = 2_000_000
VARIANT_LABELS = ("without", "with")
COMPARED = ("config_without", "unet_without")  # in a record: what --compare compares with
STILL_GOOD = "The images that are there are whole; the same command continues with the others."

Provenance = dict[str, Any]  # "weights": their digests; "samplers": each one's class and config


def make_record(request: ImageRequest, provenance: Provenance) -> dict[str, Any]:
    """Everything that decides the image, as plain JSON."""
    sampler = provenance["samplers"][request.sampler or ""]
    return {**asdict(request), "sampler": sampler, "weights": provenance["weights"]}


def read_record(path: Path, to_the_end: bool = True) -> tuple[dict[str, Any] | None, bool]:
    """The record in a PNG of how it was generated, and whether the file is complete.

    The record is None if generate did not write the file, and empty if the record is damaged. The
    checksums of the format are checked, and no pixel is decoded, so that an image of any size, or
    one that claims it, takes no memory. With ``to_the_end`` False, reading stops at the pixels.

    Raises:
        ValueError: not a regular file, or a file of another format.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(MAX_RECORD_BYTES if to_the_end else 65_536)
        file.seek(len(SIGNATURE))
        # Where a length in the file is damaged, what comes after it is not found chunk by chunk.
        record: dict[str, Any] | None = {} if RECORD_START in head else None
        is_complete = is_png = head.startswith(SIGNATURE) or not head
        if not is_png and record is None:
            raise ValueError(f"{path}: no PNG file; move it away, or give another --out")
        for kind, data, sound in _png_chunks(file):
            if kind == b"IDAT" and not to_the_end:
                return record, is_complete
            is_complete = is_complete and sound
            if sound and (kind + data).startswith(RECORD_START):
                record = _parse_record(data)
            if kind == b"IEND":
                return record, is_complete
    return record, False


def _png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes, bool]]:
    """Each chunk of a PNG: its kind, its data if it is text, and whether its checksum is right."""
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


def caption_row(path: Path, record: dict[str, Any] | None) -> CaptionRow | None:
    """The row of the listing for an image, from its own record; None if it has no usable one."""
    try:
        values = {field.name: (record or {})[field.name] for field in fields(ImageRequest)}
        request = ImageRequest(**values | {"sampler": None})
        prompt = str(request.prompt)
        prompt.encode()  # JSON may have a lone surrogate, which a file of captions cannot
        size = output_size(request)
    except (KeyError, TypeError, UnicodeEncodeError):
        return None
    return CaptionRow(path.name, prompt, *size) if all(type(n) is int for n in size) else None


def why_stale(path: Path, requested: dict[str, Any]) -> str | None:
    """Why an image must be generated: empty if it is missing, None if it is up to date.

    Raises:
        ValueError: generate did not write the file.
    """
    if not path.exists():
        return ""
    recorded, is_complete = read_record(path)
    if recorded is None and is_complete:
        raise ValueError(f"{path}: not drawn by shardtune; move it away, or give another --out")
    if recorded is None or not is_complete:
        return "damaged"
    if recorded.get("compare") != requested["compare"]:  # the other fields follow from it
        recorded, requested = _without_comparison(recorded), _without_comparison(requested)
    changed = sorted(name for name in requested if recorded.get(name) != requested[name])
    return f"{', '.join(changed)} changed" if changed else None


def _without_comparison(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the fields that only ``--compare`` adds, but with ``compare`` itself."""
    kept = dict(record)
    for name in ("sampler", "weights"):
        if isinstance(part := record.get(name), dict):
            kept[name] = {key: value for key, value in part.items() if key not in COMPARED}
    return kept


def output_size(request: ImageRequest) -> tuple[int, int]:
    """(width, height) of the image file; with ``--compare`` it has two images and labels."""
    if request.compare:
        label, gap = _margins(request)
        return 2 * request.width + gap, request.height + label
    return request.width, request.height


def _margins(request: ImageRequest) -> tuple[int, int]:
    """Pixels above two images, for their labels, and between them; legible on a contact sheet
    too."""
    return max(20, request.height // 16), max(4, request.width // 128)


def save_image(
    path: Path,
    images: list[torch.Tensor],
    request: ImageRequest,
    provenance: Provenance,
    loras: str,
) -> None:
    """Write one image [3, H, W] in 0..1, or two side by side, the one without the fine-tune first.

    ``loras`` is for the line that web UIs show: names and weights, or empty.
    """
    rendered = [_to_image(image) for image in images]
    image = rendered[0] if len(rendered) == 1 else _side_by_side(rendered, request)
    info = PngImagePlugin.PngInfo()
    record = make_record(request, provenance)
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
    for column, image in enumerate(images):
        left = column * (request.width + gap)
        text = VARIANT_LABELS[column]
        pen.text((left + gap, label / 2), text, fill="black", font=font, anchor="lm")
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


# The folder of images, with their captions and contact sheet.

SHEET = "contact-sheet.png"
LOCK = "generate.lock"  # held while a run generates into the folder
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
        """Make the folder, lock out other runs, and remove partial files of a killed one.

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
            self._rewrite_listing()
            self._check_listing()
            self._check_sheet()
            try:
                yield
            finally:
                self._rewrite_listing()

    def _check_listing(self) -> None:
        """Refuse to replace captions that generate did not write, or that were edited."""
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
        """Refuse to replace a contact sheet that generate did not write; those of earlier versions
        have no record."""
        sheet = self.out / SHEET
        if self.listing.exists() or not sheet.exists() or read_record(sheet, False)[0] is not None:
            return
        if not any(read_record(path, False)[0] is not None for path in self._existing_images()):
            raise ValueError(
                f"{sheet}: not drawn by shardtune; move it away, or give another --out"
            )

    def _existing_images(self) -> list[Path]:
        """The image files in the folder, sorted by name."""
        return sorted(path for path in self.image_folder.glob("*.png") if NAME.fullmatch(path.name))

    def missing(self, requests: list[ImageRequest], provenance: Provenance) -> list[ImageRequest]:
        """The requests whose images are missing or outdated; warns of outdated and unrequested
        ones."""
        stale = {
            request: why_stale(self.path(request), make_record(request, provenance))
            for request in requests
        }
        for reason in sorted({why for why in stale.values() if why}):
            paths = [self.path(request) for request, why in stale.items() if why == reason]
            warnings.warn(
                f"{_summarize_paths(paths)}: to be generated again: {reason}", stacklevel=2
            )
        requested = {self.path(request) for request in requests}
        if others := [path for path in self._existing_images() if path not in requested]:
            warnings.warn(
                f"{_summarize_paths(others)}: not asked for this time; left as it is", stacklevel=2
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
        """Call this before an image is written. It sets the captions aside if an image is replaced,
        and no sooner, so that whatever fails earlier leaves the folder as it was. A damaged file
        without a record is kept under another name."""
        path = self.path(request)
        if path.exists():
            set_aside(self.listing)
            if read_record(path, to_the_end=False)[0] is None:
                set_aside(path, path.with_name(path.name + DAMAGED))

    def finish(self, requests: list[ImageRequest], title: str) -> Path:
        """Write the captions and the contact sheet, when all images exist; return the sheet's
        path. ``title`` says what drew them."""
        sizes = map(output_size, requests)
        self._write_listing(
            [
                CaptionRow(self.name(request), request.prompt, *size)
                for request, size in zip(requests, sizes, strict=True)
            ]
        )
        tile = WIDE_TILE if requests[0].compare else TILE
        shown = [(self.path(each), f"seed {each.seed}: {each.prompt}") for each in requests]
        num = of_all(min(len(shown), MAX_TILES), len(shown))
        sheet = contact_sheet(shown, tile, f"{title}; {num}" if title else num)
        path, info = self.out / SHEET, PngImagePlugin.PngInfo()
        info.add_text(SETTINGS_KEY, "{}")
        with writing(path, STILL_GOOD), durable_file(path) as file:
            sheet.save(file, format="PNG", compress_level=1, pnginfo=info)
        return path

    def _rewrite_listing(self) -> None:
        """Write the captions of the existing images, from their records, if a run failed or was
        killed while it replaced images."""
        if aside_of(self.listing).exists():
            rows = (
                caption_row(path, read_record(path, False)[0]) for path in self._existing_images()
            )
            self._write_listing([row for row in rows if row is not None])

    def _write_listing(self, rows: list[CaptionRow]) -> None:
        text = coco_listing(rows) if self.is_coco else jsonl_listing(rows)
        with writing(self.listing, STILL_GOOD):
            write_durable(self.listing, text.encode())
        remove_path(aside_of(self.listing))


def _summarize_paths(paths: list[Path]) -> str:
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
