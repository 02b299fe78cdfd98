"""The lean pass on static buffers, in shapes of a few buckets, so that CUDA graphs of it can be replayed; on a CPU it runs eagerly.

Row r of every grid is slot r of the cache, whatever requests are active. Tokens, starts and counts arrive in static buffers; where a
token belongs is computed on the device; attention reads a whole bucket of the cache under a mask of lengths. What pads a batch is
written to a position that belongs to nobody.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.rewind import FIRST_CAPACITY, Slot, SlotCache
from dspark.verify.graphs import SHARE, Buffers, Capture, Graphs, cuda_graphs
from dspark.verify.lean import FOLDED, Attention, LeanPass, lean_pass

if TYPE_CHECKING:
    from dspark.target.target import Target

KEPT = 4  # buffers of finished engines that are kept for the next ones


def bucket(count: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … that is at least ``count``."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if power > 2 and count <= 3 * power // 4 else power


class Shape(NamedTuple):
    """A bucket: the sizes of one program, each rounded up."""

    rows: int  # slots, from the first on
    tokens: int  # N, new tokens of all requests
    width: int  # n, new tokens of one request
    context: int  # positions of the cache that attention reads


class StaticCache(SlotCache):
    """A slot cache whose buffers outlive it, and stay where they are until they must grow."""

    def __init__(self, buffers: Buffers) -> None:
        self.slots, self.buffers = [], buffers

    @property
    def layers(self) -> list[tuple[Tensor, ...]]:
        return self.buffers.layers

    def _resize(self, slots: int, tokens: int) -> None:
        super()._resize(slots, tokens)
        self.buffers.programs.clear()  # they read the old buffers

    def shape(self, slots: Sequence[Slot], counts: Sequence[int]) -> Shape:
        """The bucket of a pass over so many new tokens per slot, once there is room for it."""
        longest = max(slot.length + count for slot, count in zip(slots, counts, strict=True))
        self.reserve(max(longest, *(slot.length for slot in self.slots)) + 1)  # padding is written to the last position of any slot
        rows, context = 1 << max(slot.index for slot in slots).bit_length(), 1 << (longest - 1).bit_length()
        return Shape(rows, bucket(sum(counts)), bucket(max(counts)), min(max(context, FIRST_CAPACITY), self.capacity))


class Layout:
    """Where each of the N tokens of a flat batch belongs, found on the device from the rows' starts and counts, two of [R].

    first: [R], the flat index of a row's first token; any index for a row without tokens.
    row, column, position: [N]; the last is where keys and values go. cell: [N], its place in a grid [R · width + 1] with one for padding.
    """

    def __init__(self, starts: Tensor, counts: Tensor, shape: Shape, nobodys: int) -> None:
        self.starts, self.shape = starts, shape
        each, ends = torch.arange(shape.tokens, device=starts.device), counts.cumsum(0)
        row = torch.searchsorted(ends, each, right=True)
        real, self.row = row < len(counts), row.clamp(max=len(counts) - 1)
        self.column = (each - (ends - counts)[self.row]).where(real, 0)
        self.position = (starts[self.row] + self.column).where(real, nobodys)
        self.cell = (self.row * shape.width + self.column).where(real, len(counts) * shape.width)
        self.first = (ends - counts).clamp(max=shape.tokens - 1)


class _StaticAttention(Attention):
    """The attention of one pass over a bucket: every row of the grid sees its own slot, as far as each query's position."""

    def __init__(self, lean: LeanPass, buffers: Buffers, table: tuple[Tensor, Tensor], layout: Layout) -> None:
        self.lean, self.layers, self.layout, self.starts = lean, buffers.layers, layout, layout.starts
        _, _, self.widest, self.longest = layout.shape
        self.group, self.sees_all, self.masks = lean.heads // lean.kv_heads, False, {}
        self.cos, self.sin = (part[layout.position] for part in table)

    def __call__(self, index: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """queries: [N, heads, head_dim]; keys, values: [N, kv_heads, head_dim]. Returns [N, heads · head_dim]."""
        lean, layout, (rows, _, width, context) = self.lean, self.layout, self.layout.shape
        for buffer, new in zip(self.layers[index], (keys, values), strict=True):
            buffer[layout.row, :, layout.position] = new
        keys, values = (buffer[:rows, :, :context] for buffer in self.layers[index])
        grid = queries.new_zeros(rows * width + 1, lean.heads, lean.head_dim)
        grid[layout.cell] = queries
        grid = grid[:-1].view(rows, width, lean.heads, -1).transpose(1, 2).reshape(rows, lean.kv_heads, -1, lean.head_dim)
        mixed = F.scaled_dot_product_attention(grid, keys, values, self._mask(window), scale=lean.scale)
        mixed = mixed.view(rows, lean.heads, width, -1).transpose(1, 2).flatten(0, 1)  # [R · n, heads, head_dim]
        return mixed[layout.cell.clamp(max=rows * width - 1)].flatten(1)


class StaticPass:
    """See :class:`dspark.verify.passes.TargetPass`. Made by :func:`static_pass`."""

    def __init__(self, lean: LeanPass, graphs: Graphs) -> None:
        self.lean, self.graphs, self.bytes_per_token = lean, graphs, lean.bytes_per_token
        self.free: deque[Buffers] = deque(maxlen=KEPT)
        self.lock = threading.Lock()

    @property
    def name(self) -> str:
        """ "graphs", or "static" where nothing is captured."""
        return "graphs" if self.graphs.new_capture else "static"

    def new_cache(self, owner: object = None, further: Sequence[tuple[Tensor, ...]] = ()) -> StaticCache:
        """A cache, on the buffers of a finished engine with the same owner if there are any.
        further: empty buffers [0, kv_heads, 0, head_dim] of layers that the owner adds to the target's."""
        with self.lock:
            buffers = next((each for each in list(self.free) if each.owner == owner), None)
            if buffers is not None:
                self.free.remove(buffers)
        buffers = buffers or Buffers(owner, [*self.lean.new_cache().layers, *further], self.graphs)
        cache = StaticCache(buffers)
        weakref.finalize(cache, self.free.append, buffers)
        return cache

    @torch.inference_mode()
    def __call__(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[Slot], cache: SlotCache, taps: Sequence[int] = (), *, last_only: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See :class:`dspark.verify.passes.TargetPass`."""
        counts = [len(ids) for ids in tokens]
        if last_only or max(counts) > FOLDED:  # prompts and other long texts run eagerly
            return self.lean(tokens, slots, cache, taps, last_only=last_only)
        shape = cache.shape(slots, counts)
        grid, spans, first = [[0] * (2 + shape.width) for _ in range(shape.rows)], {}, 0
        for slot, ids in sorted(zip(slots, tokens, strict=True), key=lambda pair: pair[0].index):
            grid[slot.index][: 2 + len(ids)] = [slot.length, len(ids), *ids]
            spans[slot], first = slice(first, first + len(ids)), first + len(ids)
            slot.length += len(ids)
        sent = cache.buffers.upload(("pass", shape.rows, shape.width), grid)
        program = partial(self.program, cache.buffers, self.lean.rope(cache.capacity), sent, sent[:, 2:], shape, tuple(taps))
        _, logits, tapped = cache.buffers.run(("pass", shape, tuple(taps)), program)
        rows = [spans[slot] for slot in slots]
        return [logits[row].clone() for row in rows], [None if tapped is None else tapped[None, row].clone() for row in rows]

    def program(
        self, buffers: Buffers, table: tuple[Tensor, Tensor], numbers: Tensor, tokens: Tensor, shape: Shape, taps: tuple[int, ...]
    ) -> tuple[Layout, Tensor, Tensor | None]:
        """The pass itself. Returns the layout, logits [N, vocab] and taps [N, m·hidden].

        table: cos and sin of every position of the buffers.
        numbers: [R, ≥ 2], each row's start and count; tokens: [R, ≥ width].
        """
        layout = Layout(*numbers[:, :2].unbind(1), shape, buffers.capacity - 1)
        attend = _StaticAttention(self.lean, buffers, table, layout)
        x, tapped = self.lean.decoder(tokens[layout.row, layout.column], attend, taps)
        return layout, self.lean.logits(x), tapped


def static_pass(target: Target, new_capture: Callable[[], Capture] | None = None) -> StaticPass | None:
    """The lean pass of this target on static buffers, None if it has none. new_capture: as for :class:`Graphs`; CUDA graphs on a GPU."""
    lean = lean_pass(target)
    if lean is None:
        return None
    if target.device.type != "cuda":
        return StaticPass(lean, Graphs(new_capture))
    free, _ = torch.cuda.mem_get_info(target.device)
    return StaticPass(lean, Graphs(new_capture or partial(cuda_graphs, target.device), SHARE * free))
