"""Ctrl-C and SIGTERM as a request that the loop honours between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """The name of the signal that came, or None."""

    def __init__(self) -> None:
        self.signal: str | None = None


@contextlib.contextmanager
def watch() -> Iterator[StopRequest]:
    """Collects SIGINT and SIGTERM; the second one stops at once.

    Python runs signal handlers in the main thread only, so elsewhere nothing is watched.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: Any) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None stands for a handler that wasn't set from Python and can't be set back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
