"""The drafter's backbone as one request runs it on a CPU: :mod:`dspark.draft.backbone` in fewer and cheaper steps.

A block has a handful of rows, so its pass costs what its calls and its weights' bytes cost, not its arithmetic. Here layers that read
the same input are one product, and queries and keys are normed and rotated together. The block's weights may have 8 bits: drafts are
accepted against the distribution they were drawn from, whichever that is. The context, which stays, is computed from the weights as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.draft.backbone import Layer, Rope
from dspark.rewind import GrowingKV

if TYPE_CHECKING:
    from dspark.draft.drafter import Drafter

FIRST_TABLE = 1024  # positions with known cosines and sines; grows by doubling


class FusedLayer:
    """One layer without a mask: every query sees the whole context and the whole block. Computes in float32.

    make: turns a weight [out, in] into the module that multiplies by it.
    """

    def __init__(self, layer: Layer, make: Callable[[Tensor], nn.Module]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim = attention.head_dim
        self.queries, self.keys = (p.out_features // self.head_dim for p in (attention.q_proj, attention.k_proj))
        self.project = make(_joined(attention.q_proj, attention.k_proj, attention.v_proj))
        self.out = make(attention.o_proj.weight)
        self.gate_and_up, self.down = make(_joined(mlp.gate_proj, mlp.up_proj)), make(mlp.down_proj.weight)
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        norms = [attention.q_norm.weight] * self.queries + [attention.k_norm.weight] * self.keys
        self.head_norms, self.eps = torch.stack(norms).float()[:, None], attention.q_norm.eps

    def __call__(self, x: Tensor, rope: Rope, context: GrowingKV) -> Tensor:
        """x: [1, n, hidden] → [1, n, hidden]. Appends the block's keys and values to the context."""
        heads = self.project(self.before_attention(x)).float().unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turned = rope.rotate(F.rms_norm(heads[:, : -self.keys], (self.head_dim,), eps=self.eps) * self.head_norms)
        keys, values = context.append(turned[:, self.queries :], heads[:, -self.keys :])
        folded = turned[:, : self.queries].reshape(1, self.keys, -1, self.head_dim)  # the heads of a group as more queries
        mixed = F.scaled_dot_product_attention(folded.to(keys.dtype), keys, values).view(1, self.queries, -1, self.head_dim)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_and_up(self.before_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class FusedBackbone:
    """``context`` and ``backbone`` of a drafter, for one request.

    of_context, of_block: turn a weight [out, in] into the module that multiplies by it, for the context and for a block.
    """

    def __init__(self, drafter: Drafter, of_context: Callable[[Tensor], nn.Module], of_block: Callable[[Tensor], nn.Module]) -> None:
        self.drafter, attentions = drafter, [layer.self_attn for layer in drafter.layers]
        self.layers = [FusedLayer(layer, of_block) for layer in drafter.layers]
        self.keys_values = of_context(_joined(*(p for a in attentions for p in (a.k_proj, a.v_proj))))
        self.key_norms, self.eps = torch.stack([a.k_norm.weight for a in attentions]).float()[:, None, None], attentions[0].k_norm.eps
        self.table = Rope(torch.empty(1, 1, 0, 0), torch.empty(1, 1, 0, 0))

    def context(self, taps: Tensor, first: int = 0) -> list[tuple[Tensor, Tensor]]:
        """See :meth:`dspark.draft.drafter.Drafter.context`. taps: [1, tokens, m·hidden]; returns float32."""
        x = self.drafter.hidden_norm(self.drafter.fc(taps).float())
        per_layer = self.keys_values(x).float().view(taps.shape[1], len(self.layers), 2, -1, self.layers[0].head_dim)
        keys, values = per_layer.permute(2, 1, 3, 0, 4)  # two of [layers, kv_heads, tokens, head_dim]
        keys = self.rope(first, taps.shape[1]).rotate(F.rms_norm(keys, keys.shape[-1:], eps=self.eps) * self.key_norms)
        return [(k[None], v[None]) for k, v in zip(keys, values, strict=True)]

    def backbone(self, tokens: Tensor, positions: Tensor, contexts: Sequence[GrowingKV]) -> Tensor:
        """See :meth:`dspark.draft.drafter.Drafter.backbone`. tokens, positions: [1, n], consecutive; returns float32."""
        x = self.drafter.embed(tokens).float()
        rope = self.rope(int(positions[0, 0]), tokens.shape[1])
        for layer, context in zip(self.layers, contexts, strict=True):
            x = layer(x, rope, context)
        return self.drafter.norm(x)

    def rope(self, first: int, count: int) -> Rope:
        """The rotation of positions first … first + count − 1, from a table."""
        if (known := self.table.cos.shape[2]) < first + count:
            config = self.drafter.config
            known = max(known, FIRST_TABLE)
            while known < first + count:
                known *= 2
            self.table = Rope.at(torch.arange(known)[None], config.head_dim, config.rope_theta, torch.float32)
        return Rope(*(part[:, :, first : first + count] for part in self.table))


def _joined(*linears: nn.Linear) -> Tensor:
    """One weight [sum of out, in] that gives the outputs of all of them."""
    return torch.cat([linear.weight.detach() for linear in linears])
