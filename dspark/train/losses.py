"""The loss: random blocks of known text, and how far the drafter's distributions are from the target's.

Tensors of rows × vocabulary in float32 would dominate a training step in time and memory, so the gradient is written out and
computed a few rows at a time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.train.features import Shard

CHUNK_ROWS = 192  # 192 × 8 192 float32 values fit a CPU's last-level cache
# The loss is CROSS_ENTROPY·CE + TOTAL_VARIATION·‖p_d − p_t‖₁ + BCE(c_k, acceptance), each times exp(−k/DECAY) at slot k.
CROSS_ENTROPY, TOTAL_VARIATION, DECAY = 0.1, 0.9, 4.0


@dataclass(frozen=True)
class Blocks:
    """Random blocks of known text, all fields [rows, anchors, γ]. Slot k (0-based) predicts the token at anchor + k + 1."""

    positions: Tensor  # int64, anchor + k; slot 0 is at the anchor
    tokens: Tensor  # int64, what the backbone reads: anchor, mask, mask, …
    previous: Tensor  # int64, the text's token before the label
    labels: Tensor  # int64, the text's token that slot k predicts
    valid: Tensor  # bool, this label and all before it are tokens to learn from
    weight: Tensor  # float32, in the loss; the sum is 1


def choose_blocks(shard: Shard, count: int, block_size: int, mask_token_id: int, generator: torch.Generator) -> Blocks:
    """``count`` random anchors a row. An anchor and its successor are tokens to learn from; rows with fewer get invalid blocks."""
    ids, assistant = shard.token_ids, shard.assistant
    rows, length = ids.shape
    candidate = assistant & assistant.roll(-1, 1)
    candidate[:, -1] = False
    score = torch.rand(rows, length, generator=generator).masked_fill(~candidate, -1.0)
    anchor = score.topk(min(count, length), dim=-1).indices.sort(-1).values  # [rows, anchors]
    positions = anchor[..., None] + torch.arange(block_size)  # [rows, anchors, γ]
    after = (positions + 1).clamp(max=length - 1)
    valid = (positions + 1 < length) & pick(assistant, after) & pick(candidate, anchor)[..., None]
    previous = pick(ids, positions.clamp(max=length - 1))
    tokens = torch.full_like(previous, mask_token_id)
    tokens[..., 0] = previous[..., 0]
    valid = valid.int().cumprod(-1).bool()
    weight = valid * torch.exp(-torch.arange(block_size) / DECAY)
    return Blocks(positions, tokens, previous, pick(ids, after), valid, weight / weight.sum().clamp(min=1e-6))


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x: [rows, tokens, ...], index: [rows, ...] int64 positions → x at these positions, [*index.shape, ...]."""
    row = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (index.dim() - 1))
    return x[row, index]


@dataclass(frozen=True)
class BlockLoss:
    """The loss of a batch of blocks and what it was computed from."""

    loss: Tensor  # scalar float32, with gradient
    acceptance: Tensor  # [rows, anchors, γ] float32, 1 − ½‖p_d − p_t‖₁: the probability that a draft is accepted
    valid: Tensor  # [rows, anchors, γ] bool, as in Blocks

    def summary(self) -> dict[str, object]:
        """Loss, acceptance by position, and the τ that these acceptances would give at temperature 1."""
        valid = self.valid.float()
        by_position = (self.acceptance * valid).sum((0, 1)) / valid.sum((0, 1)).clamp(min=1)
        whole = self.valid.all(-1)
        survival = self.acceptance[whole].clamp(0, 1).cumprod(-1)
        tau = 1 + (survival.sum(-1).mean().item() if len(survival) else 0.0)
        return {"loss": self.loss.item(), "tau": tau, "acceptance": [round(a, 4) for a in by_position.tolist()]}


