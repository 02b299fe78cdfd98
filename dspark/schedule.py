"""Scheduling policies: how many of the drafted tokens are worth checking.

A policy answers three questions. ``window``, before drafting: how many tokens to draft, from past rounds alone (0 = plain
autoregressive step, the drafter is not run). ``lengths``: how many of them to verify, from the survival probabilities
a_k = Π_{i≤k} c_i of all active requests; for a single one ``admits`` asks it already while the block is drawn. c_k does not
depend on x_k, and cutting at k reads only c_1..c_k, so no cut ever depends on the token it cuts: that is why the output law
stays the target's. ``siblings``, behind drafting: how many further guesses to check beside the block; these may depend on all that
was drafted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

SIBLING_RATES = (0.17, 0.07, 0.04)  # set on dev prompts, with the drafter of the second training run


class Past(Protocol):
    """What a policy may know of a request's last round (see :class:`dspark.decode.Round`)."""

    window: int
    verify_length: int
    accepted: int
    target_probs_of_drafts: tuple[float, ...]


class Policy:
    """The base: draft a full block, verify all of it."""

    def window(self, last: Past | None, block_size: int) -> int:
        """Tokens to draft for a request whose last round was ``last`` (None at the start); 0 … block_size."""
        return block_size

    def lengths(self, confidence: Sequence[Tensor]) -> list[int]:
        """Tokens to verify for each of R requests. confidence: R tensors [w_r] float32, c_k of each request's draft."""
        return [len(c) for c in confidence]

    def admits(self, confidence: Sequence[float]) -> bool:
        """Is the next token of a request, alone in its round, worth drawing? confidence: c_1..c_k, asked before x_k is drawn.

        A cut at k reads c_1..c_k alone, so it can be made as soon as these are known, and what would not be checked is not drawn.
        """
        return self.lengths([torch.tensor(confidence)]) == [len(confidence)]

    def siblings(self, confidence: Tensor) -> list[int]:
        """How many siblings of x_1, x_2, … of a request, alone in its round, to check beside the block (:mod:`dspark.verify.accept`).
        confidence: [w] float32. None here; who overrides this overrides :attr:`chain`.

        It may depend on all that is drafted: a sibling is tried only where its draft was rejected, against what that left owing.
        """
        return []

    @property
    def chain(self) -> Policy:
        """The same policy for drafts that have no siblings."""
        return self

    def check(self, block_size: int, has_confidence: bool) -> None:
        """Raises ValueError if this policy cannot run with such a drafter."""


@dataclass(frozen=True)
class Autoregressive(Policy):
    """ℓ = 0 always: plain decoding. Nothing is drafted, so nothing can bias the law."""

    def window(self, last: Past | None, block_size: int) -> int:
        return 0


@dataclass(frozen=True)
class FixedWindow(Policy):
    """ℓ = n: classic speculative decoding (Leviathan et al.; Chen et al., 2023). A constant cannot bias the law.

    n: tokens per round; None for the drafter's whole block.
    """

    n: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"FixedWindow needs at least 1 token, got {self.n}: use Autoregressive() for plain decoding")

    def window(self, last: Past | None, block_size: int) -> int:
        return block_size if self.n is None else self.n

    def check(self, block_size: int, has_confidence: bool) -> None:
        if self.n is not None and self.n > block_size:
            raise ValueError(f"a window of {self.n} is more than the drafter's block size {block_size}: choose 1..{block_size}")


@dataclass(frozen=True)
class MTP1(FixedWindow):
    """ℓ = 1: the production baseline that the published 57–85 % was measured against."""

    n: int | None = 1


