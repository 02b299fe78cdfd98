"""The policy for those who do not want to choose one: draft only where past rounds say that it pays, then run Algorithm 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from torch import Tensor

from dspark.round import Round
from dspark.schedule.policies import SPS, Histories, Policy
from dspark.schedule.prefix import PrefixScheduler

RECENT = 8  # drafts of a request that its outlook is the mean of
TRIAL = 4  # drafts before the first decision not to draft
RETRY = 24  # rounds of the whole engine between two drafts that only look whether drafting pays again
EVIDENCE = 2.0  # drafts that the mean of all requests counts for in the outlook of one


@dataclass(frozen=True)
class Auto(Policy):
    """Per round and request: draft or not, from past rounds alone; then check what Algorithm 1 admits.

    Before drafting, Algorithm 1 runs on each request's outlook, its mean survival over recent drafts, once for every number of
    requests that could draft. The number with the highest expected throughput drafts, those with the best outlook first; 0 makes the
    round a plain step. So a busy engine, or a pair of models that does not pay, becomes plain decoding by itself. Any choice
    made here is exact, since no token of the round exists yet.

    sps: target steps per second at B tokens, such as :func:`dspark.tune.profile.step_times`. If it has them, ``draft_seconds(requests)``
        is the time of one parallel draft (else drafting counts as free), and ``at(contexts)`` knows what the requests' contexts add.
    """

    sps: SPS

    def windows(self, histories: Histories, block_size: int) -> list[int]:
        outlooks = _outlooks(histories)
        if outlooks is None:
            return [block_size] * len(histories)
        ranked, sps = sorted(range(len(outlooks)), key=lambda r: -sum(outlooks[r])), after_contexts(self.sps, histories)

        def throughput(drafting: int) -> float:
            """Expected tokens per second of a round in which so many requests draft."""
            scheduler = PrefixScheduler(sps, draft_seconds(sps, drafting))
            survival = [outlooks[r] if place < drafting else () for place, r in enumerate(ranked)]
            return max(step.throughput for step in scheduler.admissions(survival))

        counts = [0, *(1 << k for k in range((len(ranked) - 1).bit_length())), len(ranked)]  # 0, 1, 2, 4, … and all
        drafting = {*ranked[: max(counts, key=throughput)]}
        drafting |= {r for r, rounds in enumerate(histories) if _is_due(rounds, len(histories))}
        return [block_size if r in drafting else 0 for r in range(len(histories))]

    def lengths(self, confidence: Sequence[Tensor], histories: Histories = ()) -> list[int]:
        """Algorithm 1; a draft without confidences is checked whole. confidence: R tensors [w_r] float32."""
        known = [c if len(c) and not c.isnan().any() else c[:0] for c in confidence]
        sps = after_contexts(self.sps, histories)
        scheduler = PrefixScheduler(sps, draft_seconds(sps, sum(len(c) > 0 for c in confidence)))
        return [n if len(k) else len(c) for n, k, c in zip(scheduler.lengths(known), known, confidence, strict=True)]


def draft_seconds(sps: SPS, requests: int) -> float:
    """Seconds of one parallel draft for so many requests; 0 if ``sps`` does not know."""
    measured = getattr(sps, "draft_seconds", None)
    return measured(requests) if measured and requests else 0.0


def after_contexts(sps: SPS, histories: Histories) -> SPS:
    """The step times of a pass that these requests share, if ``sps`` knows what their contexts add."""
    at = getattr(sps, "at", None)
    return at([rounds[-1].context for rounds in histories]) if at and histories else sps


def _outlooks(histories: Histories) -> list[list[float]] | None:
    """Per request, the survivals a_1, a_2, … to expect of its next draft; None while too few drafts are known.

    The mean over its own recent drafts and, with little weight, everybody's; scaled down where fewer drafts were accepted than their
    confidences promised, since those may be wrong for this text.
    """
    recent = [[r for r in rounds if r.draft_tokens][-RECENT:] for rounds in histories]
    pooled = [r for rounds in recent for r in rounds]
    if len(pooled) < TRIAL:
        return None
    sums = np.zeros((len(recent), max(len(r.draft_tokens) for r in pooled)))  # [requests, positions]
    for total, rounds in zip(sums, recent, strict=True):
        for r in rounds:
            total[: len(r.draft_tokens)] += _survival(r)
    promised = sum(sum(_survival(r)[: r.verify_length]) for r in pooled)
    trust = min(1.0, (RECENT + sum(r.accepted for r in pooled)) / (RECENT + promised))
    everybody, counts = sums.sum(0) / len(pooled), np.array([[len(rounds)] for rounds in recent])
    return (trust * (sums + EVIDENCE * everybody) / (counts + EVIDENCE)).tolist()


def _survival(r: Round) -> Sequence[float]:
    """a_1..a_w of a draft; without confidences, what became of each token instead."""
    return r.survival if not math.isnan(r.confidence[0]) else [float(k < r.accepted) for k in range(len(r.draft_tokens))]


def _is_due(rounds: Sequence[Round], requests: int) -> bool:
    """Whether a request that has not drafted for long should look again; over all requests it happens once in RETRY rounds."""
    plain = sum(1 for _ in takewhile(lambda r: r.window == 0, reversed(rounds)))
    return plain > 0 and plain % (RETRY * requests) == 0
