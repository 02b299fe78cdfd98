"""Ctrl-C in the middle of an update would leave half of the weights moved: it waits until the update is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back() -> Iterator[None]:
    """SIGINT and SIGTERM, where they raise KeyboardInterrupt, raise it behind the body instead of inside it."""
    came: list[int] = []
    ours = threading.current_thread() is threading.main_thread()  # no other thread is interrupted
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if ours and signal.getsignal(n) is signal.default_int_handler]
    for number in numbers:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
