"""Finds damaged TIFF, BMP, JPEG and PNG files that Pillow would decode without an error.

libtiff and Pillow fill up what is missing, and continue after invalid codes. So this module looks
for whatever damage a format lets one find.
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
GROUP_3, ZERO_RUN = 3, bytes(8)
LIBTIFF_MESSAGE = re.compile(rb"(Fax\w+|\S+\.tif): [^\n]*\n")
BI_RLE8, BI_RLE4 = 1, 2
TRUNCATED = "truncated: the file ends before the image does"
MISSING = "damaged: a part of its data is missing"
UNDECODABLE = "damaged or truncated: its data cannot be decoded"

_stderr = threading.Lock()


@contextmanager
def refuse_damage(image: Image.Image, data: bytes) -> Iterator[None]:
    """Load the opened ``image`` of ``data`` inside this context, which refuses a damaged file.

    Raises:
        ImageError: a part is missing, or cannot be decoded.
    """
    if image.format == "BMP" and not _runs_fit(data, *image.size):
        raise ImageError(UNDECODABLE)
    if not isinstance(image, TiffImageFile):
        yield
        return
    compression = image.tag_v2.get(COMPRESSION, 1)
    _check_strips(image, data, compression)
    if compression not in FAX:
        yield
        return
    with _libtiff_messages() as messages:
        yield
    if messages:
        raise ImageError(UNDECODABLE)


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
            raise ImageError(TRUNCATED)
        part = memoryview(data)[offset : offset + count]
        if not count:
            raise ImageError(MISSING)
        if compression in DEFLATE and not _inflates(part):
            raise ImageError(UNDECODABLE)
        if compression in FAX and _has_zero_run(bytes(part), compression):
            raise ImageError(UNDECODABLE)
        if compression == JPEG and not bytes(part[-16:]).rstrip(b"\0").endswith(b"\xff\xd9"):
            raise ImageError(UNDECODABLE)
    if compression == PACKBITS and offsets == STRIPS[0] and tags.get(PLANES, 1) == 1:
        row_bytes = -(-image.width * sum(_numbers(tags, BITS) or (1,)) // 8)
        for number, (offset, count) in enumerate(places):
            num_rows = min(rows, image.height - number * rows)
            if _unpacked_bytes(data[offset : offset + count]) != num_rows * row_bytes:
                raise ImageError(UNDECODABLE)


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    return tuple(value) if isinstance(value, tuple) else (int(value),)


def _has_zero_run(part: bytes, compression: int) -> bool:
    """Whether a fax has more zeros than any code; in group 3 they may fill up a line."""
    return part.endswith(ZERO_RUN) if compression == GROUP_3 else ZERO_RUN in part


def _inflates(part: memoryview) -> bool:
    """Whether the bytes are one complete zlib stream with the right checksum."""
    unpacker, rest = zlib.decompressobj(), bytes(part)
    try:
        while rest and not unpacker.eof:
            unpacker.decompress(rest, 1 << 20)
            rest = unpacker.unconsumed_tail
    except zlib.error:
        return False
    return unpacker.eof


def _unpacked_bytes(part: bytes) -> int:
    """The unpacked size in bytes of a strip in PackBits; -1 if it ends within a run."""
    position, total = 0, 0
    while position < len(part):
        head = part[position]
        if head < 128:
            total, position = total + head + 1, position + head + 2
        else:
            total, position = total + (257 - head if head > 128 else 0), position + 1 + (head > 128)
    return total if position == len(part) else -1


@contextmanager
def _libtiff_messages() -> Iterator[list[bytes]]:
    """Collect libtiff's messages on bad codes: it continues after them, and Pillow gets no error.

    It prints them to the process's stderr, from which they are taken; other lines are passed on.
    """
    messages: list[bytes] = []
    try:
        buffer = tempfile.TemporaryFile()  # noqa: SIM115
    except OSError:  # no room for it, which is no fault of the image
        yield messages
        return
    with _stderr, buffer as file:
        try:
            before = os.dup(2)
        except OSError:  # there is no stderr
            yield messages
            return
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            printed = file.read()
            messages += LIBTIFF_MESSAGE.findall(printed)
            if others := LIBTIFF_MESSAGE.sub(b"", printed):
                os.write(2, others)


def _runs_fit(data: bytes, width: int, height: int) -> bool:
    """Whether the runs of a BMP stay within its rows and fill them; True for a BMP without runs."""
    if int.from_bytes(data[14:18], "little") < 40:
        return True
    compression = int.from_bytes(data[30:34], "little")
    if compression not in (BI_RLE8, BI_RLE4):
        return True
    position, x, y = int.from_bytes(data[10:14], "little"), 0, 0
    while position + 2 <= len(data) and y < height:
        num, value = data[position], data[position + 1]
        position += 2
        if num:
            x += num
        elif value == 0:
            x, y = 0, y + 1
        elif value == 1:
            return True  # what was not set stays black
        elif value == 2:
            x, y = x + data[position : position + 1][0], y + data[position + 1 : position + 2][0]
            position += 2
        else:
            size = -(-value // 2) if compression == BI_RLE4 else value
            x, position = x + value, position + size + size % 2
        if x > width or y > height or (y == height and x):
            return False
    return y >= height or (y == height - 1 and x == width)


# JPEG. libjpeg fills up what is missing with gray, or with coarser detail, and Pillow swallows its
# warning. So the end marker is kept from the decoder until it has shown whether it still waits for
# coded data.

SOI, EOI, SOS, SOF2 = 0xD8, 0xD9, 0xDA, 0xC2
FRAMES = {0xC0, 0xC1, SOF2}  # Huffman-coded: libjpeg cannot halt an arithmetic decoder
NEXT_MARKER = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # after coded data: neither stuffing nor a restart
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
# Coded data of the longest codes, and no data at all between segments. libjpeg looks ahead by up to
# eight bytes before it decodes a code.
FILLING = b"\xff\x00"
LOOKAHEAD = 8 * FILLING
PART_MISSING = "truncated: it has an end mark, but a part before it is missing"


@dataclass
class _Layout:
    """A JPEG's segments: where the coded data ends, and the last bit sent of each coefficient."""

    frame: int = 0
    components: tuple[int, ...] = ()
    last_bits: dict[tuple[int, int], int] = field(default_factory=dict)  # by component, frequency
    last_scan: int = 0  # offset of the coded data of the last scan
    end: int = 0  # offset of the end marker; 0 if there is none

    @property
    def lacks_scans(self) -> bool:
        frequencies = range(64) if self.frame == SOF2 else range(1)
        wanted = ((component, number) for component in self.components for number in frequencies)
        return any(self.last_bits.get(position, 1) for position in wanted)