@dataclass(frozen=True)
class AdaptiveWindow(Policy):
    """The press report's rule: the target's own view of the last drafts moves the window.

    After a verification the mean probability that the target gave the drafts it checked is compared: above
    ``widen_threshold`` the window grows by one, below ``narrow_threshold`` it shrinks by one, below ``fallback_threshold``
    the next step is plain autoregressive and drafting resumes after it with ``min_window``. Only past rounds are read, so the
    choice is made before any token it concerns exists: the law cannot be biased.
    """

    widen_threshold: float = 0.6
    narrow_threshold: float = 0.3
    fallback_threshold: float = 0.05
    min_window: int = 1
    max_window: int | None = None

    def __post_init__(self) -> None:
        order = (self.fallback_threshold, self.narrow_threshold, self.widen_threshold)
        if not 0 <= order[0] <= order[1] <= order[2] <= 1:
            raise ValueError(f"thresholds must satisfy 0 ≤ fallback ≤ narrow ≤ widen ≤ 1, got fallback, narrow, widen = {order}")
        if self.min_window < 1 or (self.max_window is not None and self.max_window < self.min_window):
            raise ValueError(f"windows must satisfy 1 ≤ min_window ≤ max_window, got {self.min_window} and {self.max_window}")

    def window(self, last: Past | None, block_size: int) -> int:
        widest = block_size if self.max_window is None else self.max_window
        if last is None:
            return max(self.min_window, widest // 2)
        if last.window == 0:
            return self.min_window
        checked = last.target_probs_of_drafts
        if not checked:  # the length limit cut the round: nothing was learnt
            return last.window
        mass = sum(checked) / len(checked)
        if mass < self.fallback_threshold:
            return 0
        step = (mass > self.widen_threshold) - (mass < self.narrow_threshold)
        return min(max(last.window + step, self.min_window), widest)

    def check(self, block_size: int, has_confidence: bool) -> None:
        if max(self.min_window, self.max_window or 0) > block_size:
            raise ValueError(f"windows up to {max(self.min_window, self.max_window or 0)} exceed the drafter's block size {block_size}")


@dataclass(frozen=True)
class Shortened(Policy):
    """Another policy in blocks of at most ``n`` tokens, as if the drafter's own block ended there. A constant cannot bias the law."""

    policy: Policy
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a block has at least 1 token, got {self.n}: use Autoregressive() for plain decoding")

    def window(self, last: Past | None, block_size: int) -> int:
        return self.policy.window(last, self.n)

    def lengths(self, confidence: Sequence[Tensor]) -> list[int]:
        return self.policy.lengths(confidence)

    def admits(self, confidence: Sequence[float]) -> bool:
        return self.policy.admits(confidence)

    def siblings(self, confidence: Tensor) -> list[int]:
        return self.policy.siblings(confidence)

    @property
    def chain(self) -> Policy:
        return self if self.policy.chain is self.policy else replace(self, policy=self.policy.chain)

    def check(self, block_size: int, has_confidence: bool) -> None:
        if self.n > block_size:
            raise ValueError(f"blocks of {self.n} tokens are more than the drafter's block size {block_size}: choose 1..{block_size}")
        self.policy.check(self.n, has_confidence)


class _NeedsConfidence(Policy):
    def check(self, block_size: int, has_confidence: bool) -> None:
        if not has_confidence:
            raise ValueError(f"{type(self).__name__} needs a drafter with a confidence head: choose FixedWindow or AdaptiveWindow")


@dataclass(frozen=True)
class ConfidenceThreshold(_NeedsConfidence):
    """Stop before the first k whose confidence falls under ``threshold``.

    on: "conditional" compares c_k, "survival" a_k = Π_{i≤k} c_i. Both are known before x_k is drawn and depend on x_<k only:
    whether x_k is checked does not depend on what x_k is, so the law is exact.
    """

    threshold: float = 0.1
    on: str = "survival"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}")
        if self.on not in ("conditional", "survival"):
            raise ValueError(f"on must be 'conditional' or 'survival', got {self.on!r}")

    def lengths(self, confidence: Sequence[Tensor]) -> list[int]:
        if self.on == "survival":
            confidence = [c.cumprod(-1) for c in confidence]
        return [int((c >= self.threshold).int().cumprod(-1).sum()) for c in confidence]


@dataclass(frozen=True)
class Admission:
    """One step of Algorithm 1: may draft ``position`` (1, 2, …) of request ``request`` be checked?

    Position 0 is the start, where nothing but the anchors is checked. sibling: 0 for the draft itself, else which of its siblings ·
    survival: a_{r,j}, of a sibling the probability that it is accepted · expected: tokens that the round would commit
    on average · budget: B, tokens in the target's pass · throughput: Θ, tokens per second · admitted: whether Θ rose.
    """

    request: int
    position: int
    survival: float
    expected: float
    budget: int
    throughput: float
    admitted: bool
    sibling: int = 0


