"""Exact acceptance: one target pass over [anchor, x_1..x_ℓ] decides how many drafts stay (Leviathan et al., 2023, Theorem 1).

A position may have further guesses, its siblings, that stand beside the block in the same pass: each is tried against what the
rejections before it have left owing (Miao et al., 2024, SpecInfer, Algorithm 2; Yang et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dspark.verify.sampling import Chance, Rows


class Sibling(NamedTuple):
    """One more guess at ``position`` k = 1, 2, … · law: [vocab] float32, what the token was drawn from."""

    position: int
    token: int
    law: Tensor


def accept(
    draft_tokens: Sequence[int], p_draft: Tensor, p_target: Tensor | Rows, chance: Chance, siblings: Sequence[Sibling] = ()
) -> tuple[int, int]:
    """Keep the longest prefix of the drafts that the rule accepts, perhaps a sibling behind it, and draw the one token behind that.

    draft_tokens: ℓ ids, x_k drawn from ``p_draft[k−1]`` · p_draft: [≥ ℓ, vocab] float32 · p_target: [ℓ+1+siblings, vocab] float32,
    the rows behind the anchor, the drafts and the siblings · siblings: those of one position in the order in which they were drawn.
    Returns (row, next_token), the row of p_target that the next token stands behind: k if k drafts were accepted, ℓ+1+i if sibling i
    (0-based) was. x_k is accepted with probability min(1, p_t(x_k) / p_d(x_k)); at the first rejection the residual takes the place of
    p_t, and the siblings of x_k are tried against it in the same way; if none is accepted, the next token comes from what is left.
    Behind an accepted token it comes from the target's own row (the bonus). Every token then follows p_target exactly, whatever the
    drafts were drawn from. Greedy is the case of one-hot rows.

    Only indexing, −, clip, sum and / touch the rows, so arrays of fractions do as well: the proof runs this very function.
    """
    for k, token in enumerate(draft_tokens):
        if chance.accepts(p_target[k, token], p_draft[k, token]):
            continue
        owed = residual(p_target[k], p_draft[k])
        for row, sibling in enumerate(siblings, len(draft_tokens) + 1):
            if sibling.position == k + 1:
                if chance.accepts(owed[sibling.token], sibling.law[sibling.token]):
                    return row, chance.choose(p_target[row])
                owed = residual(owed, sibling.law)
        return k, chance.choose(owed)
    return len(draft_tokens), chance.choose(p_target[len(draft_tokens)])


def residual(p_target: Tensor, p_draft: Tensor) -> Tensor:
    """norm(max(p_t − p_d, 0)): what the target still owes after a rejection. [vocab] float32; no epsilon, it would bend the law.

    Its mass is positive whenever a rejection is possible: some token has p_d > p_t, so another has p_t > p_d. Only the last bit
    of float32 rows can make it zero; then the two laws are the same as far as float32 can tell.
    """
    owed = (p_target - p_draft).clip(0)
    mass = owed.sum()
    return owed / mass if mass > 0 else p_target
