"""Images in a folder, each with its caption and mask beside it."""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from precompute.dataset.captions import (
    MOST_TEXT_BYTES,
    decode_text,
    is_text,
    normalize_captions,
    texts_of,
)
from precompute.dataset.file_roles import (
    TEXTS,
    has_ending,
    is_hidden,
    is_image,
    is_title,
    masked_stems,
    stem_of,
    unread_image,
)
from precompute.dataset.records import (
    MAX_IMAGE_BYTES,
    NO_ROW,
    Blob,
    Memory,
    MetadataEntry,
    Rejected,
    SourceImage,
)
from precompute.dataset.tars import HEAD_BYTES, Pack, too_large
from precompute.settings import EncodeSettings
from runtime.files import kind_of_file, open_regular


@dataclass
class Masks:
    """Mask files by the path, without ending, of the images that they belong to.

    ``lone`` are named like masks and belong to no image: such a file is an image of its own where
    it has a caption of its own, else it is rejected. Never is it given another image's caption.
    """

    by_stem: dict[str, list[str]] = field(default_factory=dict)
    all: set[str] = field(default_factory=set)
    lone: set[str] = field(default_factory=set)

    def beside(self, path: str) -> str | None:
        """The mask of an image.

        Raises:
            ValueError: there are several.
        """
        masks = self.by_stem.get(stem_of(path), [])
        if len(masks) > 1:
            names = [name.rpartition("/")[2] for name in masks]
            if names[0] == names[1]:
                names = masks
            raise ValueError(f"both {names[0]} and {names[1]}: which is its mask?")
        return masks[0] if masks else None


def find_masks(paths: Iterable[str]) -> Masks:
    """Of all files of a folder or a tar.

    ``gas mask.png`` with ``gas mask.txt`` is an image with a title, whatever else is there.
    """
    paths = list(paths)
    images = [path for path in paths if is_image(path)]
    titled = {stem_of(path) for path in paths if path.lower().endswith(TEXTS) and is_title(path)}
    candidates = {
        path: stems
        for path in images
        if "mask" in path.lower() and stem_of(path) not in titled and (stems := masked_stems(path))
    }
    masks = Masks()
    if not candidates:
        return masks
    exact = {stem_of(path) for path in images}
    lower: dict[str, list[str]] = {}
    for stem in exact:
        lower.setdefault(stem.lower(), []).append(stem)
    for path, stems in candidates.items():
        own = stem_of(path)
        matches = next(
            (image_stems for stem in stems if (image_stems := _matches(stem, own, exact, lower))),
            [],
        )
        for stem in matches:
            masks.by_stem.setdefault(stem, []).append(path)
        (masks.all if matches else masks.lone).add(path)
    return masks


def _matches(stem: str, own: str, exact: set[str], lower: dict[str, list[str]]) -> list[str]:
    if stem in exact and stem != own:
        return [stem]
    return sorted(candidate for candidate in lower.get(stem.lower(), ()) if candidate != own)


# The images, and the captions beside them. A tar (``tars.py``) is read as its files would be.

MOST_DEPTH = 100  # folders in each other; a link may lead to a tree without end
Stamp = tuple[int, int]  # size in bytes, mtime in nanoseconds

