"""Images in a folder, each with its caption and mask beside it."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from precompute.dataset.captions import (
    MAX_TEXT_BYTES,
    captions_of_text,
    decode_text,
    is_text,
    normalize_captions,
)
from precompute.dataset.file_roles import (
    TEXTS,
    has_ending,
    is_hidden,
    is_ignored,
    is_image,
    is_title,
    stem_of,
    stems_of_masked,
    unread_image,
)
from precompute.dataset.records import (
    JSON_FIELDS,
    MAX_IMAGE_BYTES,
    NO_ENTRY,
    Blob,
    Memory,
    MetadataEntry,
    Rejected,
    SourceImage,
    captions_of_field,
    captions_of_object,
    parse_row,
)
from precompute.dataset.tars import HEAD_BYTES, TarMembers, too_large
from precompute.settings import EncodeSettings
from runtime.files import kind_of_file, open_regular


@dataclass
class Masks:
    """Mask files: ``by_stem`` has them by the path, without ending, of their image.

    ``paired`` are all of them. ``unpaired`` files are named like masks and belong to no image: such
    a file is an image if it has its own caption, else it is rejected. It never gets another
    image's caption.
    """

    by_stem: dict[str, list[str]] = field(default_factory=dict)
    paired: set[str] = field(default_factory=set)
    unpaired: set[str] = field(default_factory=set)

    def mask_of(self, path: str) -> str | None:
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
    """Find the masks among all files of a folder or a tar.

    ``gas mask.png`` with ``gas mask.txt`` is an image with a title, whatever else is there.
    """
    paths = list(paths)
    images = [path for path in paths if is_image(path)]
    titled = {stem_of(path) for path in paths if path.lower().endswith(TEXTS) and is_title(path)}
    candidates = {
        path: stems
        for path in images
        if "mask" in path.lower()
        and stem_of(path) not in titled
        and (stems := stems_of_masked(path))
    }
    masks = Masks()
    if not candidates:
        return masks
    exact = {stem_of(path) for path in images}
    lower: dict[str, list[str]] = {}
    for stem in exact:
        lower.setdefault(stem.lower(), []).append(stem)
    for path, stems in candidates.items():
        own_stem = stem_of(path)
        matches = next(
            (
                image_stems
                for stem in stems
                if (image_stems := _matches(stem, own_stem, exact, lower))
            ),
            [],
        )
        for stem in matches:
            masks.by_stem.setdefault(stem, []).append(path)
        (masks.paired if matches else masks.unpaired).add(path)
    return masks


def _matches(stem: str, own_stem: str, exact: set[str], lower: dict[str, list[str]]) -> list[str]:
    if stem in exact and stem != own_stem:
        return [stem]
    return sorted(candidate for candidate in lower.get(stem.lower(), ()) if candidate != own_stem)


# The images, and the captions beside them. A tar (``tars.py``) is read as its files would be.

MAX_DEPTH = 100  # folders in each other; a link may lead to a tree without end
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
    prefix: str = ""  # the root's path within the dataset, for the memory: "train/"
    files: dict[str, Stamp] = field(default_factory=dict)
    irregular: dict[str, str] = field(
        default_factory=dict
    )  # files that are not regular, and what they are
    unread_folders: dict[str, str] = field(
        default_factory=dict
    )  # folders that are not read, and why
    hidden: list[str] = field(default_factory=list)  # system files; folders end with a slash
    ignore: tuple[str, ...] = ()  # patterns of what is left out
    ignored: list[str] = field(default_factory=list)  # by them; folders end with a slash
    used: set[str] = field(default_factory=set)  # files that were read, or taken as a mask or text
    named_columns: set[tuple[str, ...]] = field(default_factory=set)  # that were guessed, and said

    @cached_property
    def paths_by_lower_case(self) -> dict[str, list[str]]:
        """Paths of all files by their lower-case form."""
        by_lower: dict[str, list[str]] = {}
        for path in (*self.files, *self.irregular):
            by_lower.setdefault(path.lower(), []).append(path)
        return by_lower

    @cached_property
    def stems(self) -> set[str]:
        """The paths of the images, without ending."""
        return {stem_of(path) for path in self.files if is_image(path)}

    def dataset_path(self, path: str) -> str:
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
        """The first bytes of a file.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        size, mtime_ns = self.files[path]
        return Blob(self.root / path, min(size, HEAD_BYTES), mtime_ns).read()

    def text(self, path: str) -> str:
        """The text of a text file.

        Raises:
            ValueError: the file has no text; the message continues a sentence after its name.
        """

        def read() -> str:
            try:
                with open_regular(self.root / path) as file:
                    data = file.read(MAX_TEXT_BYTES + 1)
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from None
            if len(data) > MAX_TEXT_BYTES:
                raise ValueError(f"has {too_large(len(data), MAX_TEXT_BYTES)}")
            return decode_text(data)

        self.used.add(path)
        if path in self.irregular:
            raise ValueError(f"is {self.irregular[path]}")
        size, mtime_ns = self.files[path]
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"has {too_large(size, MAX_TEXT_BYTES)}")
        return str(self.memory.recall(self.prefix + path, size, mtime_ns, read))

    def row(self, path: str) -> MetadataEntry:
        """No entry: only tars have such entries. Of a JSON file in a folder the caption is read."""
        return NO_ENTRY

    def fields(self, path: str, names: tuple[str, ...]) -> dict[str, Any]:
        """The fields of these names in a JSON file beside an image, those that it has. It may be
        any tool's: what is no JSON object has none."""

        def read() -> dict[str, Any]:
            try:
                row = parse_row(decode_text(Blob(self.root / path, size, mtime_ns).read()))
                return {name: row[name] for name in names if name in row}
            except ValueError:
                return {}

        if path in self.irregular:
            return {}
        size, mtime_ns = self.files[path]
        if size > MAX_TEXT_BYTES:
            return {}
        role = f"fields {json.dumps(names)} "
        fields: dict[str, Any] = self.memory.recall(role + self.prefix + path, size, mtime_ns, read)
        if fields:
            self.used.add(path)
        return fields


