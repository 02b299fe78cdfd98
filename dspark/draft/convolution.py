"""Causal convolutions along the block, which let the slots of one parallel pass tell each other apart (DFlash 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from dspark.draft.backbone import DrafterConfig


class BlockConvolution(nn.Module):
    """y_k = x_k + Σ_t w_{k,t} ⊙ x_{k−t} over the slots k of one block, t from 0; before slot 0 stands nothing.

    w_{k,t} = base_t + proj(x_k)_t: a learnt weight for each channel, and one for each group of channels that is computed from the
    token. With both at zero the block passes unchanged. Raises ValueError for sizes or layers that do not fit.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        hidden, kernel, groups = config.hidden_size, config.convolution_kernel, config.convolution_groups
        if kernel < 0 or groups < 1 or hidden % groups:
            raise ValueError(f"convolution_kernel {kernel} must be positive, and convolution_groups {groups} divide hidden_size ({hidden})")
        if config.layer_type != "qwen3":
            raise ValueError(f"convolution_kernel is {kernel}, but layers of {config.layer_type} have no convolutions: set it to 0")
        self.block_size, self.kernel = config.block_size, kernel
        self.base = nn.Parameter(torch.zeros(kernel, hidden))
        self.proj = nn.Linear(hidden, kernel * groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, blocks·γ, hidden] → the same shape; no block sees another."""
        blocks = x.unflatten(1, (-1, self.block_size))  # [batch, blocks, γ, hidden]
        earlier = F.pad(blocks, (0, 0, self.kernel - 1, 0)).unfold(2, self.kernel, 1).flip(-1)  # [batch, blocks, γ, hidden, kernel]
        of_token = self.proj(blocks).to(x.dtype).unflatten(-1, (-1, 1, self.kernel))  # [batch, blocks, γ, groups, 1, kernel]
        base = self.base.to(x.dtype).T.unflatten(0, (of_token.shape[-3], -1))  # [groups, channels, kernel]
        return x + ((of_token + base).flatten(-3, -2) * earlier).sum(-1).flatten(1, 2)
