"""Drafting by looking up: when the text repeats itself, the context already holds the block (prompt lookup; Saxena, 2023), and when
it repeats what the target wrote elsewhere, a memory of phrases does (:mod:`dspark.phrases`)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dspark.draft.drafter import NOTHING, Admits, Draft, Drafter, DraftState, everything
from dspark.phrases import ORDERS, PhraseMemory
from dspark.target.target import Target
from dspark.verify.sampling import Chance, Sampling

MAX_COPY = 16  # tokens
LEAST_SURVIVAL = 0.1  # a block ends where it is this unlikely to be right so far
# How often what followed an n-gram of so many tokens follows it again: set after a trial count on self-play text. Constants, so
# that a draft follows from the text alone and a trace can be replayed.
RATES = {1: 0.3, 2: 0.45, 3: 0.55, 4: 0.65, 5: 0.7, 6: 0.9}
LONGEST = max(RATES)
Gram = tuple[int, ...]
COPIED = ("copy", "phrase")  # sources of drafts that were looked up, not computed


@dataclass
class LookupState:
    """Committed tokens, and what follows each n-gram among them."""

    drafter: DraftState | None
    tokens: list[int] = field(default_factory=list)
    follows: dict[Gram, int] = field(default_factory=dict)  # n-gram → the token behind its last occurrence


class ContextLookup:
    """Wraps a drafter, or does without one: token by token, the draft is what followed the longest end of the text that is known.

    Each draft is what followed the longest n-gram that ends the text: at least ``min_match`` tokens of it in the context, or one of
    ``phrases``; of two equally long ones the context's counts. Drafts made so far count as text, so a loop is followed on and on. The
    distribution of such a draft is one-hot, chosen by past tokens alone, and the same exact rule checks it. Where nothing is known the
    wrapped drafter proposes, at most its own block, and hears what is known to follow its drafts; without one (None) the round is a
    plain step, and ``target`` says whose vocabulary is copied: so any causal LM decodes, with nothing trained.

    min_match: tokens that must repeat, at least 1. max_copy: longest block in tokens; looking up costs nothing, so it may be longer
    than the drafter's.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        min_match: int = 2,
        max_copy: int = MAX_COPY,
        *,
        phrases: PhraseMemory | None = None,
        target: Target | None = None,
    ) -> None:
        if drafter is None and target is None:
            raise ValueError("copying without a drafter needs the target's vocabulary: pass ContextLookup(None, target=target)")
        if min_match < 1:
            raise ValueError(f"min_match must be at least 1, got {min_match}")
        if max_copy < 1:
            raise ValueError(f"max_copy must be at least 1, got {max_copy}")
        self.drafter, self.phrases, self.target, self.min_match, self.max_copy = drafter, phrases, target, min_match, max_copy
        self.lengths = range(max(min_match, LONGEST), 0, -1)  # of n-grams, the longest asked first

    @property
    def block_size(self) -> int:
        return max(self.max_copy, self.drafter.block_size) if self.drafter else self.max_copy

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.drafter.target_layer_ids if self.drafter else ()

    @property
    def has_confidence(self) -> bool:
        return self.drafter.has_confidence if self.drafter else True

    def new_state(self, prompt: Sequence[int] = ()) -> LookupState:
        if self.drafter is None:
            return LookupState(None)
        return LookupState(self.drafter.new_state(prompt))

    def extend(self, state: LookupState, token_ids: Sequence[int], taps: Tensor | None) -> None:
        for token in token_ids:
            # Indexed one token late: the n-grams that end the text have nothing behind them yet.
            state.follows.update((gram, token) for gram in self._ends(state.tokens))
            state.tokens.append(token)
        if self.drafter:
            self.drafter.extend(state.drafter, token_ids, taps)

    def draft(self, state: LookupState, anchor: int, window: int, sampling: Sampling, chance: Chance, admits: Admits = everything) -> Draft:
        """Looking up costs nothing, so ``admits`` is the wrapped drafter's to ask."""
        text = [*state.tokens[-max(self.lengths) :], anchor]
        follows = ChainMap(dict.fromkeys(self._ends(state.tokens), anchor), state.follows)  # the anchor, not yet indexed, included
        tokens, rates, source, survival = [], [], "", 1.0
        while len(tokens) < min(window, self.max_copy) and (found := self._follower(follows, [*text, *tokens])) is not None:
            token, rate, known_by = found
            survival *= rate
            if survival < LEAST_SURVIVAL:
                break
            source = source or known_by
            tokens.append(token)
            rates.append(rate)
        if tokens:
            return self._certain(tokens, rates, source)
        if self.drafter is None:
            return NOTHING
        window = min(window, self.drafter.block_size)
        return self.drafter.draft(state.drafter, anchor, window, sampling, chance, admits, partial(self._vote, follows, text))

    def _follower(self, follows: Mapping[Gram, int], text: Sequence[int]) -> tuple[int, float, str] | None:
        """What follows the longest known end of the text: a token, its rate in 0..1, who knows it."""
        for length in self.lengths:
            gram = tuple(text[-length:])
            if len(gram) < length:
                continue
            if gram in follows:
                return follows[gram], RATES[min(length, LONGEST)], "copy"
            if self.phrases is not None and length in ORDERS and (found := self.phrases.follower(gram)) is not None:
                return *found, "phrase"
        return None

    def _ends(self, tokens: Sequence[int]) -> list[Gram]:
        """The n-grams that end these tokens, of all lengths that may be copied behind."""
        return [tuple(tokens[-length:]) for length in self.lengths if self.min_match <= length <= len(tokens)]

    def _vote(self, follows: Mapping[Gram, int], text: Sequence[int], drafts: Sequence[int]) -> tuple[int, float] | None:
        """What is known to follow the drafts so far, though nothing known follows the anchor: inside a block the drafter hears it
        (:meth:`dspark.draft.drafter.Drafter.draft`)."""
        found = self._follower(follows, [*text, *drafts])
        return found and found[:2]

    def _certain(self, tokens: list[int], confidence: list[float], source: str) -> Draft:
        """A draft without chance: one-hot distributions."""
        vocab_size, device = self._place()
        probs = torch.zeros(len(tokens), vocab_size, device=device)
        probs[range(len(tokens)), tokens] = 1.0
        return Draft(tokens, probs, torch.tensor(confidence), source)

    def _place(self) -> tuple[int, torch.device]:
        """Width and device of the distributions."""
        if self.target:
            return self.target.vocab_size, self.target.device
        return self.drafter.config.vocab_size, self.drafter.head_weight.device
