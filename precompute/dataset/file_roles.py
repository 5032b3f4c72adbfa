"""The role of a file or folder by its name: image, caption, mask, split, or none.

The names of splits are those that Hugging Face's datasets library knows, and others that people
give (huggingface/datasets, data_files.py: train, training; validation, valid, dev, val; test,
testing, eval, evaluation; anywhere in a path, with digits and separators around). Held out means
that no image is trained on by accident: a name that is not meant so costs a warning, the other way
around a benchmark.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from precompute.dataset.records import PACKS, Rejected, Source, SourceImage
from runtime.messages import pluralize

IMAGE_ENDINGS = (  # of formats that encode opens; the content decides which one it is
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".jfi",
    ".jif",
    ".pjpeg",
    ".pjp",
    ".mpo",
    ".png",
    ".apng",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".avifs",
    ".jp2",
    ".j2k",
    ".j2c",
    ".jpc",
    ".jpf",
    ".jpx",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".heic",
    ".heics",
    ".heif",
    ".hif",
    ".jxl",
)
TEXTS = (".txt", ".caption")

_RAW = "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq kdc mef mos mrw nef nrw orf pef ptx raf raw rw2"
_RAW += " rwl sr2 srf srw x3f"
_VECTOR = "svg svgz eps ai cdr wmf emf"
_LAYERED = "psd psb xcf kra ora clip sai pdn afphoto procreate"
_HDR = "exr hdr pfm"
_OTHER = "pam tga icb vda vst qoi dds ico cur icns pcx dib sgi ras xbm xpm jxr wdp hdp bpg flif mng"
_OTHER += " jng jpm jxs fits dcm djvu ktx ktx2 pict"

# Images by their ending that are not opened. Content could not decide: Pillow takes the preview in
# a camera RAW file for the image, and a layered document for whatever its program flattened.
UNREAD = {
    f".{ending}": description
    for endings, description in (
        (_RAW, "a camera RAW file"),
        (_VECTOR, "a vector drawing"),
        (_LAYERED, "a layered document"),
        (_HDR, "an HDR image"),
        (_OTHER, "an image of a format"),
    )
    for ending in endings.split()
}

# What operating systems, NAS boxes and file managers leave in folders; dot files are skipped too.
_SYSTEM = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@tmp",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "$recycle.bin",
    "recycler",
    "recycled",
    "system volume information",
    "lost+found",
    "network trash folder",
    "temporary items",
    "thumbnails",
    "_thumbnails",
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "icon\r",
}

_ANY = re.IGNORECASE | re.DOTALL
_SEPARATORS = r"[-_. ]"
_MASK_BEHIND = re.compile(rf"(.+?){_SEPARATORS}+mask(?:label)?s?(?:{_SEPARATORS}?\d+)?", _ANY)
_MASK_BEFORE = re.compile(rf"masks?{_SEPARATORS}+(.+)", _ANY)
_MASK_FOLDER = re.compile(rf"(?:(.+?){_SEPARATORS}+)?mask(?:label)?s?", _ANY)
_TITLE = re.compile(r"[^-_.]+ +masks?|masks? +[^-_.]+", _ANY)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")


def is_image(name: str) -> bool:
    # A hidden name such as ".png" has no suffix for pathlib, but it is a name like any other.
    return name.lower().endswith(IMAGE_ENDINGS)


def unread_image(name: str) -> str:
    """What an image is that encode does not open, such as "a camera RAW file"; else empty."""
    return UNREAD.get("." + name.rpartition(".")[2].lower(), "") if "." in name else ""


def is_packed(path: str) -> bool:
    """Whether a file would be a tar or a table of images."""
    return path.lower().endswith(PACKS)


def has_ending(path: str) -> bool:
    return "." in path.rpartition("/")[2]


def stem_of(path: str) -> str:
    """The path without the ending of its name; dots in folders are no endings."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] if "." in name else name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system or a tool, not to the dataset."""
    return name.startswith(".") or name.lower() in _SYSTEM


