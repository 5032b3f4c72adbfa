"""Recognizes what a path is: one that is misspelled, or in another's place, is refused at once.

It looks at names alone: nothing is read and nothing heavy is imported, so that a command can ask
before it loads anything. What is inside a folder is checked where it is read.
"""

import re
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

CACHE, RUN, BASE, WEIGHTS, IMAGES = "cache", "run", "base", "weights", "images"
_DESCRIPTIONS = {
    CACHE: "a cache of shards, as encode makes it",
    RUN: "a run of train",
    BASE: "an SDXL base",
    WEIGHTS: "a file of weights",
    IMAGES: "a folder of images",
}
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".heic")
HUB_DATASET = "hf:"  # how the name of a dataset of the hub begins, hf://OWNER/NAME
PAGE_MARK = b'<meta name="generator" content="shardtune">'
_HEAD_BYTES = 2000  # of a page, in which the mark stands
_SHARD_INDEX = re.compile(r"\d+x\d+-\d{6,}\.index")  # as encode names them
CHECKPOINTS = "checkpoints"  # in the folder of a run
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_LOOKED_AT = 1000  # names in a folder: what it is shows in the first, and there may be millions


def kind_of(path: Path) -> str | None:
    """What a file or folder is, by the names in it; None if that cannot be told."""
    if path.is_file():
        return WEIGHTS if path.suffix.lower() == ".safetensors" else None
    if not path.is_dir():
        return None
    names = _names(path)
    shards = [*names, *_names(path / "train"), *_names(path / "val")]
    if any(_SHARD_INDEX.fullmatch(name) for name in shards):
        return CACHE
    if (path / "metrics.jsonl").is_file() and (path / "config.json").is_file():
        return RUN
    if (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file():
        return BASE
    if any(name.endswith(".safetensors") for name in names):
        return None  # images beside weights show what the weights draw
    return IMAGES if any(name.endswith(_IMAGE_ENDINGS) for name in names) else None


def _names(folder: Path) -> list[str]:
    """The first names in a folder, in lower case; none of what is no folder."""
    if not folder.is_dir():
        return []
    return [entry.name.lower() for entry in islice(folder.iterdir(), _LOOKED_AT)]


def check_kind(path: Path, wanted: str, remedies: dict[str, str]) -> None:
    """Refuse a path that is not there, or that is something else than ``wanted``.

    ``remedies`` say what to do with a path of another kind, by that kind; kinds that are not in it
    pass, for the stage knows better what is wrong.

    Raises:
        ValueError: one line with what it is and what to do.
    """
    if not path.exists():
        raise ValueError(missing(path))
    kind = kind_of(path)
    if kind is not None and kind != wanted and kind in remedies:
        raise ValueError(f"{path}: {_DESCRIPTIONS[kind]}; {remedies[kind]}")


def check_cache(path: Path) -> None:
    """Refuse what is no cache by its kind.

    Raises:
        ValueError: says what it is.
    """
    hint = "give the cache that encode made"
    check_kind(path, CACHE, dict.fromkeys((RUN, BASE, WEIGHTS, IMAGES), hint))


def checkpoints_in(run: Path) -> dict[int, Path]:
    """The checkpoints in the folder of a run by their step, in order, complete or damaged."""
    by_step = {}
    for path in (run / CHECKPOINTS).glob("checkpoint-*"):
        if match := _CHECKPOINT.fullmatch(path.name):
            by_step[int(match[1])] = path
    return dict(sorted(by_step.items()))


def check_page(path: Path) -> None:
    """Refuse to replace what is no page of ours.

    Raises:
        ValueError: a folder, or a file that shardtune did not write.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a file, for example {path / 'page.html'}")
    if path.exists() and not is_own_page(path):
        raise ValueError(f"{path}: not written by shardtune; move it away, or give another --out")


def is_own_page(path: Path) -> bool:
    """Whether an HTML file was written by shardtune, and may be replaced by it."""
    with open(path, "rb") as file:
        return PAGE_MARK in file.read(_HEAD_BYTES)


def missing(path: Path, also: tuple[str, ...] = ()) -> str:
    """A line that says that a path is not there, with the name nearest to it; ``also`` are other
    names that it could have been."""
    try:
        beside = [entry.name for entry in islice(path.parent.iterdir(), _LOOKED_AT)]
    except OSError:
        beside = []
    near = get_close_matches(path.name, [*also, *beside], n=1, cutoff=0.7)
    guess = ""
    if near:
        guess = f"; did you mean {near[0] if near[0] in also else path.parent / near[0]}?"
    return f"{path}: no such {'file' if path.suffix else 'folder'}{guess}"
