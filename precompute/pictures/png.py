"""A PNG without its texts: what a program notes in a file is never a reason to reject the image.

Pillow refuses a file with a text or a profile of more than 1 MB, or of many MB in all. So whatever
says nothing of the pixels is taken out before Pillow sees the file. What may say how the image is
turned stays, up to that size.
"""

import struct
import zlib

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
