"""Independent pieces of a proof, side by side: one process a core, one thread a process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

T, R = TypeVar("T"), TypeVar("R")


def side_by_side(work: Callable[[T], R], pieces: Sequence[T], processes: int) -> Iterator[tuple[T, R]]:
    """(piece, work(piece)) for each piece, as they end. ``work`` and the pieces travel to other processes, unless ``processes`` is 1:
    then everything happens here, in order. An error of any piece ends the rest. No process outlives this one.

    What pieces share (models) ``work`` should keep in a cache of its module: a process does many pieces, one after another.
    """
    if processes == 1 or len(pieces) < 2:
        for piece in pieces:
            yield piece, work(piece)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _single) as pool:
        waiting = {pool.submit(work, piece): piece for piece in pieces}
        try:
            for done in as_completed(waiting):
                yield waiting.pop(done), done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _single() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; the first one says so
    threading.Thread(target=_end_with_the_first, daemon=True).start()


def _end_with_the_first() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
