"""Work of several kinds in turns, a step at a time and each on a clock of its own, so that a machine whose speed drifts is fair to all."""

import time
from collections.abc import Generator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds since the first :meth:`start`, without those in which others had their turn."""

    def __init__(self) -> None:
        self._zero = self._stopped = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def start(self) -> None:
        self._zero += time.perf_counter() - self._stopped

    def stop(self) -> float:
        """Returns the seconds so far."""
        self._stopped = time.perf_counter()
        return self._stopped - self._zero

    def skip(self, seconds: float) -> None:
        """Waiting costs nothing: the clock moves on at once."""
        self._zero -= max(seconds, 0.0)


def in_turns(work: Mapping[str, tuple[Stopwatch, Generator[None, None, T]]]) -> dict[str, T]:
    """Run all generators to their ends and return what each returns.

    The next step is taken by the one whose clock shows least, so equal times are compared, step by step.
    """
    found: dict[str, T] = {}
    seconds = dict.fromkeys(work, 0.0)
    while seconds:
        name = min(seconds, key=seconds.__getitem__)
        clock, steps = work[name]
        clock.start()
        try:
            next(steps)
        except StopIteration as end:
            found[name] = end.value
            del seconds[name]
        else:
            seconds[name] = clock.stop()
    return {name: found[name] for name in work}