def hidden_part(path: str) -> str:
    """The path up to its first hidden name, a folder with a slash behind it; else empty."""
    parts = path.split("/")
    for number, part in enumerate(parts, 1):
        if is_hidden(part):
            return "/".join(parts[:number]) + ("/" if number < len(parts) else "")
    return ""


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path in the dataset is left out by a pattern.

    One without a slash is for the name of the file or of any folder that it lies in, one with a
    slash for the whole path, or that of such a folder.
    """
    parts = path.strip("/").split("/")
    folders = ["/".join(parts[:number]) for number in range(1, len(parts) + 1)]
    for pattern in patterns:
        pattern = pattern.strip("/")
        if any(fnmatchcase(name, pattern) for name in (folders if "/" in pattern else parts)):
            return True
    return False


def is_title(path: str) -> bool:
    """Whether a name reads as words about a mask (``gas mask.txt``), where tools that write masks
    use other characters than spaces."""
    return _TITLE.fullmatch(stem_of(path).rpartition("/")[2]) is not None


def stems_of_masked(path: str) -> list[str]:
    """Paths, without ending, of the images that a file could be the mask of, likeliest first.

    ``x.mask.png``, ``x_mask.png`` and ``mask-x.png`` belong to ``x``, ``masks/x.png`` to ``x`` or
    ``images/x``, ``train_masks/x.png`` to ``train/x``; letter case does not matter.
    """
    folder, slash, stem = stem_of(path).rpartition("/")
    behind, before = _MASK_BEHIND.fullmatch(stem), _MASK_BEFORE.fullmatch(stem)
    names = [match[1] for match in (behind, before) if match]
    stems = [folder + slash + name for name in names]
    parts = folder.split("/") if folder else []
    for place in reversed(range(len(parts))):
        match = _MASK_FOLDER.fullmatch(parts[place])
        if match:
            instead = [[match[1]]] if match[1] else [[], *([name] for name in IMAGE_FOLDERS)]
            for middle in instead:
                where = "/".join([*parts[:place], *middle, *parts[place + 1 :]])
                stems += [f"{where}/{name}".lstrip("/") for name in (stem, *names)]
            break
    return stems


# Splits: which images are to train on, to validate on, and held out, by their folders.

TRAIN, VAL, TEST = "train", "val", "test"
_SPLIT_OF = {
    word: split
    for split, words in (
        (TRAIN, "train training trn"),
        (VAL, "val valid validate validation dev devel development eval evaluate evaluation"),
        (TEST, "test tst testing holdout heldout unseen"),
    )
    for word in words.split()
}
_FILLER = re.compile("(data)?sets?|data|split|(image|img|picture|photo|sample)s?|folder|dir")
_JOINED = re.compile(r"(set|data|dataset|split|images|imgs)$")
MAX_NAMED = 5


def split_of_name(name: str) -> str:
    """The split that a folder or a tar is named after: ``Val``, ``val2017``, ``test_images``,
    ``cats-train-0001.tar``; empty for any other name.

    ``10_test`` is none: so are folders named that repeat the images of "test" ten times.
    """
    is_pack = is_packed(name)
    words = _words(name.rpartition(".")[0] if is_pack else name)
    if is_pack:  # a tar's name has the set's too
        ends = [words[0], words[-1]] if words else []
        return next((_SPLIT_OF[word] for word in ends if word in _SPLIT_OF), "")
    if name[:1].isdigit():
        return ""
    return _SPLIT_OF.get("".join(words), "")


def mentions_split(name: str) -> bool:
    """Whether a folder that is no split is named as if its images were held out: ``test shots``."""
    return any(_SPLIT_OF.get(word) in (VAL, TEST) for word in _words(name))


def _words(name: str) -> list[str]:
    words = [_JOINED.sub("", word) or word for word in re.findall("[a-z]+", name.lower())]
    return [word for word in words if not _FILLER.fullmatch(word)]


@lru_cache(maxsize=65536)
def split_of_folder(folder: str) -> tuple[str, str]:
    """The split that a path of folders and tars names, and the part of it that does.

    test and val take precedence over train: ``train/test/`` is held out.
    """
    parts = folder.split("/")
    splits = [split_of_name(part) for part in parts]
    for split in (TEST, VAL, TRAIN):
        if split in splits:
            name = "/".join(parts[: splits.index(split) + 1])
            return split, name if is_packed(name) else f"{name}/"
    return "", ""


def folder_of(path: str) -> str:
    """The folder or tar of an image; for a tar that cannot be read, the tar itself."""
    return path if is_packed(path) else path.rpartition("/")[0]


def find_layout(root: Path) -> dict[str, Path]:
    """The folders directly in a dataset that are named after the splits train and val.

    Raises:
        ValueError: two folders are one split.
    """
    by_split: dict[str, list[Path]] = {TRAIN: [], VAL: [], TEST: []}
    with os.scandir(root) as entries:  # Path.iterdir would ask the disk about each of its files
        folders = sorted(entry.name for entry in entries if entry.is_symlink() or entry.is_dir())
    for name in folders:
        split = split_of_name(name)
        if split and (root / name).is_dir():
            by_split[split].append(root / name)
    # Hugging Face counts eval to the tests; beside a folder for validation it is one.
    plain = [path for path in by_split[VAL] if "eval" not in path.name.lower()]
    by_split[VAL] = plain or by_split[VAL]
    for split in (TRAIN, VAL):
        if len(by_split[split]) > 1:
            names = " and ".join(f"{path.name}/" for path in by_split[split][:2])
            raise ValueError(f"{root}: both {names} are named like the {split} split; keep one")
    return {split: by_split[split][0] for split in (TRAIN, VAL) if by_split[split]}


def divide_by_folders(root: Path, source: Source, may_validate: bool = True) -> dict[str, Source]:
    """Divide a dataset by the splits that its folders name: all of it as "", or train and val.

    Test images belong to neither. Without ``may_validate``, as in train/ beside a val/, validation
    images are held out too.

    Raises:
        ValueError: nothing is left to train on.
    """
    parts: dict[str, Source] = {name: Source([], []) for name in (TRAIN, VAL, TEST)}
    folders: dict[str, Counter[str]] = {VAL: Counter(), TEST: Counter()}
    items: list[SourceImage | Rejected] = [*source.records, *source.rejected]
    for item in items:
        split, folder = _split_of(item)
        split = TEST if split == VAL and not may_validate else split or TRAIN
        if split != TRAIN:
            folders[split][folder] += 1
        if isinstance(item, SourceImage):
            parts[split].records.append(item)
        else:
            parts[split].rejected.append(item)
    _warn(root, source, folders)
    if not parts[TRAIN].records and (parts[VAL].records or parts[TEST].records):
        name = min([*folders[VAL], *folders[TEST]])
        raise ValueError(
            f"{root}: nothing to train on: all images are held out, by the name of {name}; to "
            "train on them, rename it or give it as DATASET"
        )
    parts[TRAIN].hidden, parts[TRAIN].unused = source.hidden, source.unused
    if parts[VAL].records or parts[VAL].rejected:
        return {name: parts[name] for name in (TRAIN, VAL)}
    return {"": parts[TRAIN]}


def _split_of(item: SourceImage | Rejected) -> tuple[str, str]:
    """The split of an image, by its list or else its path, and the words that name it."""
    if isinstance(item, SourceImage) and item.split:
        split = _SPLIT_OF.get("".join(_words(item.split)), "")
        if split:
            return split, f'"split": "{item.split[:40]}"'
    return split_of_folder(folder_of(item.path))


def _warn(root: Path, source: Source, folders: dict[str, Counter[str]]) -> None:
    for split, use in (
        (VAL, "to validate on, not to train on"),
        (TEST, "held out and not encoded"),
    ):
        if folders[split]:
            warnings.warn(
                f"{root}: {pluralize(folders[split].total(), 'image')} {use}, by the name of "
                f"{_listed(sorted(folders[split]))}; rename what is not meant so",
                stacklevel=3,
            )
    places = {folder_of(record.path) for record in source.records if not record.split}
    unsplit = sorted(place for place in places if place and not split_of_folder(place)[0])
    mentioned = [p for p in unsplit if any(map(mentions_split, p.split("/")))]
    is_divided = any(split_of_name(place.partition("/")[0]) == TRAIN for place in places)
    beside = [p for p in unsplit if is_divided and p not in mentioned]
    for names, use in (
        (mentioned, "trained on, though named as if held out"),
        (beside, "trained on, though they lie beside a folder for training"),
    ):
        if names:
            listed = _listed([f"{name}/" for name in names])
            warnings.warn(f"{root}: {use}: {listed}", stacklevel=3)


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")
