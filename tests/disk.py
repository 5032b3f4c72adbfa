"""A process that dies in the k-th of its file operations, and what a disk then holds at worst."""

import builtins
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

DIED = 77  # exit code


def fork_for_each_operation(run: Path, where: Path, writes: bool = False) -> bool:
    """Fork child after child. The k-th goes to a copy of ``run``, a folder below the working
    folder, at ``where``/k, and will die in its k-th file operation from here on, until one gets
    through. Whether this is a child.

    Files are linked, not copied: none may be changed in place. With ``writes`` each write to a file
    is an operation too.
    """
    for last in count(1):
        folder = where / f"{last}"
        shutil.copytree(run, folder / run, copy_function=os.link)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            child = os.fork()
        if not child:
            signal.alarm(60)
            os.chdir(folder)
            (where / f"{last} cut").mkdir()
            Disk(run, where / f"{last} cut" / run, last, writes).arm()
            return True
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, DIED), (folder, code)
        if code == 0:
            shutil.rmtree(folder)
            (where / f"{last} cut").rmdir()
            break
    return False


class Disk:
    """Counts the operations on files; ``os._exit`` in number ``last``, which is left half done.

    The folder ``root`` stays as it is then, and ``cut`` becomes the worst that it may be had the
    power failed: of files that were not fsynced there is half; names of new and of renamed files
    are there only if their folder was fsynced since; what was deleted is gone.
    """

    def __init__(self, root: Path, cut: Path, last: int, writes: bool = False) -> None:
        self.root, self.cut, self.last, self.count = root, cut, last, 0
        self.writes = writes
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
        self._operation()
        return real(*args, **kwargs)

    def _fsync(self, real: Callable[..., Any], descriptor: int) -> None:
        self._operation()  # and no more: a process that dies loses nothing of what it wrote
        at = os.fstat(descriptor).st_ino
        self.synced.add(at)
        self.named |= {
            (at, name)
            for folder, folders, files in os.walk(self.root)
            if os.stat(folder).st_ino == at
            for name in (*folders, *files)
        }
        self.renames = [rename for rename in self.renames if _name(rename[1]) not in self.named]

    def _replace(self, real: Callable[..., Any], old: Path, new: Path) -> None:
        self._operation()
        self.renames.append((old, new, new.read_bytes() if new.is_file() else None))
        self.named.discard(_name(new))
        real(old, new)

    def _open(self, real: Callable[..., Any], file: Any, mode: str = "r", *a: Any, **k: Any) -> Any:
        if mode != "wb":
            return real(file, mode, *a, **k)
        self._operation()
        opened = real(file, mode, *a, **k)
        return _CountedFile(opened, self._operation) if self.writes else opened

    def _save_file(self, real: Callable[..., Any], tensors: Any, path: Path, **more: Any) -> None:
        self._operation(lambda: (real(tensors, path, **more), _halve(path)))
        real(tensors, path, **more)

    def _write_text(self, real: Callable[..., Any], path: Path, text: str) -> Any:
        self._operation(lambda: real(path, text[: len(text) // 2]))
        return real(path, text)

    def _operation(self, half: Callable[[], Any] = lambda: None) -> None:
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


class _CountedFile:
    """A file whose every write is an operation, which may end half done."""

    def __init__(self, file: Any, operation: Callable[[Callable[[], Any]], None]) -> None:
        self._file, self._operation = file, operation

    def write(self, data: bytes) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._operation(half)
        return int(self._file.write(data))

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _name(path: Path) -> tuple[int, str]:
    """A name in its folder, wherever that is moved to."""
    return path.parent.stat().st_ino, path.name


def _halve(path: Path) -> None:
    """Not in place: the file may have another name."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
