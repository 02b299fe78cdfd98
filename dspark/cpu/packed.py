"""Linear layers whose weights are laid out once for the CPU's matrix kernels instead of at every call.

For bfloat16 on a CPU, PyTorch hands each weight to oneDNN in its plain layout and oneDNN rearranges it at every call. With a few rows
of input that costs more than the product. With weights rearranged once, a pass takes about half the time, and a block of eight tokens
about as long as one token, so verification is nearly free.

On a CPU without bfloat16 kernels (AVX2 at best) PyTorch multiplies row by row, so verifying n tokens takes as long as n plain steps. There
our own product (:mod:`dspark.cpu.product`) reads the weights once for six rows and computes in float32. Other devices and dtypes are
left alone.

Only a drafter's weights may have 8 bits: acceptance is exact for any distribution of drafts, but the target's must not change.
"""

import platform
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

LANES = 8  # float32 numbers of an AVX2 register, in which our own product computes
TYPICAL_ROWS = 8  # the layout is chosen for this many rows and works for any


class PackedLinear(nn.Module):
    """``F.linear(x, weight, bias)``, summed in float32.

    weight: [out, in] bfloat16; bias: [out].
    keep_weight: also keep the plain weight, so that it can be saved.
    Called with x [..., in]; returns [..., out] in x's dtype, bfloat16 or float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep_weight: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.native, self.bias = has_bfloat16_kernels(), bias
        if self.native:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TYPICAL_ROWS)
        else:
            from dspark.cpu import product  # here, because numba takes long to import

            self.packed, self.multiply = product.words(weight), product.multiply
        if keep_weight:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return torch.ops.mkldnn._linear_pointwise.default(x.bfloat16(), self.packed, self.bias, "none", [], "").to(x.dtype)
        return self.multiply(x, self.packed, self.out_features, self.bias).to(x.dtype)

    __call__ = forward  # without nn.Module's hooks, which take as long as a small kernel


class QuantizedLinear(nn.Module):
    """Approximately that product, in half the time: int8 weights with one scale per output, the input rounded to 8 bits at each call.

    All rows of the input share one scale, so they should be normed. Only for processors that add such products in 32 bits.
    weight, keep_weight: as above. Called with x [..., in]; returns [..., out] float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep_weight: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny).double() / 127
        with warnings.catch_warnings():  # PyTorch will remove this call; can_quantize notices
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(wide, scale, torch.zeros(len(wide), dtype=torch.long), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None if bias is None else bias.detach().float())
        if keep_weight:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float().reshape(-1, self.in_features)
        product = torch.ops.quantized.linear_dynamic.default(rows, self.packed)
        return product.view(*x.shape[:-1], self.out_features)

    __call__ = forward


@cache
def has_bfloat16_kernels() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU, and this build of PyTorch lets it keep them in its own layout."""
    ops = torch.ops.mkldnn
    return hasattr(ops, "_linear_pointwise") and hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported()


def compute_dtype() -> torch.dtype:
    """Of activations between products of bfloat16 weights: float32 where our kernels run, so that nothing is converted."""
    return torch.bfloat16 if has_bfloat16_kernels() else torch.float32


def can_pack(weight: Tensor) -> bool:
    """Whether the weight is a bfloat16 matrix on a CPU with oneDNN kernels for it, or of a width that ours take."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    old = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT"  # without AVX2
    return has_bfloat16_kernels() or (weight.shape[1] % (2 * LANES) == 0 and not old)


def can_quantize(weight: Tensor) -> bool:
    """Whether :func:`can_pack`, and PyTorch has 8-bit kernels that do not overflow: all processors with bfloat16 kernels have."""
    has = hasattr(torch.ops.quantized, "linear_dynamic") and hasattr(torch, "quantize_per_channel")
    return can_pack(weight) and has_bfloat16_kernels() and has and torch.backends.quantized.engine in ("x86", "fbgemm")


def pack_linears(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear) -> None:
    """Replace each ``nn.Linear`` inside ``module`` whose weight :func:`can_pack` by ``make(weight, bias)``, in place."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, make(child.weight, child.bias))
        else:
            pack_linears(child, make)
