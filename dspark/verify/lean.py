"""Our own pass of Llama-like models: the arithmetic of transformers' modules in fewer calls, for R requests at once.

A pass over a few tokens spends its time on reading weights and calling kernels. Here projections of the same input are one product, the
heads that share keys are folded into the queries of one attention call, and products run over the tokens of all requests without
padding. The caller chooses how a product's weight is laid out and in which dtype the pass computes (:mod:`dspark.cpu` does for a CPU).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.rewind import Slot, SlotCache

if TYPE_CHECKING:
    from dspark.target.target import Target

log = logging.getLogger(__name__)

Product = Callable[[Tensor], Tensor]
MakeProduct = Callable[[Tensor, Tensor | None], Product]  # weight [out, in], bias [out] → x [..., in] → [..., out]
FIRST_TABLE = 1024  # positions in the first table of cosines and sines; it grows by doubling
FOLDED = 64  # tokens of a request up to which the heads that share keys are folded into the queries
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # models of other types run transformers' own modules


def windows(config: object, layers: int) -> list[int | None]:
    """Per layer how many tokens a query sees, itself included; None for all."""
    if config.model_type.startswith("qwen"):
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    return [config.sliding_window if config.model_type == "mistral" else None] * layers


def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """x · weightᵀ + bias, from the weight as it is."""
    return partial(F.linear, weight=weight, bias=bias)


class Layer:
    """One decoder layer: its products, norms and window."""

    def __init__(self, lean: LeanPass, layer: nn.Module, window: int | None, make: MakeProduct) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = joined(make, attention.q_proj, attention.k_proj, attention.v_proj)  # hidden → (heads + 2 kv_heads) · head_dim
        self.out = joined(make, attention.o_proj)  # heads · head_dim → hidden
        self.gate_up = joined(make, mlp.gate_proj, mlp.up_proj)  # hidden → 2 intermediate
        self.down = joined(make, mlp.down_proj)  # intermediate → hidden
        self.before_attention = layer.input_layernorm.weight.detach().to(lean.dtype)  # [hidden]
        self.before_mlp = layer.post_attention_layernorm.weight.detach().to(lean.dtype)  # [hidden]
        self.window = window  # tokens, None for all
        self.qk_norms: Tensor | None = None  # [heads + kv_heads, head_dim]
        if hasattr(attention, "q_norm"):
            norms = [attention.q_norm.weight] * lean.heads + [attention.k_norm.weight] * lean.kv_heads
            self.qk_norms = torch.stack(norms).detach().to(lean.dtype)


class LeanPass:
    """See :class:`dspark.verify.passes.TargetPass`. Made by :func:`lean_pass`."""

    name = "lean"

    def __init__(self, target: Target, make: MakeProduct, dtype: torch.dtype) -> None:
        config, decoder = target.config, target.decoder
        self.device, self.dtype, self.rotary = target.device, dtype, decoder.rotary_emb
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps, self.scale = config.rms_norm_eps, self.head_dim**-0.5
        seen = windows(config, target.num_layers)
        self.layers = [Layer(self, layer, window, make) for layer, window in zip(target.layers, seen, strict=True)]
        self.norm = decoder.norm.weight.detach().to(dtype)
        self.embedding = target.embedding.weight
        self.head = make(target.head_weight, None)
        self.table = (torch.empty(0), torch.empty(0))

    @property
    def bytes_per_token(self) -> int:
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * self.dtype.itemsize

    def new_cache(self) -> SlotCache:
        return SlotCache(len(self.layers), self.kv_heads, self.head_dim, self.dtype, self.device)

    @torch.inference_mode()
    def __call__(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[Slot], cache: SlotCache, taps: Sequence[int] = (), *, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See :class:`dspark.verify.passes.TargetPass`."""
        order = sorted(range(len(slots)), key=lambda r: slots[r].index)  # rows of the buffers that are adjacent are not copied
        tokens, slots = [tokens[r] for r in order], [slots[r] for r in order]
        counts = [len(ids) for ids in tokens]
        starts = [slot.length for slot in slots]
        cache.reserve(max(start + count for start, count in zip(starts, counts, strict=True)))
        ids = torch.tensor([token for row in tokens for token in row], device=self.device)
        attend = Attention(self, cache, slots, starts, counts)
        x, tapped = self.decoder(ids, attend, taps)
        for slot, count in zip(slots, counts, strict=True):
            slot.length += count
        if last_only:
            x = x[torch.tensor(counts, device=self.device).cumsum(0) - 1]
        joined = [None] * len(slots) if tapped is None else [each[None] for each in tapped.split(counts)]
        logits, back = self.logits(x).split(1 if last_only else counts), sorted(range(len(order)), key=order.__getitem__)
        return [logits[r] for r in back], [joined[r] for r in back]

    def decoder(self, ids: Tensor, attend: Attention, taps: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """All layers. ids: [N] → the residual stream [N, hidden] after the last, and the taps [N, m·hidden], None if none are asked for."""
        x = F.embedding(ids, self.embedding).to(self.dtype)
        tapped = {-1: x}
        for i, layer in enumerate(self.layers):
            x = self._decoder_layer(layer, x, i, attend)
            if i in taps:
                tapped[i] = x
        return x, torch.cat([tapped[i] for i in taps], -1).to(self.embedding.dtype) if taps else None

    def logits(self, x: Tensor) -> Tensor:
        """The residual stream [N, hidden] after the last layer → [N, vocab]."""
        return self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.eps))

    def _decoder_layer(self, layer: Layer, x: Tensor, index: int, attend: Attention) -> Tensor:
        """x: [N, hidden] → [N, hidden], for the N new tokens of all requests; index: of the layer."""
        qkv = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.before_attention, self.eps)).unflatten(-1, (-1, self.head_dim))
        queries_keys, values = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]  # [N, heads, head_dim]
        if layer.qk_norms is not None:
            queries_keys = F.rms_norm(queries_keys, (self.head_dim,), None, self.eps) * layer.qk_norms
        rotated = attend.rotate(queries_keys)
        x = x + layer.out(attend(index, layer.window, rotated[:, : self.heads], rotated[:, self.heads :], values))
        gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.before_mlp, self.eps)).chunk(2, -1)
        return x + layer.down(F.silu(gate) * up)

    def rope(self, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions 0, 1, … up to at least ``longest``, two of [positions, 1, head_dim], by the model's own module.

        The first half of each sine is negated, so that rotating x is x · cos + roll(x) · sin.
        """
        table = self.table  # other threads may replace it
        if len(table[0]) < longest:
            every = torch.arange(max(FIRST_TABLE, 1 << (longest - 1).bit_length()), device=self.device)[None]
            cos, sin = (part[0][:, None] for part in self.rotary(self.embedding[:1, None].to(self.dtype), every))
            left, right = sin.chunk(2, -1)
            table = self.table = (cos, torch.cat([-left, right], -1))
        return table


class Attention:
    """The attention of one pass: writes new keys and values to the slots, then lets every query see its own request's tokens.

    All requests share one call, on a grid [R, n] of new tokens padded to the longest; a single request needs no padding.

    widest, longest: n, and the most tokens that a request has, new ones included.
    row, column: [N], where each new token is in the grid.
    slot, positions: [N], where its key and value go.
    rows: the requests' rows of the buffers; a slice if they are adjacent, which copies nothing.
    """

    def __init__(self, lean: LeanPass, cache: SlotCache, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.lean, self.cache, self.group = lean, cache, lean.heads // lean.kv_heads
        device, index = lean.device, [slot.index for slot in slots]
        self.starts, each, slot = (torch.tensor(numbers, device=device) for numbers in (starts, counts, index))
        self.widest, self.longest = max(counts), max(start + n for start, n in zip(starts, counts, strict=True))
        self.row = torch.arange(len(slots), device=device).repeat_interleave(each)
        self.column = torch.arange(len(self.row), device=device) - (each.cumsum(0) - each)[self.row]
        self.positions, self.slot = self.starts[self.row] + self.column, slot[self.row]
        self.rows = slice(index[0], index[0] + len(slots)) if index == list(range(index[0], index[0] + len(slots))) else slot
        self.sees_all = self.widest == 1 and all(start + 1 == self.longest for start in starts)
        self.cos, self.sin = (part[self.positions] for part in lean.rope(self.longest))
        self.masks: dict[int | None, Tensor | None] = {}

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding. x: [N, heads, head_dim]."""
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin

    def __call__(self, index: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries: [N, heads, head_dim]; keys, values: [N, kv_heads, head_dim]. Returns [N, heads · head_dim]."""
        buffers, lean, requests = self.cache.layers[index], self.lean, len(self.starts)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            if requests > 1:
                buffer[self.slot, :, self.positions] = new
            else:  # as a slice, in half the time
                buffer[self.rows, :, self.longest - self.widest : self.longest] = new.transpose(0, 1)
        keys, values = (buffer[self.rows, :, : self.longest] for buffer in buffers)  # [R, kv_heads, context, head_dim]
        if requests > 1:
            grid = queries.new_zeros(requests, self.widest, lean.heads, lean.head_dim)
            grid[self.row, self.column] = queries
        else:
            grid = queries[None]
        grid, mask = grid.transpose(1, 2), self._mask(window)  # [R, heads, n, head_dim]
        if self.widest <= FOLDED:  # the kernel reads shared keys once
            grid = grid.reshape(requests, lean.kv_heads, -1, lean.head_dim)
        mixed = F.scaled_dot_product_attention(grid, keys, values, mask, scale=lean.scale, enable_gqa=self.widest > FOLDED)
        mixed = mixed.view(requests, lean.heads, self.widest, lean.head_dim).transpose(1, 2)
        return (mixed[self.row, self.column] if requests > 1 else mixed[0]).flatten(1)

    def _mask(self, window: int | None) -> Tensor | None:
        """0 where a query may see a key, else −∞: [R, 1, group · n, context], or [R, 1, n, context] unfolded. None if all is visible."""
        if window not in self.masks:
            mask = None
            if not self.sees_all or (window is not None and self.longest > window):
                query = self.starts[:, None, None] + torch.arange(self.widest, device=self.starts.device)[:, None]
                key = torch.arange(self.longest, device=self.starts.device)
                hidden = key > query if window is None else (key > query) | (key <= query - window)  # [R, n, context]
                mask = torch.zeros(hidden.shape, dtype=self.lean.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
                mask = mask.repeat(1, self.group if self.widest <= FOLDED else 1, 1)[:, None]
            self.masks[window] = mask
        return self.masks[window]


def lean_pass(
    target: Target, make: MakeProduct = plain_product, dtype: torch.dtype | None = None, kind: type[LeanPass] = LeanPass
) -> LeanPass | None:
    """The lean pass of this target, or None if its architecture is not in FAMILIES or its modules are not the plain ones.

    kind: a faster one with the same arguments.
    dtype: of hidden states, keys, values and logits between the products; None for the model's own.
    """
    config = target.config
    devices = {str(weight.device) for weight in target.model.parameters()}
    if len(devices) > 1:
        log.warning("%s is split over %s: its own modules run", target.name, ", ".join(sorted(devices)))
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    usual = getattr(config, "hidden_act", "silu") == "silu" and rope.get("partial_rotary_factor", 1.0) == 1.0
    steady = target.steady_context >= (getattr(config, "max_position_embeddings", None) or 0)
    fits = config.model_type in FAMILIES and usual and steady and all(map(_is_plain, target.layers))
    return kind(target, make, dtype or target.dtype) if fits else None


def _is_plain(layer: nn.Module) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    names = [(attention, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")] + [(mlp, n) for n in ("gate_proj", "up_proj", "down_proj")]
    return all(type(getattr(part, name, None)) is nn.Linear for part, name in names)


def joined(make: MakeProduct, *linears: nn.Linear) -> Product:
    """One product that computes the outputs of all of these, side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears])
    return make(weight, bias)
