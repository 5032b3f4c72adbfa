"""Hashes a whole cache again and names what is damaged; with ``--repair``, drops that alone.

The intact samples of a damaged shard are written into a new shard of the same name. A sample is
intact if each of its parts has the digest that the index names, whatever happened to the tar around
it. Any other stays among the shard's members as one that failed for now, so that the next encode
makes it again, in its old position.
"""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash

from runtime.files import PARTIAL, file_sha256, fsync_folder, move_into, remove_path, writing
from runtime.messages import pluralize
from runtime.schema import read_json
from shards.format import CacheError, OtherFormat, sample_key
from shards.index import Index
from shards.manifest import ENCODE_FILES, MANIFEST, PROMPTS, REPLACED, SIDE_FILES, UNCONDITIONAL
from shards.reader import read_ahead
from shards.writer import Members, write_members

MAX_THREADS = 16  # hashing lets go of Python's lock, so each keeps a core or the disk busy


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something in a cache that is not as it was written; as text, the line that reports it."""

    path: Path  # of the file
    kind: Literal["missing", "damaged", "unreadable", "foreign"]
    message: str
    shard: str | None = None  # its name; None: a file beside the shards
    sample: str | None = None  # the key of the damaged sample; None: not known, or none is

    def __str__(self) -> str:
        return self.message


def verify(folder: Path, manifest: dict[str, Any]) -> Iterator[list[Fault]]:
    """Faults of each shard in turn, then those of everything else.

    ``manifest`` is what ``read_manifest`` gave, so its own bytes are already checked. Yields
    ``len(manifest["shards"]) + 1`` lists; all empty means that every byte is as it was written.
    """
    threads = min(MAX_THREADS, (os.cpu_count() or 1) + 1)
    shards = manifest["shards"]
    yield from read_ahead(lambda shard: _check_shard(folder, shard), shards, threads, 2 * threads)
    yield [*_check_side_files(folder, manifest)]


def _check_side_files(folder: Path, manifest: dict[str, Any]) -> Iterator[Fault]:
    expected = {MANIFEST, *ENCODE_FILES, *manifest["side_files"]}
    expected |= {f"{s['name']}.{end}" for s in manifest["shards"] for end in ("tar", "index")}
    for name, digest in manifest["side_files"].items():
        path = folder / name
        if not path.is_file():
            yield Fault(path=path, kind="missing", message=f"{path}: missing")
            continue
        try:
            if file_sha256(path) != digest:
                message = f"{path}: damaged (sha256 differs)"
                yield Fault(path=path, kind="damaged", message=message)
        except OSError as error:
            message = f"{path}: cannot be read ({error.strerror or error})"
            yield Fault(path=path, kind="unreadable", message=message)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in expected:
            message = f"{path}: not a file of this cache; encode again, or remove it"
            yield Fault(path=path, kind="foreign", message=message)


def _check_shard(folder: Path, shard: dict[str, Any]) -> list[Fault]:
    """A disk that fails to read one shard is no reason to leave the others unchecked."""
    try:
        return [*_hash_shard(folder, shard["name"], shard["index_sha256"])]
    except OSError as error:
        tar = folder / f"{shard['name']}.tar"
        message = f"{tar}: cannot be read ({error.strerror or error})"
        return [Fault(path=tar, kind="unreadable", message=message, shard=shard["name"])]


def _hash_shard(folder: Path, name: str, index_sha256: str) -> Iterator[Fault]:
    tar, index_path = folder / f"{name}.tar", folder / f"{name}.index"
    try:
        index = Index(index_path)
    except CacheError as error:
        kind: Literal["damaged", "missing"] = "damaged" if index_path.is_file() else "missing"
        yield Fault(path=index_path, kind=kind, message=str(error), shard=name)
        return
    if index.sha256 != index_sha256:
        message = f"{index_path}: whole, but not the one the manifest names"
        yield Fault(path=index_path, kind="damaged", message=message, shard=name)
        return
    if not tar.is_file():
        yield Fault(path=tar, kind="missing", message=f"{tar}: missing", shard=name)
        return
    if (size := tar.stat().st_size) != index.header["tar_bytes"]:
        message = f"{tar}: {size} bytes where {index.header['tar_bytes']} were written"
        yield Fault(path=tar, kind="damaged", message=message, shard=name)
    if file_sha256(tar) != index.header["tar_sha256"]:
        samples = [*_damaged_samples(tar, index)]
        message = f"{tar}: damaged outside the samples (tar header, padding or end)"
        yield from samples or [Fault(path=tar, kind="damaged", message=message, shard=name)]


def _damaged_samples(tar: Path, index: Index) -> Iterator[Fault]:
    with open(tar, "rb") as file:
        for row in range(len(index)):
            bad, path = [], ""
            for part, digest in index.parts(row):
                data = read_part(file, part.offset, part.size)
                if xxhash.xxh3_64_intdigest(data) != digest:
                    bad.append(part.label)
                elif part.label == "json":
                    path = f" ({path_of(data)})"
            if bad:
                key = index.key(row)
                message = f"{tar}: sample {key}{path}: damaged: {', '.join(bad)}"
                yield Fault(path=tar, kind="damaged", message=message, shard=tar.stem, sample=key)


def read_part(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a tar; fewer where it ends before, however many its index promises."""
    end = os.fstat(file.fileno()).st_size
    if offset >= end:
        return b""
    file.seek(offset)
    return file.read(min(size, end - offset))


