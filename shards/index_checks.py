"""What an index must hold to be read from, whoever wrote it: see ``shards.schema``."""

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.devices import DTYPES
from shards.sample import (
    CAPTION_TENSORS,
    MASK_TENSORS,
    TENSORS,
    VARIANT_TENSORS,
    Layout,
)
from shards.schema import (
    BUCKET,
    DIGEST,
    REPEATS,
    SHARD,
    SIDE,
    each,
    fields,
    flag,
    like,
    misfit,
    number,
    record,
    text,
    whole,
)

MOST_SLICE_BYTES = 2**40
REQUIRED_TENSORS = ("latents.mean", "sizes", *CAPTION_TENSORS)
HEADER = {
    "shard": SHARD,
    "count": whole(),
    "tar_bytes": whole(),
    "tar_sha256": DIGEST,
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "latent": each(SIDE, 3),
    "prompt": each(SIDE, 2),
    "pooled": SIDE,
}
KEY = like("[0-9a-f]{20}")


def _member(value: Any) -> bool:
    """Its key, then marks: text and numbers."""
    is_row = isinstance(value, list) and len(value) > 0 and KEY(value[0])
    return is_row and all(text(mark) or number(mark) for mark in value[1:])


ABOUT = {  # what encode adds; a shard that was written in another way may lack it
    "bucket": BUCKET,
    "repeats": REPEATS,
    "recipe": fields(
        {
            **dict.fromkeys(("preprocessing", "vae", "text_encoder", "text_encoder_2"), record),
            "storage": fields({"dtype": text, "mean_only": flag}),
        },
        {"long_captions": whole(1, 1000)},
    ),
    "members": each(_member),
    "rejected": each(each(text, 2)),
    "made_with": each(record),
    "sums": fields(dict.fromkeys(("gram", "cross"), each(each(number)))),
    "num_cut_captions": whole(),
    "dropped_variants": each(
        lambda value: (
            isinstance(value, list) and len(value) == 2 and text(value[0]) and whole()(value[1])
        )
    ),
}


def misfit_of_header(header: Any) -> str | None:
    """What is wrong with the JSON of an index; None if nothing is."""
    found = misfit(header, HEADER, ABOUT)
    if found is None and "bucket" in header:
        width, height = header["bucket"]
        if header["latent"][1:] != [height // 8, width // 8]:
            return "its latents are not of its bucket"
    if found is None and "sums" in header:
        size = header["latent"][0] + 1
        for name, width in (("gram", size), ("cross", 3)):
            if [len(row) for row in header["sums"][name]] != size * [width]:
                return f"its sums are not of {size - 1} channels"
    return found


def misfit_of_records(
    records: npt.NDArray[np.void], layout: Layout, tar_bytes: int, num_digests: int
) -> str | None:
    """What is wrong with the records: each must lie in the tar, and hold just its tensors."""
    if not len(records):
        return None
    keys = np.frombuffer(records["key"].tobytes(), np.uint8).reshape(len(records), 20)
    if not ((keys >= 48) & (keys <= 57) | (keys >= 97) & (keys <= 102)).all():
        return "a key is not 20 hex digits"
    if not (records["key"][1:] > records["key"][:-1]).all():
        return "its keys are not in order"
    if not (np.isfinite(records["weight"]) & (records["weight"] >= 0)).all():
        return "a weight is not a number from 0 on"
    for offset, size in (("json_offset", "json_size"), ("offset", "size")):
        if not _fits(records[offset], records[size], tar_bytes).all():
            return "a sample lies outside the tar"
    if not (records["first_digest"] <= num_digests).all():
        return "a sample has no digests"
    return _misfit_of_tensors(records, layout)


def _misfit_of_tensors(records: npt.NDArray[np.void], layout: Layout) -> str | None:
    size, covered = records["size"], records["header_size"].astype(np.uint64)
    if not (records["num_variants"].all() and records["num_captions"].all()):
        return "a sample has no variant or no caption"
    for place, name in enumerate(TENSORS):
        offsets = records["tensors"][:, place]
        there = offsets > 0
        if name in REQUIRED_TENSORS and not there.all():
            return f"a sample has no {name}"
        slice_bytes = layout.slice_bytes(name)
        if slice_bytes > MOST_SLICE_BYTES:
            return f"its {name} is larger than any"
        of = "num_variants" if name in VARIANT_TENSORS + MASK_TENSORS else "num_captions"
        total = records[of].astype(np.uint64) * np.uint64(slice_bytes)
        covered = covered + np.where(there, total, np.uint64(0))
        starts_late = offsets >= records["header_size"]
        if not (~there | starts_late & _fits(offsets, total, size)).all():
            return f"the {name} of a sample lies outside it"
    return None if (covered == size).all() else "a sample holds more than its tensors"


def _fits(offset: Any, size: Any, most: Any) -> npt.NDArray[np.bool_]:
    """Whether [offset, offset + size) lies in [0, most), in numbers that cannot overflow."""
    offset, size = offset.astype(np.uint64), size.astype(np.uint64)
    limit = np.broadcast_to(np.asarray(most, np.uint64), offset.shape)
    inside = offset <= limit
    fits: npt.NDArray[np.bool_] = inside & (size <= limit - np.where(inside, offset, np.uint64(0)))
    return fits
