"""The description that a program or a person wrote into an image file, as its caption.

A file may say anything here: what cannot be read says nothing, and no XML with a DTD is parsed, for
only there could an entity grow without end.
"""

import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from xml.etree import ElementTree

from PIL import Image, ImageFile, IptcImagePlugin

from precompute.images.damage import MAX_TEXT, SIGNATURE
from precompute.images.decode import open_checked

IPTC_CAPTION = (2, 120)
IMAGE_DESCRIPTION, XP_COMMENT, EXIF_FOLDER, USER_COMMENT, XMP_TAG = 270, 40092, 34665, 37510, 700
COMMENT_CHARSETS = {b"ASCII\0\0\0": "utf-8", b"UNICODE\0": "utf-16", b"\0" * 8: "utf-8"}
PNG_KEYS = ("Description", "Comment", "parameters")  # the last one as A1111 and its kin write it
DC = "{http://purl.org/dc/elements/1.1/}description"
LI = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
# What stands behind the positive prompt among the settings that A1111 notes.
AFTER_PROMPT = re.compile(r"(?:^|\n)(?:Negative prompt:|Steps: \d)")


def description_of(data: bytes) -> str:
    """The first text that an image file has as IPTC caption, XMP description, EXIF
    ImageDescription, XPComment or UserComment, or PNG text; of settings of A1111 the positive
    prompt. Empty if there is none, or the file cannot be read.
    """
    # Pillow raises anything of a bad file; encode rejects it later.
    with suppress(Exception), open_checked(data) as image:
        for text in _descriptions(image, data):
            text = text.replace("\r\n", "\n").partition("\0")[0]
            if text := AFTER_PROMPT.split(text)[0].strip():
                return text
    return ""


def _descriptions(image: Image.Image, data: bytes) -> Iterator[str]:
    with suppress(Exception):
        assert isinstance(image, ImageFile.ImageFile)
        values = IptcImagePlugin.getiptcinfo(image) or {}
        yield _decoded(_first(values.get(IPTC_CAPTION)))
    with suppress(Exception):
        yield _xmp_description(image)
    if image.format != "PNG" or b"eXIf" in data:  # to look for it, Pillow would decode a PNG
        with suppress(Exception):
            exif = image.getexif()
            yield _decoded(_first(exif.get(IMAGE_DESCRIPTION)))
            yield _first(exif.get(XP_COMMENT)).decode("utf-16-le")
            comment = _first(exif.get_ifd(EXIF_FOLDER).get(USER_COMMENT))
            yield _user_comment(comment, exif.endian or "<")
    texts = dict(_png_texts(data))
    yield from (texts[key] for key in PNG_KEYS if key in texts)


def _first(value: object) -> bytes:
    """The bytes of a value, or of the first of several; none of a value of another kind."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(value, str):  # Pillow takes EXIF text for Latin-1, where most write UTF-8
        return value.encode("latin-1", "ignore")
    return value if isinstance(value, bytes) else b""


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _user_comment(comment: bytes, endian: str) -> str:
    charset = COMMENT_CHARSETS.get(comment[:8])
    if charset == "utf-16":
        is_marked = comment[8:10] in (b"\xff\xfe", b"\xfe\xff")
        order = "" if is_marked else "-be" if endian == ">" else "-le"
        text = comment[8:].decode(f"utf-16{order}", "replace")
        # Some write big-endian text into little-endian EXIF, A1111 among them.
        if not is_marked and sum(ord(char) > 0xFF and not ord(char) & 0xFF for char in text[:20]):
            swapped = "-le" if order == "-be" else "-be"
            text = comment[8:].decode(f"utf-16{swapped}", "replace")
        return text
    return _decoded(comment[8:] if charset else comment)


def _xmp_description(image: Image.Image) -> str:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if packet is None and image.format == "TIFF":
        packet = image.getexif().get(XMP_TAG)
    text = packet if isinstance(packet, str) else _decoded(packet or b"")
    text = text.strip("\0 \r\n\ufeff")
    if not text or len(text) > MAX_TEXT or "<!" in text:
        return ""
    for element in ElementTree.fromstring(text).iter():
        if text := element.get(DC, ""):
            return text
        if element.tag == DC:
            items = sorted(element.iter(LI), key=lambda item: item.get(LANGUAGE) != "x-default")
            return next((item.text for item in items if item.text), element.text or "")
    return ""


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """The texts of a PNG by their key, those that can be read."""
    place = len(SIGNATURE)
    while data.startswith(SIGNATURE) and place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        place += 12 + length
        if kind not in (b"tEXt", b"zTXt", b"iTXt") or length > MAX_TEXT:
            continue
        key, _, rest = body.partition(b"\0")
        if kind == b"iTXt":
            is_packed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        else:
            is_packed, rest = kind == b"zTXt", rest[1:] if kind == b"zTXt" else rest
        with suppress(zlib.error):
            text = zlib.decompressobj().decompress(rest, MAX_TEXT) if is_packed else rest
            yield key.decode("latin-1"), _decoded(text)