def walk(
    root: Path,
    memory: Memory,
    prefix: str = "",
    skip: Path | None = None,
    ignore: tuple[str, ...] = (),
) -> Tree:
    """List all files below ``root``, in linked folders too, but not in ``skip``; no file is opened.

    Hidden and system folders, those to ``ignore``, those that cannot be listed and those that lie
    too deep are noted and not entered.

    Raises:
        OSError: ``root`` cannot be listed.
    """
    tree = Tree(root, memory, prefix, ignore=ignore)
    skipped = [] if skip is None or not skip.exists() else [skip.stat()]
    ancestors = tuple((status.st_dev, status.st_ino) for status in skipped)
    # A stack and no recursion: a path may have more folders than Python has frames.
    pending = [("", ancestors)]
    while pending:
        inside, ancestors = pending.pop()
        path = os.path.join(root, inside)
        try:
            status = os.stat(path)
            folder_id = (status.st_dev, status.st_ino)
            if folder_id in ancestors:
                continue  # a link to a folder it lies in
            if inside.count("/") > MAX_DEPTH:
                tree.unread_folders[inside] = f"a folder in more than {MAX_DEPTH} others: not read"
                continue
            with os.scandir(path) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise
            if error.errno != errno.ENOENT:  # else it was removed meanwhile
                tree.unread_folders[inside] = f"a folder that cannot be read: {error.strerror}"
            continue
        folders = [entry.name for entry in children if _is_folder(tree, inside, entry)]
        pending += [(f"{inside}{name}/", (*ancestors, folder_id)) for name in reversed(folders)]
    return tree