# How files of the formats that encode opens begin, for those without an ending.
_HEADS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass
class Tree:
    """Every file below ``root`` that may be of the set, by its relative posix path."""

    root: Path
    memory: Memory
    prefix: str = ""  # of the root within the dataset, for the memory: "train/"
    files: dict[str, Stamp] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)  # no regular files, and what they are
    closed: dict[str, str] = field(default_factory=dict)  # folders that are not read, and why
    hidden: list[str] = field(default_factory=list)  # the system's; folders end with a slash
    used: set[str] = field(default_factory=set)  # files that were asked for

    @cached_property
    def lower(self) -> dict[str, list[str]]:
        """Paths of all files by their lower-case form."""
        by_lower: dict[str, list[str]] = {}
        for path in (*self.files, *self.odd):
            by_lower.setdefault(path.lower(), []).append(path)
        return by_lower

    @cached_property
    def stems(self) -> set[str]:
        """Of the images, their paths without ending."""
        return {stem_of(path) for path in self.files if is_image(path)}

    def label(self, path: str) -> str:
        return path

    def blob(self, path: str) -> Blob:
        """
        Raises:
            KeyError: no such file.
            ValueError: it is larger than any image.
        """
        size, mtime_ns = self.files[path]
        self.used.add(path)
        if size > MAX_IMAGE_BYTES:
            raise ValueError(too_large(size, MAX_IMAGE_BYTES))
        return Blob(self.root / path, size, mtime_ns)

    def head(self, path: str) -> bytes:
        """Its first bytes.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        size, mtime_ns = self.files[path]
        return Blob(self.root / path, min(size, HEAD_BYTES), mtime_ns).read()

    def text(self, path: str) -> str:
        """What a text file holds.

        Raises:
            ValueError: why it has none, to be put behind its name.
        """

        def read() -> str:
            try:
                with open_regular(self.root / path) as file:
                    data = file.read(MOST_TEXT_BYTES + 1)
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from None
            if len(data) > MOST_TEXT_BYTES:
                raise ValueError(f"has {too_large(len(data), MOST_TEXT_BYTES)}")
            return decode_text(data)

        self.used.add(path)
        if path in self.odd:
            raise ValueError(f"is {self.odd[path]}")
        size, mtime_ns = self.files[path]
        if size > MOST_TEXT_BYTES:
            raise ValueError(f"has {too_large(size, MOST_TEXT_BYTES)}")
        return str(self.memory.recall(self.prefix + path, size, mtime_ns, read))

    def row(self, path: str) -> MetadataEntry:
        """Of tars only: a JSON file in a folder may be any tool's."""
        return NO_ROW


def walk(root: Path, memory: Memory, prefix: str = "", skip: Path | None = None) -> Tree:
    """Names, sizes and times of all files below, in linked folders too, but for ``skip``.

    Opens none. What is hidden or a system's is noted, not entered; so is a folder that cannot be
    listed, and one that lies too deep.

    Raises:
        OSError: ``root`` cannot be listed.
    """
    tree = Tree(root, memory, prefix)
    left_out = [] if skip is None or not skip.exists() else [skip.stat()]
    above = tuple((status.st_dev, status.st_ino) for status in left_out)
    # A stack and no recursion: a path may have more folders than Python has frames.
    waiting = [("", above)]
    while waiting:
        inside, above = waiting.pop()
        path = os.path.join(root, inside)
        try:
            status = os.stat(path)
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue  # a link to a folder it lies in
            if inside.count("/") > MOST_DEPTH:
                tree.closed[inside] = f"a folder in more than {MOST_DEPTH} others: not read"
                continue
            with os.scandir(path) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            if error.errno != errno.ENOENT:  # it went while it was looked at
                tree.closed[inside] = f"a folder that cannot be read: {error.strerror}"
            continue
        folders = [entry.name for entry in children if _is_folder(tree, inside, entry)]
        waiting += [(f"{inside}{name}/", (*above, here)) for name in reversed(folders)]
    return tree


def _is_folder(tree: Tree, inside: str, entry: os.DirEntry[str]) -> bool:
    """Whether to enter it; what is none is noted in the tree."""
    name = inside + entry.name
    try:
        is_folder = entry.is_dir()
        if is_hidden(entry.name):
            tree.hidden.append(name + "/" * is_folder)
            return False
        status = entry.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            tree.odd[name] = "a link that leads to itself"
        elif entry.is_symlink():
            tree.odd[name] = "a link that leads nowhere"
        elif error.errno != errno.ENOENT:  # it went while it was looked at
            tree.odd[name] = f"not readable: {error.strerror}"
        return False
    file_kind = kind_of_file(status.st_mode)
    if not file_kind:
        tree.files[name] = (status.st_size, status.st_mtime_ns)
    elif not is_folder or entry.name.lower().endswith(TEXTS):
        tree.odd[name] = file_kind  # a folder x.txt too: x.jpg asks for it
    return is_folder


