"""One writer per folder: a lock file that is held while a command writes there."""

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

WAIT_SECONDS = 0.2  # a holder that is just leaving is no reason to refuse
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # from a file system without them


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock ``file``. Its folder is made; the file is removed afterwards, and the folder
    too if it is new and empty.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written.
    """
    is_new = not file.parent.exists()
    try:
        lock = _acquire(file)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OSError(f"{file.parent}: cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        # Before the release: afterwards the name could be another holder's. FileLock refuses a file
        # that has lost its name.
        with suppress(OSError):
            file.unlink(missing_ok=True)
            if is_new:
                file.parent.rmdir()
        if lock is not None:
            lock.release()


def _acquire(file: Path) -> FileLock | None:
    """Acquire the lock; None, with a warning, where the file system has no locks."""
    lock = FileLock(file, timeout=WAIT_SECONDS, thread_local=False)
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(poll_interval=WAIT_SECONDS / 10)
            return lock
        except Timeout:
            raise ValueError(
                f"{file.parent}: another {file.stem} writes to it; wait for that, or give another "
                "--out"
            ) from None
        except FileNotFoundError:
            if file.parent.exists():
                raise
            # Else the process that held it has removed the empty folder: make it again.
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{file}: this file system locks no files ({error.strerror}): see to it yourself "
                f"that only one {file.stem} writes there",
                stacklevel=2,
            )
            return None
