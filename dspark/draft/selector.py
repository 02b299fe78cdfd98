"""A head that chooses among a few candidates instead of biasing the whole vocabulary (DFlash 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.draft.backbone import DrafterConfig
from dspark.draft.heads import MarkovHead


def markov_head(config: DrafterConfig) -> MarkovHead | None:
    """The head that a config asks for; None for rank 0. Raises ValueError for candidates that this head cannot have."""
    selects, k, most = config.markov_head_type == "selector" and config.markov_rank > 0, config.num_candidates, config.draft_vocab_size
    if not (1 <= k <= most if selects else k == 0):
        raise ValueError(f"num_candidates is {k}: a selector head with a rank takes 1 to draft_vocab_size ({most}), any other head 0")
    kind = SelectorHead if selects else MarkovHead
    return kind(config) if config.markov_rank else None


class SelectorHead(MarkovHead):
    """latent = e ⊙ P·h_k, and B_k is added to the K largest of U_k alone; no other token is drafted."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.num_candidates = config.num_candidates
        self.hidden_proj = nn.Linear(config.hidden_size, self.rank, bias=False)

    def step(self, hidden: Tensor, embedded: Tensor, state: None) -> tuple[Tensor, None]:
        return self.hidden_proj(hidden) * embedded, None

    def logits(self, base: Tensor, latent: Tensor) -> Tensor:
        best, candidates = base.topk(self.num_candidates)
        bias = (self.markov_w2.weight[candidates].to(latent.dtype) @ latent[..., None])[..., 0]  # K·r products instead of V·r
        return torch.full_like(base, -torch.inf).scatter(-1, candidates, best + bias.to(base.dtype))