def read_images(place: Tree | Pack, settings: EncodeSettings) -> Iterator[SourceImage | Rejected]:
    """Every image with the text and the mask beside it, or why it is refused."""
    masks = find_masks(place.files)
    place.used.update(masks.all)
    for path in place.files:
        if path in masks.all:
            continue
        unread_format = unread_image(path)
        # If it is among the stems, the image is there in another format.
        if unread_format and stem_of(path) not in place.stems:
            place.used.update((path, *find_sidecars(place, stem_of(path), TEXTS)))
            yield Rejected(
                place.label(path),
                f"{unread_format} that encode does not read: save it as PNG or JPEG",
            )
        elif is_image(path) or (not has_ending(path) and _begins_like_image(place, path)):
            yield _read_image(place, path, masks, settings)


def _read_image(
    place: Tree | Pack, path: str, masks: Masks, settings: EncodeSettings
) -> SourceImage | Rejected:
    place.used.add(path)
    if not is_text(path):
        return Rejected(place.label(path), "its name is not UTF-8 text")
    try:
        record, why = _with_caption(place, path, settings)
        if path in masks.lone and not any(record.captions):
            raise ValueError("is named like a mask, but there is no image that it belongs to")
        mask = masks.beside(path)
        if mask is not None:
            record = replace(record, mask=place.blob(mask))
    except ValueError as error:
        return Rejected(place.label(path), str(error))
    return normalize_captions(record, settings, why)


def _begins_like_image(place: Tree | Pack, path: str) -> bool:
    """Whether a file is an image by its first bytes."""
    try:
        head = place.head(path)
    except (ValueError, OSError):
        return False
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_heif = head[4:8] == b"ftyp" and head[8:12] in _BRANDS
    return head.startswith(_HEADS) or is_webp or is_heif


def _with_caption(
    place: Tree | Pack, path: str, settings: EncodeSettings
) -> tuple[SourceImage, str]:
    """The image with the captions beside it; why there are none.

    Raises:
        ValueError: a text that cannot be read, or more than one.
    """
    stem = stem_of(path)
    texts = find_sidecars(place, stem, TEXTS)
    names = [text.rpartition("/")[2] for text in texts]
    if len(texts) > 1:
        place.used.update(texts)
        raise ValueError(f"both {names[0]} and {names[1]}: which is its caption?")
    captions: tuple[str, ...] = ()
    if texts:
        try:
            captions = texts_of(place.text(texts[0]), settings)
        except ValueError as error:
            raise ValueError(f"no caption: {names[0]} {error}") from None
    rows = find_sidecars(place, stem, (".json",)) if isinstance(place, Pack) else []
    row = place.row(rows[0]) if rows else NO_ROW
    if not any(captions):
        captions = row.captions or captions
    record = SourceImage(
        place.label(path),
        place.blob(path),
        captions,
        row.weight,
        row.repeats,
        split=row.split,
    )
    return record, f"no caption: {stem.rpartition('/')[2]}{TEXTS[0]} is missing"


def find_sidecars(place: Tree | Pack, stem: str, endings: tuple[str, ...]) -> list[str]:
    """Files of these endings beside the image ``stem``, in any case: of ``X.JPG``, ``X.TXT``.

    One of another case counts only where none is spelled like the image, and where no other image
    is spelled like it.
    """
    exact = [
        stem + ending
        for ending in endings
        if stem + ending in place.files or stem + ending in place.odd
    ]
    if exact:
        return exact
    return [
        path
        for ending in endings
        for path in place.lower.get((stem + ending).lower(), ())
        if stem_of(path) == stem or stem_of(path) not in place.stems
    ]
