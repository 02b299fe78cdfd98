"""Matrix products with bfloat16 weights on a CPU, compiled by numba.

With a few input rows a product takes as long as reading its weights. So each weight is read once, prefetched, widened to float32 in
registers and used for up to six rows. LLVM's optimizer does not find this loop, so it is written in LLVM's instructions. Sums have one
order for any number of rows, so a token's logits are the same, bit for bit, alone and in a verified block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import config, float32, get_num_threads, njit, prange, set_num_threads, types, uint32
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from dspark.cpu.packed import LANES
from dspark.files import cache_dir, digest

log = logging.getLogger(__name__)

ROWS = 6  # input rows that share one read of the weights
OUTPUTS = LANES // 4  # whose weights are read together: as many sums as the registers hold, 12 of 16 in AVX2 and 24 of 32 in AVX-512
BLOCK = 16  # outputs of a task, whose weights stay in the cache for further rows
CHUNK = 48  # input rows that stay in the second cache while all weights pass
AHEAD = 1024 if LANES == 8 else 4096  # how far the weights are prefetched, in words
LINE = 16  # words of a line of the cache
LOCALITY = 3 if LANES == 8 else 2  # prefetched into all caches, or all but the first

FLOAT_ROWS, WORD_ROWS = float32[:, ::1], uint32[:, ::1]  # numba's types
F32, I32, I64, BYTES = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()  # LLVM's
FLOATS, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
ZERO = FLOATS([0.0] * LANES)

_lock, _threads = Lock(), torch.get_num_threads()
get_num_threads()  # starts numba's threads, which sets the number of OpenMP's, and those are PyTorch's too
torch.set_num_threads(_threads)


def multiply(x: Tensor, weight: np.ndarray, outputs: int, bias: Tensor | None = None) -> Tensor:
    """:func:`product`, plus a bias [outputs], of a tensor x [..., in]. Returns [..., outputs] float32."""
    rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
    missing = 2 * weight.shape[1] - rows.shape[1]
    assert 0 <= missing < 2 * LANES, (rows.shape, weight.shape)  # the compiled code does not look
    with running():
        rows = F.pad(rows, (0, missing)) if missing else rows
        y = torch.from_numpy(product(rows.numpy(), weight)).view(*x.shape[:-1], len(weight))[..., :outputs]
    return y if bias is None else y.add_(bias.detach())


@contextmanager
def running() -> Iterator[None]:
    """For calls of compiled code: PyTorch's number of threads, one caller at a time (not all thread pools of numba take more)."""
    with _lock:
        set_num_threads(min(torch.get_num_threads(), config.NUMBA_NUM_THREADS))
        yield


