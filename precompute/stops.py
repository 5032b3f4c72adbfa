"""Ctrl-C and SIGTERM, heard for certain."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Stops:
    """While entered, signals do what they did before, and ``check`` does it once more.

    What a handler raises is lost where it happens to run inside a destructor: of a tokenizer's
    cache, say. Then the run would go on.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "Stops":
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if callable(before):
                try:
                    signal.signal(number, self._note)
                except ValueError:  # not the main thread: signals are not ours to take
                    return self
                self._before[number] = before
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = number
        self._before[number](number, frame)

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: a signal came, and the run is still here.
        """
        if self._seen is not None:
            self._before[self._seen](self._seen, None)
