"""Exact acceptance: one target pass over [anchor, x_1..x_ℓ] decides how many drafts stay (Leviathan et al., 2023, Theorem 1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark.sampling import Chance, Rows


def accept(draft_tokens: Sequence[int], p_draft: Tensor, p_target: Tensor | Rows, chance: Chance) -> tuple[int, int]:
    """Keep the longest prefix of the drafts that the rule accepts, and draw the one token behind it.

    draft_tokens: ℓ ids, x_k drawn from ``p_draft[k−1]`` · p_draft: [≥ ℓ, vocab] float32 · p_target: [ℓ+1, vocab] float32.
    Returns (accepted, next_token). x_k is accepted with probability min(1, p_t(x_k) / p_d(x_k)); at the first rejection the
    next token comes from the residual, after ℓ acceptances from the target's last row (the bonus). Every token then follows
    p_target exactly, whatever p_draft is. Greedy is the case of one-hot rows.

    Only indexing, −, clip, sum and / touch the rows, so arrays of fractions do as well: the proof runs this very function.
    """
    for k, token in enumerate(draft_tokens):
        if not chance.accepts(p_target[k, token], p_draft[k, token]):
            return k, chance.choose(residual(p_target[k], p_draft[k]))
    return len(draft_tokens), chance.choose(p_target[len(draft_tokens)])


def residual(p_target: Tensor, p_draft: Tensor) -> Tensor:
    """norm(max(p_t − p_d, 0)): what the target still owes after a rejection. [vocab] float32; no epsilon, it would bend the law.

    Its mass is positive whenever a rejection is possible: some token has p_d > p_t, so another has p_t > p_d. Only the last bit
    of float32 rows can make it zero; then the two laws are the same as far as float32 can tell.
    """
    owed = (p_target - p_draft).clip(0)
    mass = owed.sum()
    return owed / mass if mass > 0 else p_target
