"""Why an image is rejected, in plain words that are the same in every run."""

import re

FILES = (  # how a file begins, and what it is then; a dot is any byte
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG", "PNG"),
    (rb"GIF8", "GIF"),
    (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"....jP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"BM", "BMP"),
)
NON_IMAGES = (
    (rb"\xef?\xbb?\xbf?\s*<(!doctype html|html)", "a web page"),
    (rb"\s*(<\?xml.{0,999})?<svg", "an SVG drawing"),
    (rb"%!PS", "a PostScript drawing"),
    (rb"%PDF", "a PDF document"),
    (rb"8BPS", "a Photoshop document"),
    (rb"....ftyp(isom|mp4|qt|M4V)|\x1a\x45\xdf\xa3", "a film"),
    (rb"PK\x03\x04|\x1f\x8b", "an archive"),
)


class ImageError(ValueError):
    """An image is rejected. The message is the reason, as a part of a sentence."""


def explain(error: Exception) -> str:
    """Why an image is rejected, in one line, from the error that opening it raised.

    Raises:
        MemoryError: ``error`` is one, which says nothing of the image.
    """
    if isinstance(error, MemoryError):
        raise error
    text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", str(error)).split())
    if isinstance(error, ImageError):
        return text
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if text.startswith("broken PNG file"):
        return f"damaged: {'a checksum differs' if 'checksum' in text else 'its parts do not join'}"
    if re.search("truncated|not enough|unexpected end|incomplete", text, re.IGNORECASE):
        return "truncated: the file ends before the image does"
    if not text or re.search("broken data stream|decod|not a ", text, re.IGNORECASE):
        return "damaged or truncated: its data cannot be decoded"
    return f"damaged: {text}"


def unidentified(data: bytes) -> ImageError:
    """The error for a file in which Pillow finds no image, by how the file begins."""
    if not data.strip(b"\0"):
        return ImageError("the file holds only zeros" if data else "the file is empty")
    for pattern, name in FILES:
        if re.match(pattern, data, re.DOTALL):
            return ImageError(f"damaged or truncated: it begins like {name}, but cannot be opened")
    for pattern, name in NON_IMAGES:
        if re.match(pattern, data, re.DOTALL | re.IGNORECASE):
            return ImageError(f"not an image that Pillow can read: {name}")
    return ImageError("not an image that Pillow can read")
