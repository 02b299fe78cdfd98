"""The target's pass and the drafter's layers on :mod:`dspark.cpu.kernels`, for bfloat16 weights on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dspark.cpu import kernels, product
from dspark.cpu.fused import FusedBackbone
from dspark.cpu.packed import LANES
from dspark.verify.lean import LeanPass

if TYPE_CHECKING:
    from dspark.cpu.packed import PackedLinear
    from dspark.draft.drafter import Drafter, DraftState
    from dspark.target.target import Target
    from dspark.verify.lean import Attention, Layer, MakeProduct


def fits(head_dim: int, products: Sequence[PackedLinear]) -> bool:
    """Whether :func:`dspark.cpu.kernels.decoder_layer`, which pads nothing, takes these sizes."""
    return head_dim % LANES == 0 and all(p.in_features % (2 * LANES) == 0 for p in products)


def _numbers(x: Tensor) -> np.ndarray:
    """As the kernels read it: float32, without gaps."""
    return x.detach().float().contiguous().numpy()


def _layer_weights(products: Sequence[PackedLinear], *norms: Tensor) -> kernels.LayerWeights:
    """products, norms: in the order of :class:`dspark.cpu.kernels.LayerWeights`."""
    biases = tuple(np.empty(0, np.float32) if p.bias is None else _numbers(p.bias) for p in products)
    return kernels.LayerWeights(*(p.packed for p in products), biases, *map(_numbers, norms))


class CompiledPass(LeanPass):
    """See :class:`dspark.verify.lean.LeanPass`. make: :class:`dspark.cpu.packed.PackedLinear`; dtype: float32."""

    name = "compiled"

    def __init__(self, target: Target, make: MakeProduct, dtype: torch.dtype) -> None:
        super().__init__(target, make, dtype)
        self.compiled, self.fits = [], True
        for layer in self.layers:
            qk_norms = torch.empty(0, self.head_dim) if layer.qk_norms is None else layer.qk_norms
            products = (layer.qkv, layer.out, layer.gate_up, layer.down)
            self.fits = self.fits and fits(self.head_dim, products)
            self.compiled += [_layer_weights(products, layer.before_attention, layer.before_mlp, qk_norms)]

    def decoder(self, ids: Tensor, attend: Attention, taps: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        cos, sin = attend.cos[:, 0].numpy(), attend.sin[:, 0].numpy()
        attend.places = kernels.Places(attend.slot.numpy(), attend.positions.numpy(), (attend.positions + 1).numpy(), cos, sin)
        with product.running():
            return super().decoder(ids, attend, taps)

    def _decoder_layer(self, layer: Layer, x: Tensor, index: int, attend: Attention) -> Tensor:
        keys, values = (buffer.numpy() for buffer in attend.cache.layers[index])
        window = layer.window or attend.longest
        return torch.from_numpy(kernels.decoder_layer(x.numpy(), self.compiled[index], attend.places, keys, values, window, self.eps))


class CompiledBackbone(FusedBackbone):
    """A :class:`dspark.cpu.fused.FusedBackbone` of a drafter without convolutions: one call for the context and one for each block.

    make: :class:`dspark.cpu.packed.PackedLinear`, and so are all linear layers of the drafter outside its layers.
    """

    def __init__(self, drafter: Drafter, make: MakeProduct) -> None:
        super().__init__(drafter, make)
        self.compiled, self.fits = (), fits(self.layers[0].head_dim, [drafter.fc, self.keys_values])
        for layer in self.layers:
            products = (layer.project, layer.out, layer.gate_and_up, layer.down)
            self.compiled += (_layer_weights(products, layer.attention_norm.weight, layer.mlp_norm.weight, layer.head_norms[:, 0]),)
            self.fits = self.fits and fits(layer.head_dim, products)
        norms = self.key_norms[:, 0].expand(-1, self.layers[0].kv_heads, -1).contiguous()
        self.of_context = (drafter.fc.packed, _numbers(drafter.hidden_norm.weight), self.keys_values.packed, _numbers(norms))
        self.block, self.norm, self.markov = kernels.draft_block(len(self.layers)), _numbers(drafter.norm.weight), None
        if drafter.markov_head is not None and drafter.markov_head.kind == "vanilla":
            self.markov = drafter.markov_head.markov_w1.weight.detach().view(torch.uint16).numpy(), drafter.markov_head.markov_w2.packed

    def context(self, taps: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        where = positions[0].numpy()
        cos, sin = self.rotation(int(where.max()) + 1)
        with product.running():
            both = kernels.draft_context(_numbers(taps[0]), *self.of_context, cos[where], sin[where], self.eps)
        keys, values = torch.from_numpy(both)[:, :, None]
        return list(zip(keys, values, strict=True))

    def blocks(self, tokens: Tensor, states: Sequence[DraftState]) -> Tensor:
        x, n, out = self.drafter.embed(tokens).float().numpy(), tokens.shape[1], []
        for block, state in zip(x, states, strict=True):
            start = state.layers[0].length
            for kv in state.layers:
                if kv.capacity < start + n:
                    kv.append(*2 * [torch.empty(1, self.layers[0].kv_heads, n, self.layers[0].head_dim)])  # which the block overwrites
            cos, sin = (part[start : start + n] for part in self.rotation(start + n))
            keys, values = (tuple(getattr(kv, side).numpy() for kv in state.layers) for side in ("keys", "values"))
            with product.running():
                out.append(self.block(block, self.compiled, keys, values, start, cos, sin, self.norm, self.eps))
        return torch.from_numpy(np.stack(out))

    def rotation(self, end: int) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [positions, head_dim] of 0, 1, … up to at least ``end``."""
        if len(self.table[0]) < end:
            self.rope(torch.tensor([end - 1]))
        return self.table[0].numpy(), self.table[1].numpy()

    def next_logits(self, base: Tensor, hidden: Tensor, k: int, previous: Sequence[int], state: Any) -> tuple[Tensor, Any]:
        if self.markov is None:
            return super().next_logits(base, hidden, k, previous, state)
        with product.running():
            return torch.from_numpy(kernels.markov_logits(_numbers(base), k, *self.markov, np.array(previous))), None
