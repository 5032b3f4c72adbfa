"""Handles Ctrl-C and SIGTERM, in the same way for all commands."""

import signal
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C does, with an exit code of its own."""


class Stopped(Exception):
    """A run was stopped by a signal, and has saved its state; ``exit_code`` as a shell reports
    it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def raise_terminated(*_: Any) -> None:
    """A signal handler."""
    raise Terminated


class StopSignals:
    """While entered, remembers in ``received`` that a signal asked this process to stop.

    With ``at_once`` the previous handler, which raises, is called at once too, and ``check`` calls
    it again: what a handler raises is lost if it runs inside a destructor (of a tokenizer's cache,
    for example), and then the run would continue. Without it the run looks at ``received`` between
    its steps; a second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self, *, at_once: bool) -> None:
        self.received: int | None = None
        self._at_once = at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            if self._at_once and not callable(before):
                continue  # the system ends this process, or the signal is ignored
            try:
                signal.signal(number, self._note)
            except ValueError:  # not the main thread, which alone may set handlers
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
        is_second = self.received is not None
        self.received = number
        if self._at_once:
            self._before[number](number, frame)
        elif is_second and number == signal.SIGINT:
            raise KeyboardInterrupt

    def check(self) -> None:
        """
        Raises:
            KeyboardInterrupt: a signal came with ``at_once``, and the run continued nevertheless.
        """
        if self.received is not None:
            self._before[self.received](self.received, None)
