"""The drafter's parallel backbone: a few transformer layers whose block reads the target's hidden states as context (§3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.draft.convolution import BlockConvolution
from dspark.draft.scaling import scaled_frequencies
from dspark.rewind import GrowingKV

HEAD_TYPES = ("vanilla", "gated", "rnn", "selector")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


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
    # From here on: what config.json holds only where it is used, and other programs do not know, see unusual().
    num_candidates: int = 0  # K, among which the selector head chooses; 0 for another head
    convolution_kernel: int = 0  # slots that a BlockConvolution reads; 0 for none
    convolution_groups: int = 1  # of channels that share the weights which it computes from the token
    # And from here on: what only drafters trained elsewhere have.
    sample_from_anchor: bool = True  # False: slot 0 predicts nothing, so γ slots give γ − 1 drafts
    head_starts_at_anchor: bool = False  # and the rnn head's state still passes through slot 0
    sliding_windows: tuple[int, ...] = ()  # tokens of context that each layer sees, 0 for all; () for all in all layers
    windows_move: bool = False  # a window ends at each slot instead of at the anchor
    causal_layers: tuple[bool, ...] = ()  # whether a layer's slots see only themselves and earlier ones; () for none
    rope_scaling: dict[str, object] = field(default_factory=dict)  # rope_type and its numbers, as transformers names them
    layer_type: str = "qwen3"  # or gemma4, see Gemma4Layer
    attention_k_eq_v: bool = False  # the values are the keys before their norm
    attention_bias: bool = False
    hidden_act: str = "silu"  # one of ACTIVATIONS
    embedding_scale: float | None = None  # the input is the embedding table times this; None: as the target's module gives it
    final_logit_softcapping: float | None = None  # c: logits U become c·tanh(U/c) before the Markov bias
    own_tables: tuple[str, ...] = ()  # of embed_tokens and lm_head, those that are the drafter's instead of the target's

    def __post_init__(self) -> None:
        for name in ("target_layer_ids", "sliding_windows", "causal_layers", "own_tables"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in (("layer_type", ("qwen3", "gemma4")), ("hidden_act", ACTIVATIONS), ("markov_head_type", HEAD_TYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, and only {', '.join(choices)} are supported")
        for name in ("sliding_windows", "causal_layers"):
            if (given := getattr(self, name)) and len(given) != self.num_hidden_layers:
                raise ValueError(f"{name} {list(given)} must have one entry for each of the {self.num_hidden_layers} layers")
        if self.draft_vocab_size is None:
            object.__setattr__(self, "draft_vocab_size", self.vocab_size)
        if self.num_drafts < 1:
            raise ValueError(f"block_size must be at least {2 - self.sample_from_anchor}, got {self.block_size}")
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank must be 0 (no sequential head) or positive, got {self.markov_rank}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} must lie in 1..vocab_size ({self.vocab_size})")

    @property
    def num_drafts(self) -> int:
        """Tokens that a block of γ slots proposes."""
        return self.block_size - (not self.sample_from_anchor)

    def unusual(self) -> dict[str, object]:
        """Fields with another value than DSpark's own drafters have, by name: whoever lacks them must refuse."""
        return {name: value for name, usual in UNUSUAL.items() if (value := getattr(self, name)) != usual}

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it. Unusual fields stand there only where they are used."""
        usual = [f.name for f in fields(self)][: -len(UNUSUAL)]
        values = {name: getattr(self, name) for name in (*usual, *self.unusual())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_names = [f.name for f in fields(DrafterConfig)]
UNUSUAL = {name: getattr(DrafterConfig, name, {}) for name in _names[_names.index("num_candidates") :]}  # field → its usual value
TRAINED_HERE = {"num_candidates", "convolution_kernel", "convolution_groups"}  # of these, and run by every way to draft


@dataclass
class Context:
    """One layer's context while training: what :meth:`append` returns is differentiable."""

    keys: Tensor  # [batch, kv_heads, tokens, head_dim]
    values: Tensor  # the same

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        return self.keys, self.values


class Rope(NamedTuple):
    """cos, sin: [batch, 1, tokens, head_dim], of absolute positions."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: DrafterConfig, dtype: torch.dtype) -> Rope:
        """positions: [batch, tokens]."""
        d, theta, scale = config.head_dim, config.rope_theta, 1.0
        frequency = theta ** (-torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
        if config.rope_scaling:
            frequency, scale = scaled_frequencies(d, theta, config.rope_scaling, positions.device)
        angle = positions[:, None, :, None].float() * frequency  # [batch, 1, tokens, head_dim/2]
        angle = torch.cat([angle, angle], dim=-1)
        return cls((angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """x: [batch, heads, tokens, head_dim]."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-right, left], dim=-1) * self.sin


def block_mask(anchors: Tensor, block_size: int, length: int, window: int = 0, causal: bool = False, moves: bool = False) -> Tensor:
    """What each slot of many blocks sees: context strictly before its anchor, and its own block.

    anchors: [rows, anchors], positions in texts of ``length`` tokens. window: the last tokens of context that are seen, 0 for all;
    with ``moves`` those fewer than ``window`` positions from the slot. causal: of its block a slot sees itself and what is before it.
    Returns [rows, 1, anchors·γ, length + anchors·γ] bool.
    """
    rows, count = anchors.shape
    owner = torch.arange(count, device=anchors.device).repeat_interleave(block_size)
    slot = torch.arange(block_size, device=anchors.device).repeat(count)
    first, key = anchors.repeat_interleave(block_size, 1), torch.arange(length, device=anchors.device)
    before = key < first[..., None]  # [rows, anchors·γ, length]
    own = owner[:, None] == owner
    if causal:
        own &= slot[:, None] >= slot
    if window:
        before &= key >= (first + slot + 1 if moves else first)[..., None] - window
        own &= (slot[:, None] - slot).abs() < (window if moves else block_size)
    return torch.cat([before, own.expand(rows, -1, -1)], -1)[:, None]


class RMSNorm(nn.RMSNorm):
    """Casts the weight to the input's dtype: PyTorch's fused kernel needs them equal, and training keeps float32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Queries come from the block only; keys and values from the context and the block, without a causal mask."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_dim
        bias = config.attention_bias
        self.head_dim, self.scale = d, None  # None: head_dim^-0.5
        self.q_proj = nn.Linear(h, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(h, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, h, bias=bias)
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
            mixed = F.scaled_dot_product_attention(folded, keys, values, mask, scale=self.scale).reshape(queries.shape)
        else:
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, or the same with another activation."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm transformer layer; convolutions, if any, stand around attention and MLP. Arguments as :meth:`Attention.forward`."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)
        self.convolutions = nn.ModuleList(BlockConvolution(config) if config.convolution_kernel else nn.Identity() for _ in range(4))

    def forward(self, x: Tensor, rope: Rope, context: GrowingKV | Context, mask: Tensor | None) -> Tensor:
        before_attention, after_attention, before_mlp, after_mlp = self.convolutions
        x = x + after_attention(self.self_attn(before_attention(self.input_layernorm(x)), rope, context, mask))
        return x + after_mlp(self.mlp(before_mlp(self.post_attention_layernorm(x))))
