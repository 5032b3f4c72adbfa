"""A process that dies in the k-th of its file operations, and what a disk then holds at worst."""

import builtins
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

DIED = 77  # exit code


class Disk:
    """Counts the operations on files; ``os._exit`` in number ``last``, which is left half done.

    The folder ``root`` stays as it is then, and ``cut`` becomes the worst that it may be had the
    power failed: of files that were not fsynced there is half; names of new and of renamed files
    are there only if their folder was fsynced since; what was deleted is gone.
    """

    def __init__(self, root: Path, cut: Path, last: int) -> None:
        self.root, self.cut, self.last, self.count = root, cut, last, 0
        self.synced = {path.stat().st_ino for path in root.rglob("*")}
        self.named = {_name(path) for path in root.rglob("*")}
        self.renames: list[tuple[Path, Path, bytes | None]] = []

    def arm(self) -> None:
        """From here on operations count, and nothing takes that back."""
        patch = pytest.MonkeyPatch()
        for owner, name, act in (
            (os, "fsync", self._fsync),
            (os, "replace", self._replace),
            (os, "unlink", self._change),
            (os, "rmdir", self._change),
            (os, "mkdir", self._change),
            (builtins, "open", self._open),
            (safetensors.torch, "save_file", self._save_file),
            (Path, "write_text", self._write_text),
        ):
            real = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, act=act, real=real, **k: act(real, *a, **k))

    def _change(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._one()
        return real(*args, **kwargs)

    def _fsync(self, real: Callable[..., Any], descriptor: int) -> None:
        self._one()  # and no more: a process that dies loses nothing of what it wrote
        at = os.fstat(descriptor).st_ino
        self.synced.add(at)
        self.named |= {
            (at, name)
            for folder, folders, files in os.walk(self.root)
            if os.stat(folder).st_ino == at
            for name in (*folders, *files)
        }
        self.renames = [one for one in self.renames if _name(one[1]) not in self.named]

    def _replace(self, real: Callable[..., Any], old: Path, new: Path) -> None:
        self._one()
        self.renames.append((old, new, new.read_bytes() if new.is_file() else None))
        self.named.discard(_name(new))
        real(old, new)

    def _open(self, real: Callable[..., Any], file: Any, mode: str = "r", *a: Any, **k: Any) -> Any:
        if mode == "wb":
            self._one()
        return real(file, mode, *a, **k)

    def _save_file(self, real: Callable[..., Any], tensors: Any, path: Path, **more: Any) -> None:
        self._one(lambda: (real(tensors, path, **more), _halve(path)))
        real(tensors, path, **more)

    def _write_text(self, real: Callable[..., Any], path: Path, text: str) -> Any:
        self._one(lambda: real(path, text[: len(text) // 2]))
        return real(path, text)

    def _one(self, half: Callable[[], Any] = lambda: None) -> None:
        self.count += 1
        if self.count == self.last:
            self.last = 0  # what follows counts no more
            half()
            shutil.copytree(self.root, self.cut, copy_function=os.link)
            self._cut()
            os.rename(self.root, self.cut.with_suffix(".swap"))
            os.rename(self.cut, self.root)
            os.rename(self.cut.with_suffix(".swap"), self.cut)
            os._exit(DIED)

    def _cut(self) -> None:
        """In ``root``, whose inodes are known."""
        for path in list(self.root.rglob("*")):
            if path.is_file() and path.stat().st_ino not in self.synced:
                _halve(path)
        for old, new, before in reversed(self.renames):
            if new.exists():
                os.rename(new, old)
            if before is not None:
                new.write_bytes(before)
                self.named.add(_name(new))
        for path in sorted(self.root.rglob("*")):
            if path.exists() and _name(path) not in self.named:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _name(path: Path) -> tuple[int, str]:
    """A name in its folder, wherever that is moved to."""
    return path.parent.stat().st_ino, path.name


def _halve(path: Path) -> None:
    """Not in place: the file may have another name."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
