"""Bases on the Hugging Face hub: the one place that uses a network. Imports no torch."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl import BaseError

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
OTHERS = ("scheduler", "tokenizer", "tokenizer_2")
HALVES = ["*.fp16.*"]
_WEIGHT_SUFFIXES = (".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx", ".safetensors")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
# The commit of each repository that this process has opened. A branch may move while a command
# runs; the UNet of one commit with the VAE of the next would be another model, and no error.
_revisions: dict[str, str] = {}


@functools.cache
def fetch_component(base: str, component: str) -> Path:
    """The hub's local snapshot of a base with at least this component, downloaded where it is not
    there: safetensors and configs; the fp16 files only where there are no others.

    The hub is asked once for each component, and all of a process are of one commit.

    Raises:
        BaseError: no hub id, or it cannot be had.
    """
    if not _HUB_ID.fullmatch(base):
        raise BaseError(f"{base}: no such folder")
    patterns = ["model_index.json", *_patterns(component)]
    with _as_base_error(f"{base}: no such folder, and could not be downloaded from the hub"):
        folder = _snapshot(base, allow_patterns=patterns, ignore_patterns=HALVES)
        if component in MODELS and not any((folder / component).glob("*.safetensors")):
            folder = _snapshot(base, allow_patterns=patterns)
        return folder


def _snapshot(repo: str, **options: Any) -> Path:
    """Files of a repository at the commit that this process first had of it."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, revision=_revisions.get(repo), **options))
    _revisions.setdefault(repo, folder.name)  # the client names a snapshot's folder by its commit
    return folder


def cached_component(base: str, component: str) -> Path | None:
    """Its folder in the local hub cache, if it is there; nothing is downloaded. From then on the
    repository is of that commit for this process, as with ``fetch_component``."""
    try:
        patterns = _patterns(component)
        folder = _snapshot(base, local_files_only=True, allow_patterns=patterns)
    except (OSError, ValueError):  # not there, or not all of it
        return None
    path = folder / component
    return path if path.is_dir() else None


def download_base(repo: str, out: Path, *, fp16: bool = False, file: str | None = None) -> Path:
    """A base of the hub into ``out``: configs, tokenizers and safetensors alone, of each model one
    set of weights (fp16 ones where asked for, or where there are no others); or the single file
    ``file``, or the only one there is. The files that an earlier call brought are kept; where a
    connection breaks, the client tries again by itself.

    Returns what to give as ``--base``.

    Raises:
        BaseError: no such repository, nothing in it that can be used, or a download that failed.
    """
    if not _HUB_ID.fullmatch(repo):
        raise BaseError(f"{repo}: no hub id; one is OWNER/NAME")
    if out.exists() and not out.is_dir():
        raise BaseError(f"{out}: not a folder")
    from huggingface_hub import HfApi, snapshot_download

    with _as_base_error(f"{repo}: could not be downloaded from the hub"):
        info = HfApi().model_info(repo, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    names = pick_files(repo, sorted(sizes), fp16, file)
    with _as_base_error(f"{repo}: not whole in {out}, run again to go on"):
        # By the commit just listed: its files may change meanwhile.
        snapshot_download(repo, revision=info.sha, local_dir=out, allow_patterns=_exactly(names))
    for name in names:
        path = out / name
        if not path.is_file() or sizes[name] not in (None, path.stat().st_size):
            raise BaseError(f"{path}: not whole; run again to go on")
    for left in (out / ".cache").rglob("*.incomplete"):  # by a run that was killed
        left.unlink(missing_ok=True)
    return out if "model_index.json" in names else out / names[0]


def pick_files(repo: str, names: list[str], fp16: bool, file: str | None) -> list[str]:
    """Which files of a repository make a base.

    Raises:
        BaseError: none do, or it is not said which.
    """
    singles = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if file is not None:
        if file not in names or not file.endswith(".safetensors"):
            raise BaseError(f"{repo}: has no {file} in safetensors (found: {_listed(singles)})")
        return [file]
    if "model_index.json" in names:
        picked = ["model_index.json"]
        for part in OTHERS:
            picked += [name for name in names if re.fullmatch(rf"{part}/[^/]+\.(json|txt)", name)]
        for part in MODELS:
            picked += [f"{part}/config.json"] * (f"{part}/config.json" in names)
            picked += _pick_weights(repo, names, part, fp16)
        return picked
    if len(singles) != 1:
        raise BaseError(
            f"{repo}: no diffusers folder (it has no model_index.json); name one of its files with "
            f"--file (found: {_listed(singles)})"
        )
    return singles


def _pick_weights(repo: str, names: list[str], part: str, fp16: bool) -> list[str]:
    """One set of weights of a model, whole or in numbered files with their list."""
    for half in (True, False) if fp16 else (False, True):
        dot = r"\.fp16" if half else ""
        weights = rf"{part}/(diffusion_pytorch_)?model{dot}(-\d+-of-\d+)?\.safetensors"
        listing = rf"{part}/(diffusion_pytorch_)?model\.safetensors\.index{dot}\.json"
        files = [name for name in names if re.fullmatch(weights, name)]
        if files:
            return files + [name for name in names if re.fullmatch(listing, name)]
    pattern = rf"{part}/(?:diffusion_pytorch_)?model\.([A-Za-z0-9_-]+)\.safetensors"
    variants = [name for name in names if re.fullmatch(pattern, name)]
    if len(variants) == 1:  # such as non_ema
        return variants
    if variants:
        raise BaseError(f"{repo}: its {part} has no plain safetensors, but {_listed(variants)}")
    others = [
        name for name in names if name.startswith(f"{part}/") and name.endswith(_WEIGHT_SUFFIXES)
    ]
    raise BaseError(
        f"{repo}: its {part} has no safetensors (found: {_listed(others)}); "
        "pickles are never loaded"
    )


def _exactly(names: list[str]) -> list[str]:
    """As patterns that match these names alone."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8) if names else "none"


def _patterns(component: str) -> list[str]:
    return [f"{component}/*.{end}" for end in ("json", "txt", "safetensors")]


@contextmanager
def _as_base_error(failure: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"{failure}: {reason}") from error
