"""Asynchronous top-K: older rounds say how many drafts to verify, this round's confidences say which (the paper's §5.2)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from dspark.schedule.auto import after_contexts, draft_seconds
from dspark.schedule.policies import SPS, Histories, NeedsConfidence


@dataclass(frozen=True)
class AsyncTopK(NeedsConfidence):
    """Verify the K drafts with the highest survival over all requests; K is the best budget for their drafts of two rounds ago.

    A server that plans round n while round n − 1 is running knows confidences up to round n − 2. As these are past, K may be the best
    of ALL budgets: a step of a jagged curve, where Algorithm 1 stops, is no obstacle. The distribution stays: (r, j) is verified if
    fewer than K survivals are above a_{r,j}, and of its own request those are a_{r,1..j−1}; later confidences of r are below it.

    sps: as for :class:`~dspark.schedule.Auto`.
    """

    sps: SPS

    def lengths(self, confidence: Sequence[Tensor], histories: Histories = ()) -> list[int]:
        survival = [c.cumprod(-1).tolist() for c in confidence]
        falling = sorted((-a, r, j) for r, each in enumerate(survival) for j, a in enumerate(each))  # of equal ones the prefix is first
        chosen = Counter(r for _, r, _ in falling[: self.budget(histories)])
        return [chosen[r] for r in range(len(survival))]

    def budget(self, histories: Histories) -> int | None:
        """K, from round n − 2 of each request; younger requests count as the mean of the others. None (no limit) if all are younger."""
        old = [rounds[-2].survival for rounds in histories if len(rounds) > 2]  # rounds[0] is the prefill
        if not old:
            return None
        share, sps = len(histories) / len(old), after_contexts(self.sps, histories)
        falling = sorted((a for each in old for a in each), reverse=True)
        drafting = draft_seconds(sps, len(histories))
        expected = accumulate(falling, initial=float(len(old)))
        throughput = [tokens / (drafting + 1 / sps(round(share * (len(old) + k)))) for k, tokens in enumerate(expected)]
        return round(share * throughput.index(max(throughput)))
