"""What decoding returns: one record per round, one per finished text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from operator import mul


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of draft, schedule, verify and rewind. Round 0 is the prefill: it drafts nothing and commits the first token.

    index: 0 for the prefill, then 1, 2, …
    committed: token ids that join the text: accepted drafts, then one correction or bonus; ends at the first end-of-text token.
    anchor: x_0, the last committed token before this round; None in the prefill.
    window: tokens that the policy asked for before drafting.
    draft_tokens: x_1..x_w, w ≤ window.
    confidence: c_1..c_w, probabilities; NaN from a drafter without a confidence head.
    verify_length: ℓ ≤ w, how many drafts the target checked.
    accepted: how many of those it accepted.
    target_probs_of_drafts: ℓ numbers, p_t(x_k) of the checked drafts; when decoding is greedy or has processors, those of temperature 1
        before processors.
    draft_probs_of_drafts: w numbers, p_d(x_k), the probabilities with which the drafts were drawn.
    logprobs: one number per committed token, natural log of the target's probability at temperature 1, before logit processors; () unless
        they were asked for.
    context: tokens of the request in the target's cache after the round; 0 if unknown, as in older traces.
    source: who drafted, such as "drafter" or "copy"; "" if nobody did.
    draft_seconds: host seconds of drafting and scheduling, for all requests of the step together.
    verify_seconds: host seconds of the target's pass, for all of them.
    seconds: host seconds from the start of the step until this round was committed.
    """

    index: int
    committed: tuple[int, ...]
    anchor: int | None = None
    window: int = 0
    draft_tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    verify_length: int = 0
    accepted: int = 0
    target_probs_of_drafts: tuple[float, ...] = ()
    draft_probs_of_drafts: tuple[float, ...] = ()
    logprobs: tuple[float, ...] = ()
    context: int = 0
    source: str = ""
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def survival(self) -> tuple[float, ...]:
        """a_k = Π_{i≤k} c_i, the probability that x_k and all drafts before it are accepted; w numbers."""
        return tuple(accumulate(self.confidence, mul))


@dataclass(frozen=True)
class Output:
    """A finished generation.

    text: the new tokens as text.
    token_ids: the new tokens, an end-of-text token included.
    rounds: in order, the prefill first.
    seconds: host seconds of the whole call, prefill included; the same for all prompts of one call.
    """

    text: str
    token_ids: list[int]
    rounds: list[Round]
    seconds: float

    @property
    def logprobs(self) -> list[float]:
        """One number per new token, as in :class:`Round`; empty unless they were asked for."""
        return [number for r in self.rounds for number in r.logprobs]

    @property
    def tokens_per_round(self) -> float:
        """τ: committed tokens per round, without the prefill and its token. NaN if the prefill ended the text."""
        rounds = self.rounds[1:]
        return sum(len(r.committed) for r in rounds) / len(rounds) if rounds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of its rounds, without the prefill. NaN if the prefill ended the text."""
        seconds = sum(r.seconds for r in self.rounds[1:])
        return sum(len(r.committed) for r in self.rounds[1:]) / seconds if seconds else math.nan
