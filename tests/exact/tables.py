"""Models that are tables of fractions, served by the product's engine: what a schedule may know of other requests, and Appendix A."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, product
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from dspark.draft.source import Draft
from dspark.schedule import Policy, PrefixScheduler, parse_policy
from dspark.verify.sampling import Rng, Sampling
from exact.enumeration import Proof, enumerated, steps_per_second

Text = tuple[int, ...]
BLOCK_SIZE = 2
TEXTS = tuple(text for length in range(BLOCK_SIZE + 1) for text in product((0, 1), repeat=length))


class TokenSlot(list):
    """Stands for a slot of the target's cache: holds only the tokens."""

    @property
    def length(self) -> int:
        return len(self)

    def rewind(self, length: int) -> None:
        assert 0 <= length <= len(self)
        del self[length:]


class TablePass:
    """A target pass, and its cache, whose answers are looked up. look: tokens so far → (row, taps) after the last of them."""

    bytes_per_token = 0

    def __init__(self, look: Callable[[Text], tuple[object, Tensor | None]]) -> None:
        self.look, self.open, self.close = look, TokenSlot, TokenSlot.clear

    def new_cache(self) -> TablePass:
        return self

    def __call__(
        self, tokens: Sequence[list[int]], slots: Sequence[TokenSlot], cache: object, taps: Sequence[int] = (), *, last_only: bool = False
    ) -> tuple[list[list[object]], list[Tensor | None]]:
        rows, tapped = [], []
        for new, slot in zip(tokens, slots, strict=True):
            slot += new
            first = len(slot) if last_only else len(slot) - len(new) + 1
            found = [self.look(tuple(slot[:end])) for end in range(first, len(slot) + 1)]
            rows.append((torch if isinstance(found[0][0], Tensor) else np).stack([row for row, _ in found]))
            tapped.append(torch.cat([each for _, each in found], 1) if taps else None)
        return rows, tapped


@dataclass(frozen=True)
class Tables:
    """One request with two tokens, 0 and 1.

    p_target, p_draft: tenths, probability of token 0 after each of TEXTS.
    confidence: c_k after each of the first of TEXTS.
    """

    p_target: tuple[int, ...]
    p_draft: tuple[int, ...]
    confidence: tuple[float, ...]


class TableSource:
    """Drafts from tables. A prompt is the request's number; the first token of every text is 0, and the tables are about what follows."""

    block_size, target_layer_ids, has_confidence = BLOCK_SIZE, (), True

    def __init__(self, requests: Sequence[Tables]) -> None:
        self.requests = requests

    def new_state(self, prompt: Sequence[int]) -> list[int]:
        return []

    def extend(self, state: list[int], token_ids: Sequence[int], taps: None) -> None:
        state += token_ids

    def draft(self, state: list[int], anchor: int, window: int, sampling: Sampling, rng: Rng) -> Draft:
        (r, _, *text), tokens = (*state, anchor), []
        tables, rows, confidence = self.requests[r], [], []
        for _ in range(window):
            before = (*text, *tokens)
            rows.append(tenths(tables.p_draft, before))
            confidence.append(tables.confidence[TEXTS.index(before)])
            tokens.append(rng.choose(rows[-1]))
        return Draft(tokens, np.array(rows), torch.tensor(confidence))


def served_together(requests: Sequence[Tables], policy: Policy) -> Proof:
    """Every branch of an engine with these requests."""

    def row(tokens: Sequence[int]) -> np.ndarray:
        r, *text = tokens
        return tenths(requests[r].p_target, tuple(text[1:])) if text else tenths((10,), ())

    verifier = TablePass(lambda tokens: (row(tokens), None))
    target = SimpleNamespace(device=torch.device("cpu"), verifier=verifier, eos_token_ids=frozenset(), decode=None)
    sampling = SimpleNamespace(temperature=1.0, row=lambda row: row, probs=lambda rows: rows)
    return enumerated(target, TableSource(requests), policy, sampling, [([r], BLOCK_SIZE + 2) for r in range(len(requests))], row)


def tenths(table: Sequence[int], text: Text) -> np.ndarray:
    """The row after this text, as fractions."""
    p = Fraction(table[TEXTS.index(text)], 10)
    return np.array([p, 1 - p], dtype=object)


@dataclass(frozen=True)
class GlobalArgmax(PrefixScheduler):
    """The wrong way: the budget with the highest expected throughput of all.

    In Appendix A, ℓ is 2 if the first draft is 0 and 0 if it is 1, since a second draft is promising only after 0. So a drafted 0 is
    always kept and a drafted 1 is always drawn again.
    """

    def lengths(self, confidence: Sequence[Tensor], histories: object = ()) -> list[int]:
        requests = len(confidence)
        survival = sorted(((a, r) for r, c in enumerate(confidence) for a in c.cumprod(-1).tolist()), key=lambda each: -each[0])
        expected = accumulate((a for a, _ in survival), initial=float(requests))
        throughput = [tokens * self.sps(requests + extra) for extra, tokens in enumerate(expected)]
        admitted = Counter(r for _, r in survival[: throughput.index(max(throughput))])
        return [admitted[r] for r in range(requests)]


APPENDIX_A = Tables((7,) * 7, (5,) * 7, (0.8, 0.9, 0.0))  # TEXTS: (), 0, 1, 00, 01, 10, 11
APPENDIX_A_STEPS = steps_per_second(1.0, 0.5, 0.45)
# After the first request's 0, its second draft outbids the second request's first one; after its 1 it does not.
PAIR = (
    Tables((7, 2, 6, 5, 2, 4, 8), (5, 6, 3, 5, 5, 5, 5), (0.9, 0.95, 0.1)),
    Tables((4, 6, 1, 3, 7, 1, 5), (7, 5, 2, 5, 5, 5, 5), (0.85, 0.2, 0.9)),
)
PAIR_STEPS = steps_per_second(1.2, 1.0, 0.8, 0.66, 0.4, 0.5)
PAIR_POLICIES = {name: parse_policy(name, lambda: PAIR_STEPS) for name in ("fixed:2", "confidence:0.5", "conditional:0.6", "prefix")}


def first_tokens(policy: Policy) -> list[Fraction]:
    """Appendix A under a schedule: the probabilities of 0 and 1 as the first drafted token."""
    distribution = served_together([APPENDIX_A], policy).distribution
    return [sum(p for ((_, first, *_),), p in distribution.items() if first == token) for token in (0, 1)]
