"""Datasets of the Hugging Face Hub, ``hf://OWNER/NAME``, downloaded and read as folders.

Nothing of a dataset is run: neither its script, nor the viewer's idea of its configs. Imports no
torch.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from precompute.dataset.file_roles import IMAGE_ENDINGS, TEXTS
from precompute.dataset.records import PACKS
from precompute.settings import EncodeSettings
from runtime.messages import first_line
from runtime.path_kinds import HUB_DATASET

# hf://OWNER/NAME@REVISION/FOLDER; a Path has one slash of the two, and fsspec says datasets/ too.
_FORM = re.compile(
    HUB_DATASET + r"/{1,2}(?:datasets/)?(?P<repo>[\w][\w.-]*/[\w][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[\w.-]+|[\w.-]+))?(?:/(?P<folder>[^\0]+?))?/*"
)
_LISTS = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class LocalDataset:
    """A dataset on this machine's disk: the settings with its folder, the name by which it is
    known, and the commit on the hub that it was downloaded from (else empty)."""

    settings: EncodeSettings
    name: str
    commit: str = ""
    inside: str = ""  # the folder in the repository

    def at(self, revision: str) -> str:
        """The name of the dataset at another revision."""
        repo = self.name.removesuffix(f"/{self.inside}") if self.inside else self.name
        return f"{repo}@{revision}{'/' if self.inside else ''}{self.inside}"


def locate_dataset(settings: EncodeSettings) -> LocalDataset:
    """The dataset of the settings; one of the hub is downloaded, unless the client's cache holds
    all of that commit already. Without a connection the cache is used.

    Raises:
        ValueError: it is not what ``hf://`` can name, or cannot be downloaded.
    """
    text = str(settings.dataset)
    if not re.match(HUB_DATASET, text):
        return LocalDataset(settings, str(settings.dataset.resolve()))
    match = _FORM.fullmatch(text)
    if match is None or ".." in (match["folder"] or "").split("/"):
        form = "hf://OWNER/NAME, with @REVISION or /FOLDER behind it"
        text = re.sub(r":/+", "://", text, count=1)  # of which a Path takes a slash
        raise ValueError(f"{text}: a dataset of the hub is named {form}")
    repo, revision, inside = match["repo"], match["revision"], match["folder"] or ""
    name = f"hf://{repo}{'/' if inside else ''}{inside}"
    endings = (*IMAGE_ENDINGS, *TEXTS, *settings.texts, *_LISTS, *PACKS)
    prefix = re.sub(r"([*?[])", r"[\1]", f"{inside}/") if inside else ""
    root = _download(name, repo, revision, [f"{prefix}*{_any_case(end)}" for end in endings])
    folder = root / inside
    if not folder.is_dir():
        raise ValueError(f"{name}: has no folder {inside} with images or tables in it")
    return LocalDataset(replace(settings, dataset=folder), name, root.name, inside)


def _any_case(ending: str) -> str:
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in ending)


def _download(name: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder of one commit in the client's cache, which is named by it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        root = snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # the hub's client raises anything
        lacks = "and the hub's cache on this machine does not hold all of it"
        if constants.HF_HUB_OFFLINE:
            why = f"HF_HUB_OFFLINE is set, {lacks}"
        elif isinstance(error, RepositoryNotFoundError):
            why = "the hub has none of that name, or a private one: run `hf auth login`"
        elif isinstance(error, LocalEntryNotFoundError):
            why = f"the hub could not be reached, {lacks}"
        else:
            why = first_line(error)
        raise ValueError(f"{name}: could not be downloaded: {why}") from error
    return Path(os.path.abspath(root))
