"""Bases on the Hugging Face hub: the one place that uses a network. Imports no torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdxl import BaseError

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
OTHERS = ("scheduler", "tokenizer", "tokenizer_2")
HALVES = ["*.fp16.*"]
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")


def fetch_component(base: str, component: str) -> Path:
    """The hub's local snapshot of a base with at least this component, downloaded where it is not
    there: safetensors and configs; the fp16 files only where there are no others.

    Raises:
        BaseError: no hub id, or it cannot be had.
    """
    if not _HUB_ID.fullmatch(base):
        raise BaseError(f"{base}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", *_patterns(component)]
    with _one_line(f"{base}: no such folder, and not had from the hub"):
        folder = snapshot_download(base, allow_patterns=patterns, ignore_patterns=HALVES)
        if component in MODELS and not any((Path(folder) / component).glob("*.safetensors")):
            folder = snapshot_download(base, allow_patterns=patterns)
        return Path(folder)


def cached_snapshot(base: str) -> Path | None:
    """What the local hub cache holds of a base; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None


def _patterns(component: str) -> list[str]:
    return [f"{component}/*.{end}" for end in ("json", "txt", "safetensors")]


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"{what}: {reason}") from error
