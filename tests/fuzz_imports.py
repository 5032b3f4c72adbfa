"""Damaged and hostile caches of another trainer."""

import io
import random
import zipfile
from pathlib import Path

import numpy as np

from precompute.imports.kohya import read_latents_header, read_text_header
from precompute.imports.npz import Npz, NpzError
from tests.kohya_caches import Arrays, latents_arrays, text_arrays
from tests.mutations import Try, damage, ending

DTYPES = ("<f2", "<f4", ">f8", "<i8", "|O", "<U9", "|V9", "<c8", "<f4, <i4", "f" * 15, "<f16", "?")
SHAPES = ("()", "(4,)", "(4, 6, 10)", "(4, 6, 10, )", "(2147483648, 9)", "(-1, 4)", "(0, 6, 10)")
SHAPES += ("(" + "9" * 70 + ",)", "(1e9, 2)", "[4, 6, 10]", "(4, 2048, 2048)", "(2, 77, 80)")
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def random_member(rng: random.Random, data: bytes) -> bytes:
    """An .npy, or one with a header that claims what it should not."""
    if rng.random() < 0.5:
        return data
    if rng.random() < 0.3:
        return damage(rng, data)
    order = rng.choice(("False", "True", "None", "'\\d'"))
    text = f"{{'descr': '{rng.choice(DTYPES)}', 'fortran_order': {order}, "
    text += f"'shape': {rng.choice(SHAPES)}, }}"
    if rng.random() < 0.1:
        text = rng.choice(("[" * 5000, "{" + "1:" * 3000, "0" * 9000, "__import__('os')"))
    version = rng.choice((1, 1, 2, 3, 9))
    size = rng.choice((len(text) + 1, len(text) + 1, 0, 65535))
    length = size.to_bytes(2 if version == 1 else 4, "little")
    numbers = rng.randbytes(rng.choice((0, 16, 4 * 240, 77 * 80 * 4, 100_000)))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text.encode() + b"\n" + numbers


def random_npz(rng: random.Random) -> bytes:
    arrays: Arrays
    if rng.random() < 0.6:
        options = {name: rng.random() < 0.5 for name in ("flipped", "mask", "sized")}
        arrays = latents_arrays(0, (80, 48), (85, 53), **options)
    else:
        arrays = text_arrays(0)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice(COMPRESSIONS[:2] * 4 + COMPRESSIONS)) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            data = member.getvalue()
            if rng.random() < 0.2:
                data = random_member(rng, data)
            if rng.random() < 0.95:
                archive.writestr(f"{name}.npy", data)
    data = file.getvalue()
    if rng.random() < 0.05:  # of a directory that is the whole file
        data = data[:-22] + data[data.rindex(b"PK\1\2") : -22] * 3000 + data[-22:]
    return damage(rng, data) if rng.random() < 0.5 else data


def fuzz_npz(work: Path, base: Path) -> Try:
    """kohya's caches: what planning reads of them, then every array."""

    def try_one(rng: random.Random) -> str:
        data = random_npz(rng)

        def read() -> None:
            npz = Npz(io.BytesIO(data))
            assert len(npz.digest) == 20
            reads = (read_latents_header, read_text_header)
            (reads if "hidden_state1" not in npz else reads[::-1])[0](npz)
            for name in npz.names:
                array = npz.array(name)
                assert array.dtype.kind in "fiu" and array.nbytes <= len(data) * 1100

        def read_with_name() -> None:
            try:
                read()
            except NpzError as error:
                raise ValueError(f"x.npz {error}") from None

        return ending(read_with_name, None)

    return try_one