def _is_folder(tree: Tree, inside: str, entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder to enter; any other is noted in the tree."""
    name = inside + entry.name
    try:
        is_folder = entry.is_dir()
        if is_hidden(entry.name):
            tree.hidden.append(name + "/" * is_folder)
            return False
        if tree.ignore and is_ignored(tree.prefix + name, tree.ignore):
            tree.ignored.append(name + "/" * is_folder)
            return False
        status = entry.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            tree.irregular[name] = "a link that leads to itself"
        elif entry.is_symlink():
            tree.irregular[name] = "a link that leads nowhere"
        elif error.errno != errno.ENOENT:  # else it was removed meanwhile
            tree.irregular[name] = f"not readable: {error.strerror}"
        return False
    file_kind = kind_of_file(status.st_mode)
    if not file_kind:
        tree.files[name] = (status.st_size, status.st_mtime_ns)
    elif not is_folder or entry.name.lower().endswith(TEXTS):
        tree.irregular[name] = file_kind  # a folder x.txt too: x.jpg asks for it
    return is_folder


def read_images(
    container: Tree | TarMembers,
    settings: EncodeSettings,
    is_listed: Callable[[str], bool] = lambda path: False,
) -> Iterator[SourceImage | Rejected]:
    """Every image with the text and the mask beside it, or why it is refused; not those that a
    list is to name."""
    masks = find_masks(container.files)
    container.used.update(masks.paired)
    for path in container.files:
        if path in masks.paired or is_listed(path):
            continue
        unread_format = unread_image(path)
        # If it is among the stems, the same image exists in a format that encode reads.
        if unread_format and stem_of(path) not in container.stems:
            container.used.update((path, *find_sidecars(container, stem_of(path), settings.texts)))
            yield Rejected(
                container.dataset_path(path),
                f"{unread_format} that encode does not read: save it as PNG or JPEG",
            )
        elif is_image(path) or (not has_ending(path) and _begins_like_image(container, path)):
            yield _read_image(container, path, masks, settings)


def _read_image(
    container: Tree | TarMembers, path: str, masks: Masks, settings: EncodeSettings
) -> SourceImage | Rejected:
    container.used.add(path)
    if not is_text(path):
        return Rejected(container.dataset_path(path), "its name is not UTF-8 text")
    try:
        record, why = _read_captions(container, path, settings)
        if path in masks.unpaired and not any(record.captions):
            raise ValueError("is named like a mask, but there is no image that it belongs to")
        mask = masks.mask_of(path)
        if mask is not None:
            record = replace(record, mask=container.blob(mask))
    except ValueError as error:
        return Rejected(container.dataset_path(path), str(error))
    return normalize_captions(record, settings, container.memory, why)


def _begins_like_image(container: Tree | TarMembers, path: str) -> bool:
    """Whether a file is an image by its first bytes."""
    try:
        head = container.head(path)
    except (ValueError, OSError):
        return False
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_heif = head[4:8] == b"ftyp" and head[8:12] in _BRANDS
    return head.startswith(_HEADS) or is_webp or is_heif


def _read_captions(
    container: Tree | TarMembers, path: str, settings: EncodeSettings
) -> tuple[SourceImage, str]:
    """The image with the captions beside it, and the reason to give if there are none.

    Raises:
        ValueError: a text that cannot be read, or more than one.
    """
    stem = stem_of(path)
    texts = find_sidecars(container, stem, settings.texts)
    texts = texts or find_sidecars(container, path, settings.texts)  # x.jpg.txt
    by_role = _captions_by_role(container, path, settings)
    texts = [] if by_role else texts
    captions, has_other = _first_text(container, texts, settings)
    is_tar = isinstance(container, TarMembers)
    rows = find_sidecars(container, stem, (".json",)) if is_tar or not texts else []
    missing = f"no caption: {stem.rpartition('/')[2]}{settings.texts[0]} is missing"
    row = NO_ENTRY
    if rows and isinstance(container, TarMembers):
        row = container.row(rows[0])
    elif rows and isinstance(container, Tree) and not by_role:
        captions, why = _captions_of_json(container, rows[0])
        missing += why
    if not any(captions):
        captions = row.captions or captions
    if by_role:
        captions = tuple(caption for caption, _ in by_role)
    record = SourceImage(
        container.dataset_path(path),
        container.blob(path),
        captions,
        row.weight,
        row.repeats,
        split=row.split,
        has_other_caption=has_other,
        roles=tuple(role for _, role in by_role),
    )
    return record, missing


def _captions_by_role(
    container: Tree | TarMembers, path: str, settings: EncodeSettings
) -> list[tuple[str, str]]:
    """The captions beside an image that have a role, each with it; empty where there are none, and
    then the image has the captions that it would have without roles.

    Raises:
        ValueError: a text cannot be read.
    """
    stem, roles = stem_of(path), settings.roles
    names = tuple(source for source in roles if source[0] != ".")
    rows = find_sidecars(container, stem, (".json",)) if names else []
    fields = container.fields(rows[0], names) if rows else {}
    pairs = []
    for source, role in roles.items():
        if source[0] == ".":
            beside = find_sidecars(container, stem, (source,))
            beside = beside or find_sidecars(container, path, (source,))
            try:
                texts = captions_of_text(container.text(beside[0]), settings) if beside else ()
            except ValueError as error:
                raise ValueError(f"no caption: {beside[0].rpartition('/')[2]} {error}") from None
        else:
            texts = captions_of_field(fields, source)
        pairs += [(text, role) for text in texts]
    return pairs if any(text for text, _ in pairs) else []


def _first_text(
    container: Tree | TarMembers, texts: list[str], settings: EncodeSettings
) -> tuple[tuple[str, ...], bool]:
    """The captions of the first text beside an image, and whether another one differs from it.

    Raises:
        ValueError: the first one cannot be read.
    """
    captions: list[tuple[str, ...]] = []
    for path in texts:
        try:
            captions.append(captions_of_text(container.text(path), settings))
        except ValueError as error:
            if not captions:
                raise ValueError(f"no caption: {path.rpartition('/')[2]} {error}") from None
            captions.append(())  # what cannot be read is not the same
    return captions[0] if captions else (), len({*captions}) > 1


def _captions_of_json(tree: Tree, path: str) -> tuple[tuple[str, ...], str]:
    """The captions in a JSON file beside an image of a folder, and why it has none.

    It may be any tool's: one without captions is not used, and no reason to reject the image.
    """

    def read() -> list[list[str] | str]:
        try:
            if size > MAX_TEXT_BYTES:
                raise ValueError(f"it has {too_large(size, MAX_TEXT_BYTES)}")
            row = parse_row(decode_text(Blob(tree.root / path, size, mtime_ns).read()))
            return [[*captions_of_object(row)], f"has no {', '.join(JSON_FIELDS)} that is text"]
        except ValueError as error:
            return [[], f"is no JSON of a caption: {error}"]

    if path in tree.irregular:
        return (), ""
    size, mtime_ns = tree.files[path]
    captions, why = tree.memory.recall(f"caption {tree.prefix}{path}", size, mtime_ns, read)
    if captions:
        tree.used.add(path)
    return tuple(captions), f", and {path.rpartition('/')[2]} {why}"


def find_sidecars(container: Tree | TarMembers, stem: str, endings: tuple[str, ...]) -> list[str]:
    """Files of these endings beside the image ``stem``, in any case: of ``X.JPG``, ``X.TXT``.

    One of another case counts only where none is spelled like the image, and where no other image
    is spelled like it.
    """
    exact = [
        stem + ending
        for ending in endings
        if stem + ending in container.files or stem + ending in container.irregular
    ]
    if exact:
        return exact
    return [
        path
        for ending in endings
        for path in container.paths_by_lower_case.get((stem + ending).lower(), ())
        if stem_of(path) == stem or stem_of(path) not in container.stems
    ]
