"""Linear layers whose weights are laid out once for the CPU's matrix kernels instead of at every call.

For bfloat16 on a CPU, PyTorch hands each weight to oneDNN in its plain layout and oneDNN rearranges it at every call. With a
few rows of input that costs more than the product itself. Rearranged once, a pass takes about half the time, and a block of
eight tokens about as long as one: it is what makes verification nearly free here. Other devices and dtypes are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 8  # the layout is chosen for this many rows and works for any


class PackedLinear(nn.Module):
    """The same product as ``F.linear(x, weight, bias)``. ``keep_weight``: also hold the plain weight, for saving it later."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep_weight: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TYPICAL_ROWS)
        self.bias = bias
        if keep_weight:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether the weight is a bfloat16 matrix on a CPU, and this build of PyTorch has the kernels."""
    ops = torch.ops.mkldnn
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_is_mkldnn_bf16_supported")
        and ops._is_mkldnn_bf16_supported()
    )


def pack_linears(module: nn.Module, keep_weights: bool = False) -> None:
    """Replace every ``nn.Linear`` below ``module`` that :func:`can_pack` by a packed one, in place."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias, keep_weights))
        else:
            pack_linears(child, keep_weights)
