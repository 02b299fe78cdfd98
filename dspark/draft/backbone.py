"""The drafter's parallel backbone: a few transformer layers whose block reads the target's hidden states as context (§3.1)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.rewind import GrowingKV

HEAD_TYPES = ("vanilla", "gated", "rnn")


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a drafter. Names are those of the reference checkpoints' config.json. Raises ValueError for a value out of range."""

    vocab_size: int  # of the target
    hidden_size: int  # of the target and of the drafter
    intermediate_size: int  # of the MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    target_layer_ids: tuple[int, ...]  # taps; i is the residual stream AFTER layer i, −1 the embedding
    mask_token_id: int  # fills the slots after the anchor
    block_size: int = 7  # γ
    markov_rank: int = 256  # of the sequential head; 0 is DFlash, the purely parallel baseline
    markov_head_type: str = "vanilla"  # one of HEAD_TYPES, see MarkovHead
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True  # the confidence head also reads W1[x_{k−1}]
    draft_vocab_size: int | None = None  # tokens that can be drafted; None for vocab_size
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layer_ids", tuple(self.target_layer_ids))
        if self.draft_vocab_size is None:
            object.__setattr__(self, "draft_vocab_size", self.vocab_size)
        if self.markov_head_type not in HEAD_TYPES:
            raise ValueError(f"markov_head_type {self.markov_head_type!r} is unknown: choose one of {', '.join(HEAD_TYPES)}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank must be 0 (no sequential head) or positive, got {self.markov_rank}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} must lie in 1..vocab_size ({self.vocab_size})")

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"target_layer_ids": list(self.target_layer_ids)}


class Context(NamedTuple):
    """One layer's context while training: what :meth:`append` returns is differentiable, and the context itself does not change."""

    keys: Tensor  # [batch, kv_heads, tokens, head_dim]
    values: Tensor  # the same

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


class Rope(NamedTuple):
    """cos, sin: [batch, 1, tokens, head_dim], of absolute positions."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
        """positions: [batch, tokens]."""
        frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
        angle = positions[:, None, :, None].float() * frequency  # [batch, 1, tokens, head_dim/2]
        angle = torch.cat([angle, angle], dim=-1)
        return cls(angle.cos().to(dtype), angle.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """x: [batch, heads, tokens, head_dim]."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-right, left], dim=-1) * self.sin


def block_mask(anchors: Tensor, block_size: int, length: int) -> Tensor:
    """What each slot of many blocks sees: context strictly before its anchor, and its own block.

    anchors: [rows, anchors], positions in texts of ``length`` tokens. Returns [rows, 1, anchors·γ, length + anchors·γ] bool.
    """
    count = anchors.shape[1]
    owner = torch.arange(count, device=anchors.device).repeat_interleave(block_size)
    before = torch.arange(length, device=anchors.device) < anchors[..., None]  # [rows, anchors, length]
    own = (owner[:, None] == owner).expand(anchors.shape[0], -1, -1)
    return torch.cat([before.repeat_interleave(block_size, 1), own], -1)[:, None]


class RMSNorm(nn.RMSNorm):
    """Casts the weight to the input's dtype: PyTorch's fused kernel needs them equal, and training keeps float32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Queries come from the block only; keys and values from the context and the block, without a causal mask."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        self.head_dim = d
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=False)
        self.q_norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(d, eps=config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [batch, tokens, heads, head_dim]

    def keys_values(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """x: [batch, tokens, hidden] → two of [batch, kv_heads, tokens, head_dim]."""
        keys = self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2)
        return rope.rotate(keys), self._heads(self.v_proj(x)).transpose(1, 2)

    def forward(self, x: Tensor, rope: Rope, context: GrowingKV | Context, mask: Tensor | None) -> Tensor:
        """x: [batch, n, hidden] → the same shape. mask: bool, broadcast to [batch, heads, n, context + n]; None if all is visible."""
        queries = rope.rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2))
        keys, values = context.append(*self.keys_values(x, rope))
        if mask is None or mask.shape[2] == 1:  # all queries see the same, so heads that share keys can be folded into them: the fast way
            folded = queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
            mixed = F.scaled_dot_product_attention(folded, keys, values, mask).reshape(queries.shape)
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm transformer layer. Arguments as :meth:`Attention.forward`."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope, context: GrowingKV | Context, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, context, mask)
        return x + self.mlp(self.post_attention_layernorm(x))
