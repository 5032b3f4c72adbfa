"""``--caption-from metadata``: the description that lies in an image file."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from precompute.dataset.records import Memory
from precompute.dataset.sources import read_dataset
from precompute.images.described import description_of
from tests.encodes import make_old, settings_of
from tests.folders import captions, put, read_one, reasons

TEXT = "ein roter Würfel, 日本"
PARAMETERS = f"{TEXT}\nNegative prompt: blurry\nSteps: 20, Sampler: Euler"
XMP = (
    '<?xpacket begin="\ufeff"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
    '"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:dc='
    '"http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt><rdf:li xml:lang="de">nein'
    f'</rdf:li><rdf:li xml:lang="x-default">{TEXT}</rdf:li></rdf:Alt></dc:description>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def saved(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, form, **options)
    return file.getvalue()


def exif_of(tag: int, value: Any, in_folder: bool = False) -> Image.Exif:
    exif = Image.Exif()
    (exif.get_ifd(0x8769) if in_folder else exif)[tag] = value
    return exif


def iptc_jpeg(text: bytes) -> bytes:
    record = b"\x1c\x02\x78" + len(text).to_bytes(2) + text
    resource = b"8BIM\x04\x04\0\0" + len(record).to_bytes(4) + record + b"\0" * (len(record) % 2)
    body = b"Photoshop 3.0\0" + resource
    data = saved("JPEG")
    return data[:2] + b"\xff\xed" + (len(body) + 2).to_bytes(2) + body + data[2:]


def png(key: str, text: str, kind: str = "itxt") -> bytes:
    notes = PngImagePlugin.PngInfo()
    if kind == "itxt":
        notes.add_itxt(key, text)
    else:
        notes.add_text(key, text, zip=kind == "ztxt")
    return saved("PNG", pnginfo=notes)


def described_files() -> dict[str, bytes]:
    """Files with TEXT as their description, by where it lies."""
    comment = b"UNICODE\0" + PARAMETERS.encode("utf-16-be")
    latin = TEXT.encode()
    return {
        "iptc": iptc_jpeg(latin),
        "xmp.jpg": saved("JPEG", xmp=XMP.encode()),
        "xmp.webp": saved("WEBP", xmp=XMP.encode()),
        "xmp.png": png("XML:com.adobe.xmp", XMP),
        "xmp.tif": saved("TIFF", tiffinfo={700: XMP.encode()}),
        "description.jpg": saved("JPEG", exif=exif_of(270, latin)),
        "description.png": saved("PNG", exif=exif_of(270, latin)),
        "xp.webp": saved("WEBP", exif=exif_of(0x9C9C, (TEXT + "\0").encode("utf-16-le"))),
        "comment.jpg": saved("JPEG", exif=exif_of(0x9286, comment, in_folder=True)),
        "ascii.jpg": saved("JPEG", exif=exif_of(0x9286, b"ASCII\0\0\0" + latin, in_folder=True)),
        "text.png": png("Description", TEXT),
        "parameters.png": png("parameters", PARAMETERS),
    }


@pytest.mark.parametrize("place", described_files())
def test_a_description_is_found_wherever_it_lies(place: str) -> None:
    assert description_of(described_files()[place]) == TEXT


def test_what_cannot_be_read_says_nothing() -> None:
    entity = '<!DOCTYPE x [<!ENTITY a "b">]>'
    bomb = png("parameters", "x" * 50_000_000, "ztxt")
    assert len(description_of(bomb)) <= 1_000_000
    for data in (
        b"",
        b"no image",
        saved("JPEG"),
        saved("JPEG", xmp=(entity + XMP).encode()),
        saved("JPEG", xmp=b"<x"),
        png("parameters", "\nNegative prompt: x"),
        png("Description", " \r\n "),
        iptc_jpeg(TEXT.encode())[:60],
    ):
        assert description_of(data) == ""
    assert description_of(iptc_jpeg("Würfel".encode("latin-1"))) == "Würfel"
    assert description_of(png("Comment", "caf\u00e9", "text")) == "caf\u00e9"


def test_only_images_without_a_caption_are_asked_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a.png", "its text", png("Comment", "in the file"))
    put(tmp_path / "b.png", data=png("Comment", "in the file"))
    put(tmp_path / "c.png", data=saved("PNG"))
    make_old(tmp_path)
    assert len(reasons(read_one(tmp_path))) == 2
    settings = settings_of(tmp_path, tmp_path, tmp_path / "out", caption_from="metadata")
    memory = Memory()
    source = read_dataset(settings, memory)[""]
    assert captions(source) == {"a.png": ("its text",), "b.png": ("in the file",)}
    assert reasons(source)["c.png"].startswith("no caption: c.txt is missing")
    monkeypatch.setattr("precompute.dataset.captions.description_of", pytest.fail)
    assert read_dataset(settings, Memory(stored=memory.seen))[""] == source
