"""JPEGs decoded once, and refused if a part is missing before an end mark.

libjpeg fills up what is missing with gray, or with coarser detail, and Pillow swallows its warning.
So the end mark is kept from the decoder until it has shown whether it still waits for coded data.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageFile

from precompute.pictures.refusals import PictureError

SOI, EOI, SOS, SOF2 = 0xD8, 0xD9, 0xDA, 0xC2
FRAMES = {0xC0, 0xC1, SOF2}  # Huffman-coded: libjpeg cannot halt an arithmetic decoder
NEXT_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # behind coded data: no stuffing, no restart
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
# Coded data of the longest codes, and no data at all between segments. libjpeg looks ahead by up to
# eight bytes before it decodes a code.
FILLING = b"\xff\x00"
LOOKAHEAD = 8 * FILLING
MISSING = "truncated: it has an end mark, but a part before it is missing"


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
        wanted = ((one, number) for one in self.components for number in frequencies)
        return any(self.last_bits.get(place, 1) for place in wanted)


def load_jpeg(image: ImageFile.ImageFile, data: bytes) -> None:
    """``image.load()`` of a JPEG whose bytes are ``data``.

    Not seen: that a few bytes are missing, at most eight and what codes the last block.

    Raises:
        PictureError: a part is missing, though it has an end mark.
        OSError: it ends before the image does, or cannot be decoded.
    """
    layout = _read_layout(data)
    if not layout.end or layout.frame not in FRAMES or len(image.tile) != 1:
        image.load()
        return
    if layout.lacks_scans:
        raise PictureError(MISSING)
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
            raise PictureError(MISSING)
    if done >= 0:
        done, error = decoder.decode(data[layout.end : layout.end + 2])
    if done >= 0:
        raise PictureError(MISSING)
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
            found = NEXT_MARK.search(data, place)
            place = found.start() if found else len(data)
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
