"""Scheduling policies: how many of the drafted tokens the target should check.

A policy answers two questions in a round. ``windows``, before drafting: how many tokens to draft, from past rounds alone (0: a plain
step, the drafter is not run); most answer request by request, in ``window``. ``lengths``, after it: how many of them to verify, from
past rounds and the survival a_k = Π_{i≤k} c_i of all requests. c_k does not depend on x_k, and cutting at k reads only c_1..c_k, so no
cut depends on the token it cuts: that keeps the target's distribution exact. A new policy is one class and one row of
:data:`dspark.schedule.POLICIES`, where names, sliders, labels and colours live.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dspark.round import Round

Histories = Sequence[Sequence[Round]]  # of R requests: the finished rounds of each, the prefill first
SPS = Callable[[int], float]  # target steps per second when one step checks B tokens, such as a dspark.tune.profile.SPSCurve


class Policy:
    """The base: draft a full block, verify all of it."""

    def window(self, last: Round | None, block_size: int) -> int:
        """Tokens to draft, 0..block_size, for a request whose last round was ``last`` (None at the start)."""
        return block_size

    def windows(self, histories: Histories, block_size: int) -> list[int]:
        """Tokens to draft for each of R requests."""
        return [self.window(rounds[-1] if len(rounds) > 1 else None, block_size) for rounds in histories]

    def lengths(self, confidence: Sequence[Tensor], histories: Histories = ()) -> list[int]:
        """Tokens to verify for each of R requests. confidence: R tensors [w_r] float32, c_k of each request's draft."""
        return [len(c) for c in confidence]

    @property
    def reads_confidence(self) -> bool:
        """Whether ``lengths`` reads the confidences; if not, nobody waits for them."""
        return type(self).lengths is not Policy.lengths

    def check(self, block_size: int, has_confidence: bool) -> None:
        """Raises ValueError if this policy cannot run with such a drafter."""


@dataclass(frozen=True)
class Autoregressive(Policy):
    """ℓ = 0 always: plain decoding. Nothing is drafted."""

    def window(self, last: Round | None, block_size: int) -> int:
        return 0


@dataclass(frozen=True)
class FixedWindow(Policy):
    """ℓ = n: classic speculative decoding (Leviathan et al.; Chen et al., 2023). A constant cannot bias the distribution.

    n: tokens per round; None for the drafter's whole block.
    """

    n: int | None = None

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"FixedWindow needs at least 1 token, got {self.n}: use Autoregressive() for plain decoding")

    def window(self, last: Round | None, block_size: int) -> int:
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
    """The press report's rule: the window follows the probabilities that the target gave to the last drafts.

    After each round their mean over the checked drafts is compared with three thresholds; the first window is half the longest. Only
    past rounds are read, so the window is chosen before its tokens exist: the distribution cannot be biased.

    widen_threshold: above it the window grows by one.
    narrow_threshold: below it the window shrinks by one.
    fallback_threshold: below it the next step is plain autoregressive; then drafting resumes with ``min_window``.
    min_window, max_window: bounds in tokens; max_window None for the drafter's block size.
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

    def window(self, last: Round | None, block_size: int) -> int:
        widest = block_size if self.max_window is None else self.max_window
        if last is None:
            return max(self.min_window, widest // 2)
        if last.window == 0:
            return self.min_window
        checked = last.target_probs_of_drafts
        if not checked:  # the length limit left no draft to check, so nothing is known
            return last.window
        mass = sum(checked) / len(checked)
        if mass < self.fallback_threshold:
            return 0
        step = (mass > self.widen_threshold) - (mass < self.narrow_threshold)
        return min(max(last.window + step, self.min_window), widest)

    def check(self, block_size: int, has_confidence: bool) -> None:
        if (widest := max(self.min_window, self.max_window or 0)) > block_size:
            raise ValueError(f"a window of {widest} is more than the drafter's block size {block_size}: choose 1..{block_size}")


@dataclass(frozen=True)
class Shortened(Policy):
    """Another policy with blocks of at most ``n`` tokens, as if that were the drafter's block size."""

    policy: Policy
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"a block has at least 1 token, got {self.n}: use Autoregressive() for plain decoding")

    def windows(self, histories: Histories, block_size: int) -> list[int]:
        return self.policy.windows(histories, self.n)

    def lengths(self, confidence: Sequence[Tensor], histories: Histories = ()) -> list[int]:
        return self.policy.lengths(confidence, histories)

    @property
    def reads_confidence(self) -> bool:
        return self.policy.reads_confidence

    def check(self, block_size: int, has_confidence: bool) -> None:
        if self.n > block_size:
            raise ValueError(f"blocks of {self.n} tokens are more than the drafter's block size {block_size}: choose 1..{block_size}")
        self.policy.check(self.n, has_confidence)


class NeedsConfidence(Policy):
    """The base of policies that read confidences: it refuses a drafter without a confidence head."""

    def check(self, block_size: int, has_confidence: bool) -> None:
        if not has_confidence:
            raise ValueError(f"{type(self).__name__} needs a drafter with a confidence head: choose FixedWindow or AdaptiveWindow")


@dataclass(frozen=True)
class ConfidenceThreshold(NeedsConfidence):
    """Stop before the first k whose confidence falls under ``threshold``.

    threshold: in [0, 1].
    on: "conditional" compares c_k, "survival" a_k = Π_{i≤k} c_i.
    """

    threshold: float = 0.1
    on: str = "survival"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}")
        if self.on not in ("conditional", "survival"):
            raise ValueError(f"on must be 'conditional' or 'survival', got {self.on!r}")

    def lengths(self, confidence: Sequence[Tensor], histories: Histories = ()) -> list[int]:
        if self.on == "survival":
            confidence = [c.cumprod(-1) for c in confidence]
        return [int((c >= self.threshold).int().cumprod(-1).sum()) for c in confidence]
