"""The paper's Appendix A: a schedule that weighs every budget reads confidences behind the token it decides on, and bends the law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from torch import Tensor

from dspark.proof.branches import Law
from dspark.proof.tables import TEXTS, Request, joint_law
from dspark.schedule import Policy, PrefixScheduler

A, B = 0, 1
APPENDIX_A = Request(
    p_target=dict.fromkeys(TEXTS, Fraction(7, 10)),
    p_draft=dict.fromkeys(TEXTS, Fraction(1, 2)),
    confidence={(): 0.8, (A,): 0.9, (B,): 0.0},
)
STEPS_PER_SECOND = {1: 1.0, 2: 0.5, 3: 0.45}.__getitem__


@dataclass(frozen=True)
class GlobalArgmax(PrefixScheduler):
    """The wrong way, for the proof and the notebook only: the budget with the highest expected throughput of all.

    In the example ℓ is 2 if the first draft is A and 0 if it is B, since only behind A is a second draft promising. Then a
    drafted A is always kept and a drafted B is always drawn afresh: of two tries one is free.
    """

    def lengths(self, confidence: list[Tensor]) -> list[int]:
        requests = len(confidence)
        survival = [(a, r) for r, c in enumerate(confidence) for a in c.cumprod(-1).tolist()]
        survival.sort(key=lambda each: -each[0])
        expected = accumulate((a for a, _ in survival), initial=float(requests))
        throughput = [tokens * self.sps(requests + extra) for extra, tokens in enumerate(expected)]
        admitted = Counter(r for _, r in survival[: throughput.index(max(throughput))])
        return [admitted[r] for r in range(requests)]

    def admits(self, confidence: Sequence[float]) -> bool:
        return True  # it wants to see the whole block before it decides: that is what is wrong


def first_token_laws() -> dict[str, Law]:
    """Policy → the exact law of the first token in the example; the target's is 7/10 for A and 3/10 for B."""
    policies: tuple[Policy, ...] = (GlobalArgmax(STEPS_PER_SECOND), PrefixScheduler(STEPS_PER_SECOND))
    return {type(policy).__name__: joint_law([APPENDIX_A], policy, tokens=1)[0] for policy in policies}
