"""Finds damaged TIFF, BMP, JPEG and PNG files that Pillow would decode without an error.

libtiff and Pillow fill up what is missing, and go on after a code that there is none of; so what a
format lets one find is looked for here.
"""

import os
import re
import struct
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from precompute.images.rejections import ImageError

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
        ImageError: a part is missing, or cannot be decoded.
    """
    if image.format == "BMP" and not _runs_fit(data, *image.size):
        raise ImageError(BROKEN)
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
        raise ImageError(BROKEN)


def _check_strips(image: TiffImageFile, data: bytes, compression: int) -> None:
    tags = image.tag_v2
    offsets, counts = STRIPS if STRIPS[0] in tags else TILES
    places = [*zip(_numbers(tags, offsets), _numbers(tags, counts), strict=False)]
    if offsets == STRIPS[0]:
        rows = min(tags.get(ROWS_A_STRIP, image.height), image.height) or image.height
        num_planes = tags.get(SAMPLES, 1) if tags.get(PLANES, 1) == 2 else 1
        if len(_numbers(tags, offsets)) < -(-image.height // rows) * num_planes:
            raise ImageError(MISSING)
    for offset, count in places:
        if offset + count > len(data):
            raise ImageError(CUT)
        part = memoryview(data)[offset : offset + count]
        if not count:
            raise ImageError(MISSING)
        if compression in DEFLATE and not _inflates(part):
            raise ImageError(BROKEN)
        if compression in FAX and _has_hole(bytes(part), compression):
            raise ImageError(BROKEN)
        if compression == JPEG and not bytes(part[-16:]).rstrip(b"\0").endswith(b"\xff\xd9"):
            raise ImageError(BROKEN)
    if compression == PACKBITS and offsets == STRIPS[0] and tags.get(PLANES, 1) == 1:
        row_bytes = -(-image.width * sum(_numbers(tags, BITS) or (1,)) // 8)
        for number, (offset, count) in enumerate(places):
            here = min(rows, image.height - number * rows)
            if _unpacked_bytes(data[offset : offset + count]) != here * row_bytes:
                raise ImageError(BROKEN)


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
    complaints: list[bytes] = []
    try:
        own = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError:  # no room for it, which is no fault of the image
        yield complaints
        return
    with _stderr, own as file:
        try:
            before = os.dup(2)
        except OSError:  # there is no stderr
            yield complaints
            return
        os.dup2(file.fileno(), 2)
        try:
            yield complaints
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            printed = file.read()
            complaints += COMPLAINT.findall(printed)
            if others := COMPLAINT.sub(b"", printed):
                os.write(2, others)


def _runs_fit(data: bytes, width: int, height: int) -> bool:
    """Whether the runs of a BMP stay within its rows, and fill them; True of one without runs."""
    if int.from_bytes(data[14:18], "little") < 40:
        return True
    compression = int.from_bytes(data[30:34], "little")
    if compression not in (BI_RLE8, BI_RLE4):
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
            size = -(-value // 2) if compression == BI_RLE4 else value
            x, place = x + value, place + size + size % 2
        if x > width or y > height or (y == height and x):
            return False
    return y >= height or (y == height - 1 and x == width)


# JPEG. libjpeg fills up what is missing with gray, or with coarser detail, and Pillow swallows its
# warning. So the end mark is kept from the decoder until it has shown whether it still waits for
# coded data.

SOI, EOI, SOS, SOF2 = 0xD8, 0xD9, 0xDA, 0xC2
FRAMES = {0xC0, 0xC1, SOF2}  # Huffman-coded: libjpeg cannot halt an arithmetic decoder
NEXT_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # behind coded data: no stuffing, no restart
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
# Coded data of the longest codes, and no data at all between segments. libjpeg looks ahead by up to
# eight bytes before it decodes a code.
FILLING = b"\xff\x00"
LOOKAHEAD = 8 * FILLING
PART_MISSING = "truncated: it has an end mark, but a part before it is missing"


@dataclass
class _Layout:
    """Where the coded data ends, and the last bit that was sent of each coefficient."""

    frame: int = 0
    components: tuple[int, ...] = ()
    last_bits: dict[tuple[int, int], int] = field(default_factory=dict)  # by component, frequency
    last_scan: int = 0  # offset of the coded data of the last scan
    end: int = 0  # offset of the end mark; 0: there is none

    @property
    def lacks_scans(self) -> bool:
        frequencies = range(64) if self.frame == SOF2 else range(1)
        wanted = ((component, number) for component in self.components for number in frequencies)
        return any(self.last_bits.get(place, 1) for place in wanted)


def load_jpeg(image: ImageFile.ImageFile, data: bytes) -> None:
    """``image.load()`` of a JPEG whose bytes are ``data``.

    Not seen: that a few bytes are missing, at most eight and what codes the last block.

    Raises:
        ImageError: a part is missing, though it has an end mark.
        OSError: it ends before the image does, or cannot be decoded.
    """
    layout = _read_layout(data)
    if not layout.end or layout.frame not in FRAMES or len(image.tile) != 1:
        image.load()
        return
    if layout.lacks_scans:
        raise ImageError(PART_MISSING)
    image.load_prepare()
    codec, extents, _, arguments = image.tile[0]
    decoder = Image._getdecoder(image.mode, codec, arguments, image.decoderconfig)
    try:
        decoder.setimage(image.im, extents)
        if _decode(decoder, data, layout) < 0:
            raise OSError("broken data stream when reading image file")
    finally:
        decoder.cleanup()
    image.tile = []


def _decode(decoder: Any, data: bytes, layout: _Layout) -> int:
    """Feed the decoder of Pillow; its error code, 0 for none.

    It returns how many bytes it is done with, or -1 when the image is finished. One that has all
    its coded data skips whatever is no segment. One that has not holds on to the bytes of a block
    that it cannot finish, at the latest to those that follow where it has taken all before; or it
    waits for a restart mark, and holds on to what follows that.
    """
    restarts = RESTART.findall(data, layout.last_scan, layout.end)
    number = (restarts[-1][0] + 1) % 8 if restarts else 0
    rest = data[: layout.end] + LOOKAHEAD
    done, error = decoder.decode(rest)
    for more in (FILLING, FILLING, bytes([0xFF, 0xD0 + number]) + FILLING):
        if done < 0:
            return int(error)
        rest = rest[done:] + more
        done, error = decoder.decode(rest)
        if 0 <= done < len(rest):
            raise ImageError(PART_MISSING)
    if done >= 0:
        done, error = decoder.decode(data[layout.end : layout.end + 2])
    if done >= 0:
        raise ImageError(PART_MISSING)
    return int(error)


def _read_layout(data: bytes) -> _Layout:
    """Walk the segments (ITU T.81, annex B); what makes no sense ends the walk."""
    layout, place = _Layout(), 2
    while data[place : place + 1] == b"\xff" and place + 1 < len(data):
        mark = data[place + 1]
        if mark == 0xFF:  # filling
            place += 1
            continue
        if mark == EOI:
            layout.end = place
            break
        length = int.from_bytes(data[place + 2 : place + 4])
        body = data[place + 4 : place + 2 + length]
        place += 2 + length
        if mark in FRAMES:
            layout.frame, layout.components = mark, tuple(body[6::3])
        elif mark == SOS:
            _note_scan(layout, body)
            layout.last_scan = place
            next_mark = NEXT_MARK.search(data, place)
            place = next_mark.start() if next_mark else len(data)
    return layout


def _note_scan(layout: _Layout, body: bytes) -> None:
    if len(body) < 4 or len(body) != 4 + 2 * body[0]:
        return
    first, last, bits = body[-3:]
    if layout.frame != SOF2:
        first, last, bits = 0, 0, 0
    for component in body[1:-3:2]:
        for number in range(first, min(last, 63) + 1):
            layout.last_bits[component, number] = bits & 15


# PNG. Pillow refuses a file with a text or a profile of more than 1 MB, or of many MB in all; what
# a program notes in a file is no reason to reject the image. So whatever says nothing of the pixels
# is taken out before Pillow sees the file. What may say how the image is turned stays, up to that
# size.

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
NOTES = (*TEXTS, b"iCCP", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"sPLT")
TURNED = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts in which orientation may stand
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the color type in a PNG's header
MOST_TEXT = 1_000_000  # bytes of one such text, unpacked; below Pillow's own limit
MOST_TEXTS = 8_000_000  # bytes of all
MOST_PROFILE = 16_000_000  # bytes of a color profile; the largest in use have some 4 MB


def without_notes(data: bytes) -> tuple[bytes, bytes | None]:
    """The file without chunks that Pillow may choke on, and its color profile.

    What is no PNG, or no chunk, stays as it is: to find damage is not the matter here.
    """
    if not data.startswith(SIGNATURE):
        return data, None
    kept, profile, left = [SIGNATURE], None, MOST_TEXTS
    place, copied = len(SIGNATURE), len(SIGNATURE)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, stop = data[place + 4 : place + 8], place + 12 + length
        if stop > len(data):
            break
        if name in NOTES:
            body = data[place + 8 : stop - 4]
            size = _turning_text(name, body) if name in TEXTS else 0
            if name == b"iCCP":
                profile = _profile(body)
            if not 0 < size <= left:
                kept.append(data[copied:place])
                copied = stop
            left -= size
        place = stop
    return b"".join([*kept, data[copied:]]), profile


def lacks_rows(data: bytes) -> bool:
    """Whether a PNG's data end before its last row, in a stream that is whole in itself: Pillow
    takes such a file, and leaves the rows black. Of an interlaced one nothing is said."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if interlaced or color not in CHANNELS:
        return False
    left: int = height * (1 + (width * depth * CHANNELS[color] + 7) // 8)
    unpacker, place = zlib.decompressobj(), len(SIGNATURE)
    while place + 12 <= len(data) and left > 0 and not unpacker.eof:
        (length,) = struct.unpack_from(">I", data, place)
        is_data = data[place + 4 : place + 8] == b"IDAT"
        packed = data[place + 8 : place + 8 + length] if is_data else b""
        while packed and left > 0:
            left -= len(unpacker.decompress(packed, 1_000_000))
            packed = unpacker.unconsumed_tail
        place += 12 + length
    return left > 0


def _turning_text(name: bytes, body: bytes) -> int:
    """Bytes of a text that may say how the image is turned; 0 of others, and of too long ones."""
    key, _, rest = body.partition(b"\0")
    if key not in TURNED:
        return 0
    if name == b"iTXt" and rest[:1] == b"\1":
        rest = rest[2:].split(b"\0", 2)[-1]
    elif name == b"zTXt":
        rest = rest[1:]
    else:
        return len(rest) if len(rest) <= MOST_TEXT else 0
    unpacked = _unpack(rest, MOST_TEXT)
    return 0 if unpacked is None else len(unpacked)


def _profile(body: bytes) -> bytes | None:
    """The color profile in a chunk; None if it cannot be unpacked."""
    _, _, rest = body.partition(b"\0")
    return _unpack(rest[1:], MOST_PROFILE) if rest[:1] == b"\0" else None


def _unpack(packed: bytes, most: int) -> bytes | None:
    """None if it is damaged, or comes to more than ``most`` bytes."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(packed, most)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None
