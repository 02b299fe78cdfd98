"""Our own pass of Llama-like models: the sums of transformers' modules in fewer steps, for R requests at once.

What costs time in a pass over a few tokens is reading the weights and calling kernels. Here projections that read the same input are one
product, the heads that share keys stand in one attention call as further queries, and the products run over all tokens of all requests
without padding. How a product's weight is laid out is the caller's choice (:mod:`dspark.load` packs it for a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.rewind import Slot, SlotCache

if TYPE_CHECKING:
    from dspark.target.target import Target

Product = Callable[[Tensor], Tensor]
MakeProduct = Callable[[Tensor, Tensor | None], Product]  # weight [out, in], bias [out] → x [..., in] → [..., out]
FIRST_TABLE = 1024  # positions with known cosines and sines; grows by doubling
FOLDED = 64  # up to so many tokens a request's heads are folded into one attention call
ALONE = 1  # up to so many requests attend one by one; more share one padded call


@dataclass(frozen=True)
class Family:
    """What tells one Llama-like architecture from the next, beyond what its modules show.

    qk_norm: queries and keys are RMS-normed per head before the rotary embedding.
    windows: config → per layer the tokens a query sees, itself included; None for all.
    """

    qk_norm: bool = False
    windows: Callable[[object, int], list[int | None]] = lambda config, layers: [None] * layers


def _by_layer_types(config: object, layers: int) -> list[int | None]:
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


FAMILIES = {  # model_type → row
    "llama": Family(),
    "mistral": Family(windows=lambda config, layers: [getattr(config, "sliding_window", None)] * layers),
    "qwen2": Family(windows=_by_layer_types),
    "qwen3": Family(qk_norm=True, windows=_by_layer_types),
}


def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """x · weightᵀ + bias, from the weight as it is."""
    return partial(F.linear, weight=weight, bias=bias)


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: its products, norms and window."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    before_attention: Tensor  # [hidden]
    before_mlp: Tensor  # [hidden]
    qk_norms: Tensor | None  # [heads + kv_heads, head_dim]
    window: int | None


class LeanPass:
    """See :class:`dspark.verify.passes.TargetPass`. Made by :func:`lean_pass`."""

    name = "lean"

    def __init__(self, target: Target, family: Family, make: MakeProduct) -> None:
        config, model = target.config, target.model
        self.target, self.decoder = target, target.decoder
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps, self.scale = config.rms_norm_eps, self.head_dim**-0.5
        windows = family.windows(config, target.num_layers)
        self.layers = [self._layer(layer, window, family, make) for layer, window in zip(target.layers, windows, strict=True)]
        self.norm = self.decoder.norm.weight
        self.embedding = target.embedding.weight
        self.head = make(model.get_output_embeddings().weight, None)
        self.table = (torch.empty(0), torch.empty(0))

    def _layer(self, layer: nn.Module, window: int | None, family: Family, make: MakeProduct) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if family.qk_norm:
            norms = torch.stack([attention.q_norm.weight] * self.heads + [attention.k_norm.weight] * self.kv_heads)
        return _Layer(
            _joined(make, attention.q_proj, attention.k_proj, attention.v_proj),
            _joined(make, attention.o_proj),
            _joined(make, mlp.gate_proj, mlp.up_proj),
            _joined(make, mlp.down_proj),
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            norms,
            window,
        )

    @property
    def bytes_per_token(self) -> int:
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * self.target.dtype.itemsize

    def new_cache(self) -> SlotCache:
        return SlotCache(len(self.layers), self.kv_heads, self.head_dim, self.target.dtype, self.target.device)

    @torch.inference_mode()
    def __call__(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[Slot], cache: SlotCache, taps: Sequence[int] = (), *, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See :class:`dspark.verify.passes.TargetPass`."""
        counts = [len(ids) for ids in tokens]
        starts = [slot.length for slot in slots]
        cache.reserve(max(start + count for start, count in zip(starts, counts, strict=True)))
        device = self.target.device
        ids = torch.tensor([token for row in tokens for token in row], device=device)
        attend = _Attention(self, cache, slots, starts, counts)
        x, tapped = F.embedding(ids, self.embedding), {}
        if -1 in taps:
            tapped[-1] = x
        for i, layer in enumerate(self.layers):
            x = self._run(layer, x, i, attend)
            if i in taps:
                tapped[i] = x
        for slot, count in zip(slots, counts, strict=True):
            slot.length += count
        if last_only:
            x = x[torch.tensor(counts, device=device).cumsum(0) - 1]
        logits = self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.eps))
        joined = torch.cat([tapped[i] for i in taps], -1).split(counts) if taps else [None] * len(slots)
        return list(logits.split(1 if last_only else counts)), [None if t is None else t[None] for t in joined]

    def _run(self, layer: _Layer, x: Tensor, index: int, attend: _Attention) -> Tensor:
        """One decoder layer. x: [N, hidden] → [N, hidden]."""
        qkv = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.before_attention, self.eps)).unflatten(-1, (-1, self.head_dim))
        queries_keys, values = qkv.split((self.heads + self.kv_heads, self.kv_heads), 1)  # [N, heads, head_dim]
        if layer.qk_norms is not None:
            queries_keys = F.rms_norm(queries_keys, (self.head_dim,), None, self.eps) * layer.qk_norms
        queries, keys = attend.rotate(queries_keys).split((self.heads, self.kv_heads), 1)
        x = x + layer.out(attend(index, layer.window, queries, keys, values))
        gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.before_mlp, self.eps)).chunk(2, -1)
        return x + layer.down(F.silu(gate) * up)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of these positions, two of [N, 1, head_dim], from a table of the model's own rotary embedding."""
        needed, table = int(positions.max()) + 1, self.table
        if len(table[0]) < needed:
            size = max(FIRST_TABLE, 1 << (needed - 1).bit_length())
            every = torch.arange(size, device=positions.device)[None]
            table = tuple(part[0][:, None] for part in self.decoder.rotary_emb(self.embedding[:1, None], every))
            self.table = table
        return table[0][positions], table[1][positions]