def path_of(data: bytes) -> str:
    """The path in a sample's JSON; a question mark if it has none."""
    try:
        return str(read_json(data)["path"])
    except (ValueError, KeyError, TypeError):
        return "?"


# Salvage: the intact samples of a damaged shard.

WRITER_FIELDS = (
    *("shard", "count", "tar_bytes", "tar_sha256", "dtype", "latent", "prompt", "pooled"),
    "caption_roles",
)
PATH = re.compile(rb'"path": ("(?:[^"\\]|\\.)*")')
# Raised for samples whose digests are right, but which shardtune did not write.
FORGED_SAMPLE_ERRORS = (
    *(ValueError, KeyError, TypeError, AttributeError),
    *(RecursionError, OverflowError, struct.error, AssertionError),
)
SHARD_UNCHANGED = "This shard is as it was; the same encode makes what was dropped of others."
REASON = "damaged in the cache, and dropped by verify --repair"


@dataclass(frozen=True)
class Salvage:
    """How many samples of a shard were saved."""

    num_kept: int
    num_dropped: int
    is_as_before: bool  # the new index is the old one, byte for byte


def salvage(folder: Path, name: str, index_sha256: str, into: Path) -> Salvage | None:
    """Write ``name.tar`` and ``name.index`` in ``into``; None where nothing can be saved.

    Without the right index there are no digests that tell which samples are intact.

    Raises:
        OSError: the new shard cannot be written.
    """
    try:
        index = Index(folder / f"{name}.index")
        file = open(folder / f"{name}.tar", "rb")  # noqa: SIM115
    except (CacheError, OSError):
        return None
    with file:
        if index.sha256 != index_sha256 or not isinstance(index.header.get("members"), list):
            return None
        header = {key: v for key, v in index.header.items() if key not in WRITER_FIELDS}
        intact = _IntactSamples(file, index, header)
        try:
            with writing(
                into / f"{name}.tar",
                SHARD_UNCHANGED,
            ):
                write_members(into, name, intact.samples(), index.layout, header)
        except FORGED_SAMPLE_ERRORS:
            return None
    if not intact.num_kept:
        return None
    is_as_before = Index(into / f"{name}.index").sha256 == index.sha256
    return Salvage(intact.num_kept, len(index) - intact.num_kept, is_as_before)


