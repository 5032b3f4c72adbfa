"""Writes one shard: the tar first, and when it is on disk for good, its index."""

import hashlib
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset as wds
import xxhash

from runtime.files import durable_file, writer_name
from shards.buckets import Size, bucket_name
from shards.format import Layout, Sample
from shards.index import RECORD_DTYPE, describe_payload, write_index

Members = dict[str, bytes]  # of one sample, by extension


class _HashingFile:
    """Hashes what is written, as it is written: a fault on the way to the disk shows later."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)


def shard_name(bucket: Size, number: int) -> str:
    return f"{bucket_name(bucket)}-{number:06d}"


def write_shard(
    folder: Path,
    name: str,
    samples: Iterable[Sample],
    layout: Layout,
    header_fields: dict[str, Any],
) -> None:
    """Write ``name.tar`` and ``name.index`` in ``folder``.

    ``samples`` come in key order. ``header_fields`` joins the index's header: it may be filled in
    while the samples are drawn, as it is read last. Same samples -> same bytes.
    """
    packed = ((sample.key, sample.weight, sample.members()) for sample in samples)
    write_members(folder, name, packed, layout, header_fields)


def write_members(
    folder: Path,
    name: str,
    samples: Iterable[tuple[str, float, Members]],
    layout: Layout,
    header_fields: dict[str, Any],
) -> None:
    """``write_shard`` for samples given as in a tar: key, weight, members."""
    digests: list[int] = []
    rows: list[dict[str, Any]] = []
    role_rows: dict[tuple[str, ...], int] = {(): 0}  # in the header's caption_roles, from 1 on
    tar = folder / f"{name}.tar"
    with durable_file(tar, writer_name()) as file:
        hashing = _HashingFile(file)
        with wds.TarWriter(hashing, encoder=False, mtime=0) as writer:
            for key, weight, members in samples:
                writer.write({"__key__": key, **members})
                row: dict[str, Any] = {"key": key.encode(), "weight": weight}
                roles = tuple(json.loads(members["json"]).get("roles", ()))
                row["roles"] = role_rows.setdefault(roles, len(role_rows))
                row["first_digest"] = len(digests)
                digests.append(xxhash.xxh3_64_intdigest(members["json"]))
                rows.append(row | describe_payload(members["safetensors"], layout, digests))
    places = _member_places(tar)
    records = np.zeros(len(rows), RECORD_DTYPE)
    for record, row in zip(records, rows, strict=True):
        key = row["key"].decode()
        record["json_offset"], record["json_size"] = places[f"{key}.json"]
        record["offset"], size = places[f"{key}.safetensors"]
        assert size == row["size"]
        for field, value in row.items():
            record[field] = value
    header = {
        "shard": name,
        "count": len(rows),
        "tar_bytes": hashing.size,
        "tar_sha256": hashing.sha256.hexdigest(),
        "dtype": layout.dtype,
        "latent": layout.latent,
        "prompt": layout.prompt,
        "pooled": layout.pooled,
        **header_fields,
        **({"caption_roles": [*role_rows][1:]} if len(role_rows) > 1 else {}),
    }
    write_index(folder / f"{name}.index", header, records, digests)


def _member_places(tar: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar, "r:") as archive:
        return {member.name: (member.offset_data, member.size) for member in archive}
