"""Damaged and hostile files of a dataset: texts, rows, lists and tars."""

import io
import json
import random
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from precompute.dataset.captions import decode_text
from precompute.dataset.records import Source, parse_row, read_entry
from precompute.dataset.sources import read_dataset
from precompute.settings import EncodeSettings
from tests.mutations import Try, damage, ending, forge, json_text

TEXT = "a red heart, \u65e5\u672c \U0001f642\r\nsecond line"
ROW = {"file_name": "a.png", "text": ["one", " "], "weight": 0.5, "repeats": 2, "mask": "m.png"}
ODD = [None, True, -1, 0, 1e308, 10**30, "", "\0", "x" * 5000, [], {}, [["x"]], "../a.png", "a.png"]
NUMBERS = [b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x01", b"77777777777\0", b"-0000000001\0"]
NUMBERS += [b"\x80\0\0\0\x10\0\0\0\0\0\0\0", b"\xff" * 10 + b"\xfc\0", b"            ", b"99999"]
TABLES = (
    b'file_name;text;repeats\r\na.png;"a cat";2\r\n"a.png",x\n',
    b'image,caption,weight,mask\na.png,"a ""red""\ncat, two",0.5,m.png\nb.png,,,\n',
    b"File\tText\nimages/a.png\ta cat\n",
)
LISTS = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv", "a.txt", "a.caption")
LISTS += ("a.json", "meta_cap.json", "meta_lat.json", "annotations.json", "captions_x.json")
COCO: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": "b", "file_name": "images/a.png"}],
    "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": "b", "caption": "two"}],
}


def fuzz_text(work: Path, base: Path) -> Try:
    """Captions in every encoding that is known."""

    def try_one(rng: random.Random) -> str:
        encoding = rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
        data = damage(rng, TEXT.encode(encoding))

        def read() -> None:
            text = decode_text(data)
            assert "\r" not in text
            text.encode()

        return ending(read, None)

    return try_one


def random_row(rng: random.Random) -> bytes:
    row = {name: rng.choice([value, rng.choice(ODD)]) for name, value in ROW.items()}
    data = json.dumps(row).encode()
    kind = rng.random()
    if kind < 0.05:
        data = b'{"repeats": ' + b"9" * rng.choice([400, 5000]) + b"}"
    elif kind < 0.1:
        data = rng.choice([b"[", b'{"a":']) * rng.choice([10, 100_000])
    return damage(rng, data) if rng.random() < 0.7 else data


def fuzz_row(work: Path, base: Path) -> Try:
    """Lines of a list, and the JSON beside an image of a tar."""

    def try_one(rng: random.Random) -> str:
        data = random_row(rng)

        def read() -> None:
            row = read_entry(parse_row(data))
            assert 1 <= row.repeats <= 10**6 and 0 <= row.weight <= 1e6

        return ending(read, None)

    return try_one


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
    return read_dataset(EncodeSettings(dataset=root, base="", out=root / "out"))[""]


def fuzz_tar(work: Path, base: Path) -> Try:
    """Webdataset tars."""

    def try_one(rng: random.Random) -> str:
        (work / "x.tar").write_bytes(random_tar(rng))

        def read() -> None:
            for record in read_all(work).records:
                assert len(record.image.read()) == record.image.size

        return ending(read, work)  # refused is a whole tar without images

    return try_one


def fuzz_table(work: Path, base: Path) -> Try:
    """Parquet: a list of images, and tables with the images' bytes."""
    import pyarrow
    from pyarrow import parquet

    (work / "a.png").write_bytes(b"")
    kinds: list[list[Any]] = [
        [{"bytes": b"x" * 40, "path": "a"}, {"bytes": None, "path": "\u65e5"}, None] * 9,
        [b"\x89PNG\r\n\x1a\n" + bytes(50)] * 27,
        ["a.png", "b.png", None] * 9,
        [["one", "two"], [], None] * 9,
        [1e308] * 27,
        [-1] * 27,
        [True] * 27,
    ]

    def try_one(rng: random.Random) -> str:
        path = work / rng.choice(["metadata.parquet", "x.parquet", "captions.parquet"])
        names = rng.sample(["image", "file_name", "text", "weight", "repeats", "mask", "split"], 4)
        columns = {name: rng.choice(kinds) for name in names}
        if rng.random() < 0.7:
            image = kinds[rng.randrange(2) if path.name[0] == "x" else 2]
            columns = {"image": image, "text": kinds[2], "mask": columns.get("mask", kinds[5])}
            columns |= {} if path.name[0] == "x" else {"mask": [None] * 27}
        file = io.BytesIO()
        parquet.write_table(
            pyarrow.table(columns),
            file,
            row_group_size=rng.choice([1, 5, 100]),
            compression=rng.choice(["none", "snappy", "zstd", "gzip"]),
            use_dictionary=rng.random() < 0.5,
        )
        data = file.getvalue()
        for _ in range(rng.randrange(3)):
            data = damage(rng, data)
        path.write_bytes(data)
        try:
            source = read_all(work)
            for record in source.records:
                with suppress(ValueError):
                    record.image.read()
        finally:
            path.unlink()
        assert source.records or source.rejected
        for item in source.rejected:
            assert len(item.path) < 6000 and len(item.reason) < 6000, item
        return "read" if source.records else "refused"

    return try_one


