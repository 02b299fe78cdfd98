"""The prefix scheduler: the paper's Algorithm 1 on measured step times."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, repeat
from operator import neg

from torch import Tensor

from dspark.schedule.policies import SPS, Histories, NeedsConfidence


@dataclass(frozen=True)
class Admission:
    """One step of Algorithm 1: may draft ``position`` of request ``request`` be checked?

    request: its index in the round.
    position: 1, 2, …; 0 is the start, where only the anchors are checked.
    survival: a_{r,j}.
    expected: tokens that the round would commit on average.
    budget: B, tokens in the target's pass.
    throughput: Θ, expected tokens per second.
    admitted: whether Θ rose.
    """

    request: int
    position: int
    survival: float
    expected: float
    budget: int
    throughput: float
    admitted: bool


@dataclass(frozen=True)
class PrefixScheduler(NeedsConfidence):
    """The paper's Algorithm 1: over all requests, admit drafts while expected throughput rises, stop at the first fall.

    Candidates (r, j) are taken by falling survival a_{r,j}, and Θ = (R + Σ admitted a) / (draft_seconds + 1/SPS(B)), where
    B = Σ(1 + ℓ_r) tokens. Stopping at the first fall keeps the distribution: whether (r, j) is admitted depends on survivals at or
    above a_{r,j} alone, hence on x_{r,<j}, never on x_{r,j} or later tokens. A search for the best budget over ALL candidates would
    read later confidences and bias it (Appendix A).

    sps: measured target steps per second at B tokens.
    draft_seconds: T_draft of the parallel pass. 0 is the paper's rule: a server drafts while it verifies. A single stream waits for
        drafting; counting that time makes a round longer, so a few more drafts are admitted.
    """

    sps: SPS
    draft_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.draft_seconds >= 0:
            raise ValueError(f"draft_seconds must be at least 0, got {self.draft_seconds}: 0 leaves drafting out")

    def lengths(self, confidence: Sequence[Tensor], histories: Histories = ()) -> list[int]:
        lengths = [0] * len(confidence)
        for step in self.admissions([c.cumprod(-1).tolist() for c in confidence]):
            if step.admitted and step.position:
                lengths[step.request] = step.position
        return lengths

    def admissions(self, survival: Sequence[Sequence[float]]) -> Iterator[Admission]:
        """The path of the algorithm from a_{r,1}, a_{r,2}, … of each request: the start first; only the last step may be unadmitted."""
        expected, budget = float(len(survival)), len(survival)
        best = self._throughput(expected, budget)
        yield Admission(0, 0, 1.0, expected, budget, best, True)
        # Survival never rises along a request, so the largest remaining candidate is always some request's next token.
        requests = [zip(map(neg, each), repeat(r), count(1)) for r, each in enumerate(survival)]
        for negative, r, position in heapq.merge(*requests):
            expected, budget = expected - negative, budget + 1
            throughput = self._throughput(expected, budget)
            admitted = throughput > best
            yield Admission(r, position, -negative, expected, budget, throughput, admitted)
            if not admitted:
                break
            best = throughput

    def _throughput(self, expected: float, budget: int) -> float:
        sps = self.sps(budget)
        return expected * sps / (1 + self.draft_seconds * sps)
