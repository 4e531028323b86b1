"""Ctrl-C and SIGTERM: the first waits for the end of the iteration, the second kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Signals:
    """Remembers a signal until the training can save and stop.

    pending: the number of the signal that waits, 0 without one.
    """

    def __init__(self) -> None:
        self.pending = 0

    def _note(self, number: int, frame: object) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = number

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
