"""The processes of one command that share out its work: none waits for another that is at it.

They meet in the key-value store of torch's launcher, not in collectives: what each does is taken
piece by piece, so that a slow process takes fewer.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed

from processes.orphans import end_with_launcher

POLL_SECONDS = 0.1  # Python's signal handlers do not run inside a blocking wait


class Crew:
    """This process, ``rank`` of ``size``; alone, or one of those that torchrun started.

    Raises:
        ValueError: WORLD_SIZE is set and RANK is not.
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and "RANK" not in os.environ:
            raise ValueError(
                "WORLD_SIZE is set and RANK is not: start several processes by torchrun"
            )
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self._store: Any = None
        self._sums: Counter[str] = Counter()  # of a process alone
        if self.size > 1:
            end_with_launcher()
            distributed: Any = torch.distributed  # whose stubs hide what its manual names
            store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(minutes=5)))
            self._store = distributed.PrefixStore("crew", store)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tell(self, name: str, value: str) -> None:
        """Publish ``value`` to the others, once a ``name``."""
        if self._store is not None:
            self._store.set(name, value)

    def hear(self, name: str) -> str:
        """What was told as ``name``, as soon as it is."""
        while not self._store.check([name]):
            time.sleep(POLL_SECONDS)
        return bytes(self._store.get(name)).decode()

    def add(self, name: str, num: int) -> int:
        """Add to the sum ``name`` that all share (0 at first); what it is then."""
        if self._store is None:
            self._sums[name] += num
            return self._sums[name]
        return int(self._store.add(name, num))

    def claim(self, name: str, num: int) -> Iterator[int]:
        """Numbers below ``num``, in order; of all processes that ask, one gets each.

        A number is taken when it is asked for: no sooner than the one before it is done.
        """
        if self._store is None:
            yield from range(num)
            return
        while (number := self._store.add(f"{name}/claimed", 1) - 1) < num:
            yield number

    def gather(self, name: str, value: str) -> list[str]:
        """What every process says as ``name``, in rank order, for the main one, which waits for
        all; the others get nothing and go on."""
        if self._store is None:
            return [value]
        self.tell(f"{name}/{self.rank}", value)
        return [self.hear(f"{name}/{rank}") for rank in range(self.size)] if self.is_main else []
