"""One run at a time in a folder."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, which is gone when it is let go. Makes its folder, which is gone as well if
    nothing came into it.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written.
    """
    is_new = not file.parent.exists()
    try:
        descriptor = _take(file)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OSError(f"{file.parent}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
            if is_new:
                file.parent.rmdir()
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            if path.parent.exists():
                raise
            continue  # the process that held it took the empty folder away
        try:
            _lock(descriptor, path)
            if _is_same(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed by the process that held it


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path.parent}: another {path.stem} writes to it; wait for that, or give another --out"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{path}: this file system locks no files ({error.strerror}): see to it yourself that "
            f"only one {path.stem} writes there",
            stacklevel=2,
        )


def _is_same(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
