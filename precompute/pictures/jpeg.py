"""Whether a JPEG is all there, though an end mark stands after what is left of it.

libjpeg fills up what is missing with grey, or with coarser detail, and Pillow swallows its warning.
"""

import io
import re
from dataclasses import dataclass, field

from PIL import Image, ImageChops

SOI, EOI, SOS, SOF2 = 0xD8, 0xD9, 0xDA, 0xC2
FRAMES = {0xC0, 0xC1, SOF2}  # Huffman-coded; an arithmetic coder may leave zeros off its end
NEXT_MARK = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # behind coded data: no stuffing, no restart
GREY = range(126, 130)  # what no coefficient at all becomes, in any colour space
# Bytes that a decoder which still lacks data takes for data, behind each restart mark it may await.
NOISE = b"".join(
    bytes((37 * number * number + 11 * mark + 90) % 255 for number in range(64))
    + bytes([0xFF, 0xD0 + mark])
    for mark in range(8)
)


@dataclass
class _Layout:
    """Where the coded data ends, and the last bit that was sent of each coefficient."""

    frame: int = 0
    components: tuple[int, ...] = ()
    num_scans: int = 0
    last_bits: dict[tuple[int, int], int] = field(default_factory=dict)  # by component, frequency
    end: int = 0  # offset of the end mark; 0: there is none

    @property
    def lacks_scans(self) -> bool:
        frequencies = range(64) if self.frame == SOF2 else range(1)
        wanted = ((one, number) for one in self.components for number in frequencies)
        return any(self.last_bits.get(place, 1) for place in wanted)


def is_cut(data: bytes, image: Image.Image) -> bool:
    """Whether a part of the JPEG ``data`` is missing; ``image`` is what Pillow made of it.

    A decoder that has all it needs does not care what stands before the end mark. So the file is
    decoded again with noise there, if there is a doubt: the last pixel is grey, or there are
    several scans. Not seen: a cut within the last block of a single scan.
    """
    layout = _read_layout(data)
    if not layout.end or layout.frame not in FRAMES:
        return False
    if layout.lacks_scans:
        return True
    last = image.getpixel((image.width - 1, image.height - 1))
    values = last if isinstance(last, tuple) else (last,)
    if layout.num_scans == 1 and not all(value in GREY for value in values):
        return False
    noisy = data[: layout.end] + NOISE + data[layout.end :]
    with Image.open(io.BytesIO(noisy), formats=("JPEG",)) as again:
        return ImageChops.difference(image, again).getbbox(alpha_only=False) is not None


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
            layout.num_scans += 1
            _note_scan(layout, body)
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
