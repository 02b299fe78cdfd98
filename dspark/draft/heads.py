"""The two heads on the parallel backbone: one makes a block's tokens depend on each other, one predicts which survive (§3.1–3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.draft.backbone import DrafterConfig


class MarkovHead(nn.Module):
    """B_k = W2 · latent_k, added to the base logits U_k: it makes x_k depend on x_{k−1}. W1: [vocab, rank], W2: [draft_vocab, rank].

    vanilla: latent = e = W1[x_{k−1}].
    gated: latent = σ(G[h_k; e]) ⊙ e.
    rnn: a state s runs along the block, s_0 = 0: [g, c, o] = J[s; e; h_k], s' = σ(g)⊙s + (1−σ(g))⊙tanh(c), latent = tanh(o).
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.kind, self.rank = config.markov_head_type, config.markov_rank
        self.markov_w1 = nn.Embedding(config.vocab_size, self.rank)
        self.markov_w2 = nn.Linear(self.rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + self.rank, self.rank)
        if self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * self.rank + config.hidden_size, 3 * self.rank)

    def step(self, hidden: Tensor, embedded: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One position. hidden h_k: [..., hidden]; embedded e: [..., rank]. Returns the latent [..., rank] and the next state."""
        if self.kind == "vanilla":
            return embedded, None
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], -1))) * embedded, None
        state = torch.zeros_like(embedded) if state is None else state
        gate, candidate, output = self.joint_proj(torch.cat([state, embedded, hidden], -1)).chunk(3, -1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)

    def latents(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """All positions of known blocks, for training. hidden: [..., γ, hidden], embedded: [..., γ, rank] → [..., γ, rank]."""
        if self.kind != "rnn":  # no position needs another
            return self.step(hidden, embedded, None)[0]
        state, out = None, []
        for k in range(embedded.shape[-2]):
            latent, state = self.step(hidden[..., k, :], embedded[..., k, :], state)
            out.append(latent)
        return torch.stack(out, dim=-2)

    def logits(self, base: Tensor, latent: Tensor) -> Tensor:
        """U_k + B_k, −∞ for a token that is not drafted. base: [..., draft_vocab], latent: [..., rank] → [..., draft_vocab]."""
        return base + self.markov_w2(latent)


class ConfidenceHead(nn.Module):
    """c_k = σ(w · [h_k; W1[x_{k−1}]] + b). It never sees x_k, so cutting a block by it keeps the distribution exact."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_head_with_markov and config.markov_rank > 0
        self.proj = nn.Linear(config.hidden_size + self.with_markov * config.markov_rank, 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """hidden: [..., hidden], embedded: [..., rank] → logits of c_k [...] in the wider of the inputs' dtypes."""
        x = torch.cat([hidden, embedded], -1) if self.with_markov else hidden
        return nn.functional.linear(x, self.proj.weight.to(x.dtype), self.proj.bias.to(x.dtype)).squeeze(-1)
