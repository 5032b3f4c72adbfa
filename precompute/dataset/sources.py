"""Reads a dataset and accounts for every file of it: record, sidecar, rejected or named.

Everything in the folder is accounted for: it is the image of a record, a sidecar of one, rejected
with its reason, or named in a warning as hidden or unused.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from precompute.dataset.arrow_files import SAVED
from precompute.dataset.captions import is_text
from precompute.dataset.file_roles import (
    IMAGE_ENDINGS,
    TEXTS,
    TRAIN,
    VAL,
    divide_by_folders,
    find_layout,
    is_hidden,
    is_ignored,
    is_image,
    is_packed,
    stem_of,
    unread_image,
)
from precompute.dataset.folder import Tree, walk
from precompute.dataset.metadata_files import (
    LISTS,
    MAX_LIST_BYTES,
    TABLES,
    find_image_lists,
    is_list,
    read_image_list,
    unlisted_images,
)
from precompute.dataset.records import MAX_REPEATS, PACKS, Memory, Rejected, Source, SourceImage
from precompute.dataset.sidecars import find_masks, read_images, with_masks_of
from precompute.dataset.tables import TABLE_ENDINGS, read_table_images, saved_files
from precompute.dataset.tars import COMPRESSED, TarMembers, open_tar, too_large
from precompute.imports.kohya import cached_stem
from precompute.settings import EncodeSettings
from runtime.messages import pluralize
from shards.manifest import UNCONDITIONAL

Item = SourceImage | Rejected
REPEATS = re.compile(r"\d{1,4}_.+")
MAX_NAMED = 20


def read_dataset(settings: EncodeSettings, memory: Memory | None = None) -> dict[str, Source]:
    """Read the dataset; its sources by their sub-folder of the cache: "" alone, or train and val.

    With a ``memory`` of an earlier run, files that did not change are not opened.

    Raises:
        ValueError: no such folder, nothing in it, or one that can be read in two ways.
    """
    root, val_share, memory = settings.dataset, settings.val_share, memory or Memory()
    if not root.is_dir():
        raise ValueError(f"{root}: {'a file; give its' if root.exists() else 'no such'} folder")
    folders = find_layout(root)
    sources = (
        None if _has_image_list(root) else _read_layout(root, folders, settings, memory)
    ) or divide_by_folders(root, read_source(root, settings, memory))
    _warn_of_roles(sources, settings)
    if not val_share:
        return sources
    if VAL in sources:
        raise ValueError(f"{root}: has its own images to validate on; remove --val-share")
    return split_by_share(sources[""], val_share)


def _warn_of_roles(sources: dict[str, Source], settings: EncodeSettings) -> None:
    """Warn of a source of texts that no image has: most likely its name is not spelled so."""
    seen = {
        role for source in sources.values() for record in source.records for role in record.roles
    }
    has_images = any(source.records for source in sources.values())
    for name, role in settings.roles.items() if has_images else ():
        if role not in seen:
            kind = (
                "no text beside an image ends" if name[0] == "." else "no column or field is named"
            )
            warnings.warn(
                f"{settings.dataset}: no image has a caption in the role {role}: {kind} {name}",
                stacklevel=3,
            )


def _read_layout(
    root: Path, folders: dict[str, Path], settings: EncodeSettings, memory: Memory
) -> dict[str, Source] | None:
    """Folders for train and val, each a set of its own; None where the root is one set."""
    train = folders.get(TRAIN)
    if train is None or (VAL not in folders and not _has_image_list(train)):
        return None
    entries = [path for path in sorted(root.iterdir()) if path not in folders.values()]
    beside = " and ".join(f"{path.name}/" for path in folders.values())
    loose = [path.name for path in entries if _is_image_or_tar(path)]
    if loose:
        raise ValueError(f"{root}: {loose[0]} lies beside {beside}: in which is it?")
    out = os.path.realpath(settings.out)
    others = [path for path in entries if os.path.realpath(path) != out and path.name not in SAVED]
    if others:
        names = [path.name + "/" * path.is_dir() for path in others]
        warnings.warn(f"{root}: not read, as only {beside} are: {_named(names)}", stacklevel=3)
    sources = {
        split: read_source(folder, settings, memory, f"{folder.name}/")
        for split, folder in folders.items()
    }
    if VAL not in folders:
        return divide_by_folders(train, sources[TRAIN])
    return sources | {TRAIN: divide_by_folders(train, sources[TRAIN], may_validate=False)[""]}


def _has_image_list(folder: Path) -> bool:
    """Whether one list says what all of a folder is."""
    annotations = folder / "annotations"
    paths = [*folder.iterdir(), *(annotations.iterdir() if annotations.is_dir() else ())]
    lists = [path for path in paths if is_list(path.name) and path.is_file()]
    if any(path.name.lower() in LISTS and path.parent == folder for path in lists):
        return True
    # Other lists are read only where no image has a text.
    return bool(lists) and any(not each.folder for each in find_image_lists(walk(folder, Memory())))


def _is_image_or_tar(path: Path) -> bool:
    is_wanted = path.name.lower().endswith((*IMAGE_ENDINGS, ".tar")) and not is_hidden(path.name)
    return is_wanted and path.is_file()


def split_by_share(source: Source, val_share: float) -> dict[str, Source]:
    """Split by key, so that an image stays in its part whatever joins or leaves the dataset."""

    def is_val(key: str) -> bool:
        return int(key[:8], 16) / 2**32 < val_share

    parts = {}
    for name in (TRAIN, VAL):
        in_val = name == VAL
        parts[name] = Source(
            [record for record in source.records if is_val(record.key) == in_val],
            [rejected for rejected in source.rejected if is_val(rejected.key) == in_val],
        )
        if not parts[name].records:
            raise ValueError(f"--val-share {val_share} leaves no image for {name}")
    parts[TRAIN].hidden, parts[TRAIN].unused = source.hidden, source.unused
    return parts


def read_source(folder: Path, settings: EncodeSettings, memory: Memory, prefix: str = "") -> Source:
    """Read one folder: the images of its list, or those with a text beside them, and its tars."""
    out = settings.out if settings.out.resolve() != folder.resolve() else None
    tree = walk(folder, memory, prefix, skip=out, ignore=settings.ignore)
    items = [*_read_tree(tree, settings)]
    unused: list[str] = []
    hidden = [path for path in tree.hidden if path not in tree.used]  # a list may name one
    foreign, missing = saved_files(tree)
    items += missing
    for path in sorted({*tree.files} - foreign):
        if path.lower().endswith(TABLE_ENDINGS) and not (is_list(path) or path in tree.used):
            items += read_table_images(tree, path, settings)
            continue
        tar = _open_if_tar(tree, path, settings)
        if isinstance(tar, Rejected):
            items.append(tar)
        elif tar is not None:
            items += _read_tar_images(tree, tar, settings)
            hidden = hidden + [tar.dataset_path(name) for name in tar.hidden]
            for path in (tar.dataset_path(name) for name in tar.files if name not in tar.used):
                is_left_out = is_ignored(tree.prefix + path, tree.ignore)
                (tree.ignored if is_left_out else unused).append(path)
    items += [Rejected(path, why) for path, why in tree.unread_folders.items()]
    unreadable = (path for path in tree.irregular if path not in tree.used and _is_input(path))
    items += [Rejected(path, tree.irregular[path]) for path in [*unreadable]]
    items = [*_without_ignored(tree, items)]
    if settings.masks is not None:
        items = [*with_masks_of(settings.masks, items, prefix, memory)]
    items = [*repeat_folders(items, settings.repeat_folders)]
    unused += _without_imports(tree, _unused(tree, {item.path for item in items}), settings)
    source = _sorted(items, hidden, unused)
    _warn(folder, source, tree.ignored)
    _warn_of_other_captions(folder, source, settings.texts)
    if not items:
        endings = " ".join([*sorted(IMAGE_ENDINGS), *PACKS])
        raise ValueError(f"{folder}: no images in it ({endings})")
    return source


def _sorted(items: list[Item], hidden: list[str], unused: list[str]) -> Source:
    records = [item for item in items if isinstance(item, SourceImage)]
    rejected = [item for item in items if isinstance(item, Rejected)]
    return Source(
        sorted(records, key=lambda r: r.key),
        sorted(rejected, key=lambda r: r.key),
        sorted(hidden),
        sorted(unused),
    )


def _read_tree(tree: Tree, settings: EncodeSettings) -> Iterator[Item]:
    """The images that lists name, and in folders without a list all images."""
    lists = []
    for image_list in find_image_lists(tree):
        size = tree.files[image_list.path][0]
        if size > MAX_LIST_BYTES:
            tree.used.add(image_list.path)
            yield Rejected(image_list.path, too_large(size, MAX_LIST_BYTES))
        else:
            lists.append(image_list)
    named: dict[str, str] = {}
    for image_list in lists:
        for item in _with_masks(tree, read_image_list(tree, image_list, settings)):
            first = named.setdefault(item.path, image_list.path)
            if first == image_list.path:
                yield item
            else:
                yield Rejected(f"{image_list.path}: {item.path}", f"is named in {first} already")
    if all(image_list.folder for image_list in lists):
        listed = tuple(image_list.folder for image_list in lists)
        yield from read_images(
            tree, settings, lambda path: path in named or path.startswith(listed)
        )
    yield from unlisted_images(tree, lists, named)


def _with_masks(tree: Tree, listed_items: Iterable[Item]) -> list[Item]:
    """Add the masks beside the images to listed images without one, and reject listed masks."""
    masks = find_masks(tree.files)
    items = []
    for item in listed_items:
        if isinstance(item, SourceImage) and item.mask is None:
            try:
                mask = masks.mask_of(item.path)
                item = item if mask is None else replace(item, mask=tree.blob(mask))
            except ValueError as error:
                item = Rejected(item.path, str(error))
        items.append(item)
    tree.used.update(masks.paired)
    return [
        Rejected(item.path, "is the mask of another image: no image to train on")
        if isinstance(item, SourceImage) and item.path in masks.paired
        else item
        for item in items
    ]


def _open_if_tar(tree: Tree, path: str, settings: EncodeSettings) -> TarMembers | Rejected | None:
    """Open a file of the tree if it is a tar with images; None for other files and a cache's
    shards."""
    lower = path.lower()
    if not lower.endswith((".tar", *COMPRESSED)):
        return None
    tree.used.add(path)
    if lower.endswith(COMPRESSED):
        return Rejected(path, "a compressed tar cannot be read in place: make it a plain .tar")
    folder = path.rpartition("/")[0]
    if f"{folder}/{UNCONDITIONAL}".lstrip("/") in tree.files:
        tree.used.discard(path)
        return None
    if not is_text(path):
        return Rejected(path, "its name is not UTF-8 text")
    try:
        return open_tar(
            tree.root, path, tree.files[path], tree.memory, tree.prefix, (*settings.roles,)
        )
    except ValueError as error:
        return Rejected(path, str(error))
    except OSError as error:
        return Rejected(path, f"cannot be read: {error.strerror}")


def _read_tar_images(tree: Tree, tar: TarMembers, settings: EncodeSettings) -> Iterator[Item]:
    """Read the images of a tar; reject its members that should be images and are not."""
    items = [*read_images(tar, settings)]
    yield from items
    if not items and not tar.damage:
        warnings.warn(f"{tree.root / tar.path}: no images in this tar", stacklevel=2)
    yield from tar.rejected({stem_of(name) for name in tar.files if is_image(name)})


def _is_input(path: str) -> bool:
    """Whether a file would be read if it were a regular file."""
    endings = (*IMAGE_ENDINGS, *TEXTS, ".tar", *TABLE_ENDINGS, *LISTS, *TABLES)
    return path.lower().endswith(endings) or bool(unread_image(path))


def _unused(tree: Tree, rejected: set[str]) -> Iterator[str]:
    """Files that were not used; for a cache in the folder, its folder alone."""
    caches = {
        path.removesuffix(UNCONDITIONAL) for path in tree.files if path.endswith(UNCONDITIONAL)
    }
    yield from (cache or UNCONDITIONAL for cache in sorted(caches))
    for path in (*tree.files, *tree.irregular):
        if path not in tree.used and path not in rejected:
            folder = path[: path.rfind("/") + 1]
            if folder not in caches:
                yield path


def _without_imports(tree: Tree, unused: Iterable[str], settings: EncodeSettings) -> list[str]:
    """The unused files but for kohya's caches of images, of which a warning says what takes
    them."""
    unused = [*unused]
    caches = {path for path in unused if cached_stem(path) in tree.stems}
    if caches and settings.import_ is None:
        warnings.warn(
            f"{tree.root}: {len(caches):,} kohya caches (.npz) found: --import kohya takes them",
            stacklevel=4,
        )
    return [path for path in unused if path not in caches]


def _without_ignored(tree: Tree, items: list[Item]) -> Iterator[Item]:
    """The images without those of a tar, a table or a list that are to be ignored; these are noted
    in the tree, as the files of the folder are."""
    for item in items:
        if not is_ignored(tree.prefix + item.path, tree.ignore):
            yield item
        elif item.path not in tree.ignored:
            tree.ignored.append(item.path)


def _warn(folder: Path, source: Source, ignored: list[str]) -> None:
    """Warn of the files that are neither encoded nor rejected: how many, and some names."""
    for paths, reason in (
        (source.hidden, "skipped as hidden or the system's"),
        (sorted(ignored), "left out by --ignore"),
        (source.unused, "not used, neither images nor sidecars of one"),
    ):
        if paths:
            warnings.warn(f"{folder}: {reason} ({len(paths):,}): {_named(paths)}", stacklevel=3)
    blank = [record for record in source.records if record.num_blank_captions]
    if blank:
        number = sum(record.num_blank_captions for record in blank)
        warnings.warn(
            f"{folder}: {pluralize(number, 'blank caption')} dropped beside others, e.g. of "
            f"{blank[0].path}",
            stacklevel=3,
        )


def _warn_of_other_captions(folder: Path, source: Source, endings: tuple[str, ...]) -> None:
    differing = [record.path for record in source.records if record.has_other_caption]
    if differing:
        warnings.warn(
            f"{folder}: {pluralize(len(differing), 'image')} with texts beside them that differ; "
            f"the first of {' '.join(endings)} is taken, e.g. of {differing[0]}",
            stacklevel=3,
        )


def _named(paths: list[str]) -> str:
    if len(paths) <= MAX_NAMED:
        return ", ".join(paths)
    endings = Counter(path.rpartition("/")[2].rpartition(".")[2].lower() for path in paths)
    most = ", ".join(f"{number:,} {ending}" for ending, number in endings.most_common(9))
    return f"{most}; e.g. {', '.join(paths[:MAX_NAMED])}"


def repeat_folders(items: Iterable[Item], enabled: bool) -> Iterator[Item]:
    """Apply the repeats of folders named ``N_name`` if ``enabled``, or warn that they do not
    count."""
    folders: dict[str, int] = {}
    for item in items:
        parts = [part for part in item.path.split("/")[:-1] if not is_packed(part)]
        name = next((part for part in reversed(parts) if REPEATS.fullmatch(part)), "")
        if name and (enabled or isinstance(item, SourceImage)):
            folders[name] = int(name.partition("_")[0])
        if name and isinstance(item, SourceImage):
            if enabled and not folders[name]:
                item = Rejected(item.path, f"its folder {name} takes it 0 times an epoch")
            elif enabled and item.repeats * folders[name] > MAX_REPEATS:
                item = Rejected(item.path, f"more than {MAX_REPEATS} repeats with those of {name}")
            elif enabled:
                item = replace(item, repeats=item.repeats * folders[name])
        yield item
    if enabled and not folders:
        warnings.warn("--repeat-folders: no folder with images is named N_name", stacklevel=2)
    if folders and not enabled:
        name, repeats = min(folders.items())
        warnings.warn(
            f"{name}/: each of its images is taken once an epoch; if the name means {repeats} "
            "times, give --repeat-folders",
            stacklevel=2,
        )
