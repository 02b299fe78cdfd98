"""Sampling and acceptance of R requests at once, on the device: the rules of :mod:`dspark.verify.sampling` and
:mod:`dspark.verify.accept` on whole tensors, without a question to the host.

The uniform numbers are arguments. A request draws 2W + 1 of them in every round: the first W draw its drafts, the next W judge them,
the last chooses the token after them. The token-by-token rule draws as many as it needs; given the same numbers, both decide the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dspark.verify.sampling import nucleus


class Samplings(NamedTuple):
    """How the next token is chosen, row by row."""

    temperature: Tensor  # [N] float32, 0 is greedy
    top_k: Tensor  # [N] int64, 0 keeps all
    top_p: Tensor  # [N] float32, 1 keeps all
    filtered: bool  # whether any row has a top_k or a top_p that drops something

    def at(self, rows: Tensor) -> Samplings:
        return Samplings(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.filtered)

    def probs(self, logits: Tensor) -> Tensor:
        """:meth:`dspark.verify.sampling.Sampling.probs`, each row with its own numbers. logits: [N, vocab]; returns float32."""
        logits, greedy = logits.float(), self.temperature[:, None] == 0
        most, best = logits.max(-1, keepdim=True)
        one_hot = torch.zeros_like(logits).scatter_(-1, best, (~most.isnan()).float())  # a row with NaN has no mass, so it is refused
        logits = (logits - most) / self.temperature[:, None].where(~greedy, 1.0)
        if self.filtered:
            k = self.top_k.where((self.top_k > 0) & (self.top_k < logits.shape[-1]), logits.shape[-1])
            smallest_kept = logits.sort(descending=True).values.gather(-1, k[:, None] - 1)
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        probs = logits.softmax(-1)
        if self.filtered:
            top_p = self.top_p[:, None]
            probs = nucleus(probs, top_p).where(top_p < 1, probs)
        return one_hot.where(greedy, probs)


def choose_each(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Per row the index i with probability p_i, by inverting the cumulative distribution; −1 where the row sums to nothing positive.
    probs: [N, vocab] float32; uniforms: [N] float64 in [0, 1). Returns [N] int64."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).clamp_(max=probs.shape[-1] - 1)
    return index.where(total > 0, -1)[:, 0]


class Block(NamedTuple):
    """R blocks of drafts to be judged, on a grid W wide."""

    tokens: Tensor  # [R, W] int64, x_1..x_W; those after the first ℓ are not read
    lengths: Tensor  # [R] int64, ℓ
    first: Tensor  # [R] int64, the row of the flat logits that judges x_1; the next rows judge the next drafts

    @property
    def judged_by(self) -> Tensor:
        """[R, W]: the flat row that judges each draft; any row for drafts that are not checked."""
        each = torch.arange(self.tokens.shape[1], device=self.first.device)
        return (self.first[:, None] + each).where(each < self.lengths[:, None], 0)

    def accepted(self, accepts: Tensor) -> Tensor:
        """How many drafts stay: the longest prefix of ``accepts`` [R, W] within ℓ. Returns [R]."""
        checked = torch.arange(self.tokens.shape[1], device=self.first.device) < self.lengths[:, None]
        return (accepts & checked).long().cumprod(1).sum(1)


def best_each(logits: Tensor) -> Tensor:
    """The arg max of each row; −1 where the row has a NaN, which no maximum is larger than. logits: [N, vocab]. Returns [N] int64."""
    most, best = logits.float().max(-1)
    return best.where(~most.isnan(), -1)


def accept_greedy(block: Block, best: Tensor) -> tuple[Tensor, Tensor]:
    """The rule for one-hot rows. best: [N] int64, see :func:`best_each`, of the target's flat rows. Returns accepted and next token,
    two of [R]; the token is −1 where its row has a NaN."""
    accepted = block.accepted(best[block.judged_by] == block.tokens)
    return accepted, best[block.first + accepted]


def accept_each(
    block: Block, drafted: Tensor, drawn_from: Callable[[Tensor], Tensor], p_target: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`dspark.verify.accept.accept` for R requests.

    drafted: [R, W] float32, p_d(x_k). p_target: [N, vocab] float32, flat.
    drawn_from: indices k [R] → the rows [R, vocab] float32 that x_{k+1} was drawn from.
    uniforms: [R, W + 1] float64: the first W judge the drafts, the last chooses the token after them.
    Returns accepted and next token, two of [R]; the token is −1 where the target's row sums to nothing positive.
    """
    judged = p_target[block.judged_by, block.tokens]  # [R, W]
    accepted = block.accepted(uniforms[:, :-1] * drafted < judged)
    row = p_target[block.first + accepted]  # [R, vocab]
    rest = (row - drawn_from(accepted.clamp(max=drafted.shape[1] - 1))).clip(0)
    mass = rest.sum(-1, keepdim=True)
    rejected = (accepted < block.lengths)[:, None]
    return accepted, choose_each((rest / mass).where(rejected & (mass > 0), row), uniforms[:, -1])
