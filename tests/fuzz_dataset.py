"""Damaged and hostile files for the parsers of a dataset: no exception but ours may leave them.

``python -m tests.fuzz_dataset --seconds 600`` runs it for longer than the suite does, and notes the
seed and the number of the input that fails.
"""

import argparse
import io
import json
import random
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from precompute.dataset.captions import decode_text
from precompute.dataset.records import Source
from precompute.dataset.rows import load_row, read_row
from precompute.dataset.sources import read_data_set
from precompute.settings import EncodeSettings

TEXT = "a red heart, \u65e5\u672c \U0001f642\r\nsecond line"
ROW = {"file_name": "a.png", "text": ["one", " "], "weight": 0.5, "repeats": 2, "mask": "m.png"}
ODD = [None, True, -1, 0, 1e308, 10**30, "", "\0", "x" * 5000, [], {}, [["x"]], "../a.png", "a.png"]
NUMBERS = [b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x01", b"77777777777\0", b"-0000000001\0"]
NUMBERS += [b"\x80\0\0\0\x10\0\0\0\0\0\0\0", b"\xff" * 10 + b"\xfc\0", b"            ", b"99999"]


def damage(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, cut, repeated, or replaced by noise."""
    for _ in range(rng.randrange(1, 4)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        data = rng.choice(
            [
                data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:],
                data[:at] + data[end:],
                data[:end] + data[at:end] * rng.randrange(3) + data[end:],
                data[:at] + rng.choice([b"\0", b"\xff", b"\n", b'"', b"[", b"\\u0000"]) + data[at:],
                data[:at],
            ]
        )
    return data


def fuzz_text(rng: random.Random) -> None:
    encoding = rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    try:
        text = decode_text(damage(rng, TEXT.encode(encoding)))
    except ValueError:
        return
    assert "\r" not in text
    text.encode()


def random_row(rng: random.Random) -> bytes:
    row = {name: rng.choice([value, rng.choice(ODD)]) for name, value in ROW.items()}
    data = json.dumps(row).encode()
    kind = rng.random()
    if kind < 0.05:
        data = b'{"repeats": ' + b"9" * rng.choice([400, 5000]) + b"}"
    elif kind < 0.1:
        data = rng.choice([b"[", b'{"a":']) * rng.choice([10, 100_000])
    return damage(rng, data) if rng.random() < 0.7 else data


def fuzz_row(rng: random.Random) -> None:
    try:
        row = read_row(load_row(random_row(rng)))
    except ValueError as error:
        assert len(str(error)) < 400 and "\n" not in str(error), error
        return
    assert 1 <= row.repeats <= 10**6 and 0 <= row.weight <= 1e6


def random_tar(rng: random.Random) -> bytes:
    """A tar whose headers claim what they should not, with sums that hold or not."""
    file = io.BytesIO()
    formats = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]
    with tarfile.open(fileobj=file, mode="w", format=rng.choice(formats)) as archive:
        for number in range(rng.randrange(1, 5)):
            long = (
                "x" * 150 if archive.format != tarfile.USTAR_FORMAT and rng.random() < 0.4 else ""
            )
            info = tarfile.TarInfo(f"{long}{number}.{rng.choice(['png', 'txt', 'json'])}")
            info.size = rng.randrange(600)
            archive.addfile(
                info, io.BytesIO(rng.choice([TEXT.encode() * 20, random_row(rng) + bytes(600)]))
            )
    data = bytearray(file.getvalue())
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(0, len(data), 512)
        if rng.random() < 0.7:
            place = rng.choice([124, 124, 124, 156, 345, 0])  # size, kind, prefix, name
            new = rng.choice(NUMBERS) if place == 124 else rng.choice(b"LKxgSV2150").to_bytes(1)
            data[at + place : at + place + len(new)] = new
        if rng.random() < 0.7:
            head = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + 512])
            data[at + 148 : at + 156] = b"%06o\0 " % (sum(head) & 0o777777)
    return bytes(data) if rng.random() < 0.7 else damage(rng, bytes(data))


def read_all(root: Path) -> Source:
    settings = EncodeSettings(dataset=root, base="", out=root / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_data_set(settings)[""]


def make_fuzz_tar(root: Path) -> Callable[[random.Random], None]:
    def fuzz_tar(rng: random.Random) -> None:
        (root / "x.tar").write_bytes(random_tar(rng))
        try:
            source = read_all(root)
        except ValueError:  # a whole tar without images
            return
        for record in source.records:
            assert len(record.picture.read()) == record.picture.size

    return fuzz_tar


def make_fuzz_list(root: Path) -> Callable[[random.Random], None]:
    (root / "a.png").write_bytes(b"")

    def fuzz_list(rng: random.Random) -> None:
        rows = [random_row(rng) for _ in range(rng.randrange(4))]
        table = b'file_name;text;repeats\r\na.png;"a cat";2\r\n"a.png",x\n'
        name = rng.choice(["captions.jsonl", "captions.csv"])
        data = table if name.endswith("csv") else b"\n".join(rows)
        data = damage(rng, data) if rng.random() < 0.8 else data.decode("latin-1").encode("utf-16")
        for other in ("captions.jsonl", "captions.csv"):
            (root / other).unlink(missing_ok=True)
        (root / name).write_bytes(data)
        source = read_all(root)
        assert source.records or source.rejected
        for item in source.rejected:
            assert len(item.path) < 6000 and len(item.reason) < 6000, item

    return fuzz_list


def run(folder: Path, seed: int, num_inputs: int, seconds: float = 1e9) -> int:
    """Inputs tried, of all parsers in turn; stops after ``num_inputs`` or ``seconds``.

    Raises:
        Exception: what a parser raised, with the seed of its input as a note.
    """
    tar, listing = folder / "tar", folder / "list"
    for path in (tar, listing):
        path.mkdir()
    parsers = [fuzz_text] * 4 + [fuzz_row] * 4 + [make_fuzz_tar(tar), make_fuzz_list(listing)]
    end = time.monotonic() + seconds
    for number in range(num_inputs):
        if time.monotonic() > end:
            return number
        try:
            parsers[number % len(parsers)](random.Random(f"{seed}/{number}"))
        except Exception as error:
            error.add_note(f"input {number} of seed {seed}")
            raise
    return num_inputs


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    options.add_argument("--inputs", type=int, default=10**9)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tried = run(Path(folder), given.seed, given.inputs, given.seconds)
    print(f"seed {given.seed}: {tried:,} inputs, no exception but ours")


if __name__ == "__main__":
    main()