def compiled(*signature: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``njit``, kept on disk, in a folder of its own for each version of these sources: numba looks only at the file of the function.

    With one signature, so that processes that compile at once write the same files. Where nothing can be written, nothing is kept.
    """

    def compile_once(function: Callable[..., Any]) -> Any:
        sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
        folder, before = cache_dir() / "kernels" / digest("".join([*sources, str(LANES)])), config.CACHE_DIR
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.CACHE_DIR = str(folder)
            return njit(*signature, nogil=True, cache=True, **options)(function)
        except (OSError, RuntimeError) as error:
            log.warning("the compiled kernels cannot be kept in %s (%s): each start will compile them, for twenty seconds", folder, error)
            return njit(*signature, nogil=True, **options)(function)
        finally:
            config.CACHE_DIR = before

    return compile_once


def words(weight: Tensor) -> np.ndarray:
    """[out, in] bfloat16 → [out, in/2] uint32: number j of a row in the low half of word j, number in/2 + j in the high half.

    With zeros until in is a multiple of 2 LANES, and out one of OUTPUTS.
    """
    padded = F.pad(weight.detach(), (0, -weight.shape[1] % (2 * LANES), 0, -len(weight) % OUTPUTS)).to(torch.bfloat16)
    halves = padded.view(torch.int16).unflatten(1, (2, -1)).transpose(1, 2)
    return halves.contiguous().view(torch.int32)[..., 0].numpy().view(np.uint32)


def _tile(columns: int, body: Callable[..., Any]) -> Callable[..., None]:
    """(x, y, out, r, i): a loop, in LLVM's instructions, that adds to rows · columns registers; rows: those of x from r on, at most ROWS.

    body: called with the builder, rows, x, y and out in memory, r, i and whether y is packed; returns how far a step of the loop goes and
    how far the loop, what a step makes of the registers, and what is done with them at the end.
    """

    @intrinsic
    def tile(context: Any, x: Any, y: Any, out: Any, r: Any, i: Any) -> Any:
        return types.none(x, y, out, types.int64, types.int64), generate

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(kind)(context, b, value) for kind, value in zip(signature.args[:3], args[:3], strict=True)]
        starts, done = [b.append_basic_block() for _ in range(ROWS)], b.append_basic_block()
        cases = b.switch(b.sub(b.extract_value(arrays[0].shape, 0), args[3]), starts[-1])
        for rows, start in enumerate(starts, 1):
            if rows < ROWS:
                cases.add_case(I64(rows), start)
            b.position_at_end(start)
            one(b, columns * rows, *body(b, rows, *arrays, *args[3:], signature.args[1].dtype == types.uint32))
            b.branch(done)
        b.position_at_end(done)
        return context.get_dummy_value()

    def one(b: ir.IRBuilder, registers: int, stride: int, end: Any, add: Any, finish: Any) -> None:
        before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(loop)
        b.position_at_end(loop)
        j, sums = b.phi(I64), [b.phi(FLOATS) for _ in range(registers)]
        following = [b.add(j, I64(stride)), *add(j, list(sums))]
        for phi, first, then in zip([j, *sums], [I64(0), *[ZERO] * registers], following, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following[0], end), loop, after)
        b.position_at_end(after)
        finish(following[1:])

    return tile


def _size(b: ir.IRBuilder, array: Any) -> Any:
    """Of a row, in numbers."""
    return b.extract_value(array.shape, 1)


def _load(b: ir.IRBuilder, array: Any, at: Any) -> Any:
    loaded = b.load(b.bitcast(b.gep(array.data, [at]), FLOATS.as_pointer()))
    loaded.align = 4
    return loaded


def _store(b: ir.IRBuilder, vector: Any, array: Any, at: Any) -> None:
    b.store(vector, b.bitcast(b.gep(array.data, [at]), vector.type.as_pointer())).align = 4


def _fma(b: ir.IRBuilder, *factors_and_sum: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), factors_and_sum)


def _dot(b: ir.IRBuilder, rows: int, x: Any, weight: Any, out: Any, r: Any, i: Any, packed: bool) -> Any:
    """out[r : r + rows, i : i + OUTPUTS] = x[r : r + rows] · weight[i : i + OUTPUTS]ᵀ.

    weight: :func:`words`, or as many float32 numbers a row as x has.
    """
    width = _size(b, weight)
    fetch = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32]), "llvm.prefetch.p0")
    x_rows = [b.mul(b.add(r, I64(k)), _size(b, x)) for k in range(rows)]
    weight_rows = [b.mul(b.add(i, I64(o)), width) for o in range(OUTPUTS)]

    def add(j: Any, sums: list[Any]) -> list[Any]:
        parts = [(j, [_load(b, weight, b.add(row, j)) for row in weight_rows])]
        if packed:
            ahead = b.add(b.add(weight_rows[0], b.mul(j, I64(OUTPUTS))), I64(AHEAD))
            for line in range(0, OUTPUTS * LANES, LINE):  # the rows are adjacent, so a step reads this many words of them
                there = b.bitcast(b.gep(weight.data, [b.add(ahead, I64(line))]), BYTES)
                b.call(fetch, [there, I32(0), I32(LOCALITY), I32(1)])  # to read, as data
            read = [b.bitcast(numbers, WORDS) for numbers in parts[0][1]]
            low = [b.bitcast(b.shl(word, WORDS([16] * LANES)), FLOATS) for word in read]
            high = [b.bitcast(b.and_(word, WORDS([0xFFFF0000] * LANES)), FLOATS) for word in read]
            parts = [(j, low), (b.add(j, width), high)]
        for column, vectors in parts:
            for k, row in enumerate(x_rows):
                number = _load(b, x, b.add(row, column))
                for o, vector in enumerate(vectors):
                    sums[OUTPUTS * k + o] = _fma(b, vector, number, sums[OUTPUTS * k + o])
        return sums

    def finish(sums: list[Any]) -> None:
        for k, totals in enumerate(_totals(b, sums)):
            _store(b, totals, out, b.add(b.mul(b.add(r, I64(k)), _size(b, out)), i))

    return LANES, width, add, finish


def _mix(vectors: int, b: ir.IRBuilder, rows: int, x: Any, values: Any, out: Any, r: Any, i: Any, packed: bool) -> Any:
    """out[r : r + rows, i : i + vectors · LANES] = x[r : r + rows] · values[:, i : i + vectors · LANES]."""
    count, size = _size(b, x), _size(b, values)
    x_rows = [b.mul(b.add(r, I64(k)), count) for k in range(rows)]

    def add(j: Any, sums: list[Any]) -> list[Any]:
        at = b.add(b.mul(j, size), i)
        read = [_load(b, values, b.add(at, I64(LANES * v))) for v in range(vectors)]
        for k, row in enumerate(x_rows):
            number = b.insert_element(ZERO, b.load(b.gep(x.data, [b.add(row, j)])), I32(0))
            number = b.shuffle_vector(number, ZERO, WORDS([0] * LANES))
            for v, vector in enumerate(read):
                sums[vectors * k + v] = _fma(b, vector, number, sums[vectors * k + v])
        return sums

    def finish(sums: list[Any]) -> None:
        for n, total in enumerate(sums):
            _store(b, total, out, b.add(b.mul(b.add(r, I64(n // vectors)), _size(b, out)), b.add(i, I64(LANES * (n % vectors)))))

    return 1, count, add, finish


def _totals(b: ir.IRBuilder, registers: list[Any]) -> list[Any]:
    """The total of each register, OUTPUTS of them to a vector: two registers are folded into one, again and again."""
    count = len(registers)
    registers = registers + [ZERO] * (-count % LANES)
    width = LANES
    while width > 1:
        width //= 2
        left = [half for start in range(0, 2 * LANES, 2 * width) for half in range(start, start + width)]
        masks = [WORDS(lanes) for lanes in (left, [lane + width for lane in left])]
        pairs = zip(registers[::2], registers[1::2], strict=True)
        registers = [b.fadd(*(b.shuffle_vector(*pair, mask) for mask in masks)) for pair in pairs]
    part = ir.VectorType(I32, OUTPUTS)
    places = [divmod(n, LANES) for n in range(0, count, OUTPUTS)]
    return [b.shuffle_vector(registers[i], ZERO, part(list(range(lane, lane + OUTPUTS)))) for i, lane in places]


_dots, _wide, _narrow = _tile(OUTPUTS, _dot), _tile(OUTPUTS, partial(_mix, OUTPUTS)), _tile(1, partial(_mix, 1))
WIDE = OUTPUTS * LANES  # columns of which ROWS rows fill the registers


@njit(nogil=True)
def tiles(x: np.ndarray, weight: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
    """out[:, first:last] = x · weight[first:last]ᵀ, a multiple of OUTPUTS. Up to ROWS rows at a time pass over the weights."""
    for r in range(0, len(x), ROWS):
        for i in range(first, last, OUTPUTS):
            _dots(x, weight, out, r, i)


@njit(nogil=True)
def mixtures(x: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out = x · values. x: [n, tokens], values: [tokens, size], out: [n, size]; size: a multiple of LANES."""
    wide = values.shape[1] // WIDE * WIDE
    for r in range(0, len(x), ROWS):
        for i in range(0, wide, WIDE):
            _wide(x, values, out, r, i)
        for i in range(wide, values.shape[1], LANES):
            _narrow(x, values, out, r, i)


@compiled(FLOAT_ROWS(FLOAT_ROWS, WORD_ROWS), parallel=True)
def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x · weightᵀ. x: [n, in] float32, weight: :func:`words`. Returns [n, out] float32."""
    outputs = weight.shape[0]
    out = np.empty((len(x), outputs), np.float32)
    for r in range(0, len(x), CHUNK):
        for block in prange((outputs + BLOCK - 1) // BLOCK):
            tiles(x[r : r + CHUNK], weight, out[r : r + CHUNK], BLOCK * block, min(BLOCK * (block + 1), outputs))
    return out