@dataclass(frozen=True)
class PrefixScheduler(_NeedsConfidence):
    """The paper's Algorithm 1: over all requests, admit drafts while expected throughput rises, stop at the first fall.

    sps: target steps per second when one step checks B = Σ(1 + ℓ_r) tokens; measured (:mod:`dspark.tune.profile`). Candidates
    (r, j) are taken by falling survival a_{r,j}, and Θ = (R + Σ admitted a) / (draft_seconds + 1/SPS(B)). Stopping at the first
    fall is what keeps the law: whether (r, j) is admitted depends on survivals at or above a_{r,j} alone, hence on x_{r,<j}, never on
    x_{r,j} or later tokens. A search for the best budget over ALL candidates would read later confidences and bias it (Appendix A).

    draft_seconds: of the drafter's parallel pass. 0, the paper's rule, leaves it out: a server drafts while it verifies. On one stream
    the pass is waited for, so Θ can count it, and a little more is checked. max_window: tokens to draft at most, None for the whole
    block; a constant.

    sibling_rates: of all rejected drafts, the share whose first, second, … sibling is accepted; empty, the paper's rule, checks none.
    The i-th sibling of x_{r,j} is a candidate as well, once x_{r,j} and the siblings before it are admitted, with
    (a_{r,j−1} − a_{r,j}) · rate_i. So of its own request the admission of x_{r,j} still reads c_{r,1}..c_{r,j} alone.
    """

    sps: Callable[[int], float]
    draft_seconds: float = 0.0
    max_window: int | None = None
    sibling_rates: tuple[float, ...] = ()

    def window(self, last: Past | None, block_size: int) -> int:
        return block_size if self.max_window is None else self.max_window

    @cached_property
    def chain(self) -> PrefixScheduler:
        return replace(self, sibling_rates=()) if self.sibling_rates else self

    def check(self, block_size: int, has_confidence: bool) -> None:
        super().check(block_size, has_confidence)
        if self.max_window is not None and not 1 <= self.max_window <= block_size:
            raise ValueError(f"max_window {self.max_window} must lie in 1..{block_size}, the drafter's block size")

    def __post_init__(self) -> None:
        if not self.draft_seconds >= 0:
            raise ValueError(f"draft_seconds must be at least 0, got {self.draft_seconds}")
        if not all(0 <= rate < 1 for rate in self.sibling_rates) or sum(self.sibling_rates) > 1:
            raise ValueError(f"sibling_rates must lie in [0, 1) and sum to 1 at most, got {self.sibling_rates}")

    def lengths(self, confidence: Sequence[Tensor]) -> list[int]:
        lengths = [0] * len(confidence)
        for step in self.admissions(confidence):
            if step.admitted and step.position and not step.sibling:
                lengths[step.request] = step.position
        return lengths

    def siblings(self, confidence: Tensor) -> list[int]:
        counts = [0] * len(confidence)
        for step in self.admissions([confidence]) if self.sibling_rates else ():
            if step.admitted and step.sibling:
                counts[step.position - 1] = step.sibling
        return counts

    def admissions(self, confidence: Sequence[Tensor]) -> Iterator[Admission]:
        """The path of the algorithm, the start first; only its last step can be one that was not admitted."""
        survival = [c.cumprod(-1).tolist() for c in confidence]
        expected, budget = float(len(survival)), len(survival)
        best = self._throughput(expected, budget)
        yield Admission(0, 0, 1.0, expected, budget, best, True)
        # Survival never rises along a request, so the largest remaining candidate is always some request's next token, or a sibling.
        heap = [(-a[0], r, 1, 0) for r, a in enumerate(survival) if a]
        heapq.heapify(heap)
        while heap:
            negative, r, position, sibling = heapq.heappop(heap)
            expected, budget = expected - negative, budget + 1
            throughput = self._throughput(expected, budget)
            admitted = throughput > best
            yield Admission(r, position, -negative, expected, budget, throughput, admitted, sibling)
            if not admitted:
                break
            best = throughput
            if not sibling and position < len(survival[r]):
                heapq.heappush(heap, (-survival[r][position], r, position + 1, 0))
            if sibling < len(self.sibling_rates):
                rejected = (survival[r][position - 2] if position > 1 else 1.0) - survival[r][position - 1]
                heapq.heappush(heap, (-rejected * self.sibling_rates[sibling], r, position, sibling + 1))

    def _throughput(self, expected: float, budget: int) -> float:
        sps = self.sps(budget)
        return expected * sps / (1 + self.draft_seconds * sps)
