"""Exact acceptance: one target pass over [x_0, x_1..x_ℓ] decides how many drafts stay (Leviathan et al., 2023, Theorem 1)."""

from collections.abc import Sequence

from torch import Tensor

from dspark.verify.sampling import LazyProbs, Narrow, OneHot, Rng, Rows


def accept(draft_tokens: Sequence[int], p_draft: Rows, p_target: Tensor | LazyProbs, rng: Rng) -> tuple[int, int]:
    """Accept the longest prefix of the drafts, then sample one more token.

    draft_tokens: ℓ ids; x_k was drawn from ``p_draft[k−1]``.
    p_draft: [≥ ℓ, vocab] float32, rows sum to 1.
    p_target: [ℓ+1, vocab] float32, the target's distributions after x_0, x_1, …, x_ℓ.
    Returns (accepted, next_token): how many drafts stay, and the token that follows them.

    x_k is accepted with probability min(1, p_t(x_k) / p_d(x_k)). At the first rejection the next token is sampled from the residual
    (the correction); if all ℓ drafts survive, from the target's last row (the bonus). Either way every token follows p_target exactly,
    whatever the drafts were drawn from. Greedy decoding is the case of one-hot rows.

    Only indexing, −, clip, sum and / touch the rows, so arrays of fractions work too: the exactness tests run this very function.
    """
    for k, token in enumerate(draft_tokens):
        if not rng.accepts(p_target[k][token], p_draft[k][token]):
            return k, rng.choose(residual(p_target[k], p_draft[k]))
    return len(draft_tokens), rng.choose(p_target[len(draft_tokens)])


def residual(p_target: Tensor | OneHot, p_draft: Tensor | OneHot | Narrow) -> Tensor | OneHot:
    """norm(max(p_t − p_d, 0)), the distribution of the correction after a rejection. All [vocab] float32.

    No epsilon: it would change the distribution. The mass is positive whenever a rejection is possible, since some token has
    p_d > p_t and so another has p_t > p_d. Only the last bit of float32 rows can make it zero; then the two distributions are equal
    as far as float32 can tell, and the target's own row is returned.
    """
    if isinstance(p_target, OneHot):  # its only token is what remains
        return p_target
    difference = (p_target - p_draft).clip(0)
    mass = difference.sum()
    return difference / mass if mass > 0 else p_target
