"""One JSON file about all images: kohya's metadata, and captions as COCO has them.

Both are parsed in memory, so there is a bound on them. Rows come with the path of the image in the
dataset, however the file names it.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from precompute.dataset.captions import decode_text
from precompute.dataset.file_roles import is_image, stem_of
from precompute.dataset.folder import Tree
from precompute.dataset.records import Columns, captions_of_object, parse_row
from precompute.dataset.tars import too_large
from runtime.files import open_regular
from runtime.messages import shortened

# kohya's, which each step of its preparation writes anew, the last one first.
KOHYA = ("meta_lat.json", "meta_clean.json", "meta_cap_dd.json", "meta_cap.json")
COCO = ("annotations.json", "captions.json", "captions_*.json")
ANNOTATION_COLUMNS = Columns(("file_name",), ("text",), are_chosen=True)
MAX_BYTES = 1 << 28
MAX_NAME = 4096  # characters; no file system has longer paths

# Numbers from 1, each with the path of an image and its captions, or why there are none.
Rows = Iterator[tuple[int, dict[str, Any] | str]]


def is_coco_name(name: str) -> bool:
    """Whether a file of this name, in lower case, may have captions as COCO has them."""
    return any(fnmatchcase(name, pattern) for pattern in COCO)


def has_coco_captions(tree: Tree, path: str) -> bool:
    """Whether a file of such a name has captions: there are annotations without, and a file beside
    an image may have the same name."""
    if stem_of(path) in tree.stems:
        return False
    try:
        text = _read(tree, path)
    except (ValueError, OSError):
        return False
    return '"annotations"' in text and '"caption"' in text


def kohya_rows(tree: Tree, path: str, folder: str) -> Rows:
    """The entries of kohya's metadata: an object by the path of each image, which may be another
    machine's, or by its stem."""
    try:
        entries = parse_row(_read(tree, path))
    except ValueError as error:
        yield 1, str(error)
        return
    files = {name.removeprefix(folder): name for name in tree.files if name.startswith(folder)}
    by_stem: dict[str, list[str]] = {}
    for name in filter(is_image, files):
        by_stem.setdefault(stem_of(name), []).append(files[name])
    for number, (key, entry) in enumerate(entries.items(), 1):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"{shortened(key)}: not a JSON object")
            captions = captions_of_object(entry, joined=True)
            name = _file_of_kohya(key, files, by_stem)
            yield number, {"file_name": name, "text": [*captions] or None}
        except ValueError as error:
            yield number, str(error)


def _file_of_kohya(key: str, files: dict[str, str], by_stem: dict[str, list[str]]) -> str:
    """The image that a key means: the longest end of it that is a file or a stem in the folder.

    Raises:
        ValueError: there are several of this stem.
    """
    parts = [part for part in key[:MAX_NAME].replace("\\", "/").split("/") if part]
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if end in files:
            return files[end]
        images = by_stem.get(end, [])
        if len(images) > 1:
            raise ValueError(f"{shortened(key)} is both {images[0]} and {images[1]}")
        if images:
            return images[0]
    return key


def coco_rows(tree: Tree, path: str, folder: str) -> Rows:
    """The images of a COCO file, each with all captions that its annotations give it."""
    try:
        content = parse_row(_read(tree, path))
        images, annotations = content.get("images"), content.get("annotations")
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise ValueError("has no lists named images and annotations, as COCO has them")
    except ValueError as error:
        yield 1, str(error)
        return
    captions: dict[int | str, list[Any]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
    by_name: dict[str, list[str]] = {}
    for name in filter(is_image, tree.files):
        if name.startswith(folder):
            by_name.setdefault(name.rpartition("/")[2], []).append(name)
    split = path.rpartition("/")[2][: -len(".json")].partition("_")[2]  # captions_train2017.json
    for number, image in enumerate(images, 1):
        try:
            if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
                raise ValueError("an image without an id")
            file_name, texts = image.get("file_name"), captions.pop(image["id"], None)
            if not isinstance(file_name, str) or not file_name:
                raise ValueError("an image without a file_name")
            file = _file_of_coco(file_name, tree, folder, split, by_name)
            yield number, {"file_name": file, "text": texts}
        except ValueError as error:
            yield number, str(error)
    if captions:
        number, first = len(captions), shortened(next(iter(captions)))
        yield len(images) + 1, f"has captions of {number:,} images that it does not list: {first}"


def _file_of_coco(
    name: str, tree: Tree, folder: str, split: str, by_name: dict[str, list[str]]
) -> str:
    """The image that a COCO file names: its path from the folder, in images/, in the folder of the
    split that the file is named after, or the only one of this name.

    Raises:
        ValueError: there are several.
    """
    for middle in ("", "images/", f"{split}/", f"images/{split}/"):
        if (path := f"{folder}{middle}{name}") in tree.files:
            return path
    images = by_name.get(name[:MAX_NAME].rpartition("/")[2], [])
    if len(images) > 1:
        raise ValueError(f"{shortened(name)} is both {images[0]} and {images[1]}")
    return images[0] if images else folder + name


def _read(tree: Tree, path: str) -> str:
    """
    Raises:
        ValueError: it is too large, or no text.
        OSError: it cannot be read.
    """
    with open_regular(tree.root / path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(too_large(len(data), MAX_BYTES))
    return decode_text(data)
