"""A function in a new process: memory peaks never fall within one, and each is given a little more or less speed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context


def in_new_process(function: Callable, *arguments: object) -> object:
    """``function(*arguments)``, run in a process of its own. Raises what it raises, or ValueError if the process was killed."""
    try:
        # Ctrl-C reaches the child as well, where Python's own handler would print a traceback.
        with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise ValueError("a measuring process was killed (out of memory?): free some memory and repeat") from None
