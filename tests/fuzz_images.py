"""Damaged image files of every format."""

import random
from pathlib import Path
from unittest.mock import patch

import precompute.images.decode
from precompute.images.decode import image_size, open_image
from precompute.images.described import description_of
from precompute.images.masks import open_alpha, open_mask
from precompute.images.rejections import explain
from tests.image_files import SIZE, bad_files, good_files, png_part, saved, scene
from tests.mutations import Try
from tests.test_described import described_files

PIXELS = 2_000_000  # in place of the limit of a run, so that many files are tried


def seeds() -> list[tuple[str, bytes]]:
    """Good files and bad ones, and some of rarer kinds."""
    files = [*good_files(), *((name, data) for name, data, _ in bad_files())]
    black = scene().convert("1")
    for packing in ("group3", "group4", "tiff_ccitt", "packbits"):
        files.append((f"{packing}.tif", saved(black, "TIFF", compression=packing)))
    for mode in ("1", "L", "P"):
        files.append((f"{mode}.bmp", saved(scene().convert(mode), "BMP")))
    for mode in ("1", "L"):
        files.append((f"{mode}.pnm", saved(scene().convert(mode), "PPM")))
    files.append(("restarts.jpg", saved(scene(), "JPEG", progressive=True, restart_marker_rows=1)))
    noted = saved(scene(), "PNG")
    notes = b"".join(png_part(name, b"a\0\0\0\0\0" + bytes(50)) for name in (b"iTXt", b"iCCP"))
    files.append(("noted.png", noted[:33] + notes + noted[33:]))
    files += [(f"described.{name}", data) for name, data in described_files().items()]
    return [(name, data) for name, data in files if len(data) < 300_000]


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, runs, cuts, numbers, parts of another file."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        size = len(changed)
        at = min(rng.randrange(size + 1), rng.randrange(size + 1))
        length = rng.choice([1, 2, 4, 8, 40, 400])
        kind = rng.randrange(7)
        if kind == 0 and at < size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.choice([b"\0", b"\xff"]) * min(length, size - at)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            number = rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1])
            changed[at : at + 4] = number.to_bytes(4, rng.choice(["little", "big"]))
        elif kind == 5:
            changed[at:at] = changed[at : at + length] * rng.choice([1, 30])
        else:
            changed[at : at + length] = other[at : at + length]
    return bytes(changed)


def fuzz_image(work: Path, base: Path) -> Try:
    """Images of every format, as what encode makes of them: an image, an alpha, a mask."""
    files = seeds()

    def try_one(rng: random.Random) -> str:
        data = mutate(rng.choice(files)[1], rng.choice(files)[1], rng)
        with patch.object(precompute.images.decode, "MAX_PIXELS", PIXELS):
            return use(data)

    return try_one


def use(data: bytes) -> str:
    """How it ends to open a file as an image; what reads it otherwise has a reason too."""
    how = "read"
    description_of(data).encode("utf-8", "surrogatepass")
    for read in (image_size, open_image, open_alpha, lambda data: open_mask(data, SIZE)):
        try:
            read(data)
        except Exception as error:  # Pillow raises anything of a bad file, so encode takes it all
            reason = explain(error)
            assert reason and "\n" not in reason, repr(reason)
            how = "refused" if read is open_image else how
    return how
