"""The protocol of a draft source: what it is asked (:class:`Ask`) and what it returns (:class:`Draft`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dspark.verify.sampling import OneHot, Rng, Sampling

COPY = "copy"  # the source of a draft that was copied from the context


class Ask(NamedTuple):
    """What one request wants drafted.

    state: what the source remembers about the request.
    anchor: x_0.
    window: tokens to propose at most; at least 1.
    sampling: how the request's tokens are chosen.
    rng: the request's own random numbers.
    """

    state: object
    anchor: int
    window: int
    sampling: Sampling
    rng: Rng


@dataclass(frozen=True)
class Draft:
    """A proposed block of w tokens.

    tokens: w ids of the target's vocabulary.
    probs: [w, vocab] float32, exactly the distributions they were drawn from; where decoding is greedy or a text was copied, without
        their zeros.
    confidence: [w] float32, c_k, calibrated if the drafter was calibrated; NaN without a confidence head.
    source: who proposed it.
    """

    tokens: list[int]
    probs: Tensor | Sequence[OneHot]
    confidence: Tensor
    source: str = "drafter"


NOTHING = Draft([], torch.empty(0, 0), torch.empty(0), "")


class DraftSource(Protocol):
    """Anything that proposes blocks: the trained drafter, copying from the context, a baseline.

    block_size: most tokens it proposes at once.
    target_layer_ids: target layers whose output it reads; () for none.
    has_confidence: whether its drafts carry confidences; if not, they are NaN.

    A source may also have ``propose(asks) → drafts``, for several requests at once, and ``bytes_per_token`` of its keys and values.
    """

    block_size: int
    target_layer_ids: tuple[int, ...]
    has_confidence: bool

    def new_state(self, prompt: Sequence[int]) -> object:
        """What this source remembers about one request."""

    def extend(self, state: object, token_ids: Sequence[int], taps: Tensor | None) -> None:
        """The target has processed these committed tokens. taps: [1, tokens, m·hidden] of these, None without target_layer_ids."""

    def draft(self, state: object, anchor: int, window: int, sampling: Sampling, rng: Rng) -> Draft:
        """Propose at most ``window`` tokens after the anchor."""


def propose(source: DraftSource, asks: Sequence[Ask]) -> list[Draft]:
    """Every request's draft, made together if the source can."""
    together = getattr(source, "propose", None)
    return together(asks) if together else [source.draft(*ask) for ask in asks]
