"""A decoder layer on a CPU, compiled by numba: one call instead of about thirty small PyTorch kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import float32, float64, int64, njit, prange, types, uint16

from dspark.cpu.product import FLOAT_ROWS, OUTPUTS, ROWS, WORD_ROWS, compiled, mixtures, product, tiles


@njit(nogil=True, fastmath=True, inline="always")
def _exp(x: float) -> float:
    """e^x to float32's precision, in arithmetic that vectorizes: 2^n from its bits, times a polynomial; x is taken from −87 to 88."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.69314718)
    p = np.float32(1.9875691e-4)
    for c in (1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 0.16666665, 0.5, 1.0, 1.0):
        p = p * r + np.float32(c)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(nogil=True, fastmath=True)
def _largest(x: np.ndarray) -> float:
    """Of the numbers x [n], compared by their bits as whole numbers, because LLVM vectorizes no maximum of floats."""
    bits, largest = x.view(np.int32), np.int32(-(2**31))
    for j in range(len(bits)):
        largest = max(largest, bits[j] ^ (bits[j] >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return np.int32(largest ^ (largest >> np.int32(31)) & np.int32(0x7FFFFFFF)).view(np.float32)


@njit(nogil=True, fastmath=True)
def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm. x: [n, hidden], weight: [hidden]. Returns [n, hidden]."""
    out = np.empty_like(x)
    for t in range(len(x)):
        square = np.float32(0)
        for i in range(x.shape[1]):
            square += x[t, i] * x[t, i]
        scale = np.float32(1) / np.sqrt(square / np.float32(x.shape[1]) + np.float32(eps))
        for i in range(x.shape[1]):
            out[t, i] = x[t, i] * scale * weight[i]
    return out


@njit(nogil=True, fastmath=True)
def _attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, ends: np.ndarray, window: int, low: int) -> None:
    """Attention of some tokens' heads that share keys, in place of the queries.

    queries: [tokens · heads, head_dim], token by token; keys, values: [seen, head_dim], from position ``low`` on, at least
    OUTPUTS; ends: [tokens].
    """
    seen, size = keys.shape
    scores, totals = np.empty((len(queries), seen), np.float32), np.empty(len(queries), np.float32)
    heads, full = len(queries) // len(ends), seen // OUTPUTS * OUTPUTS
    for rest in range(1 + (full < seen)):  # a tile takes OUTPUTS keys, so the last one takes some of them once more
        tiles(queries, keys, scores, rest * (seen - OUTPUTS), full + rest * (seen - full))
    for head in range(len(queries)):
        row, end = scores[head], ends[head // heads]
        first = max(0, end - window)
        for j in range(first - low):
            row[j] = 0
        for j in range(end - low, seen):
            row[j] = 0
        row = row[first - low : end - low]
        largest, total = _largest(row), np.float32(0)
        for j in range(len(row)):
            row[j] = _exp((row[j] - largest) * np.float32(size**-0.5))
            total += row[j]
        totals[head] = np.float32(1) / total
    mixtures(scores, values, queries)
    for head in range(len(queries)):
        for i in range(size):
            queries[head, i] *= totals[head]


@njit(parallel=True, nogil=True, fastmath=True)
def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, slots: np.ndarray, ends: np.ndarray, window: int) -> np.ndarray:
    """Returns [n, heads · head_dim].

    queries: [n, heads + kv_heads, head_dim]; the last kv_heads are not read.
    keys, values: [slots, kv_heads, capacity ≥ OUTPUTS, head_dim], finite also where nothing was written.
    slots: [n], each query's row of the buffers. ends: [n], it sees the positions before this one. window: of those the last so many.
    """
    n, size, kv_heads = len(queries), queries.shape[2], keys.shape[1]
    heads = queries.shape[1] - kv_heads
    out, group = np.empty((n, heads, size), np.float32), heads // kv_heads
    starts, count = np.empty(n + 1, np.int64), 0  # of tokens that read the same keys together
    for t in range(n):
        if not count or slots[t] != slots[t - 1] or group * (t + 1 - starts[count - 1]) > ROWS:
            starts[count] = t
            count += 1
    starts[count] = n
    for task in prange(count * kv_heads):
        kv, start, stop = task // count, starts[task % count], starts[task % count + 1]
        low, end, together = ends[start], 0, np.empty(((stop - start) * group, size), np.float32)
        for t in range(start, stop):
            low, end = min(low, max(0, ends[t] - window)), max(end, ends[t])
            for head in range(group):
                for i in range(size):
                    together[(t - start) * group + head, i] = queries[t, kv * group + head, i]
        low = min(low, keys.shape[2] - OUTPUTS)
        end = max(end, low + OUTPUTS)  # the first few tokens are given more keys than they see
        _attend(together, keys[slots[start], kv, low:end], values[slots[start], kv, low:end], ends[start:stop], window, low)
        for t in range(start, stop):
            for head in range(group):
                for i in range(size):
                    out[t, kv * group + head, i] = together[(t - start) * group + head, i]
    return out.reshape(n, -1)


class LayerWeights(NamedTuple):
    """Of one decoder layer: matrices as :func:`dspark.cpu.product.words`, all else float32; a bias or norm that a model lacks is empty."""

    qkv: np.ndarray  # [(heads + 2 kv_heads) · head_dim, hidden/2]
    out: np.ndarray  # [hidden, heads · head_dim / 2]
    gate_up: np.ndarray  # [2 intermediate, hidden/2]
    down: np.ndarray  # [hidden, intermediate/2]
    biases: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of these four
    before_attention: np.ndarray  # [hidden]
    before_mlp: np.ndarray  # [hidden]
    qk_norms: np.ndarray  # [heads + kv_heads, head_dim]


class Places(NamedTuple):
    """Where each of the n tokens of a pass is written, and how far it sees.

    slots, positions: [n] int64, the row of the buffers and the position in it where a token's key and value go.
    ends: [n] int64, how many positions it sees.
    cos, sin: [n, head_dim] float32; of the sines the second half is read.
    """

    slots: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


@njit(nogil=True)
def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    y = product(x, weight)
    if len(bias):
        for t in range(len(y)):
            for i in range(y.shape[1]):
                y[t, i] += bias[i]
    return y


@njit(nogil=True)
def _write(x: np.ndarray, first: int, places: Places, buffer: np.ndarray) -> None:
    """The keys or values x[:, first : first + kv_heads] to their places in the buffer [slots, kv_heads, capacity, head_dim]."""
    for t in range(len(x)):
        for head in range(buffer.shape[1]):
            for i in range(buffer.shape[3]):
                buffer[places.slots[t], head, places.positions[t], i] = x[t, first + head, i]


@njit(nogil=True)
def _sum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    for t in range(len(x)):
        for i in range(x.shape[1]):
            y[t, i] += x[t, i]
    return y


@njit(nogil=True, fastmath=True)
def _normed_and_rotated(qkv: np.ndarray, heads: int, norms: np.ndarray, cos: np.ndarray, sin: np.ndarray, eps: float) -> np.ndarray:
    """Queries and keys with their norms, if they have some, and rotary embedding. qkv: [n, > heads, head_dim] → [n, heads, head_dim]."""
    n, half = len(qkv), qkv.shape[2] // 2
    out = np.empty((n, heads, 2 * half), np.float32)
    for t in range(n):
        for head in range(heads):
            vector, rotated = qkv[t, head], out[t, head]
            if len(norms):
                vector = norm(qkv[t, head : head + 1], norms[head], eps)[0]
            for i in range(half):
                rotated[i] = vector[i] * cos[t, i] - vector[half + i] * sin[t, half + i]
                rotated[half + i] = vector[half + i] * cos[t, half + i] + vector[i] * sin[t, half + i]
    return out


@njit(parallel=True, nogil=True, fastmath=True)
def _swiglu(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) · up. gate_up: [n, 2 intermediate] → [n, intermediate]."""
    n, wide = len(gate_up), gate_up.shape[1] // 2
    out = np.empty((n, wide), np.float32)
    for t in prange(n):
        gate, up, row = gate_up[t, :wide], gate_up[t, wide:], out[t]
        for i in range(wide):
            row[i] = gate[i] / (np.float32(1) + _exp(-gate[i])) * up[i]
    return out


BUFFER, NUMBERS, INDICES = float32[:, :, :, ::1], float32[::1], int64[::1]
LAYER = types.NamedTuple((*[WORD_ROWS] * 4, types.UniTuple(NUMBERS, 4), NUMBERS, NUMBERS, FLOAT_ROWS), LayerWeights)
PLACES = types.NamedTuple((*[INDICES] * 3, FLOAT_ROWS, FLOAT_ROWS), Places)


@compiled(FLOAT_ROWS(FLOAT_ROWS, LAYER, PLACES, BUFFER, BUFFER, int64, float64))
def decoder_layer(
    x: np.ndarray, layer: LayerWeights, places: Places, keys: np.ndarray, values: np.ndarray, window: int, eps: float
) -> np.ndarray:
    """x: [n, hidden]; keys, values: [slots, kv_heads, capacity, head_dim], into which those of the tokens go. Returns [n, hidden]."""
    kv_heads, size = keys.shape[1], keys.shape[3]
    qkv = _linear(norm(x, layer.before_attention, eps), layer.qkv, layer.biases[0]).reshape(len(x), -1, size)
    heads = qkv.shape[1] - 2 * kv_heads
    rotated = _normed_and_rotated(qkv, heads + kv_heads, layer.qk_norms, places.cos, places.sin, eps)
    _write(rotated, heads, places, keys)
    _write(qkv, heads + kv_heads, places, values)
    mixed = attention(rotated, keys, values, places.slots, places.ends, window)
    x = _sum(x, _linear(mixed, layer.out, layer.biases[1]))
    gate_up = _linear(norm(x, layer.before_mlp, eps), layer.gate_up, layer.biases[2])
    return _sum(x, _linear(_swiglu(gate_up), layer.down, layer.biases[3]))


@compiled(float32[:, :, :, :, ::1](FLOAT_ROWS, WORD_ROWS, NUMBERS, WORD_ROWS, float32[:, :, ::1], FLOAT_ROWS, FLOAT_ROWS, float64))
def draft_context(
    taps: np.ndarray,
    fc: np.ndarray,
    hidden_norm: np.ndarray,
    keys_values: np.ndarray,
    key_norms: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float,
) -> np.ndarray:
    """The drafter's keys and values of n context tokens, [2, layers, kv_heads, n, head_dim].

    taps: [n, m·hidden]; fc, keys_values: words, the second of [layers · 2 · kv_heads · head_dim, hidden]; hidden_norm: [hidden];
    key_norms: [layers, kv_heads, head_dim]; cos, sin: [n, head_dim].
    """
    n, (layers, kv_heads, size) = len(taps), key_norms.shape
    projected = product(norm(product(taps, fc), hidden_norm, eps), keys_values).reshape(n, layers, 2 * kv_heads, size)
    out = np.empty((2, layers, kv_heads, n, size), np.float32)
    for layer in range(layers):
        keys = _normed_and_rotated(projected[:, layer], kv_heads, key_norms[layer], cos, sin, eps)
        for head in range(kv_heads):
            for t in range(n):
                for i in range(size):
                    out[0, layer, head, t, i] = keys[t, head, i]
                    out[1, layer, head, t, i] = projected[t, layer, kv_heads + head, i]
    return out


@cache
def draft_block(layers: int) -> Callable[..., np.ndarray]:
    """:func:`_draft_block` for as many layers."""
    tuples = (types.UniTuple(kind, layers) for kind in (LAYER, BUFFER, BUFFER))
    return compiled(FLOAT_ROWS(FLOAT_ROWS, *tuples, int64, FLOAT_ROWS, FLOAT_ROWS, NUMBERS, float64))(_draft_block)


def _draft_block(
    x: np.ndarray,
    layers: tuple[LayerWeights, ...],
    keys: tuple[np.ndarray, ...],
    values: tuple[np.ndarray, ...],
    start: int,
    cos: np.ndarray,
    sin: np.ndarray,
    norm_weight: np.ndarray,
    eps: float,
) -> np.ndarray:
    """All layers of the drafter and its norm for one block, all of which sees ``start`` tokens of context and itself.

    x: [n, hidden]; keys, values: of each layer, [1, kv_heads, capacity, head_dim], into which those of the block go.
    cos, sin: [n, head_dim].
    """
    n = len(x)
    places = Places(np.zeros(n, np.int64), np.arange(start, start + n), np.full(n, start + n, np.int64), cos, sin)
    for i in range(len(layers)):
        x = decoder_layer(x, layers[i], places, keys[i], values[i], start + n, eps)
    return norm(x, norm_weight, eps)


@compiled(FLOAT_ROWS(float32[:, :, ::1], int64, uint16[:, ::1], WORD_ROWS, INDICES))
def markov_logits(base: np.ndarray, k: int, w1: np.ndarray, w2: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """U_k + W2 · W1[x_{k−1}] of a vanilla Markov head, [R, draft_vocab].

    base: [R, w, draft_vocab]; w1: [vocab, rank], the bits of bfloat16; w2: words; previous: [R], x_{k−1}.
    """
    embedded = np.zeros((len(base), 2 * w2.shape[1]), np.float32)
    for r in range(len(base)):
        for i in range(w1.shape[1]):
            embedded[r, i] = np.uint32(np.uint32(w1[previous[r], i]) << np.uint32(16)).view(np.float32)
    bias = product(embedded, w2)
    out = np.empty((len(base), base.shape[2]), np.float32)
    for r in range(len(base)):
        for i in range(base.shape[2]):
            out[r, i] = base[r, k, i] + bias[r, i]
    return out
