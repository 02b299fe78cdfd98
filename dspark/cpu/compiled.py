"""The target's pass and the drafter's layers on :mod:`dspark.cpu.kernels`, for bfloat16 weights on a CPU without instructions for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dspark.cpu import kernels, product
from dspark.cpu.fused import FusedLayer
from dspark.verify.lean import LeanPass

if TYPE_CHECKING:
    from dspark.cpu.packed import PackedLinear
    from dspark.draft.backbone import Layer as DraftLayer
    from dspark.draft.backbone import Rope
    from dspark.rewind import GrowingKV
    from dspark.target.target import Target
    from dspark.verify.lean import Attention, Layer, MakeProduct


def _layer_weights(products: Sequence[PackedLinear], *norms: Tensor) -> kernels.LayerWeights:
    """products, norms: in the order of :class:`dspark.cpu.kernels.LayerWeights`."""
    biases = tuple(np.empty(0, np.float32) if p.bias is None else p.bias.detach().float().numpy() for p in products)
    return kernels.LayerWeights(*(p.packed for p in products), biases, *(norm.detach().float().numpy() for norm in norms))


class CompiledPass(LeanPass):
    """See :class:`dspark.verify.lean.LeanPass`. make: :class:`dspark.cpu.packed.PackedLinear` with our product; dtype: float32."""

    name = "compiled"

    def __init__(self, target: Target, make: MakeProduct, dtype: torch.dtype) -> None:
        super().__init__(target, make, dtype)
        self.compiled = []
        for layer in self.layers:
            qk_norms = torch.empty(0, self.head_dim) if layer.qk_norms is None else layer.qk_norms
            products = (layer.qkv, layer.out, layer.gate_up, layer.down)
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


class CompiledLayer(FusedLayer):
    """A :class:`dspark.cpu.fused.FusedLayer` as one compiled call per request; without convolutions."""

    def __init__(self, layer: DraftLayer, make: MakeProduct) -> None:
        super().__init__(layer, make)
        products, norms = (self.project, self.out, self.gate_and_up, self.down), (self.attention_norm.weight, self.mlp_norm.weight)
        self.compiled = _layer_weights(products, *norms, self.head_norms[:, 0])

    def __call__(self, x: Tensor, rope: Rope, contexts: Sequence[GrowingKV]) -> Tensor:
        out, room, slots = torch.empty_like(x), x.new_empty(1, self.kv_heads, x.shape[1], self.head_dim), np.zeros(x.shape[1], np.int64)
        for r, context in enumerate(contexts):
            positions = np.arange(context.length, context.length + x.shape[1])
            context.append(room, room)  # which the layer overwrites
            ends = np.full_like(positions, context.length)
            places = kernels.Places(slots, positions, ends, rope.cos[r, 0].numpy(), rope.sin[r, 0].numpy())
            keys, values = context.keys.numpy(), context.values.numpy()
            with product.running():
                block = kernels.decoder_layer(x[r].numpy(), self.compiled, places, keys, values, context.length, self.eps)
            out[r] = torch.from_numpy(block)
        return out
