"""Drafting by copying: where the text repeats itself, the context already holds the block (prompt lookup; Saxena, 2023)."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark.draft.drafter import Drafter, DraftState
from dspark.draft.source import COPY, NOTHING, Ask, Draft, Together, propose
from dspark.verify.sampling import OneHot

if TYPE_CHECKING:
    from dspark.target.target import Target

MAX_COPY = 16  # tokens
LEAST_SURVIVAL = 0.1  # a block ends before the first token whose survival a_k is lower
# n → c_k of a copied token: how often the token that followed an n-gram follows it again, counted on self-play text. Constants, so
# drafts depend on the text alone and a trace can be replayed.
RATES = {1: 0.3, 2: 0.45, 3: 0.55, 4: 0.65, 5: 0.7, 6: 0.9}
LONGEST = max(RATES)
Gram = tuple[int, ...]


@dataclass
class LookupState:
    """What is remembered about one request."""

    drafter: DraftState | None  # the wrapped drafter's state, None without one
    tokens: list[int] = field(default_factory=list)  # the committed tokens
    follows: dict[Gram, int] = field(default_factory=dict)  # n-gram → the token after its last occurrence


class ContextLookup(Together):
    """Copies where the text repeats itself; elsewhere the wrapped drafter proposes, or nobody.

    Token by token, the draft is what followed the longest suffix n-gram with a known continuation, at least ``min_match`` tokens of
    it. Drafts count as text, so a copy can run past the end of the text into itself. The distribution of such a draft is one-hot: it
    depends on past tokens alone, so the exact acceptance rule applies unchanged.

    drafter: proposes where nothing can be copied, at most its own block; None makes such a round a plain step.
    min_match: tokens that must repeat, at least 1.
    max_copy: longest copied block in tokens; copying costs nothing, so it may be longer than the drafter's.
    target: whose vocabulary is copied; needed only without a drafter. This needs no training.
    Raises ValueError for a number under 1, or if both drafter and target are missing.
    """

    def __init__(self, drafter: Drafter | None, min_match: int = 2, max_copy: int = MAX_COPY, *, target: Target | None = None) -> None:
        if drafter is None and target is None:
            raise ValueError("copying without a drafter needs the target's vocabulary: pass ContextLookup(None, target=target)")
        for name, value in (("min_match", min_match), ("max_copy", max_copy)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.drafter, self.target, self.min_match, self.max_copy = drafter, target, min_match, max_copy
        self.block_size = max(max_copy, drafter.block_size) if drafter else max_copy
        self.target_layer_ids = drafter.target_layer_ids if drafter else ()
        self.has_confidence = drafter.has_confidence if drafter else True
        self.bytes_per_token = getattr(drafter, "bytes_per_token", 0)
        self.gram_lengths = range(max(min_match, LONGEST), min_match - 1, -1)  # the longest is looked up first

    def new_state(self, prompt: Sequence[int] = ()) -> LookupState:
        return LookupState(self.drafter.new_state(prompt) if self.drafter else None)

    def extend(self, state: LookupState, token_ids: Sequence[int], taps: Tensor | None) -> None:
        """Index committed tokens. taps: [1, tokens, m·hidden], None if the wrapped drafter is."""
        self.index(state, token_ids)
        if self.drafter:
            self.drafter.extend(state.drafter, token_ids, taps)

    def index(self, state: LookupState, token_ids: Sequence[int]) -> None:
        """Committed tokens can be copied from now on."""
        for token in token_ids:
            # Indexed one token late: the n-grams that end the text have no continuation yet.
            state.follows.update((gram, token) for gram in self._suffixes(state.tokens))
            state.tokens.append(token)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """Copies for the requests that repeat themselves; the drafter proposes for all others together."""
        drafts = [self.copy(ask.state, ask.anchor, ask.window) for ask in asks]
        others = [i for i, draft in enumerate(drafts) if not draft.tokens]
        if self.drafter is not None and others:
            limit = self.drafter.block_size
            inner = [asks[i]._replace(state=asks[i].state.drafter, window=min(asks[i].window, limit)) for i in others]
            for i, draft in zip(others, propose(self.drafter, inner), strict=True):
                drafts[i] = draft
        return drafts

    def copy(self, state: LookupState, anchor: int, most: int) -> Draft:
        """At most so many copied tokens; NOTHING if no suffix has a known continuation."""
        text = [*state.tokens[-self.gram_lengths[0] :], anchor]
        follows = ChainMap(dict.fromkeys(self._suffixes(state.tokens), anchor), state.follows)  # the anchor is not indexed yet
        tokens, rates = [], []
        while len(tokens) < min(most, self.max_copy):
            gram = next((gram for gram in self._suffixes([*text, *tokens]) if gram in follows), None)  # the longest
            if gram is None or math.prod(rates) * (rate := RATES[min(len(gram), LONGEST)]) < LEAST_SURVIVAL:
                break
            tokens.append(follows[gram])
            rates.append(rate)
        return Draft(tokens, [*map(OneHot, tokens)], torch.tensor(rates), COPY) if tokens else NOTHING

    def _suffixes(self, tokens: Sequence[int]) -> list[Gram]:
        """The n-grams that end these tokens, the longest first."""
        return [tuple(tokens[-length:]) for length in self.gram_lengths if length <= len(tokens)]
