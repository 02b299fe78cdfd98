"""Linear layers whose weights are laid out once for the CPU's matrix kernels instead of at every call.

For bfloat16 on a CPU, PyTorch hands each weight to oneDNN in its plain layout and oneDNN rearranges it at every call. With a few rows
of input that costs more than the product. Rearranged once, a pass takes about half the time, and a block of eight tokens about as
long as one token, so verification is nearly free.

A CPU without bfloat16 kernels (AVX2 at best) multiplies row by row, so verifying a block takes as long as decoding it plainly. There
the weights are laid out in float16 for FBGEMM, which reads them once for six rows and computes in float32; float16 keeps every digit
of a bfloat16 number of at least 2⁻¹⁷. Other devices and dtypes are left alone.

Only a drafter's weights may have 8 bits: acceptance is exact for any distribution of drafts, but the target's must not change.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

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
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), None if bias is None else bias.detach().float())
        if keep_weight:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return torch.ops.mkldnn._linear_pointwise.default(x.bfloat16(), self.packed, self.bias, "none", [], "").to(x.dtype)
        product = torch.ops.quantized.linear_dynamic_fp16.default(x.float().reshape(-1, self.in_features), self.packed)
        return product.view(*x.shape[:-1], self.out_features).to(x.dtype)

    __call__ = forward  # without nn.Module's hooks, which take as long as a small kernel


class QuantizedLinear(nn.Module):
    """Approximately that product, in half the time: int8 weights with one scale per output, the input rounded to 8 bits at each call.

    The input has 7 bits if the processor adds pairs of products in 16 bits, which 8 would overflow. All rows of the input share one
    scale, so they should be normed. weight, keep_weight: as above. Called with x [..., in]; returns [..., out] float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep_weight: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias, self.seven_bits = bias, not has_vnni()
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
        product = torch.ops.quantized.linear_dynamic.default(rows, self.packed, self.seven_bits)
        return product.view(*x.shape[:-1], self.out_features)

    __call__ = forward


@cache
def has_bfloat16_kernels() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU, and this build of PyTorch lets it keep them in its own layout."""
    ops = torch.ops.mkldnn
    return hasattr(ops, "_linear_pointwise") and hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported()


def compute_dtype() -> torch.dtype:
    """Of activations between products of bfloat16 weights: float32 where the kernels take that, so that nothing is converted."""
    return torch.bfloat16 if has_bfloat16_kernels() else torch.float32


@cache
def has_float16_kernels() -> bool:
    """Whether FBGEMM multiplies by float16 weights on this CPU, found by trying: builds and processors differ."""
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(torch.eye(8), None)
        return torch.equal(torch.ops.quantized.linear_dynamic_fp16(torch.ones(1, 8), packed), torch.ones(1, 8))
    except (RuntimeError, AttributeError):
        return False


@cache
def has_vnni() -> bool:
    """Whether the processor adds 8-bit products in 32 bits; False if PyTorch cannot tell."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def can_pack(weight: Tensor) -> bool:
    """Whether the weight is a bfloat16 matrix on a CPU with kernels for it: bfloat16 ones, or float16 ones if its values fit."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    largest = torch.finfo(torch.float16).max
    return has_bfloat16_kernels() or (has_float16_kernels() and bool(weight.abs().amax() <= largest))


def can_quantize(weight: Tensor) -> bool:
    """Whether :func:`can_pack`, and this build of PyTorch has 8-bit kernels for this processor."""
    has = hasattr(torch.ops.quantized, "linear_dynamic") and hasattr(torch, "quantize_per_channel")
    return can_pack(weight) and has and torch.backends.quantized.engine in ("x86", "fbgemm")


def pack_linears(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear) -> None:
    """Replace each ``nn.Linear`` inside ``module`` whose weight :func:`can_pack` by ``make(weight, bias)``, in place."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, make(child.weight, child.bias))
        else:
            pack_linears(child, make)