class _IntactSamples:
    """The intact samples of a shard; when all have been read, ``header`` describes them alone."""

    def __init__(self, file: BinaryIO, index: Index, header: dict[str, Any]) -> None:
        self.file, self.index, self.header = file, index, header
        self.num_kept = 0

    def samples(self) -> Iterator[tuple[str, float, Members]]:
        dropped: dict[str, str | None] = {}  # key to path, None where that cannot be read any more
        sums: dict[str, Any] | None = None
        num_cut = 0
        for row in range(len(self.index)):
            record = self.index.record(row)
            members = _read_members(self.file, self.index, row)
            key = record.key.decode()
            if not _is_intact(members, self.index, row):
                dropped[key] = _find_path(members["json"], key)
                continue
            self.num_kept += 1
            notes = json.loads(members["json"])["notes"]
            own = {name: np.array(rows) for name, rows in notes["latents"]["sums"].items()}
            # Samples of an earlier version have not all that later ones have.
            sums = own if sums is None else {n: sums[n] + own[n] for n in sums if n in own}
            num_cut += notes["text"]["num_cut_captions"]
            yield key, record.weight, members
        if dropped:
            totals = {name: rows.tolist() for name, rows in (sums or {}).items()}
            self.header.update(
                _drop_members(self.header, dropped), sums=totals, num_cut_captions=num_cut
            )


def _drop_members(header: dict[str, Any], dropped: dict[str, str | None]) -> dict[str, Any]:
    """The lists of members without the samples that were dropped.

    One whose path is known stays a member, with a fingerprint that no image has, as rejected.
    """
    members = []
    for key, *fingerprint in header["members"]:
        if dropped.get(key) is not None:
            fingerprint = [type(field_value)() for field_value in fingerprint]
        if key not in dropped or dropped[key] is not None:
            members.append([key, *fingerprint])
    rejected = [[path, REASON] for path in dropped.values() if path is not None]
    paths = {path for path, _ in rejected}
    lists: dict[str, Any] = {
        "members": members,
        "rejected": sorted(header["rejected"] + rejected, key=lambda row: sample_key(row[0])),
    }
    if "dropped_variants" in header:
        remaining = [row for row in header["dropped_variants"] if row[0] not in paths]
        lists["dropped_variants"] = remaining
    return lists


def _read_members(file: BinaryIO, index: Index, row: int) -> Members:
    """A sample's members as they are in the tar; short if it ends before, or the disk fails."""
    record = index.record(row)
    places = {
        "json": (record.json_offset, record.json_size),
        "safetensors": (record.offset, record.size),
    }
    members = {}
    for end, (offset, size) in places.items():
        try:
            members[end] = read_part(file, offset, size)
        except OSError:
            members[end] = b""
    return members


def _is_intact(members: Members, index: Index, row: int) -> bool:
    record = index.record(row)
    if len(members["safetensors"]) != record.size:
        return False
    for part, digest in index.parts(row):
        data, start = members["safetensors"], part.offset - record.offset
        if part.label == "json":
            data, start = members["json"], 0
        if xxhash.xxh3_64_intdigest(memoryview(data)[start : start + part.size]) != digest:
            return False
    return True


def _find_path(text: bytes, key: str) -> str | None:
    """The path in a sample's JSON, which may be damaged: the right one has this key."""
    for match in PATH.finditer(text):
        try:
            path = json.loads(match[1])
        except ValueError:
            continue
        if sample_key(path) == key:
            return str(path)
    return None


# Repair: drop what ``verify`` found damaged, so that the next encode makes it again.

SUFFIXES = (".index", ".tar")  # the index goes first: a tar without an index is no shard
REMEDIES = {PROMPTS: "`python cli.py prompts` makes it again"}


