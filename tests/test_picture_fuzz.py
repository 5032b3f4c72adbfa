"""Damaged image files of every format: a reason in one line, or an image, and never a hang.

``python -m tests.test_picture_fuzz COUNT SEED`` tries more by hand.
"""

import random
import sys
import time
import warnings

import pytest

import precompute.pictures.images
from precompute.pictures.images import open_picture, picture_size
from precompute.pictures.masks import open_alpha, open_mask
from precompute.pictures.refusals import explain
from tests.picture_files import SIZE, bad_files, good_files, png_part, saved, scene

SECONDS = 20  # that no file may take, on a busy machine too
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
    return [(name, data) for name, data in files if len(data) < 300_000]


def mutate(data: bytes, other: bytes, choices: random.Random) -> bytes:
    """One to four changes: bits, runs, cuts, numbers, parts of another file."""
    changed = bytearray(data)
    for _ in range(choices.randint(1, 4)):
        size = len(changed)
        at = min(choices.randrange(size + 1), choices.randrange(size + 1))
        length = choices.choice([1, 2, 4, 8, 40, 400])
        kind = choices.randrange(7)
        if kind == 0 and at < size:
            changed[at] ^= 1 << choices.randrange(8)
        elif kind == 1:
            changed[at : at + length] = choices.choice([b"\0", b"\xff"]) * min(length, size - at)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            number = choices.choice([0, 1, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1])
            changed[at : at + 4] = number.to_bytes(4, choices.choice(["little", "big"]))
        elif kind == 5:
            changed[at:at] = changed[at : at + length] * choices.choice([1, 30])
        else:
            changed[at : at + length] = other[at : at + length]
    return bytes(changed)


def use(data: bytes) -> str:
    """What encode does with a file, as an image and as a mask; how that ends."""
    how = "taken"
    for read in (picture_size, open_picture, open_alpha, lambda data: open_mask(data, SIZE)):
        try:
            read(data)
        except Exception as error:
            reason = explain(error)
            assert reason and "\n" not in reason, repr(reason)
            how = "rejected" if read is open_picture else how
    return how


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Damage so many files; how many were taken and rejected."""
    files, counts = seeds(), {"taken": 0, "rejected": 0}
    for number in range(count):
        choices = random.Random(f"{seed} {number}")
        name, data = choices.choice(files)
        mutated = mutate(data, choices.choice(files)[1], choices)
        start = time.monotonic()
        try:
            counts[use(mutated)] += 1
            assert time.monotonic() - start < SECONDS, "it took too long"
        except BaseException:
            print(f"file {number} of seed {seed}, {name}", file=sys.stderr)
            raise
    return counts


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::DeprecationWarning:PIL")
def test_no_damaged_file_raises_more_than_a_reason(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precompute.pictures.images, "MOST_PIXELS", PIXELS)
    counts = fuzz(400, 0)
    assert min(counts.values()) > 30, counts


if __name__ == "__main__":
    precompute.pictures.images.MOST_PIXELS = PIXELS
    warnings.simplefilter("ignore")
    print(fuzz(int(sys.argv[1]), int(sys.argv[2])))
