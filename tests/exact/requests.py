"""One round over several requests, each given as tables of fractions: what a schedule may know of the others, and Appendix A.

The scheduling policy and the acceptance rule are the product's; only the models are tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, product
from math import prod

import numpy as np
import torch
from torch import Tensor

from dspark.lab.branches import Branch, Distribution, every_branch
from dspark.schedule import ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler
from dspark.verify.accept import accept

Text = tuple[int, ...]
BLOCK_SIZE = 2
TEXTS = tuple(text for length in range(BLOCK_SIZE + 1) for text in product((0, 1), repeat=length))


@dataclass(frozen=True)
class Request:
    """Two tokens, 0 and 1. p_target, p_draft: text so far → probability of token 0. confidence: drafts so far → c_k."""

    p_target: Mapping[Text, Fraction]
    p_draft: Mapping[Text, Fraction]
    confidence: Mapping[Text, float]


@dataclass(frozen=True)
class GlobalArgmax(PrefixScheduler):
    """The wrong way: the budget with the highest expected throughput of all.

    In Appendix A, ℓ is 2 if the first draft is 0 and 0 if it is 1, since a second draft is promising only after 0. So a drafted 0 is
    always kept and a drafted 1 is always drawn again.
    """

    def lengths(self, confidence: Sequence[Tensor]) -> list[int]:
        requests = len(confidence)
        survival = sorted(((a, r) for r, c in enumerate(confidence) for a in c.cumprod(-1).tolist()), key=lambda each: -each[0])
        expected = accumulate((a for a, _ in survival), initial=float(requests))
        throughput = [tokens * self.sps(requests + extra) for extra, tokens in enumerate(expected)]
        admitted = Counter(r for _, r in survival[: throughput.index(max(throughput))])
        return [admitted[r] for r in range(requests)]


def fractions(*texts: str) -> dict[Text, Fraction]:
    """One for each of TEXTS, in their order: (), 0, 1, 00, 01, 10, 11."""
    return dict(zip(TEXTS, map(Fraction, texts), strict=True))


APPENDIX_A = Request(fractions(*["7/10"] * 7), fractions(*["1/2"] * 7), {(): 0.8, (0,): 0.9, (1,): 0.0})
APPENDIX_A_STEPS = {1: 1.0, 2: 0.5, 3: 0.45}.__getitem__
# After the first request's 0, its second draft outbids the second request's first one; after its 1 it does not.
PAIR = (
    Request(
        fractions("7/10", "1/4", "2/3", "1/2", "1/5", "3/7", "5/6"),
        fractions("1/2", "3/5", "1/3", "1/2", "1/2", "1/2", "1/2"),
        {(): 0.9, (0,): 0.95, (1,): 0.1},
    ),
    Request(
        fractions("2/5", "5/8", "1/9", "1/3", "3/4", "1/7", "1/2"),
        fractions("3/4", "1/2", "1/4", "1/2", "1/2", "1/2", "1/2"),
        {(): 0.85, (0,): 0.2, (1,): 0.9},
    ),
)
PAIR_STEPS = {2: 1.0, 3: 0.8, 4: 0.66, 5: 0.4, 6: 0.5}.__getitem__
PAIR_POLICIES: dict[str, Policy] = {
    "fixed": FixedWindow(2),
    "confidence": ConfidenceThreshold(0.5),
    "conditional": ConfidenceThreshold(0.88, on="conditional"),
    "prefix": PrefixScheduler(PAIR_STEPS),
}


def one_round(requests: Sequence[Request], policy: Policy, branch: Branch) -> tuple[list[Text], list[int]]:
    """Draft for every request, schedule all drafts together, accept. Returns the committed tokens and ℓ of each request."""
    drafts = [sample(request.p_draft, (), BLOCK_SIZE, branch) for request in requests]
    confidence = [torch.tensor([r.confidence[draft[:k]] for k in range(BLOCK_SIZE)]) for r, draft in zip(requests, drafts, strict=True)]
    lengths, texts = policy.lengths(confidence), []
    for request, draft, length in zip(requests, drafts, lengths, strict=True):
        p_draft, p_target = (np.array([row(p[draft[:k]]) for k in range(BLOCK_SIZE + 1)]) for p in (request.p_draft, request.p_target))
        accepted, next_token = accept(draft[:length], p_draft, p_target[: length + 1], branch)
        texts.append((*draft[:accepted], next_token))
    return texts, lengths


def joint_distribution(requests: Sequence[Request], policy: Policy, tokens: int = BLOCK_SIZE + 1) -> tuple[Distribution, int]:
    """Of the first ``tokens`` tokens of all requests, end to end, and its branches: one round, then plain sampling."""

    def run(branch: Branch) -> Text:
        texts, _ = one_round(requests, policy, branch)
        return sum((sample(r.p_target, text, tokens, branch) for r, text in zip(requests, texts, strict=True)), ())

    return every_branch(run)


def independent_distribution(requests: Sequence[Request], tokens: int = BLOCK_SIZE + 1) -> Distribution:
    """What :func:`joint_distribution` must be: independent requests, each with its target's own distribution."""
    distribution = {}
    for texts in product(product((0, 1), repeat=tokens), repeat=len(requests)):
        steps = [row(r.p_target[text[:k]])[text[k]] for r, text in zip(requests, texts, strict=True) for k in range(tokens)]
        distribution[sum(texts, ())] = prod(steps)
    return distribution


def sample(table: Mapping[Text, Fraction], text: Text, length: int, branch: Branch) -> Text:
    """Lengthen ``text`` to ``length`` tokens, or cut it there."""
    while len(text) < length:
        text = (*text, branch.choose(row(table[text])))
    return text[:length]


def row(p: Fraction) -> np.ndarray:
    return np.array([p, 1 - p], dtype=object)
