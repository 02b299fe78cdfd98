"""One round over several requests at once, each given as tables of fractions: small enough to see what a schedule may know.

The scheduling policy and the acceptance rule are the product's; only the two models are tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod

import numpy as np
import torch

from dspark.proof.branches import Law, enumerate_law
from dspark.schedule import ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler
from dspark.verify.accept import accept
from dspark.verify.sampling import Chance

Text = tuple[int, ...]
BLOCK_SIZE = 2
TEXTS = tuple(text for length in range(BLOCK_SIZE + 1) for text in product((0, 1), repeat=length))


@dataclass(frozen=True)
class Request:
    """Two tokens, 0 and 1. p_target, p_draft: text so far → probability of token 0 · confidence: drafts so far → c_k."""

    p_target: Mapping[Text, Fraction]
    p_draft: Mapping[Text, Fraction]
    confidence: Mapping[Text, float]


def _chances(*fractions: str) -> dict[Text, Fraction]:
    """One fraction for each of TEXTS, in their order: (), 0, 1, 00, 01, 10, 11."""
    return dict(zip(TEXTS, map(Fraction, fractions), strict=True))


# Behind the first request's 0 its second draft outbids the second request's first one, behind its 1 it does not.
PAIR = (
    Request(
        p_target=_chances("7/10", "1/4", "2/3", "1/2", "1/5", "3/7", "5/6"),
        p_draft=_chances("1/2", "3/5", "1/3", "1/2", "1/2", "1/2", "1/2"),
        confidence={(): 0.9, (0,): 0.95, (1,): 0.1},
    ),
    Request(
        p_target=_chances("2/5", "5/8", "1/9", "1/3", "3/4", "1/7", "1/2"),
        p_draft=_chances("3/4", "1/2", "1/4", "1/2", "1/2", "1/2", "1/2"),
        confidence={(): 0.85, (0,): 0.2, (1,): 0.9},
    ),
)
PAIR_STEPS_PER_SECOND = {2: 1.0, 3: 0.8, 4: 0.66, 5: 0.4, 6: 0.5}.__getitem__
PAIR_POLICIES: dict[str, Policy] = {
    "fixed:2": FixedWindow(2),
    "confidence": ConfidenceThreshold(0.5),
    "conditional": ConfidenceThreshold(0.88, on="conditional"),
    "prefix-jagged": PrefixScheduler(PAIR_STEPS_PER_SECOND),
}


def one_round(requests: Sequence[Request], policy: Policy, chance: Chance) -> tuple[list[Text], list[int]]:
    """Draft for every request, schedule all drafts together, accept. Returns the committed tokens and ℓ of each request."""
    drafts = [_draft(request, chance) for request in requests]
    confidence = [[request.confidence[draft[:k]] for k in range(BLOCK_SIZE)] for request, draft in zip(requests, drafts, strict=True)]
    lengths = policy.lengths([torch.tensor(c) for c in confidence])
    texts = []
    for request, draft, length in zip(requests, drafts, lengths, strict=True):
        p_draft = np.array([_row(request.p_draft[draft[:k]]) for k in range(BLOCK_SIZE)])
        p_target = np.array([_row(request.p_target[draft[:k]]) for k in range(length + 1)])
        accepted, next_token = accept(draft[:length], p_draft, p_target, chance)
        texts.append((*draft[:accepted], next_token))
    return texts, lengths


def joint_law(requests: Sequence[Request], policy: Policy, tokens: int = BLOCK_SIZE + 1) -> tuple[Law, int]:
    """The law of the first ``tokens`` tokens of all requests, end to end, and its branches: a round, and plain sampling behind it."""

    def run(chance: Chance) -> Text:
        texts, _ = one_round(requests, policy, chance)
        return sum((_continued(*each, tokens, chance) for each in zip(requests, texts, strict=True)), ())

    return enumerate_law(run)


def target_law(requests: Sequence[Request], tokens: int = BLOCK_SIZE + 1) -> Law:
    """What :func:`joint_law` must be: independent requests, each with its target's own law."""
    texts = list(product((0, 1), repeat=tokens))
    law = {}
    for chosen in product(texts, repeat=len(requests)):
        rows = [(_row(r.p_target[text[:k]]), text[k]) for r, text in zip(requests, chosen, strict=True) for k in range(tokens)]
        law[sum(chosen, ())] = prod(row[token] for row, token in rows)
    return law


def _draft(request: Request, chance: Chance) -> Text:
    draft: Text = ()
    for _ in range(BLOCK_SIZE):
        draft = (*draft, chance.choose(_row(request.p_draft[draft])))
    return draft


def _continued(request: Request, text: Text, tokens: int, chance: Chance) -> Text:
    while len(text) < tokens:
        text = (*text, chance.choose(_row(request.p_target[text])))
    return text[:tokens]


def _row(p: Fraction) -> np.ndarray:
    return np.array([p, 1 - p], dtype=object)
