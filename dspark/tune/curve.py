"""Seconds of one target step as the scheduler reads them: over tokens in the pass, requests that share it and tokens in the cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Extra:
    """Seconds beyond a curve that was measured with one request, all at least 0.

    context: tokens in the cache when the curve was measured.
    joining: per further request.
    reading: per request and further token in the cache, whose key and value are read.
    attending: per token in the pass and further token in the cache.
    """

    context: int
    joining: float = 0.0
    reading: float = 0.0
    attending: float = 0.0


@dataclass(frozen=True)
class SPSCurve:
    """SPS(B): target steps per second when one step checks B tokens. Called with B, it never rises in B.

    widths: measured B, ascending.
    seconds: median step time at each; the running maximum is kept, so a wider step that was measured faster takes as long.
    Between widths the step TIME is linear. Below the first it is constant; beyond the last it grows with the last or the mean slope,
    whichever is steeper, so that noise cannot make tokens look free.
    draft: the drafter's own curve, over the number of requests that draft together; None if nobody drafts, or for free.
    extra: what requests and contexts add, for :meth:`at`; None if they add nothing.
    """

    widths: tuple[int, ...]
    seconds: tuple[float, ...]
    draft: SPSCurve | None = None
    extra: Extra | None = None

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.seconds):
            raise ValueError(f"a step-time curve needs one time per width, got {len(self.widths)} widths and {len(self.seconds)} times")
        if self.widths[0] < 1 or any(b <= a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"widths must ascend from at least 1, got {self.widths}")
        if not all(0 < s < float("inf") for s in self.seconds):
            raise ValueError(f"step times must be positive seconds, got {self.seconds}")
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "seconds", tuple(accumulate(self.seconds, max)))

    def __call__(self, tokens: int) -> float:
        return 1.0 / self.step_seconds(tokens)

    def step_seconds(self, tokens: int) -> float:
        """Seconds of one step over ``tokens`` tokens."""
        w, s = self.widths, self.seconds
        if tokens <= w[0]:
            return s[0]
        if tokens >= w[-1]:
            slope = max(self._slope(-2, -1), self._slope(0, -1)) if len(w) > 1 else 0.0
            return s[-1] + slope * (tokens - w[-1])
        i = bisect_right(w, tokens) - 1
        return s[i] + self._slope(i, i + 1) * (tokens - w[i])

    def draft_seconds(self, requests: int) -> float:
        """Seconds of one parallel draft for so many requests."""
        return self.draft.step_seconds(requests) if self.draft else 0.0

    def at(self, contexts: Sequence[int]) -> SPSCurve:
        """The curve of a pass that so many requests share, each with so many tokens in the cache; shorter ones are padded."""
        if self.extra is None or not contexts:
            return self
        extra, longer = self.extra, max(contexts) - self.extra.context
        once = extra.joining * (len(contexts) - 1) + extra.reading * len(contexts) * longer
        # Far below the context of the measurement the line is only an estimate: no pass gets more than twice as fast.
        seconds = [max(s + once + extra.attending * w * longer, s / 2) for w, s in zip(self.widths, self.seconds, strict=True)]
        return SPSCurve(self.widths, tuple(seconds), self.draft)

    def convex(self) -> SPSCurve:
        """The curve without staircases: slopes that fall are averaged until every slope is at least the one before.

        Kernels come in steps, and Algorithm 1 stops at the first token that does not pay, so it would never see behind a step.
        The first and last times stay as measured.
        """
        pieces: list[tuple[float, int]] = []  # slope, tokens
        for i in range(len(self.widths) - 1):
            slope, tokens = self._slope(i, i + 1), self.widths[i + 1] - self.widths[i]
            while pieces and pieces[-1][0] > slope:
                before, more = pieces.pop()
                slope, tokens = (before * more + slope * tokens) / (more + tokens), tokens + more
            pieces.append((slope, tokens))
        widths = accumulate((tokens for _, tokens in pieces), initial=self.widths[0])
        seconds = accumulate((slope * tokens for slope, tokens in pieces), initial=self.seconds[0])
        return SPSCurve(tuple(widths), tuple(seconds), self.draft, self.extra)

    def _slope(self, i: int, j: int) -> float:
        return (self.seconds[j] - self.seconds[i]) / (self.widths[j] - self.widths[i])
