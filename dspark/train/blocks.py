"""Blocks to learn from: random anchors in known text, what stands behind them, and the loss of a batch of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.draft.drafter import Drafter
from dspark.train.features import Shard
from dspark.train.losses import HeadLoss, LossWeights, position_weights


@dataclass(frozen=True)
class Blocks:
    """Anchors of one batch and what stands behind them. All [rows, anchors, γ]; slot k predicts the token at anchor + k + 1."""

    positions: Tensor  # where slot k stands: anchor + k
    tokens: Tensor  # the backbone's input: anchor, mask, mask, …
    previous: Tensor  # x_{k−1}, known text
    labels: Tensor  # x_k
    valid: Tensor  # label lies in what is learnt from (a response, or all text), and so do all before it

    @property
    def anchors(self) -> Tensor:
        return self.positions[..., 0]


def choose_blocks(shard: Shard, count: int, block_size: int, mask_token_id: int, generator: torch.Generator) -> Blocks:
    """``count`` random anchors a row, each a token that is learnt from (of a response, or any) and whose successor is too.

    Rows with fewer get invalid blocks.
    """
    ids, assistant = shard.token_ids, shard.assistant
    rows, length = ids.shape
    candidate = assistant.clone()
    candidate[:, :-1] &= assistant[:, 1:]
    candidate[:, -1] = False
    score = torch.rand(rows, length, generator=generator).masked_fill(~candidate, -1.0)
    best = score.topk(min(count, length), dim=-1)
    anchor = best.indices.sort(-1).values  # [rows, anchors]
    positions = anchor[..., None] + torch.arange(block_size)  # [rows, anchors, γ]
    after = (positions + 1).clamp(max=length - 1)
    valid = (positions + 1 < length) & pick(assistant, after) & pick(candidate, anchor)[..., None]
    previous = pick(ids, positions.clamp(max=length - 1))
    tokens = torch.full_like(previous, mask_token_id)
    tokens[..., 0] = previous[..., 0]
    return Blocks(positions, tokens, previous, pick(ids, after), valid.int().cumprod(-1).bool())


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x: [rows, tokens, ...], index: [rows, ...] positions → x at these positions, [*index.shape, ...]."""
    row = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (index.dim() - 1))
    return x[row, index]


@dataclass(frozen=True)
class StepResult:
    """loss: scalar with gradient · acceptance: [rows, anchors, γ] 1 − ½‖p_d − p_t‖₁ · valid: the same shape · parts: floats."""

    loss: Tensor
    acceptance: Tensor
    valid: Tensor
    parts: dict[str, float]

    def summary(self) -> dict[str, object]:
        """Loss, its parts, acceptance by position, and the τ that these acceptances would give at temperature 1."""
        valid = self.valid.float()
        by_position = (self.acceptance * valid).sum((0, 1)) / valid.sum((0, 1)).clamp(min=1)
        whole = self.valid.all(-1)
        survival = self.acceptance[whole].clamp(0, 1).cumprod(-1)
        tau = 1 + (survival.sum(-1).mean().item() if len(survival) else 0.0)
        return {"loss": self.loss.item(), "tau": tau, "acceptance": [round(a, 4) for a in by_position.tolist()], **self.parts}


def block_loss(drafter: Drafter, t2d: Tensor, shard: Shard, blocks: Blocks, weights: LossWeights) -> StepResult:
    """One forward pass over all blocks of a batch. t2d: [vocab] draft id of each token, −1 if it has none."""
    rows, count, gamma = blocks.positions.shape
    length = shard.token_ids.shape[1]
    hidden = drafter.block_hidden(shard.token_ids, shard.taps, blocks.tokens, blocks.previous, blocks.positions)  # [rows, anchors, γ, h]

    embedded = latent = w2 = None
    if drafter.markov_head is not None:
        embedded = drafter.markov_head.markov_w1(blocks.previous)
        latent = drafter.markov_head.latents(hidden, embedded).flatten(0, 2)
        w2 = drafter.markov_head.markov_w2.weight
    read = blocks.positions.clamp(max=length - 1)
    weight = position_weights(blocks.valid, weights.decay)
    weight = weight / weight.sum().clamp(min=1e-6)
    head_loss, acceptance = HeadLoss.apply(
        hidden.flatten(0, 2),
        latent,
        w2,
        drafter.head_weight,
        pick(shard.final, read).flatten(0, 2),
        pick(shard.logsumexp, read).flatten(),
        t2d[blocks.labels].flatten(),
        weight.flatten(),
        weights,
    )
    acceptance = acceptance.view(rows, count, gamma)
    confidence_loss = torch.zeros_like(head_loss)
    if drafter.confidence_head is not None:
        logits = drafter.confidence_head(hidden, embedded).float()
        bce = F.binary_cross_entropy_with_logits(logits, acceptance.clamp(0, 1), reduction="none")
        confidence_loss = (weight * bce).sum()
    loss = head_loss + weights.confidence * confidence_loss
    return StepResult(loss, acceptance, blocks.valid, {"head_loss": head_loss.item(), "confidence_loss": confidence_loss.item()})
