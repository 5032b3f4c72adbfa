"""Drop what ``verify`` found damaged, so that the next encode makes it again, and only it."""

import os
from pathlib import Path
from typing import Any

from runtime.files import PARTIAL, file_sha256, fsync_folder, remove_path
from shards import CacheError, OtherFormat
from shards.index import Index
from shards.manifest import MANIFEST, PROMPTS, REPLACED, SIDE_FILES, UNCONDITIONAL
from shards.salvage import salvage
from shards.words import counted

ENDS = (".index", ".tar")  # the mark goes first: a tar without an index is nothing
REMEDIES = {PROMPTS: "`python cli.py prompts` makes it again"}


def drop_damaged(folder: Path, manifest: dict[str, Any], found: list[list[str]]) -> list[str]:
    """Drop each damaged sample and each damaged side file; a line for each shard and file.

    ``found`` is all that ``verify(folder, manifest)`` gave. The manifest goes first, as it vouches
    for what then goes: stopped anywhere, what is left is an unfinished cache, never a wrong one.
    It stays where no sample is lost. Files that are not of the cache stay: they are the user's.
    """
    shards = [shard for shard, faults in zip(manifest["shards"], found, strict=False) if faults]
    files = [name for name in manifest["side_files"] if _is_named(folder / name, found[-1])]
    lines = []
    if "digest" not in manifest:
        _drop(folder, MANIFEST)
        lines.append(f"{folder / MANIFEST}: dropped")
    for shard in shards:
        lines.append(_repair_shard(folder, shard))
    for name in files:
        _drop(folder, MANIFEST)
        _drop(folder, name)
        remedy = REMEDIES.get(name)
        lines.append(f"{folder / name}: dropped" + (f"; {remedy}" if remedy else ""))
    return lines


def _repair_shard(folder: Path, shard: dict[str, Any]) -> str:
    """Put a shard of its whole samples in its place, or drop it; says which."""
    name, path = shard["name"], folder / shard["name"]
    work = folder / ("repair" + PARTIAL)
    remove_path(work)
    work.mkdir()
    try:
        saved = salvage(folder, name, shard["index_sha256"], work)
        if saved is None:
            _drop(folder, MANIFEST)
            for end in ENDS:
                _drop(folder, name + end)
            return f"{path}: dropped, with its {counted(shard['count'], 'sample')}"
        if saved.is_as_before:  # only the tar was damaged, outside the samples
            os.replace(work / f"{name}.tar", folder / f"{name}.tar")
            fsync_folder(folder)
            return f"{path}: repaired, no sample was lost"
        _drop(folder, MANIFEST)
        _swap(folder, name, work)
        if not saved.num_dropped:
            return f"{path}: repaired, no sample was lost"
        total = counted(saved.num_kept + saved.num_dropped, "sample")
        return f"{path}: dropped {saved.num_dropped:,} of its {total}"
    finally:
        remove_path(work)


def _swap(folder: Path, name: str, work: Path) -> None:
    """Put the new shard where the old one is.

    The old one first moves to ``replaced/``, from where encode takes what is right in it, as it
    does of a shard that it is about to write anew: stopped anywhere, no whole sample is lost.
    """
    aside = folder / REPLACED
    aside.mkdir(exist_ok=True)
    for end in ENDS:
        (aside / (name + end)).unlink(missing_ok=True)
    for end in ENDS:
        os.replace(folder / (name + end), aside / (name + end))
    for one in (aside, folder):
        fsync_folder(one)
    for end in reversed(ENDS):
        os.replace(work / (name + end), folder / (name + end))
        fsync_folder(folder)
    for end in ENDS:
        (aside / (name + end)).unlink()
    if not any(aside.iterdir()):
        aside.rmdir()


def stand_in(folder: Path, error: CacheError) -> dict[str, Any]:
    """For a damaged manifest: what the indexes at hand vouch for, as ``verify`` takes it.

    An index that is damaged itself is among the shards, with a digest that nothing has.

    Raises:
        CacheError: ``error``, where what it says of the manifest is no damage: it is of another
            version, or of another program. Also where an index is.
    """
    is_ours = (folder / UNCONDITIONAL).exists() or any(folder.glob("*.index"))
    if isinstance(error, OtherFormat) or not is_ours:
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
    there = [name for name in SIDE_FILES if (folder / name).exists()]
    side_files = {name: file_sha256(folder / name) for name in there}
    return {"shards": shards, "side_files": side_files}


def _is_named(path: Path, faults: list[str]) -> bool:
    return any(fault.startswith(f"{path}: ") for fault in faults)


def _drop(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    fsync_folder(folder)
