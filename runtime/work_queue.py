"""How the processes of one command share out its work; nothing in it waits for ever.

They meet in the key-value store of torch's launcher, not in collectives: work is claimed piece by
piece, so that a slow process takes fewer, and none waits for another that is busy. A process that
fails says so in the store, and all that wait for something look there. One that was killed, or
whose machine is gone, says nothing: then the work of all stands still, and after a while the main
process does itself what is missing.
"""

import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime.errors import describe_error
from runtime.files import PARTIAL
from runtime.workers import end_with_launcher, process_label, rank_info

POLL_SECONDS = 0.1  # Python's signal handlers do not run inside a blocking wait
SHARED_SECONDS = 20  # in which each process must see what the main one wrote
ANSWER_SECONDS = 120  # for an answer of the store, which takes a millisecond
LOST_SECONDS = 3  # in which a launcher, which knows why a process was lost, ends this one
MAX_REASON = 1000  # characters
LEAVE_SECONDS = 10  # for the others to end, when all work is done
FAILED = "failed"  # the key of the first failure
MAIN_IS_LOST = (
    "the process in which the others of this command meet is gone; the same command goes on from "
    "what is whole"
)


class _Meeting:
    """The key-value store in which the processes of a command meet, one for all its queues."""

    def __init__(self) -> None:
        import torch.distributed

        distributed: Any = torch.distributed  # whose stubs hide what its manual names
        end_with_launcher()
        timeout = timedelta(seconds=ANSWER_SECONDS)
        self._store, _, _ = next(distributed.rendezvous("env://", timeout=timeout))
        self._asked_at: float | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the store.

        Raises:
            ConnectionError: its process is gone.
        """
        self._asked_at = time.monotonic()
        try:
            return getattr(self._store, method)(*arguments)
        except RuntimeError as error:  # torch's DistError
            raise ConnectionError(MAIN_IS_LOST) from error
        finally:
            self._asked_at = None

    def _watch(self) -> None:
        """End this process when the store does not answer, as when its machine is cut off: a
        request has no timeout of its own, and Python does not run while it waits."""
        while True:
            time.sleep(ANSWER_SECONDS / 10)
            asked_at = self._asked_at
            if asked_at is not None and time.monotonic() - asked_at > ANSWER_SECONDS:
                with suppress(OSError, ValueError):
                    print(f"Error: {process_label()}{MAIN_IS_LOST}", file=sys.stderr, flush=True)
                os._exit(1)


@cache
def _meeting() -> _Meeting:
    return _Meeting()


class WorkQueue:
    """The processes of one command that share out its work; alone, or started by torchrun.

    A command that shares out several pieces of work in turn gives each queue a name of its own.
    It is used as a context: a failure in it ends the others too.

    Raises:
        ValueError: WORLD_SIZE is set and RANK is not.
        ConnectionError: from every method: another process has failed, or is gone.
    """

    def __init__(self, name: str = "work") -> None:
        info = rank_info()
        self.rank, self.size = info.rank, info.size
        self._name = name
        self._meeting = _meeting() if self.size > 1 else None
        self._values: Counter[str] = Counter()  # of a process alone

    def __enter__(self) -> "WorkQueue":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._meeting is None:
            return
        with suppress(ConnectionError):
            if not self._meeting.ask("check", [FAILED]):
                reason = "was stopped"
                if isinstance(error, Exception):
                    reason = f"failed: {describe_error(error)}"
                self._meeting.ask("set", FAILED, f"process {self.rank} {reason}"[:MAX_REASON])

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def _key(self, name: str) -> str:
        return f"{self._name}/{name}"

    def check(self) -> None:
        """
        Raises:
            ConnectionError: another process has failed.
        """
        if self._meeting is not None and self._meeting.ask("check", [FAILED]):
            reason = bytes(self._meeting.ask("get", FAILED)).decode(errors="replace")
            if "TORCHELASTIC_RUN_ID" in os.environ:
                time.sleep(LOST_SECONDS)
            raise ConnectionError(reason)

    def publish(self, name: str, value: str) -> None:
        """Give ``value`` to the others, once per ``name``."""
        if self._meeting is not None:
            self._meeting.ask("set", self._key(name), value)

    def wait_for(self, name: str) -> str:
        """Wait until ``name`` is published; return its value."""
        assert self._meeting is not None
        while not self._meeting.ask("check", [self._key(name)]):
            self.check()
            time.sleep(POLL_SECONDS)
        return bytes(self._meeting.ask("get", self._key(name))).decode()

    def add(self, name: str, num: int) -> int:
        """Add to the counter ``name`` that all processes share (0 at first); return its new
        value. Work that is done is counted: that is how a process that waits sees it go on."""
        if self._meeting is None:
            self._values[name] += num
            return self._values[name]
        if num:
            self._meeting.ask("add", self._key("activity"), 1)
        return int(self._meeting.ask("add", self._key(name), num))

    def claim(self, name: str, num: int) -> Iterator[int]:
        """Numbers below ``num``, in order; each goes to one of the processes that ask.

        A number is claimed when it is asked for: no sooner than the one before it is done.
        """
        if self._meeting is None:
            yield from range(num)
            return
        key = self._key(f"{name}/claimed")
        while (number := self._meeting.ask("add", key, 1) - 1) < num:
            self.check()
            yield number

    def wait_until(self, is_done: Callable[[], bool], idle_seconds: float) -> bool:
        """Wait for the others' work; False when nothing was counted for ``idle_seconds``: then
        those that had claimed the rest are gone, or as good as gone."""
        seen, since = -1, time.monotonic()
        while not is_done():
            self.check()
            time.sleep(POLL_SECONDS)
            if (activity := self.add("activity", 0)) != seen:
                seen, since = activity, time.monotonic()
            elif time.monotonic() - since > idle_seconds:
                return False
        return True

    def leave(self) -> None:
        """To be called when all work is done. The main process, in which the others may meet, waits
        a little for them."""
        if self._meeting is None:
            return
        self.publish(f"left/{self.rank}", "")
        end = time.monotonic() + LEAVE_SECONDS
        names = [self._key(f"left/{rank}") for rank in range(self.size if self.is_main else 0)]
        while names and time.monotonic() < end and not self._meeting.ask("check", names):
            time.sleep(POLL_SECONDS)

    def check_shared(self, folder: Path) -> None:
        """Refuse where one of the processes sees another folder under this name. Every process must
        call it. What is new is looked for beside it, in the nearest folder that there is.

        Raises:
            ValueError: the folder is not shared.
            OSError: it cannot be written.
        """
        if self._meeting is None:
            return
        parents = [folder.absolute(), *folder.absolute().parents]
        if self.is_main:
            level = next(n for n, parent in enumerate(parents) if parent.is_dir())
            nonce = secrets.token_hex(8)
            path = _nonce_file(parents[level], nonce)
            path.touch()
            try:
                self.publish("shared", f"{level} {nonce}")
                seen = [self.wait_for(f"shared/{rank}") for rank in range(1, self.size)]
            finally:
                path.unlink(missing_ok=True)
        else:
            number, nonce = self.wait_for("shared").split()
            is_seen = is_file_seen(_nonce_file(parents[int(number)], nonce))
            self.publish(f"shared/{self.rank}", "yes" if is_seen else "no")
            seen = ["yes" if is_seen else "no"]
        if "no" in seen:
            raise ValueError(not_shared(folder))


def _nonce_file(folder: Path, nonce: str) -> Path:
    return folder / f".shared-{nonce}{PARTIAL}"


def is_file_seen(path: Path) -> bool:
    """Whether this process sees a file that another one has written, given some time: a network
    file system remembers for a while what was not there."""
    end = time.monotonic() + SHARED_SECONDS
    while not path.is_file() and time.monotonic() < end:
        with suppress(OSError):
            os.listdir(path.parent.parent)
            os.listdir(path.parent)
        time.sleep(POLL_SECONDS)
    return path.is_file()


def not_shared(folder: Path) -> str:
    return f"{folder}: the processes do not see the same folder there; machines need a shared one"
