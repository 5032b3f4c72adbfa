"""Drop what ``verify`` found damaged, so that the next encode makes it again, and only it."""

from pathlib import Path
from typing import Any

from runtime.files import file_sha256, fsync_folder
from shards import CacheError, OtherFormat
from shards.index import Index
from shards.manifest import MANIFEST, PROMPTS, SIDE_FILES, UNCONDITIONAL

REMEDIES = {PROMPTS: "`python cli.py prompts` makes it again"}


def drop_damaged(folder: Path, manifest: dict[str, Any], found: list[list[str]]) -> list[str]:
    """Drop each shard with a fault, and each damaged side file; a line for each.

    ``found`` is all that ``verify(folder, manifest)`` gave. The manifest goes first, as it vouches
    for what then goes: stopped anywhere, what is left is an unfinished cache, never a wrong one.
    Files that are not of the cache stay: they are the user's.
    """
    shards = [shard for shard, faults in zip(manifest["shards"], found, strict=False) if faults]
    files = [name for name in manifest["side_files"] if _is_named(folder / name, found[-1])]
    is_stand_in = "digest" not in manifest
    if not (shards or files or is_stand_in):
        return []
    _drop(folder, MANIFEST)
    lines = [f"{folder / MANIFEST}: dropped"] if is_stand_in else []
    for shard in shards:
        for end in ("index", "tar"):  # the mark first: a tar without an index is nothing
            _drop(folder, f"{shard['name']}.{end}")
        held = "1 sample" if shard["count"] == 1 else f"{shard['count']} samples"
        lines.append(f"{folder / shard['name']}: dropped, with its {held}")
    for name in files:
        _drop(folder, name)
        remedy = REMEDIES.get(name)
        lines.append(f"{folder / name}: dropped" + (f"; {remedy}" if remedy else ""))
    return lines


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
