"""The layers of drafters in the manner of Gemma 4: other norms, and values that may be the keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.draft.backbone import Attention, Context, DrafterConfig, Layer, RMSNorm, Rope
from dspark.rewind import GrowingKV


class Gemma4Attention(Attention):
    """Values are normed, too, and scores are not scaled."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.scale = 1.0
        if config.attention_k_eq_v:
            self.v_proj = None

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        keys = self._heads(self.k_proj(x))
        values = F.rms_norm(keys if self.v_proj is None else self._heads(self.v_proj(x)), (self.head_dim,), eps=self.k_norm.eps)
        return rope.rotate(self.k_norm(keys).transpose(1, 2)), values.transpose(1, 2)


class Gemma4Layer(Layer):
    """Norms before and after attention and MLP, and a scale of the layer's output."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.self_attn = Gemma4Attention(config)
        self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, rope: Rope, context: GrowingKV | Context, mask: Tensor | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, context, mask))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar.to(x.dtype)
