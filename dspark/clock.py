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


class Marks:
    """Moments on the device's own time line: taking one waits for nothing. Read them after something else has waited."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.moments = device, []
        self.add()

    def add(self) -> None:
        if self.device.type == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each moment to the next."""
        pairs = zip(self.moments, self.moments[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in pairs]
