"""The drafter's backbone on a CPU: the arithmetic of :mod:`dspark.draft.backbone` in fewer and cheaper calls.

A block has a handful of rows, so its time goes into calls and reading weights, not arithmetic. Here projections of the same input are one
product, and queries and keys are normed and rotated together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.draft.backbone import Layer, Rope
from dspark.rewind import GrowingKV
from dspark.verify.lean import FIRST_TABLE, MakeProduct, joined

if TYPE_CHECKING:
    from dspark.draft.drafter import Drafter, DraftState


class FusedLayer:
    """One layer without a mask: every query sees the whole context and the whole block. Computes in float32.

    make: the product by a weight [out, in] and a bias, None here.
    """

    def __init__(self, layer: Layer, make: MakeProduct) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        self.heads, self.kv_heads = (p.out_features // self.head_dim for p in (attention.q_proj, attention.k_proj))
        self.project = joined(make, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = joined(make, attention.o_proj)
        self.gate_and_up, self.down = joined(make, mlp.gate_proj, mlp.up_proj), joined(make, mlp.down_proj)
        self.attention_norm, self.mlp_norm, self.convolutions = layer.input_layernorm, layer.post_attention_layernorm, layer.convolutions
        norms = [attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.kv_heads
        self.head_norms, self.eps = torch.stack(norms).float()[:, None], attention.q_norm.eps

    def __call__(self, x: Tensor, rope: Rope, contexts: Sequence[GrowingKV]) -> Tensor:
        """x: [R, n, hidden] → the same shape; each request's block is appended to its context, and sees all of it."""
        before_attention, after_attention, before_mlp, after_mlp = self.convolutions
        qkv = self.project(before_attention(self.attention_norm(x))).float().unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        rotated = rope.rotate(F.rms_norm(qkv[:, : -self.kv_heads], (self.head_dim,), eps=self.eps) * self.head_norms)
        mixed = []
        for r, context in enumerate(contexts):
            keys, values = context.append(rotated[r, None, self.heads :], qkv[r, None, -self.kv_heads :])
            folded = rotated[r, : self.heads].reshape(1, self.kv_heads, -1, self.head_dim)  # heads that share keys
            mixed.append(F.scaled_dot_product_attention(folded.to(keys.dtype), keys, values).view(self.heads, -1, self.head_dim))
        x = x + after_attention(self.out(torch.stack(mixed).transpose(1, 2).flatten(2)))
        gate, up = self.gate_and_up(before_mlp(self.mlp_norm(x))).chunk(2, -1)
        return x + after_mlp(self.down(F.silu(gate) * up))


class FusedBackbone:
    """:attr:`dspark.draft.drafter.Drafter.fused`. make: the products."""

    def __init__(self, drafter: Drafter, make: MakeProduct) -> None:
        self.drafter, attentions = drafter, [layer.self_attn for layer in drafter.layers]
        self.layers = [FusedLayer(layer, make) for layer in drafter.layers]
        self.keys_values = joined(make, *(p for a in attentions for p in (a.k_proj, a.v_proj)))
        self.key_norms, self.eps = torch.stack([a.k_norm.weight for a in attentions]).float()[:, None, None], attentions[0].k_norm.eps
        self.table = (torch.empty(0), torch.empty(0))  # cos and sin, [positions, head_dim]

    def context(self, taps: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """See :meth:`dspark.draft.drafter.Drafter.context`. taps: [1, tokens, m·hidden], positions: [1, tokens]; returns float32."""
        x = self.drafter.hidden_norm(self.drafter.fc(taps).float())
        per_layer = self.keys_values(x).float().view(taps.shape[1], len(self.layers), 2, -1, self.layers[0].head_dim)
        keys, values = per_layer.permute(2, 1, 3, 0, 4)  # two of [layers, kv_heads, tokens, head_dim]
        keys = self.rope(positions[0]).rotate(F.rms_norm(keys, keys.shape[-1:], eps=self.eps) * self.key_norms)
        return [(k[None], v[None]) for k, v in zip(keys, values, strict=True)]

    def blocks(self, tokens: Tensor, states: Sequence[DraftState]) -> Tensor:
        """See :meth:`dspark.draft.drafter.Drafter.blocks`. tokens: [R, γ]; returns float32."""
        x = self.drafter.embed(tokens).float()
        starts = torch.tensor([state.layers[0].length for state in states])
        rope = self.rope(starts[:, None] + torch.arange(tokens.shape[1]))
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, [state.layers[i] for state in states])
        return self.drafter.norm(x)

    def rope(self, positions: Tensor) -> Rope:
        """The rotation, from a table: positions [n] → [1, 1, n, head_dim], or [R, n] → [R, 1, n, head_dim]."""
        needed, (cos, sin) = int(positions.max()) + 1, self.table
        if len(cos) < needed:
            size = max(FIRST_TABLE, 1 << (needed - 1).bit_length())
            cos, sin = self.table = tuple(part[0, 0] for part in Rope.at(torch.arange(size)[None], self.drafter.config, torch.float32))
        return Rope(*(part[positions].view(-1, 1, positions.shape[-1], part.shape[-1]) for part in (cos, sin)))

    def next_logits(self, base: Tensor, hidden: Tensor, k: int, previous: Sequence[int], state: Any) -> tuple[Tensor, Any]:
        """See :meth:`dspark.draft.drafter.Drafter.next_logits`."""
        return self.drafter.next_logits(base, hidden, k, previous, state)
