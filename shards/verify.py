"""Re-hash a whole cache and name what is damaged."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from shards import CacheError
from shards.index import Index
from shards.manifest import MANIFEST, OWN


def verify(folder: Path, manifest: dict[str, Any]) -> Iterator[list[str]]:
    """Faults of each shard in turn, one line each, then those of everything else.

    ``manifest`` is what ``read_manifest`` gave, so its own bytes are already checked. Yields
    ``len(manifest["shards"]) + 1`` lists; all empty means that every byte is as it was written.
    """
    for shard in manifest["shards"]:
        yield _check_shard(folder, shard)
    yield [*_check_side_files(folder, manifest)]


def _check_side_files(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    known = {MANIFEST, *OWN, *manifest["side_files"]}
    known |= {f"{s['name']}.{end}" for s in manifest["shards"] for end in ("tar", "index")}
    for name, digest in manifest["side_files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{path}: missing"
        elif _sha256(path) != digest:
            yield f"{path}: damaged (sha256 differs)"
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in known:
            yield f"{path}: not a file of this cache; encode again, or remove it"


def _check_shard(folder: Path, shard: dict[str, Any]) -> list[str]:
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
    if _sha256(tar) != index.header["tar_sha256"]:
        samples = [*_damaged_samples(tar, index)]
        outside = f"{tar}: damaged outside the samples (tar header, padding or end)"
        faults.extend(samples or [outside])
    return faults


def _damaged_samples(tar: Path, index: Index) -> Iterator[str]:
    with open(tar, "rb") as file:
        for row in range(len(index)):
            bad, path = [], ""
            for part, digest in index.parts(row):
                file.seek(part.offset)
                data = file.read(part.size)
                if xxhash.xxh3_64_intdigest(data) != digest:
                    bad.append(part.what)
                elif part.what == "json":
                    path = f" ({json.loads(data)['path']})"
            if bad:
                yield f"{tar}: sample {index.key(row)}{path}: damaged: {', '.join(bad)}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
