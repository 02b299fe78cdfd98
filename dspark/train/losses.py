"""The drafter's loss, with its gradient written out and computed a few rows at a time.

Rows × vocabulary float32 tensors would dominate a training step in time and memory; here none outlives its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 192  # 192 × 8 192 float32 values stay inside a CPU's last-level cache


@dataclass(frozen=True)
class LossWeights:
    """0.1·CE + 0.9·‖p_d − p_t‖₁ + 1.0·BCE(c, acceptance), and the decay of the position weight exp(−k/decay)."""

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0


class HeadLoss(torch.autograd.Function):
    """Cross-entropy and L1 distance between the drafter's and the target's next-token distributions, and the acceptance.

    With z = h·Hᵀ + latent·W2ᵀ, p = softmax(z), q the target's probabilities and s = sign(p − q):
        ∂‖p − q‖₁/∂z = p ⊙ (s − ⟨p, s⟩)        ∂CE/∂z = p − onehot(label)
    The target's mass outside the draft vocabulary counts in full in the L1 distance: the drafter can never propose it.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,  # [n, h]
        latent: Tensor | None,  # [n, r]
        w2: Tensor | None,  # [draft_vocab, r]
        head: Tensor,  # [draft_vocab, h], frozen
        final: Tensor,  # [n, h] what the target's head reads at the same positions
        logsumexp: Tensor,  # [n] float32, over the whole vocabulary
        label: Tensor,  # [n] int64 draft ids, −1 where the label is outside the draft vocabulary
        weight: Tensor,  # [n] float32, already normalised
        weights: LossWeights,
    ) -> tuple[Tensor, Tensor]:
        dtype = head.dtype
        inputs = hidden.to(dtype) if latent is None else torch.cat([hidden.to(dtype), latent.to(dtype)], -1)
        columns = head if latent is None else torch.cat([head, w2.to(dtype)], -1)  # [draft_vocab, h (+ r)]
        grad_inputs = torch.empty_like(inputs)
        grad_w2 = None if latent is None else torch.zeros(w2.shape, dtype=torch.float32, device=w2.device)
        total = torch.zeros((), dtype=torch.float32, device=head.device)
        acceptance = torch.empty(len(inputs), dtype=torch.float32, device=head.device)

        for rows in torch.arange(len(inputs), device=head.device).split(CHUNK_ROWS):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            p = F.linear(inputs[rows], columns).float()  # [c, draft_vocab] logits …
            log_norm = p.logsumexp(-1, keepdim=True)
            known = (label[rows] >= 0).float()
            index = label[rows].clamp(min=0)[:, None]
            cross_entropy = (log_norm - p.gather(-1, index)).squeeze(-1) * known
            p.sub_(log_norm).exp_()  # … now probabilities
            q = F.linear(final[rows], head).float().sub_(logsumexp[rows, None]).exp_()
            outside = (1 - q.sum(-1)).clamp_(min=0)
            sign = p - q
            distance = sign.abs().sum(-1) + outside
            sign.sign_()
            acceptance[rows] = 1 - 0.5 * distance
            w = weight[rows]
            total += (w * (weights.cross_entropy * cross_entropy + weights.total_variation * distance)).sum()

            a = (w * weights.total_variation)[:, None]
            b = (w * weights.cross_entropy * known)[:, None]
            inner = torch.linalg.vecdot(p, sign).unsqueeze(-1)
            grad = sign.mul_(a).add_(b - a * inner).mul_(p)  # p·(a·(s − ⟨p,s⟩) + b)
            grad.scatter_add_(-1, index, -b)
            grad = grad.to(dtype)
            grad_inputs[rows] = grad @ columns
            if grad_w2 is not None:
                grad_w2 += grad.T @ inputs[rows, hidden.shape[-1] :]

        ctx.save_for_backward(grad_inputs, *([] if grad_w2 is None else [grad_w2]))
        ctx.width = hidden.shape[-1]
        ctx.mark_non_differentiable(acceptance)
        return total, acceptance

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_inputs, *rest = ctx.saved_tensors
        grad_hidden = grad_inputs[:, : ctx.width] * grad_total.to(grad_inputs.dtype)
        if not rest:
            return grad_hidden, None, None, None, None, None, None, None, None
        grad_latent = grad_inputs[:, ctx.width :] * grad_total.to(grad_inputs.dtype)
        return grad_hidden, grad_latent, rest[0] * grad_total, None, None, None, None, None, None


def position_weights(valid: Tensor, decay: float) -> Tensor:
    """valid: [..., γ] bool → [..., γ] float32: exp(−k/decay) over the contiguous valid prefix, 0 behind its end."""
    k = torch.arange(valid.shape[-1], device=valid.device)
    return valid.int().cumprod(-1) * torch.exp(-k / decay)
