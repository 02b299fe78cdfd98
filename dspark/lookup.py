"""Drafting by copying: when the text repeats itself, the context already holds the block (prompt lookup; Saxena, 2023), and when
it repeats what the target wrote elsewhere, a memory of phrases does (:mod:`dspark.phrases`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dspark.draft import NOTHING, Draft, Drafter, DraftState
from dspark.phrases import ORDERS, PhraseMemory
from dspark.sampling import Chance, Sampling
from dspark.target import Target

MAX_COPY = 12  # tokens
CONTEXT_RATE = 0.5  # of a vote from the context; constant, so that a draft follows from the text alone and a trace can be replayed
COPIED = ("copy", "phrase")  # sources of drafts that were looked up, not computed


@dataclass
class CopyRecord:
    """How copies have fared in one request: what the confidence in the next one rests on."""

    copy: Sequence[int] = ()  # the last copy, until it is known what really stood there
    copy_at: int = 0  # the position of its first token
    right: int = 0  # tokens that copies foretold rightly, and copies that ended in a wrong one
    wrong: int = 0

    @property
    def confidence(self) -> float:
        """The rate at which copies were right so far (rule of succession): known before the next one exists."""
        return (self.right + 1) / (self.right + self.wrong + 2)

    def expect(self, copy: Sequence[int], at: int) -> None:
        """A copy was drafted; its first token would stand at position ``at``."""
        self.copy, self.copy_at = copy, at

    def learn(self, text: Sequence[int]) -> None:
        """Compare the last copy with the text that came, checked or not: a copy that the policy cut short teaches, too."""
        for foretold, token in zip(self.copy, text[self.copy_at :] if self.copy else (), strict=False):
            if foretold != token:
                self.wrong += 1
                break
            self.right += 1
        self.copy = ()


@dataclass
class LookupState:
    """Committed tokens, what follows each n-gram among them, and how copies have fared in this request."""

    drafter: DraftState | None
    tokens: list[int] = field(default_factory=list)
    follows: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram → position behind its last occurrence
    copies: CopyRecord = field(default_factory=CopyRecord)


class ContextLookup:
    """Wraps a drafter, or does without one: if the last ``min_match`` tokens stand earlier in the context, what followed them
    there is the draft.

    A copy is a draft like any other: its distribution is one-hot, chosen by past tokens alone, and the same exact rule checks
    it. Where nothing repeats, ``phrases`` that the target writes elsewhere are drafted, if there are any that fit, and else the
    wrapped drafter proposes, at most its own block, and hears what is known to follow its drafts; without one (None) the round
    is a plain step, and ``target`` says whose vocabulary is copied: so any causal LM decodes, with nothing trained.
    min_match: tokens that must repeat, at least 1. max_copy: longest copy in tokens; a copy costs nothing to draft, so it may
    be longer than the block.
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
            # Indexed one token late: the n-gram that ends the text has nothing behind it yet.
            if len(state.tokens) >= self.min_match:
                state.follows[tuple(state.tokens[-self.min_match :])] = len(state.tokens)
            state.tokens.append(token)
        if self.drafter:
            self.drafter.extend(state.drafter, token_ids, taps)

    def draft(self, state: LookupState, anchor: int, window: int, sampling: Sampling, chance: Chance) -> Draft:
        state.copies.learn([*state.tokens, anchor])
        text = [*state.tokens[-self.min_match :], anchor]
        start = state.follows.get(tuple(text[-self.min_match :]))
        longest = min(window, self.max_copy)
        if start is not None:
            copy = [*state.tokens[start:], anchor][:longest]
            state.copies.expect(copy, len(state.tokens) + 1)
            return self._certain(copy, [state.copies.confidence] * len(copy), "copy")
        if self.phrases is not None:
            phrase, rates = self.phrases.continuation([*state.tokens[-ORDERS[0] :], anchor], longest)
            if phrase:
                return self._certain(phrase, rates, "phrase")
        if self.drafter is None:
            return NOTHING
        window = min(window, self.drafter.block_size)
        return self.drafter.draft(state.drafter, anchor, window, sampling, chance, partial(self._vote, state, anchor))

    def _vote(self, state: LookupState, anchor: int, drafts: Sequence[int]) -> tuple[int, float] | None:
        """What follows the drafts so far in the context or in a phrase, though nothing known follows the anchor: inside a block
        the drafter hears it (:meth:`dspark.draft.Drafter.draft`)."""
        tail = max(self.min_match, ORDERS[0])
        text = [*state.tokens[-tail:], anchor, *drafts]
        if (start := state.follows.get(tuple(text[-self.min_match :]))) is not None:
            return state.tokens[start], CONTEXT_RATE
        return self.phrases.follower(text) if self.phrases is not None else None

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