def block_loss(drafter: Drafter, shard: Shard, blocks: Blocks) -> BlockLoss:
    """One forward pass over the blocks of a batch, or of some of its rows."""
    hidden = drafter.block_hidden(shard.token_ids, shard.taps, blocks.tokens, blocks.previous, blocks.positions)  # [rows, anchors, γ, h]
    embedded, latent, w2 = None, hidden.flatten(0, 2)[:, :0], drafter.head_weight[:, :0]  # no Markov head: rank 0
    if drafter.markov_head is not None:
        embedded = drafter.markov_head.markov_w1(blocks.previous)
        latent = drafter.markov_head.latents(hidden, embedded).flatten(0, 2)
        w2 = drafter.markov_head.markov_w2.weight
    positions = blocks.positions.clamp(max=shard.token_ids.shape[1] - 1)
    student = hidden.flatten(0, 2), latent, w2, drafter.head_weight
    teacher = pick(shard.final, positions).flatten(0, 2), pick(shard.logsumexp, positions).flatten()
    labels = drafter.t2d[blocks.labels].flatten(), blocks.weight.flatten()
    loss, acceptance = HeadLoss.apply(*student, *teacher, *labels, drafter.config.num_candidates)
    acceptance = acceptance.view(blocks.positions.shape)
    if drafter.confidence_head is not None:
        logits = drafter.confidence_head(hidden, embedded).float()
        bce = F.binary_cross_entropy_with_logits(logits, acceptance.clamp(0, 1), reduction="none")
        loss = loss + (blocks.weight * bce).sum()
    return BlockLoss(loss, acceptance, blocks.valid)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy and L1 distance between the drafter's and the target's next-token distributions, and the acceptance.

    With z = h·Hᵀ + latent·W2ᵀ, p = softmax(z) the drafter's probabilities, q the target's and s = sign(p − q):
        ∂‖p − q‖₁/∂z = p ⊙ (s − ⟨p, s⟩)        ∂CE/∂z = p − onehot(label)
    The target's mass outside the draft vocabulary counts in full in the L1 distance, as the drafter can never propose it.

    A selector's latent acts on its K candidates alone, and drafts are drawn from the softmax over these: it is p in the L1 distance and
    the acceptance, and the target's mass outside the candidates counts in full. Only the cross-entropy takes the softmax over all z, as
    one over the candidates would never raise the base logit of a label outside them, and so never make it a candidate.

    Returns the loss (scalar float32, the weighted sum over rows) and the acceptance ([n] float32, without gradient).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,  # [n, h]
        latent: Tensor,  # [n, r]
        w2: Tensor,  # [draft_vocab, r]
        head: Tensor,  # [draft_vocab, h], frozen
        final: Tensor,  # [n, h] what the target's head reads at the same positions
        logsumexp: Tensor,  # [n] float32, over the whole vocabulary
        label: Tensor,  # [n] int64 draft ids, −1 where the label is outside the draft vocabulary
        weight: Tensor,  # [n] float32, of each row in the loss
        candidates: int = 0,  # K of a selector, 0 for another head
    ) -> tuple[Tensor, Tensor]:
        dtype, width = head.dtype, hidden.shape[-1]
        inputs = torch.cat([hidden.to(dtype), latent.to(dtype)], -1)
        columns = torch.cat([head, w2.to(dtype)], -1)  # [draft_vocab, h + r]
        grad_inputs = torch.empty_like(inputs)
        grad_w2 = torch.zeros(w2.shape, dtype=torch.float32, device=w2.device)
        total = torch.zeros((), dtype=torch.float32, device=head.device)
        acceptance = torch.empty(len(inputs), dtype=torch.float32, device=head.device)

        for rows in torch.arange(len(inputs), device=head.device).split(CHUNK_ROWS):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            if candidates:
                p = F.linear(inputs[rows, :width], head).float()
                chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(candidates).indices, True)
                p += chosen * F.linear(inputs[rows, width:], columns[:, width:])
                drawn = p.masked_fill(~chosen, -torch.inf).softmax(-1)
            else:
                p = drawn = F.linear(inputs[rows], columns).float()  # logits, [chunk, draft_vocab] …
            log_norm = p.logsumexp(-1, keepdim=True)
            known = (label[rows] >= 0).float()
            index = label[rows].clamp(min=0)[:, None]
            cross_entropy = (log_norm - p.gather(-1, index)).squeeze(-1) * known
            p.sub_(log_norm).exp_()  # … now probabilities
            q = F.linear(final[rows], head).float().sub_(logsumexp[rows, None]).exp_()
            outside = (1 - q.sum(-1)).clamp_(min=0)
            sign = drawn - q
            distance = sign.abs().sum(-1) + outside
            sign.sign_()
            acceptance[rows] = 1 - 0.5 * distance
            w = weight[rows]
            total += (w * (CROSS_ENTROPY * cross_entropy + TOTAL_VARIATION * distance)).sum()

            a = (w * TOTAL_VARIATION)[:, None]
            b = (w * CROSS_ENTROPY * known)[:, None]
            inner = torch.linalg.vecdot(drawn, sign).unsqueeze(-1)
            grad = sign.sub_(inner).mul_(drawn).mul_(a).addcmul_(p, b)  # a·p·(s − ⟨p,s⟩) + b·p
            grad.scatter_add_(-1, index, -b)
            grad = grad.to(dtype)
            grad_inputs[rows] = grad @ columns
            if candidates:
                grad *= chosen
                grad_inputs[rows, width:] = grad @ columns[:, width:]
            grad_w2 += grad.T @ inputs[rows, width:]

        ctx.save_for_backward(grad_inputs, grad_w2)
        ctx.width = width
        ctx.mark_non_differentiable(acceptance)
        return total, acceptance

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_inputs, grad_w2 = ctx.saved_tensors
        grad_inputs = grad_inputs * grad_total.to(grad_inputs.dtype)
        return grad_inputs[:, : ctx.width], grad_inputs[:, ctx.width :], grad_w2 * grad_total, *[None] * 6
