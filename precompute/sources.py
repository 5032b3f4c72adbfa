"""What the user has, as stable records: a path, its bytes, captions. No picture is opened."""

import warnings
from pathlib import Path

from precompute.folder import PICTURES, is_picture, shown, walk, with_text_files
from precompute.listing import LISTS, listed
from precompute.records import Memory, Record, Rejected, Source
from precompute.settings import EncodeSettings


def read_data_set(settings: EncodeSettings, memory: Memory | None = None) -> dict[str, Source]:
    """The sources by the sub-folder of the cache they belong in: "" alone, or train and val.

    With a ``memory`` of an earlier run, files that did not change are not opened.

    Raises:
        ValueError: no such folder, nothing in it, or one that can be read in two ways.
    """
    root, val_share, memory = settings.dataset, settings.val_share, memory or Memory()
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder" if not root.exists() else f"{root}: no folder")
    is_split = (root / "train").is_dir() and (root / "val").is_dir()
    if is_split and not any((root / name).is_file() for name in LISTS):
        loose = [path.name for path in sorted(root.iterdir()) if _is_loose(path)]
        if loose:
            raise ValueError(f"{root}: {loose[0]} lies beside train/ and val/: in which is it?")
        if val_share:
            raise ValueError(f"{root}: has its own val/; leave --val-share out")
        for path in sorted(root.iterdir()):
            if path.is_dir() and path.name not in ("train", "val"):
                warnings.warn(f"{path}: not read: only train/ and val/ are", stacklevel=2)
        return {n: read_source(root / n, settings, memory, n + "/") for n in ("train", "val")}
    source = read_source(root, settings, memory)
    return split(source, val_share) if val_share else {"": source}


def split(source: Source, val_share: float) -> dict[str, Source]:
    """Split by key: a picture stays on its side whatever joins or leaves the set."""

    def is_val(key: str) -> bool:
        return int(key[:8], 16) / 2**32 < val_share

    parts = {}
    for name in ("train", "val"):
        wanted = name == "val"
        parts[name] = Source(
            [record for record in source.records if is_val(record.key) == wanted],
            [rejected for rejected in source.rejected if is_val(rejected.key) == wanted],
        )
        if not parts[name].records:
            raise ValueError(f"--val-share {val_share} leaves no picture for {name}")
    return parts


def read_source(folder: Path, settings: EncodeSettings, memory: Memory, prefix: str = "") -> Source:
    """Records of one folder: by its list, else by a text file beside each picture."""
    tree = walk(folder, prefix)
    lists = [name for name in LISTS if name in tree.files]
    if len(lists) > 1:
        raise ValueError(f"{folder}: both {LISTS[0]} and {LISTS[1]}; keep one")
    found = [*(listed(tree, lists[0]) if lists else with_text_files(tree, memory))]
    if not settings.empty_captions:
        found = [_refuse_empty(item) for item in found]
    named = {item.path for item in found}
    if lists:
        why = f"not named in {lists[0]}, so it has no caption"
        found += [Rejected(shown(path), why) for path in tree.pictures() if path not in named]
    why = "a link that leads nowhere"
    lost = (shown(path) for path in tree.broken if is_picture(path))
    found += [Rejected(path, why) for path in lost if path not in named]
    if not found:
        raise ValueError(f"{folder}: no pictures in it ({' '.join(sorted(PICTURES))})")
    records = [item for item in found if isinstance(item, Record)]
    rejected = [item for item in found if isinstance(item, Rejected)]
    return Source(sorted(records, key=lambda r: r.key), sorted(rejected, key=lambda r: r.key))


def _is_loose(path: Path) -> bool:
    return is_picture(path.name) and path.is_file()


def _refuse_empty(item: Record | Rejected) -> Record | Rejected:
    if isinstance(item, Record) and not all(item.captions):
        return Rejected(item.path, "its caption is empty")
    return item