def fuzz_arrow(work: Path, base: Path) -> Try:
    """Arrow files with the images' bytes, and what describes a saved dataset."""
    import pyarrow

    images: list[Any] = [
        pyarrow.array([{"bytes": b"x" * 40, "path": "a"}, {"bytes": None, "path": "b"}, None] * 9),
        pyarrow.array([b"\x89PNG\r\n\x1a\n" + bytes(50)] * 27),
        pyarrow.array([b"", b"y" * 9, None] * 9, pyarrow.large_binary()),
    ]
    others: list[Any] = [
        pyarrow.array(["a text", "\u65e5", None] * 9),
        pyarrow.array(["one", "two", "one"] * 9).dictionary_encode(),
        pyarrow.array([["one", "two"], [], None] * 9),
        pyarrow.array([1e308] * 27),
        pyarrow.array([{"a": [1, 2]}] * 27),
        pyarrow.array([-1] * 27),
    ]
    state = {"_data_files": [{"filename": "x.arrow"}, {"filename": "y.arrow"}]}

    def try_one(rng: random.Random) -> str:
        columns = {"image": rng.choice(images), "text": rng.choice(others[:3])}
        if rng.random() < 0.3:
            columns[rng.choice(["text", "caption", "weight", "split"])] = rng.choice(others)
        table, file = pyarrow.table(columns), io.BytesIO()
        opener = rng.choice([pyarrow.ipc.new_file, *[pyarrow.ipc.new_stream] * 3])
        compression = rng.choice([None, None, None, "lz4", "zstd"])
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with opener(file, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=rng.choice([1, 5, 100]))
        data = file.getvalue()
        for _ in range(rng.randrange(3)):
            data = damage(rng, data)
        (work / "x.arrow").write_bytes(data)
        if rng.random() < 0.3:
            text = json_text(forge(rng, state)).encode("utf-8", "surrogatepass")
            (work / "state.json").write_bytes(text)

        def read() -> None:
            source = read_all(work)
            for record in source.records:
                assert len(record.image.read()) == record.image.size
            for item in source.rejected:
                assert len(item.path) < 6000 and len(item.reason) < 6000, item
            if not source.records:
                raise ValueError(f"{work}: no records")

        try:
            return ending(read, work)
        finally:
            (work / "state.json").unlink(missing_ok=True)

    return try_one


def fuzz_list(work: Path, base: Path) -> Try:
    """Lists as JSON lines and as CSV, and texts beside an image."""
    (work / "a.png").write_bytes(b"")

    def try_one(rng: random.Random) -> str:
        path = work / rng.choice(LISTS)
        if path.suffix == ".jsonl":
            data = b"\n".join(random_row(rng) for _ in range(rng.randrange(4)))
        elif path.name in ("annotations.json", "captions_x.json"):
            data = json_text(forge(rng, COCO)).encode("utf-8", "surrogatepass")
        elif path.suffix == ".json":
            data = random_row(rng)
            if path.stem != "a":
                key = rng.choice(["a", "a.png", "C:\\\\x\\\\a.png", "", "/" * 5000])
                data = b'{"' + key.encode() + b'": ' + data + b"}"
        else:
            data = rng.choice(TABLES) if path.suffix == ".csv" else TEXT.encode()
        data = damage(rng, data) if rng.random() < 0.8 else data.decode("latin-1").encode("utf-16")
        path.write_bytes(data)
        try:
            source = read_all(work)
        finally:
            path.unlink()
        assert source.records or source.rejected
        for item in source.rejected:
            assert len(item.path) < 6000 and len(item.reason) < 6000, item
        return "read" if source.records else "refused"

    return try_one
