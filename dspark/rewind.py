"""A KV cache that forgets in O(1): the rejected part of a block is dropped by lowering a number."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_CAPACITY = 256  # tokens; grows by doubling, so extending costs amortised O(1) per token


def enlarged(buffer: Tensor, rows: int, tokens: int) -> Tensor:
    """A copy of [≤ rows, heads, ≤ tokens, head_dim] with room for these and more; zeros follow, since kernels read too far: no NaN."""
    capacity = max(FIRST_CAPACITY, 1 << (tokens - 1).bit_length())
    bigger = buffer.new_zeros(rows, buffer.shape[1], capacity, buffer.shape[3])
    bigger[: len(buffer), :, : buffer.shape[2]] = buffer
    return bigger


class GrowingKV:
    """Keys and values of one attention layer in a preallocated buffer, of which the first ``length`` positions are valid.

    keys, values: [batch, heads, capacity, head_dim] in the dtype of what is appended; None before that.
    """

    length = 0
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [batch, heads, new, head_dim] after the valid part; return views [batch, heads, length, head_dim]."""
        start, self.length = self.length, self.length + keys.shape[2]
        if self.length > self.capacity:
            held = (keys[:, :, :0], values[:, :, :0]) if self.keys is None else (self.keys, self.values)
            self.keys, self.values = (enlarged(side, len(keys), self.length) for side in held)
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.view()

    def view(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def rewind(self, length: int) -> None:
        """Forget every position from ``length`` on. Raises ValueError if fewer are held."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} tokens")
        self.length = length


class RewindLayer(GrowingKV, DynamicLayer):
    """One layer as transformers sees it.

    It never claims to be a sliding-window layer: all keys and values stay, and the model's own mask applies the window. So a
    rewind never needs keys that were dropped.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        return self.append(key_states, value_states)

    def get_seq_length(self, *_: object) -> int:
        return self.length


class RewindCache(Cache):
    """A transformers cache for any causal LM, passed as ``past_key_values``; :meth:`rewind` costs O(layers), whatever the length."""

    most_replayed = 0  # tokens that are run again after a rewind: a cache with states has some

    def __init__(self, num_hidden_layers: int) -> None:
        super().__init__(layers=[RewindLayer() for _ in range(num_hidden_layers)])

    @property
    def length(self) -> int:
        return self.layers[0].length

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ValueError if fewer are held."""
        for layer in self.layers:
            layer.rewind(length)


class Slot:
    """One request's place in a :class:`SlotCache`.

    index: row of the buffers; the last slot's changes when another is closed.
    length: tokens held.
    """

    def __init__(self, index: int) -> None:
        self.index, self.length = index, 0

    rewind = GrowingKV.rewind


class SlotCache:
    """Keys and values of R requests, each with a length of its own; a rewind lowers that number.

    layers: per layer keys and values, two of [slots, kv_heads, capacity, head_dim]; the R open slots are rows 0..R−1.
    """

    def __init__(self, num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots: list[Slot] = []
        self.layers = [
            tuple(torch.empty(0, kv_heads, 0, head_dim, dtype=dtype, device=device) for _ in range(2)) for _ in range(num_layers)
        ]

    @property
    def capacity(self) -> int:
        """Tokens that every slot has room for."""
        return self.layers[-1][0].shape[2]  # the last to grow, should an interrupt come in between

    def open(self) -> Slot:
        """An empty slot for a new request."""
        if len(self.slots) == len(self.layers[-1][0]):
            self._resize(2 * len(self.slots) or 1, self.capacity)
        self.slots.append(Slot(len(self.slots)))
        return self.slots[-1]

    @torch.inference_mode()
    def close(self, slot: Slot) -> None:
        """Give a slot back; the last one takes its row, so open slots stay together."""
        last = self.slots[-1]
        if last is not slot:
            for buffers in self.layers:
                for buffer in buffers:
                    buffer[slot.index, :, : last.length] = buffer[last.index, :, : last.length]
            self.slots[slot.index], last.index = last, slot.index
        self.slots.pop()
        slot.length = 0

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` tokens in every slot; buffers grow by doubling."""
        if tokens > self.capacity:
            self._resize(len(self.layers[-1][0]), tokens)

    def _resize(self, slots: int, tokens: int) -> None:
        for i, buffers in enumerate(self.layers):
            self.layers[i] = tuple(enlarged(buffer, slots, tokens) for buffer in buffers)
