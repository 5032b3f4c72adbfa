"""What an earlier run left in a cache's folder: whole shards, and those set aside.

A shard that is to be written anew is first moved to ``replaced/``: what is still right in it is
copied from there, and no index ever stands beside a tar that is not its own.
"""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from precompute.planning.placement import MARKS, Place
from runtime.files import fsync_folder
from shards.format import CacheError, OtherFormat, sample_key
from shards.index import Index
from shards.manifest import REPLACED

SHARD_NAME = re.compile(r"\d+x\d+-\d{6}")
ENDS = (".index", ".tar")  # the mark goes first: a tar without an index is nothing


@dataclass(frozen=True, eq=False)
class Held:
    """A whole shard as it lies in ``folder``: the cache's, or its ``replaced/``."""

    folder: Path
    index: Index

    @property
    def name(self) -> str:
        return str(self.index.header["shard"])

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.index.header["recipe"])

    @cached_property
    def marks(self) -> dict[str, list[Any]]:
        """Of each member by key, those that failed too, what it was made from."""
        return {key: marks for key, *marks in self.index.header["members"]}

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why members have no sample, by key."""
        return {sample_key(path): reason for path, reason in self.index.header["rejected"]}

    @cached_property
    def rows(self) -> dict[str, int]:
        keys = (key for key in self.marks if key not in self.reasons)
        return {key: row for row, key in enumerate(keys)}

    @property
    def place(self) -> Place:
        width, height = self.index.header["bucket"]
        return Place((width, height), self.index.header["repeats"], tuple(self.marks))


def read_held(folder: Path) -> dict[str, Held]:
    """The whole shards in a folder, by name.

    Raises:
        CacheError: they are of another version of the format.
    """
    found = {}
    for name in shard_names(folder):
        try:
            index = Index(folder / f"{name}.index")
            size = (folder / f"{name}.tar").stat().st_size
        except OtherFormat:
            raise
        except (CacheError, OSError):
            continue
        members = index.header.get("members")
        known = isinstance(members, list) and all(len(row) == 1 + len(MARKS) for row in members)
        if known and size == index.header["tar_bytes"]:
            found[name] = Held(folder, index)
    return found


def shard_names(folder: Path) -> list[str]:
    """Of all shards of which anything lies in the folder."""
    if not folder.is_dir():
        return []
    stems = {path.stem for path in folder.iterdir() if path.suffix in ENDS}
    return sorted(stem for stem in stems if SHARD_NAME.fullmatch(stem))


def set_aside(folder: Path, names: list[str]) -> None:
    """Move whole shards to ``replaced/``, durably."""
    aside = folder / REPLACED
    if not names:
        return
    aside.mkdir(exist_ok=True)
    for name in names:
        remove_shard(aside, name)
        for end in ENDS:
            os.replace(folder / (name + end), aside / (name + end))
    for one in (aside, folder):
        fsync_folder(one)


def finish_moves(folder: Path) -> None:
    """Go on where ``set_aside`` was interrupted: half a shard there, and half still here."""
    aside = folder / REPLACED
    for name in shard_names(aside):
        there = [end for end in ENDS if (aside / (name + end)).exists()]
        here = [end for end in ENDS if (folder / (name + end)).exists()]
        if len(there) == len(here) == 1 and there != here:
            os.replace(folder / (name + here[0]), aside / (name + here[0]))


def remove_shard(folder: Path, name: str) -> None:
    for end in ENDS:
        (folder / (name + end)).unlink(missing_ok=True)


def remove_replaced(folder: Path) -> None:
    """What was set aside, when nothing is copied from it any more."""
    aside = folder / REPLACED
    if aside.is_dir():
        for name in shard_names(aside):
            remove_shard(aside, name)
        if not any(aside.iterdir()):
            aside.rmdir()
