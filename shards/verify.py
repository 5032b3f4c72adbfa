"""Re-hash a whole cache and name what is damaged."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from runtime.files import file_sha256
from shards import CacheError
from shards.index import Index
from shards.manifest import MANIFEST, OWN
from shards.reader import read_ahead
from shards.schema import read_json

MOST_THREADS = 16  # hashing lets go of Python's lock, so each keeps a core or the disk busy


def verify(folder: Path, manifest: dict[str, Any]) -> Iterator[list[str]]:
    """Faults of each shard in turn, one line each, then those of everything else.

    ``manifest`` is what ``read_manifest`` gave, so its own bytes are already checked. Yields
    ``len(manifest["shards"]) + 1`` lists; all empty means that every byte is as it was written.
    """
    threads = min(MOST_THREADS, (os.cpu_count() or 1) + 1)
    shards = manifest["shards"]
    yield from read_ahead(lambda shard: _check_shard(folder, shard), shards, threads, 2 * threads)
    yield [*_check_side_files(folder, manifest)]


def _check_side_files(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    known = {MANIFEST, *OWN, *manifest["side_files"]}
    known |= {f"{s['name']}.{end}" for s in manifest["shards"] for end in ("tar", "index")}
    for name, digest in manifest["side_files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: missing"
            continue
        try:
            if file_sha256(path) != digest:
                yield f"{path}: damaged (sha256 differs)"
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror or error})"
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in known:
            yield f"{path}: not a file of this cache; encode again, or remove it"


def _check_shard(folder: Path, shard: dict[str, Any]) -> list[str]:
    """A disk that fails to read one shard is no reason to leave the others unchecked."""
    try:
        return _hash_shard(folder, shard)
    except OSError as error:
        return [f"{folder / shard['name']}.tar: cannot be read ({error.strerror or error})"]


def _hash_shard(folder: Path, shard: dict[str, Any]) -> list[str]:
    tar = folder / f"{shard['name']}.tar"
    try:
        index = Index(folder / f"{shard['name']}.index")
    except CacheError as error:
        return [str(error)]
    if index.sha256 != shard["index_sha256"]:
        return [f"{tar.with_suffix('.index')}: whole, but not the one the manifest names"]
    if not tar.is_file():
        return [f"{tar}: missing"]
    faults = []
    if (size := tar.stat().st_size) != index.header["tar_bytes"]:
        faults.append(f"{tar}: {size} bytes where {index.header['tar_bytes']} were written")
    if file_sha256(tar) != index.header["tar_sha256"]:
        samples = [*_damaged_samples(tar, index)]
        outside = f"{tar}: damaged outside the samples (tar header, padding or end)"
        faults.extend(samples or [outside])
    return faults


def _damaged_samples(tar: Path, index: Index) -> Iterator[str]:
    with open(tar, "rb") as file:
        for row in range(len(index)):
            bad, path = [], ""
            for part, digest in index.parts(row):
                data = read_part(file, part.offset, part.size)
                if xxhash.xxh3_64_intdigest(data) != digest:
                    bad.append(part.what)
                elif part.what == "json":
                    path = f" ({path_of(data)})"
            if bad:
                yield f"{tar}: sample {index.key(row)}{path}: damaged: {', '.join(bad)}"


def read_part(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a tar; fewer where it ends before, however many its index promises."""
    end = os.fstat(file.fileno()).st_size
    if offset >= end:
        return b""
    file.seek(offset)
    return file.read(min(size, end - offset))


def path_of(data: bytes) -> str:
    """The path in a sample's JSON; a question mark where that is none."""
    try:
        return str(read_json(data)["path"])
    except (ValueError, KeyError, TypeError):
        return "?"
