"""Ctrl-C and SIGTERM end a run at the next step, with a checkpoint."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, remembers the first signal; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are not ours to take
                return self
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
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM: 128 and the signal's number."""
        return 128 + (self.signal or signal.SIGTERM)
