"""Host seconds that wait for a GPU, whose calls return before the work is done."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, once everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """A stopwatch: :meth:`lap` for the parts of a round, :meth:`total` for all of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.last = self.last, now(self.device)
        return self.last - before

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start
