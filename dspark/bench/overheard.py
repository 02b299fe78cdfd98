"""Listens while a request is decoded: with what probability each checked draft was accepted, before it was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.decode import DraftSource
from dspark.draft.drafter import Draft
from dspark.target.target import Target
from dspark.verify.sampling import Sampling


class _Stand:
    """Stands in for another object: whatever it has not itself is the other's."""

    def __init__(self, other: object) -> None:
        self.other = other

    def __getattr__(self, name: str) -> object:
        return getattr(self.other, name)


class Overheard:
    """``target`` and ``drafter`` decode as the originals do; ``acceptances`` gets, for every target pass behind the prefill, the
    conditional acceptance Σ min(p_d, p_t) of each draft it checked.

    That is the probability that x_k survives given x_<k, as c_k estimates it: what a head that knew both laws would state.
    """

    def __init__(self, target: Target, drafter: DraftSource, sampling: Sampling) -> None:
        self.sampling = sampling
        self.acceptances: list[list[float]] = []
        self.draft: Draft | None = None
        self.target, self.drafter = _Stand(target), _Stand(drafter)
        self.target.forward, self.drafter.draft = self._forward, self._draft

    def _draft(self, *arguments: object) -> Draft:
        self.draft = self.drafter.other.draft(*arguments)
        return self.draft

    def _forward(
        self, token_ids: Tensor, *arguments: object, logits_to_keep: int = 0, siblings: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        logits, taps = self.target.other.forward(token_ids, *arguments, logits_to_keep=logits_to_keep, siblings=siblings)
        if not logits_to_keep:  # the prefill asks for its last row alone
            checked = token_ids.shape[1] - 1 - len(siblings)
            laws = zip(self.draft.probs, self.sampling.probs(logits[0, :checked]), strict=False) if checked else ()
            self.acceptances.append([float(torch.minimum(p_draft, p_target).sum()) for p_draft, p_target in laws])
        return logits, taps
