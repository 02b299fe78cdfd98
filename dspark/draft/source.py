"""The protocol of a draft source: what it is asked (:class:`Ask`) and what it returns (:class:`Draft`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dspark.verify.sampling import Rng, Rows, Sampling

COPY = "copy"  # the source of a draft that was copied from the context


class Ask(NamedTuple):
    """What one request wants drafted."""

    state: object  # what the source remembers about the request
    anchor: int  # x_0
    window: int  # tokens to propose at most; at least 1
    sampling: Sampling  # how the request's tokens are chosen
    rng: Rng  # the request's own random numbers


@dataclass(frozen=True)
class Draft:
    """A proposed block of w tokens."""

    tokens: list[int]  # w ids of the target's vocabulary
    probs: Rows  # [w, vocab] float32 that they were drawn from
    confidence: Tensor  # [w] float32, c_k, calibrated if the drafter was calibrated; NaN without a confidence head
    source: str = "drafter"  # who proposed it


NOTHING = Draft([], torch.empty(0, 0), torch.empty(0), "")


class DraftSource(Protocol):
    """Anything that proposes blocks: the trained drafter, copying from the context, a baseline.

    A source may also have ``propose(asks) → drafts``, for several requests at once, and ``bytes_per_token`` of its keys and values.
    """

    block_size: int  # most tokens it proposes at once
    target_layer_ids: tuple[int, ...]  # target layers whose output it reads; () for none
    has_confidence: bool  # whether its drafts carry confidences; if not, they are NaN

    def new_state(self, prompt: Sequence[int]) -> object:
        """What this source remembers about one request."""

    def extend(self, state: object, token_ids: Sequence[int], taps: Tensor | None) -> None:
        """The target has processed these committed tokens. taps: [1, tokens, m·hidden] of these, None without target_layer_ids."""

    def draft(self, state: object, anchor: int, window: int, sampling: Sampling, rng: Rng) -> Draft:
        """Propose at most ``window`` tokens after the anchor."""


class Together:
    """A source that proposes for several requests at once, asked for one."""

    def draft(self, *ask: object) -> Draft:
        """Arguments as :class:`Ask`."""
        return self.propose([Ask(*ask)])[0]


def propose(source: DraftSource, asks: Sequence[Ask]) -> list[Draft]:
    """Every request's draft, made together if the source can."""
    together = getattr(source, "propose", None)
    return together(asks) if together else [source.draft(*ask) for ask in asks]
