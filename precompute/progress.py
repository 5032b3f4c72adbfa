"""One bar over what all processes of a run encode; the main one shows it."""

import time
from types import TracebackType

from tqdm import tqdm

from runtime.signals import StopSignals
from runtime.workers import POLL_SECONDS, WorkQueue


class Progress:
    """Samples done and rejected, and shards written; counted over all processes."""

    def __init__(self, queue: WorkQueue, num_samples: int) -> None:
        self._queue, self._stops = queue, StopSignals(at_once=True)
        self._bar = tqdm(total=num_samples, unit="img", desc="encode", disable=not queue.is_main)

    def __enter__(self) -> "Progress":
        self._stops.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stops.__exit__(kind, error, trace)
        self._bar.close()

    def tick(self, failed: bool) -> None:
        """One sample more was tried.

        Raises:
            KeyboardInterrupt: the run is to stop.
        """
        self._stops.check()
        self._count("rejected", int(failed))
        self._show(self._count("samples", 1))

    def shard_done(self) -> None:
        self._count("shards", 1)

    def wait_for(self, num_shards: int) -> None:
        """The main process's last part: until all shards are written, whoever writes them."""
        while self._count("shards", 0) < num_shards:
            time.sleep(POLL_SECONDS)
            self._stops.check()
            self._show(self._count("samples", 0))

    def _count(self, what: str, number: int) -> int:
        return self._queue.add(f"encode {what}", number)

    def _show(self, done: int) -> None:
        if self._queue.is_main and done > self._bar.n:
            self._bar.set_postfix(rejected=self._count("rejected", 0), refresh=False)
            self._bar.update(done - self._bar.n)
