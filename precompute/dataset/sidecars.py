"""Images of a folder or a tar, each with the captions and the mask beside it."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    is_image,
    is_title,
    stem_of,
    stems_of_masked,
    unread_image,
)
from precompute.dataset.folder import Tree, walk
from precompute.dataset.records import (
    JSON_FIELDS,
    NO_ENTRY,
    Blob,
    Memory,
    Rejected,
    SourceImage,
    captions_of_field,
    captions_of_object,
    parse_row,
)
from precompute.dataset.tars import TarMembers, too_large
from precompute.settings import EncodeSettings
from runtime.messages import pluralize


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


def with_masks_of(
    folder: Path, items: Iterable[SourceImage | Rejected], prefix: str, memory: Memory
) -> Iterator[SourceImage | Rejected]:
    """Give the images without a mask theirs of another folder (``--masks``).

    It lies there under the image's path, which begins with ``prefix`` where the dataset is several
    folders, or under its name alone; its ending may be another, and its name that of a mask file.
    Masks that no image takes are counted in a warning, where the dataset is one folder.
    """
    tree = walk(folder, memory)
    by_stem: dict[str, list[str]] = {}
    for path in sorted(tree.files):
        if is_image(path):
            for stem in dict.fromkeys([stem_of(path), *stems_of_masked(path)]):
                by_stem.setdefault(stem.lower(), []).append(path)
    for item in items:
        if isinstance(item, SourceImage) and item.mask is None:
            stem = stem_of(item.path).lower()
            stems = dict.fromkeys([f"{prefix}{stem}".lower(), stem, stem.rpartition("/")[2]])
            masks = next((by_stem[name] for name in stems if name in by_stem), [])
            try:
                if len(masks) > 1:
                    raise ValueError(f"has several masks in --masks: {', '.join(masks[:3])}")
                item = replace(item, mask=tree.blob(masks[0])) if masks else item
            except ValueError as error:
                item = Rejected(item.path, str(error))
        yield item
    unused = [path for path in tree.files if is_image(path) and path not in tree.used]
    if unused and not prefix:
        warnings.warn(
            f"--masks {folder}: {pluralize(len(unused), 'mask')} of no image, or of one that has a "
            f"mask beside it, e.g. {unused[0]}",
            stacklevel=2,
        )


def _matches(stem: str, own_stem: str, exact: set[str], lower: dict[str, list[str]]) -> list[str]:
    if stem in exact and stem != own_stem:
        return [stem]
    return sorted(candidate for candidate in lower.get(stem.lower(), ()) if candidate != own_stem)


# The images, and the captions beside them. A tar (``tars.py``) is read as its files would be.


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
