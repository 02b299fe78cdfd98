"""Linear layers on our own product (:mod:`dspark.cpu.product`), with weights laid out once instead of at every call.

PyTorch rearranges a bfloat16 weight at every product or, on a CPU without instructions for it, multiplies row by row, so verifying n
tokens takes as long as n plain steps. Our product reads the weights once for six rows and computes in float32, which rounds nothing, so
activations between the products are float32 too. Other devices and dtypes are left alone.
"""

import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn

LANES = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8  # float32 numbers of a register


class PackedLinear(nn.Module):
    """``F.linear(x, weight, bias)``, summed in float32.

    weight: [out, in] bfloat16; bias: [out].
    keep_weight: also keep the plain weight, so that it can be saved.
    Called with x [..., in]; returns [..., out] in x's dtype, bfloat16 or float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keep_weight: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        from dspark.cpu import product  # here, because numba takes long to import

        self.packed, self.multiply, self.bias = product.words(weight), product.multiply, bias
        if keep_weight:
            self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.packed, self.out_features, self.bias).to(x.dtype)

    __call__ = forward  # without nn.Module's hooks, which take as long as a small kernel


def can_pack(weight: Tensor) -> bool:
    """Whether the weight is a bfloat16 matrix on a CPU with registers of eight float32 numbers."""
    old = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() == "DEFAULT"  # without AVX2
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not old


def pack_linears(module: nn.Module, make: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear) -> None:
    """Replace each ``nn.Linear`` inside ``module`` whose weight :func:`can_pack` by ``make(weight, bias)``, in place."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, make(child.weight, child.bias))
        else:
            pack_linears(child, make)