def load_jpeg(image: ImageFile.ImageFile, data: bytes) -> None:
    """``image.load()`` of a JPEG whose bytes are ``data``.

    It does not notice that a few bytes are missing: at most eight, and those of the last block.

    Raises:
        ImageError: a part is missing, though there is an end marker.
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
    """Feed Pillow's decoder; return its error code, 0 for none.

    ``decode`` returns how many bytes it consumed, or -1 when the image is finished. A decoder that
    has all its coded data skips whatever is no segment. One that lacks data does not consume the
    bytes of a block that it cannot finish, or, while it waits for a restart marker, those that
    follow the marker.
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
    """Walk the segments (ITU T.81, annex B) up to the first that makes no sense."""
    layout, position = _Layout(), 2
    while data[position : position + 1] == b"\xff" and position + 1 < len(data):
        marker = data[position + 1]
        if marker == 0xFF:  # filling
            position += 1
            continue
        if marker == EOI:
            layout.end = position
            break
        length = int.from_bytes(data[position + 2 : position + 4])
        body = data[position + 4 : position + 2 + length]
        position += 2 + length
        if marker in FRAMES:
            layout.frame, layout.components = marker, tuple(body[6::3])
        elif marker == SOS:
            _note_scan(layout, body)
            layout.last_scan = position
            next_marker = NEXT_MARKER.search(data, position)
            position = next_marker.start() if next_marker else len(data)
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
# a program notes in a file is no reason to reject the image. So whatever does not concern the
# pixels is removed before Pillow reads the file. Text that may have the orientation stays, up to
# that size.

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
NOTES = (*TEXTS, b"iCCP", b"tIME", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"sPLT")
ORIENTATION_KEYS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts that may have it
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the color type in a PNG's header
MAX_TEXT = 1_000_000  # bytes of one such text, unpacked; below Pillow's own limit
MAX_TEXTS = 8_000_000  # bytes of all
MAX_PROFILE = 16_000_000  # bytes of a color profile; the largest in use have some 4 MB