def drop_damaged(folder: Path, manifest: dict[str, Any], faults: Iterable[Fault]) -> list[str]:
    """Drop each damaged sample and each damaged side file; a line for each shard and file.

    ``faults`` are all that ``verify(folder, manifest)`` yielded. The manifest is deleted first, as
    it vouches for what is deleted next: stopped anywhere, this leaves an unfinished cache, never a
    wrong one. It stays if no sample is lost. Files that are not of the cache are the user's and
    stay.
    """
    faults = [*faults]
    damaged = {fault.shard for fault in faults}
    shards = [shard for shard in manifest["shards"] if shard["name"] in damaged]
    damaged_files = {fault.path.name for fault in faults if fault.shard is None}
    files = [name for name in manifest["side_files"] if name in damaged_files]
    lines = []
    if "digest" not in manifest:
        _delete(folder, MANIFEST)
        lines.append(f"{folder / MANIFEST}: dropped")
    for shard in shards:
        lines.append(_repair_shard(folder, shard))
    for name in files:
        _delete(folder, MANIFEST)
        _delete(folder, name)
        remedy = REMEDIES.get(name)
        lines.append(f"{folder / name}: dropped" + (f"; {remedy}" if remedy else ""))
    return lines


def _repair_shard(folder: Path, shard: dict[str, Any]) -> str:
    """Replace a shard by one of its intact samples, or drop it; return a line that says which."""
    name, path = shard["name"], folder / shard["name"]
    work = folder / ("repair" + PARTIAL)
    remove_path(work)
    work.mkdir()
    try:
        saved = salvage(folder, name, shard["index_sha256"], work)
        if saved is None:
            _delete(folder, MANIFEST)
            for end in SUFFIXES:
                _delete(folder, name + end)
            return f"{path}: dropped, with its {pluralize(shard['count'], 'sample')}"
        if saved.is_as_before:  # only the tar was damaged, outside the samples
            move_into(folder, [work / f"{name}.tar"])
            return f"{path}: repaired, no sample was lost"
        _delete(folder, MANIFEST)
        _replace_shard(folder, name, work)
        if not saved.num_dropped:
            return f"{path}: repaired, no sample was lost"
        total = pluralize(saved.num_kept + saved.num_dropped, "sample")
        return f"{path}: dropped {saved.num_dropped:,} of its {total}"
    finally:
        remove_path(work)


def _replace_shard(folder: Path, name: str, work: Path) -> None:
    """Replace the old shard by the new one.

    The old one first moves to ``replaced/``, from which an encode copies what is valid, as it does
    from shards that it writes anew: stopped anywhere, no intact sample is lost.
    """
    replaced = folder / REPLACED
    replaced.mkdir(exist_ok=True)
    for end in SUFFIXES:
        (replaced / (name + end)).unlink(missing_ok=True)
    move_into(replaced, [folder / (name + end) for end in SUFFIXES])
    for end in reversed(SUFFIXES):
        move_into(folder, [work / (name + end)])
    for end in SUFFIXES:
        (replaced / (name + end)).unlink()
    if not any(replaced.iterdir()):
        replaced.rmdir()


def rebuild_manifest(folder: Path, error: CacheError) -> dict[str, Any]:
    """A manifest for ``verify`` in place of a damaged one, from the indexes in the folder.

    A damaged index is among the shards, with a digest that no index has.

    Raises:
        CacheError: ``error`` itself, if the manifest is not damaged but of another version or
            program; or an index is.
    """
    is_cache = (folder / UNCONDITIONAL).exists() or any(folder.glob("*.index"))
    if isinstance(error, OtherFormat) or not is_cache:
        raise error
    shards = []
    for path in sorted(folder.glob("*.index")):
        try:
            index = Index(path)
            digest, count = index.sha256, len(index)
        except OtherFormat:
            raise
        except CacheError:
            digest, count = "", 0
        shards.append({"name": path.stem, "index_sha256": digest, "count": count})
    present = [name for name in SIDE_FILES if (folder / name).exists()]
    side_files = {name: file_sha256(folder / name) for name in present}
    return {"shards": shards, "side_files": side_files}


def _delete(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    fsync_folder(folder)
