"""What the user has, as stable records: a path, its bytes, captions. No picture is opened."""

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from precompute.dataset.captions import is_text
from precompute.dataset.folder import (
    PICTURES,
    Tree,
    find_masks,
    is_picture,
    mask_beside,
    read_pictures,
    walk,
)
from precompute.dataset.listing import LISTS, read_list
from precompute.dataset.records import Memory, Record, Rejected, Source
from precompute.dataset.tars import COMPRESSED, open_pack
from precompute.settings import EncodeSettings
from shards.manifest import UNCONDITIONAL

Item = Record | Rejected
REPEATS = re.compile(r"\d{1,4}_.+")


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
    """Records of one folder: by its list, else by the text beside each picture; and of its tars."""
    out = settings.out if settings.out.resolve() != folder.resolve() else None
    tree = walk(folder, memory, prefix, skip=out)
    lists = [name for name in LISTS if name in tree.files]
    if len(lists) > 1:
        raise ValueError(f"{folder}: both {LISTS[0]} and {LISTS[1]}; keep one")
    if lists:
        found = [*_with_masks(tree, read_list(tree, lists[0], settings))]
        found += _unnamed(tree, found, lists[0])
    else:
        found = [*read_pictures(tree, settings)]
    for path in sorted(tree.files):
        found += _packed(tree, path, settings)
    lost = (path for path in tree.broken if is_picture(path))
    found += [Rejected(path, "a link that leads nowhere") for path in lost]
    found = [*repeat_folders(found, settings.repeat_folders)]
    if not found:
        raise ValueError(f"{folder}: no pictures in it ({' '.join(sorted(PICTURES))} .tar)")
    records = [item for item in found if isinstance(item, Record)]
    rejected = [item for item in found if isinstance(item, Rejected)]
    return Source(sorted(records, key=lambda r: r.key), sorted(rejected, key=lambda r: r.key))


def _is_loose(path: Path) -> bool:
    return path.name.lower().endswith((*PICTURES, ".tar")) and path.is_file()


def _with_masks(tree: Tree, found: Iterable[Item]) -> Iterator[Item]:
    """Of a list that names no masks, those beside the pictures."""
    masks = find_masks(tree)
    for item in found:
        if isinstance(item, Record) and item.mask is None:
            try:
                item = replace(item, mask=mask_beside(tree, item.path, masks))
            except ValueError as error:
                item = Rejected(item.path, str(error))
        yield item


def _unnamed(tree: Tree, found: list[Item], listing: str) -> Iterator[Rejected]:
    named = {item.path for item in found}
    named |= {mask for masks in find_masks(tree).values() for mask in masks}
    masks = {item.mask.file for item in found if isinstance(item, Record) and item.mask}
    for path in tree.files:
        if is_picture(path) and path not in named and tree.root / path not in masks:
            yield Rejected(path, f"not named in {listing}, so it has no caption")


def _packed(tree: Tree, path: str, settings: EncodeSettings) -> Iterator[Item]:
    """What a file comes to if it is a tar; shards of a cache are none of the user's."""
    if path.lower().endswith(COMPRESSED):
        yield Rejected(path, "a compressed tar cannot be read in place: make it a plain .tar")
    folder = path.rpartition("/")[0]
    is_shard = f"{folder}/{UNCONDITIONAL}".lstrip("/") in tree.files
    if not path.lower().endswith(".tar") or is_shard:
        return
    if not is_text(path):
        yield Rejected(path, "its name is not UTF-8 text")
        return
    pack = open_pack(tree.root, path, tree.files[path], tree.memory, tree.prefix)
    yield from read_pictures(pack, settings)
    pictures = {name.rpartition(".")[0] for name in pack.files if is_picture(name)}
    if not pictures and not pack.damage:
        warnings.warn(f"{tree.root / path}: no pictures in this tar", stacklevel=2)
    yield from pack.rejected(pictures)


def repeat_folders(found: Iterable[Item], wanted: bool) -> Iterator[Item]:
    """Repeats from folders named ``N_name``, or a word on those that are not taken so."""
    folders: dict[str, int] = {}
    for item in found:
        parts = [part for part in item.path.split("/")[:-1] if not part.lower().endswith(".tar")]
        name = next((part for part in reversed(parts) if REPEATS.fullmatch(part)), "")
        if name and (wanted or isinstance(item, Record)):
            folders[name] = int(name.partition("_")[0])
        if name and isinstance(item, Record):
            if wanted and not folders[name]:
                item = Rejected(item.path, f"its folder {name} takes it 0 times an epoch")
            elif wanted:
                item = replace(item, repeats=item.repeats * folders[name])
        yield item
    if wanted and not folders:
        warnings.warn("--repeat-folders: no folder with pictures is named N_name", stacklevel=2)
    if folders and not wanted:
        name, repeats = min(folders.items())
        warnings.warn(
            f"{name}/: each of its pictures is taken once an epoch; if the name means {repeats} "
            "times, give --repeat-folders",
            stacklevel=2,
        )