class _Attention:
    """The attention of one pass: writes new keys and values to the slots, then lets every query see its own request's past.

    A few requests attend one after another, each over its own context; more share one call, padded to the longest.
    """

    def __init__(self, lean: LeanPass, cache: SlotCache, slots: Sequence[Slot], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.lean, self.cache, self.starts, self.counts = lean, cache, starts, counts
        device = lean.target.device
        self.positions = torch.cat([torch.arange(start, start + n, device=device) for start, n in zip(starts, counts, strict=True)])
        self.cos, self.sin = lean.rope(self.positions)
        self.group = lean.heads // lean.kv_heads
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}
        self.slots = [slot.index for slot in slots]
        self.together = len(slots) > ALONE and max(counts) <= FOLDED
        if self.together:  # where each token stands: its slot, and its row and column in a [R, n] grid
            each = torch.tensor(counts, device=device)
            self.row = torch.arange(len(slots), device=device).repeat_interleave(each)
            self.column = self.positions - torch.tensor(starts, device=device).repeat_interleave(each)
            self.slot = torch.tensor(self.slots, device=device)
            self.in_order = self.slots == list(range(len(slots)))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding. x: [N, heads, head_dim]."""
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def __call__(self, index: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries: [N, heads, head_dim]; keys, values: [N, kv_heads, head_dim]. Returns [N, heads · head_dim]."""
        buffers = self.cache.layers[index]
        if self.together:
            return self._padded(buffers, window, queries, keys, values)
        out, first = [], 0
        for r, (slot, start, n) in enumerate(zip(self.slots, self.starts, self.counts, strict=True)):
            rows, end = slice(first, first + n), start + n
            for buffer, new in zip(buffers, (keys, values), strict=True):
                buffer[slot, :, start:end] = new[rows].transpose(0, 1)
            k, v = (buffer[slot, None, :, :end] for buffer in buffers)
            out.append(self._alone(queries[rows], k, v, self._mask(r, window)))
            first += n
        return torch.cat(out) if len(out) > 1 else out[0]

    def _alone(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """queries: [n, heads, head_dim]; keys, values: [1, kv_heads, context, head_dim]; mask: see :meth:`_mask`. Returns [n, …]."""
        n, lean = len(queries), self.lean
        if n <= FOLDED:  # a group's heads as further queries: the kernel reads shared keys once
            folded = queries.transpose(0, 1).reshape(1, lean.kv_heads, self.group * n, lean.head_dim)
            mixed = F.scaled_dot_product_attention(folded, keys, values, mask, scale=lean.scale)
            return mixed.view(lean.heads, n, lean.head_dim).transpose(0, 1).reshape(n, -1)
        mixed = F.scaled_dot_product_attention(queries.transpose(0, 1)[None], keys, values, mask, scale=lean.scale, enable_gqa=True)
        return mixed[0].transpose(0, 1).reshape(n, -1)

    def _padded(self, buffers: tuple[Tensor, ...], window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All requests in one call."""
        lean, count, widest = self.lean, len(self.counts), max(self.counts)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[self.slot[self.row], :, self.positions] = new
        longest = max(start + n for start, n in zip(self.starts, self.counts, strict=True))
        k, v = (buffer[:count, :, :longest] if self.in_order else buffer[self.slot, :, :longest] for buffer in buffers)
        grid = queries.new_zeros(count, widest, lean.heads, lean.head_dim)
        grid[self.row, self.column] = queries
        folded = grid.transpose(1, 2).reshape(count, lean.kv_heads, self.group * widest, lean.head_dim)
        mixed = F.scaled_dot_product_attention(folded, k, v, self._mask_of_all(widest, longest, window), scale=lean.scale)
        mixed = mixed.view(count, lean.heads, widest, lean.head_dim).transpose(1, 2)
        return mixed[self.row, self.column].flatten(1)

    def _mask(self, r: int, window: int | None) -> Tensor | None:
        """What request r's queries may see, [n or group · n, context], 0 or −∞; None if that is everything. Made once per pass."""
        if (r, window) not in self.masks:
            start, n = self.starts[r], self.counts[r]
            end, device = start + n, self.positions.device
            if n == 1 and (window is None or end <= window):
                mask = None
            else:
                mask = self._additive(torch.arange(start, end, device=device)[:, None], torch.arange(end, device=device), window)
                mask = mask.repeat(self.group, 1) if n <= FOLDED else mask
            self.masks[r, window] = mask
        return self.masks[r, window]

    def _mask_of_all(self, widest: int, longest: int, window: int | None) -> Tensor | None:
        """The same for all requests, [R, 1, group · n, context]."""
        if (-1, window) not in self.masks:
            ends = {start + n for start, n in zip(self.starts, self.counts, strict=True)}
            if widest == 1 and ends == {longest} and (window is None or longest <= window):
                mask = None
            else:
                device = self.positions.device
                query = torch.tensor(self.starts, device=device)[:, None] + torch.arange(widest, device=device)
                mask = self._additive(query[..., None], torch.arange(longest, device=device), window)  # [R, n, context]
                mask = mask.repeat(1, self.group, 1)[:, None]
            self.masks[-1, window] = mask
        return self.masks[-1, window]

    def _additive(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """0 where a query at this position may see a key at that one, −∞ elsewhere."""
        hidden = key > query if window is None else (key > query) | (key <= query - window)
        return torch.zeros(hidden.shape, dtype=self.lean.target.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def lean_pass(target: Target, make: MakeProduct = plain_product) -> LeanPass | None:
    """The lean pass of this target, or None if its architecture has no row or its modules are not the plain ones."""
    family, config = FAMILIES.get(target.config.model_type), target.config
    rope = getattr(config, "rope_parameters", None) or {}
    fits = family is not None and getattr(config, "hidden_act", "silu") == "silu" and rope.get("partial_rotary_factor", 1.0) == 1.0
    fits = fits and target.steady_context >= (getattr(config, "max_position_embeddings", None) or 0)
    if not fits or not all(_is_plain(layer, family) for layer in target.layers):
        return None
    return LeanPass(target, family, make)


def _is_plain(layer: nn.Module, family: Family) -> bool:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    names = [(attention, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")] + [(mlp, n) for n in ("gate_proj", "up_proj", "down_proj")]
    return all(type(getattr(part, name, None)) is nn.Linear for part, name in names)


def _joined(make: MakeProduct, *linears: nn.Linear) -> Product:
    """One product that gives the outputs of all of these."""
    weight = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight.detach()
    bias = None
    if any(linear.bias is not None for linear in linears):
        none = [linear.weight.new_zeros(linear.out_features) for linear in linears]
        bias = torch.cat([zero if linear.bias is None else linear.bias.detach() for linear, zero in zip(linears, none, strict=True)])
    return make(weight, bias)
