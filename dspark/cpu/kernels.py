"""A decoder layer for CPUs without bfloat16 instructions, compiled by numba: one call instead of about thirty small PyTorch kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import float32, float64, int64, njit, prange, types

from dspark.cpu.product import FLOAT_ROWS, WORD_ROWS, compiled, product, tiles


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
def _attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, mixed: np.ndarray) -> None:
    """Attention of one token's heads that share keys. queries, mixed: [heads, head_dim]; keys, values: [tokens, head_dim]."""
    tokens, size = keys.shape
    even = tokens // 2 * 2
    scores = np.empty((len(queries), tokens), np.float32)
    tiles(queries, keys, scores, 0, even)
    for head in range(len(queries)):
        row, out = scores[head], mixed[head]
        if even < tokens:  # tiles take keys in pairs
            row[even] = 0
            for i in range(size):
                row[even] += queries[head, i] * keys[even, i]
        largest, total = row[0], np.float32(0)
        for j in range(tokens):
            largest = max(largest, row[j])
        for j in range(tokens):
            row[j] = _exp((row[j] - largest) * np.float32(size**-0.5))
            total += row[j]
        out[:] = 0
        for j in range(0, tokens - 3, 4):  # four values at a time, so that the sums are seldom written
            a, b, c, d = row[j], row[j + 1], row[j + 2], row[j + 3]
            for i in range(size):
                out[i] += a * values[j, i] + b * values[j + 1, i] + c * values[j + 2, i] + d * values[j + 3, i]
        for j in range(tokens // 4 * 4, tokens):
            for i in range(size):
                out[i] += row[j] * values[j, i]
        for i in range(size):
            out[i] /= total


@njit(parallel=True, nogil=True, fastmath=True)
def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, slots: np.ndarray, ends: np.ndarray, window: int) -> np.ndarray:
    """Returns [n, heads · head_dim].

    queries: [n, heads + kv_heads, head_dim]; the last kv_heads are not read.
    keys, values: [slots, kv_heads, capacity, head_dim].
    slots: [n], each query's row of the buffers. ends: [n], it sees the positions before this one. window: of those the last so many.
    """
    n, size, kv_heads = len(queries), queries.shape[2], keys.shape[1]
    heads = queries.shape[1] - kv_heads
    out, group = np.empty((n, heads, size), np.float32), heads // kv_heads
    for task in prange(n * kv_heads):
        kv, t = task // n, task % n
        slot, first, end, own = slots[t], max(0, ends[t] - window), ends[t], slice(kv * group, (kv + 1) * group)
        _attend(queries[t, own], keys[slot, kv, first:end], values[slot, kv, first:end], out[t, own])
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
    return y + bias if len(bias) else y


@njit(nogil=True, fastmath=True)
def _normed_and_rotated(qkv: np.ndarray, heads: int, norms: np.ndarray, places: Places, eps: float) -> np.ndarray:
    """Queries and keys with their norms, if they have some, and rotary embedding. qkv: [n, > heads, head_dim] → [n, heads, head_dim]."""
    n, half = len(qkv), qkv.shape[2] // 2
    out = np.empty((n, heads, 2 * half), np.float32)
    for t in range(n):
        cos, sin = places.cos[t], places.sin[t]
        for head in range(heads):
            vector, rotated = qkv[t, head], out[t, head]
            if len(norms):
                vector = norm(qkv[t, head : head + 1], norms[head], eps)[0]
            for i in range(half):
                rotated[i] = vector[i] * cos[i] - vector[half + i] * sin[half + i]
                rotated[half + i] = vector[half + i] * cos[half + i] + vector[i] * sin[half + i]
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
    rotated = _normed_and_rotated(qkv, heads + kv_heads, layer.qk_norms, places, eps)
    for t in range(len(x)):
        keys[places.slots[t], :, places.positions[t]] = rotated[t, heads:]
        values[places.slots[t], :, places.positions[t]] = qkv[t, heads + kv_heads :]
    mixed = attention(rotated, keys, values, places.slots, places.ends, window)
    x = x + _linear(mixed, layer.out, layer.biases[1])
    gate_up = _linear(norm(x, layer.before_mlp, eps), layer.gate_up, layer.biases[2])
    return x + _linear(_swiglu(gate_up), layer.down, layer.biases[3])
