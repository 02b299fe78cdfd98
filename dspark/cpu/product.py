"""Matrix products with bfloat16 weights for CPUs without bfloat16 instructions, compiled by numba.

With a few input rows a product takes as long as reading its weights. So each weight is read once, prefetched, widened to float32 in
registers and used for up to six rows. LLVM's optimizer does not find this loop, so it is written in LLVM's instructions. Sums have one
order for any number of rows, so a token's logits are the same, bit for bit, alone and in a verified block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

ROWS = 6  # input rows that share one read of the weights: with two outputs, twelve sums in sixteen registers
BLOCK = 16  # outputs of a task, whose weights stay in the cache for further rows
CHUNK = 48  # input rows that stay in the second cache while all weights pass
AHEAD = 1024  # how far the weights are prefetched, in words

FLOAT_ROWS, WORD_ROWS = float32[:, ::1], uint32[:, ::1]  # numba's types
F32, I32, I64, BYTES = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()  # LLVM's
FLOATS, WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)

_lock, _threads = Lock(), torch.get_num_threads()
get_num_threads()  # starts numba's threads, which sets the number of OpenMP's, and those are PyTorch's too
torch.set_num_threads(_threads)


def multiply(x: Tensor, weight: np.ndarray, outputs: int, bias: Tensor | None = None) -> Tensor:
    """:func:`product`, plus a bias [outputs], of a tensor x [..., in]. Returns [..., outputs] float32."""
    rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
    assert rows.shape[1] == 2 * weight.shape[1], (rows.shape, weight.shape)  # the compiled code does not look
    with running():
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
        folder, before = cache_dir() / "kernels" / digest("".join(sources)), config.CACHE_DIR
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.CACHE_DIR = str(folder)
            return njit(*signature, nogil=True, cache=True, **options)(function)
        except (OSError, RuntimeError) as error:
            log.warning("the compiled kernels cannot be kept in %s (%s): each start will compile them, for ten seconds", folder, error)
            return njit(*signature, nogil=True, **options)(function)
        finally:
            config.CACHE_DIR = before

    return compile_once


def words(weight: Tensor) -> np.ndarray:
    """[out, in] bfloat16 → [out, in/2] uint32: number j of a row in the low half of word j, number in/2 + j in the high half.

    in: a multiple of 16; an odd out gets a row of zeros.
    """
    padded = F.pad(weight.detach(), (0, 0, 0, len(weight) % 2)).to(torch.bfloat16)
    halves = padded.view(torch.int16).unflatten(1, (2, -1)).transpose(1, 2)
    return halves.contiguous().view(torch.int32)[..., 0].numpy().view(np.uint32)


def _tile(rows: int) -> Callable[..., None]:
    """(x, weight, out, r, i): out[r : r + rows, i : i + 2] = x[r : r + rows] · weight[i : i + 2]ᵀ, as LLVM instructions on registers.

    weight: :func:`words`, or as many float32 numbers a row as x has.
    """

    @intrinsic
    def tile(context: Any, x: Any, weight: Any, out: Any, r: Any, i: Any) -> Any:
        return types.none(x, weight, out, types.int64, types.int64), generate

    def generate(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
        packed = signature.args[1].dtype == types.uint32
        x, weight, out = (context.make_array(kind)(context, b, value) for kind, value in zip(signature.args[:3], args[:3], strict=True))
        r, i = args[3:]
        width, size, outputs = (b.extract_value(array.shape, 1) for array in (weight, x, out))
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32")
        fetch = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32]), "llvm.prefetch.p0")
        x_rows = [b.mul(b.add(r, I64(k)), size) for k in range(rows)]
        weight_rows = [b.mul(b.add(i, I64(o)), width) for o in range(2)]

        def load(array: Any, at: Any, kind: ir.VectorType) -> Any:
            loaded = b.load(b.bitcast(b.gep(array.data, [at]), kind.as_pointer()))
            loaded.align = 4
            return loaded

        before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
        b.branch(loop)
        b.position_at_end(loop)
        j, sums = b.phi(I64), [b.phi(FLOATS) for _ in range(2 * rows)]
        next_sums, parts = list(sums), [(j, [load(weight, b.add(row, j), FLOATS) for row in weight_rows])]
        if packed:
            ahead = b.add(b.add(weight_rows[0], b.add(j, j)), I64(AHEAD))
            # The two rows are adjacent, so a step reads one cache line's length of them. To read, into all caches, as data:
            b.call(fetch, [b.bitcast(b.gep(weight.data, [ahead]), BYTES), I32(0), I32(3), I32(1)])
            read = [b.bitcast(numbers, WORDS) for numbers in parts[0][1]]
            low = [b.bitcast(b.shl(word, WORDS([16] * LANES)), FLOATS) for word in read]
            high = [b.bitcast(b.and_(word, WORDS([0xFFFF0000] * LANES)), FLOATS) for word in read]
            parts = [(j, low), (b.add(j, width), high)]
        for column, pair in parts:
            for k, row in enumerate(x_rows):
                number = load(x, b.add(row, column), FLOATS)
                for o in range(2):
                    next_sums[2 * k + o] = b.call(fma, [pair[o], number, next_sums[2 * k + o]])
        step = b.add(j, I64(LANES))
        for phi, first, following in zip([j, *sums], [I64(0), *[FLOATS([0.0] * LANES)] * (2 * rows)], [step, *next_sums], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", step, width), loop, after)
        b.position_at_end(after)
        for n, total in enumerate(_totals(b, next_sums)):
            at = b.add(b.mul(b.add(r, I64(n // 2)), outputs), b.add(i, I64(n % 2)))
            b.store(total, b.gep(out.data, [at]))
        return context.get_dummy_value()

    return tile


def _totals(b: ir.IRBuilder, registers: list[Any]) -> list[Any]:
    """The sum of each register's numbers. Two registers are folded into one, and again, until each number is a total."""
    count, zero = len(registers), FLOATS([0.0] * LANES)
    registers = registers + [zero] * (-count % LANES)
    width = LANES
    while width > 1:
        width //= 2
        left = [half for start in range(0, 2 * LANES, 2 * width) for half in range(start, start + width)]
        masks = [WORDS(lanes) for lanes in (left, [lane + width for lane in left])]
        pairs = zip(registers[::2], registers[1::2], strict=True)
        registers = [b.fadd(*(b.shuffle_vector(*pair, mask) for mask in masks)) for pair in pairs]
    return [b.extract_element(registers[n // LANES], I32(n % LANES)) for n in range(count)]


_one, _two, _three, _four, _five, _six = (_tile(rows) for rows in range(1, ROWS + 1))


@njit(nogil=True)
def tiles(x: np.ndarray, weight: np.ndarray, out: np.ndarray, first: int, last: int) -> None:
    """out[:, first:last] for all rows of x, an even number of outputs. Up to ROWS rows at a time pass over the weights."""
    n = len(x)
    for r in range(0, n, ROWS):
        left = n - r
        for i in range(first, last, 2):
            if left == 1:
                _one(x, weight, out, r, i)
            elif left == 2:
                _two(x, weight, out, r, i)
            elif left == 3:
                _three(x, weight, out, r, i)
            elif left == 4:
                _four(x, weight, out, r, i)
            elif left == 5:
                _five(x, weight, out, r, i)
            else:
                _six(x, weight, out, r, i)


@compiled(FLOAT_ROWS(FLOAT_ROWS, WORD_ROWS), parallel=True)
def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x · weightᵀ. x: [n, in] float32, weight: :func:`words`. Returns [n, out] float32."""
    outputs = weight.shape[0]
    out = np.empty((len(x), outputs), np.float32)
    for r in range(0, len(x), CHUNK):
        for block in prange((outputs + BLOCK - 1) // BLOCK):
            tiles(x[r : r + CHUNK], weight, out[r : r + CHUNK], BLOCK * block, min(BLOCK * (block + 1), outputs))
    return out
