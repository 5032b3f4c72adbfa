"""Damage that Pillow's decoders make do with: TIFF strips, and BMPs in run lengths.

libtiff and Pillow fill up what is missing, and go on after a code that there is none of; so what a
format lets one find is looked for here.
"""

import os
import re
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from precompute.pictures.refusals import PictureError

COMPRESSION, BITS, ROWS_A_STRIP, SAMPLES, PLANES = 259, 258, 278, 277, 284  # TIFF tags
STRIPS, TILES = (273, 279), (324, 325)  # offsets, numbers of bytes
FAX, JPEG, DEFLATE, PACKBITS = (2, 3, 4), 7, (8, 32946), 32773
GROUP_3, HOLE = 3, bytes(8)
COMPLAINT = re.compile(rb"(Fax\w+|\S+\.tif): [^\n]*\n")
BI_RLE8, BI_RLE4 = 1, 2
CUT = "truncated: the file ends before the image does"
MISSING = "damaged: a part of its data is missing"
BROKEN = "damaged or truncated: its data cannot be decoded"

_stderr = threading.Lock()


@contextmanager
def watched(image: Image.Image, data: bytes) -> Iterator[None]:
    """Load the opened ``image`` of ``data`` inside: what is damaged is refused before or after.

    Raises:
        PictureError: a part is missing, or cannot be decoded.
    """
    if image.format == "BMP" and not _runs_fit(data, *image.size):
        raise PictureError(BROKEN)
    if not isinstance(image, TiffImageFile):
        yield
        return
    compression = image.tag_v2.get(COMPRESSION, 1)
    _check_strips(image, data, compression)
    if compression not in FAX:
        yield
        return
    with _complaints() as complaints:
        yield
    if complaints:
        raise PictureError(BROKEN)


def _check_strips(image: TiffImageFile, data: bytes, compression: int) -> None:
    tags = image.tag_v2
    offsets, counts = STRIPS if STRIPS[0] in tags else TILES
    places = [*zip(_numbers(tags, offsets), _numbers(tags, counts), strict=False)]
    if offsets == STRIPS[0]:
        rows = min(tags.get(ROWS_A_STRIP, image.height), image.height) or image.height
        num_planes = tags.get(SAMPLES, 1) if tags.get(PLANES, 1) == 2 else 1
        if len(_numbers(tags, offsets)) < -(-image.height // rows) * num_planes:
            raise PictureError(MISSING)
    for offset, count in places:
        if offset + count > len(data):
            raise PictureError(CUT)
        part = memoryview(data)[offset : offset + count]
        if not count:
            raise PictureError(MISSING)
        if compression in DEFLATE and not _inflates(part):
            raise PictureError(BROKEN)
        if compression in FAX and _has_hole(bytes(part), compression):
            raise PictureError(BROKEN)
        if compression == JPEG and not bytes(part[-16:]).rstrip(b"\0").endswith(b"\xff\xd9"):
            raise PictureError(BROKEN)
    if compression == PACKBITS and offsets == STRIPS[0] and tags.get(PLANES, 1) == 1:
        row_bytes = -(-image.width * sum(_numbers(tags, BITS) or (1,)) // 8)
        for number, (offset, count) in enumerate(places):
            here = min(rows, image.height - number * rows)
            if _unpacked_bytes(data[offset : offset + count]) != here * row_bytes:
                raise PictureError(BROKEN)


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    return tuple(value) if isinstance(value, tuple) else (int(value),)


def _has_hole(part: bytes, compression: int) -> bool:
    """Whether a fax has zeros that no code has; in group 3 they may fill up a line."""
    return part.endswith(HOLE) if compression == GROUP_3 else HOLE in part


def _inflates(part: memoryview) -> bool:
    """Whether it is one zlib stream, whole by its checksum."""
    unpacker, rest = zlib.decompressobj(), bytes(part)
    try:
        while rest and not unpacker.eof:
            unpacker.decompress(rest, 1 << 20)
            rest = unpacker.unconsumed_tail
    except zlib.error:
        return False
    return unpacker.eof


def _unpacked_bytes(part: bytes) -> int:
    """How many bytes a strip in PackBits comes to; -1 where it ends within a run."""
    place, total = 0, 0
    while place < len(part):
        head = part[place]
        if head < 128:
            total, place = total + head + 1, place + head + 2
        else:
            total, place = total + (257 - head if head > 128 else 0), place + 1 + (head > 128)
    return total if place == len(part) else -1


@contextmanager
def _complaints() -> Iterator[list[bytes]]:
    """What libtiff prints of bad codes meanwhile: it goes on after them, and Pillow does not hear.

    It prints to the process's stderr, from which its lines are taken; others are passed on.
    """
    found: list[bytes] = []
    try:
        own = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError:  # no room for it, which is no fault of the image
        yield found
        return
    with _stderr, own as file:
        try:
            before = os.dup(2)
        except OSError:  # there is no stderr
            yield found
            return
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            printed = file.read()
            found += COMPLAINT.findall(printed)
            if others := COMPLAINT.sub(b"", printed):
                os.write(2, others)


def _runs_fit(data: bytes, width: int, height: int) -> bool:
    """Whether the runs of a BMP stay within its rows, and fill them; True of one without runs."""
    if int.from_bytes(data[14:18], "little") < 40:
        return True
    kind = int.from_bytes(data[30:34], "little")
    if kind not in (BI_RLE8, BI_RLE4):
        return True
    place, x, y = int.from_bytes(data[10:14], "little"), 0, 0
    while place + 2 <= len(data) and y < height:
        num, value = data[place], data[place + 1]
        place += 2
        if num:
            x += num
        elif value == 0:
            x, y = 0, y + 1
        elif value == 1:
            return True  # what was not set stays black
        elif value == 2:
            x, y = x + data[place : place + 1][0], y + data[place + 1 : place + 2][0]
            place += 2
        else:
            size = -(-value // 2) if kind == BI_RLE4 else value
            x, place = x + value, place + size + size % 2
        if x > width or y > height or (y == height and x):
            return False
    return y >= height or (y == height - 1 and x == width)
