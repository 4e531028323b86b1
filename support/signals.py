"""Ctrl-C and SIGTERM: in a training the first waits for the end of the iteration, a later kills."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ECHO = 2.0  # seconds: torchrun passes a signal on that a scheduler has sent to all processes


class Signals:
    """Remembers a signal until the training can save and stop.

    pending: the number of the signal that waits, 0 without one.
    """

    def __init__(self) -> None:
        self.pending, self.since = 0, 0.0

    def _note(self, number: int, frame: object) -> None:
        if self.pending and time.monotonic() - self.since > ECHO:
            raise KeyboardInterrupt
        if not self.pending:
            self.pending, self.since = number, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the first SIGINT or SIGTERM wait inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def orderly() -> Iterator[None]:
    """Let SIGTERM end the block by SystemExit, so that it can end the processes that it started."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