def strip_metadata(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG file without the chunks that Pillow may refuse, and its color profile.

    Other files, and whatever is no chunk, are kept: this function does not look for damage.
    """
    if not data.startswith(SIGNATURE):
        return data, None
    kept, profile, left = [SIGNATURE], None, MAX_TEXTS
    position, copied = len(SIGNATURE), len(SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        name, stop = data[position + 4 : position + 8], position + 12 + length
        if stop > len(data):
            break
        if name in NOTES:
            body = data[position + 8 : stop - 4]
            size = _orientation_text_bytes(name, body) if name in TEXTS else 0
            if name == b"iCCP":
                profile = _profile(body)
            if not 0 < size <= left:
                kept.append(data[copied:position])
                copied = stop
            left -= size
        position = stop
    return b"".join([*kept, data[copied:]]), profile


def lacks_rows(data: bytes) -> bool:
    """Whether a PNG's data end before its last row, though the stream is complete in itself: Pillow
    accepts such a file and leaves the rows black. Always False for an interlaced PNG."""
    width, height, depth, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if interlaced or color not in CHANNELS:
        return False
    left: int = height * (1 + (width * depth * CHANNELS[color] + 7) // 8)
    unpacker, position = zlib.decompressobj(), len(SIGNATURE)
    while position + 12 <= len(data) and left > 0 and not unpacker.eof:
        (length,) = struct.unpack_from(">I", data, position)
        is_data = data[position + 4 : position + 8] == b"IDAT"
        packed = data[position + 8 : position + 8 + length] if is_data else b""
        while packed and left > 0:
            left -= len(unpacker.decompress(packed, 1_000_000))
            packed = unpacker.unconsumed_tail
        position += 12 + length
    return left > 0


def _orientation_text_bytes(name: bytes, body: bytes) -> int:
    """The size in bytes of a text that may have the orientation; 0 for others, and for a too long
    one."""
    key, _, rest = body.partition(b"\0")
    if key not in ORIENTATION_KEYS:
        return 0
    if name == b"iTXt" and rest[:1] == b"\1":
        rest = rest[2:].split(b"\0", 2)[-1]
    elif name == b"zTXt":
        rest = rest[1:]
    else:
        return len(rest) if len(rest) <= MAX_TEXT else 0
    unpacked = _unpack(rest, MAX_TEXT)
    return 0 if unpacked is None else len(unpacked)


def _profile(body: bytes) -> bytes | None:
    """The color profile in a chunk; None if it cannot be unpacked."""
    _, _, rest = body.partition(b"\0")
    return _unpack(rest[1:], MAX_PROFILE) if rest[:1] == b"\0" else None


def _unpack(packed: bytes, limit: int) -> bytes | None:
    """Unpack zlib data; None if it is damaged, or unpacks to more than ``most`` bytes."""
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(packed, limit)
    except zlib.error:
        return None
    return unpacked if unpacker.eof else None
