"""How weights are laid out for a CPU. Applied from outside, by :mod:`dspark.load`: the target and the drafter import nothing from here."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from dspark.cpu.fused import FusedBackbone
from dspark.cpu.packed import PackedLinear, can_pack, pack_linears
from dspark.draft.drafter import Drafter
from dspark.verify.lean import lean_pass
from dspark.verify.passes import weights_now
from dspark.verify.static import static_pass

if TYPE_CHECKING:
    from dspark.target.target import Target
    from dspark.verify.passes import TargetPass

# Fields that FusedLayer does not read.
OTHER_LAYERS = {"sliding_windows", "causal_layers", "layer_type", "attention_k_eq_v", "attention_bias", "hidden_act"}


def pack_target(target: Target) -> Target:
    """Give the target the fastest pass that this machine has for it. Returns the target.

    A family that the lean pass knows runs it, compiled if its weights are bfloat16 and this is a CPU; the model's own modules do not
    change, and later Targets of this model run that pass too, until the weights change: then it is refused until they are packed again.
    Any other bfloat16 model on a CPU has its linear layers packed in place; the model keeps the digest of its plain weights, so another
    Target of it has the same digest.
    """
    packs = can_pack(target.head_weight)
    target.verifier = target.model.dspark_pass = _fast_pass(target, packs)
    if target.verifier is not None:
        target.verifier.made_of = weights_now(target.model)
    if target.verifier is None and packs:
        target.model.weight_digest = target.digest
        pack_linears(target.model)
        target.model.save_pretrained = _refuse_to_save
        target.head.weight = target.head_weight  # a Target reads it, so the packed model can be made a target again
    return target


def _fast_pass(target: Target, packs: bool) -> TargetPass | None:
    if target.device.type == "cuda":
        return static_pass(target)
    if not packs or not all(can_pack(module.weight) for module in target.decoder.modules() if type(module) is nn.Linear):
        return lean_pass(target)
    from dspark.cpu.compiled import CompiledPass  # here, because numba takes long to import

    fast = lean_pass(target, PackedLinear, torch.float32, CompiledPass)
    return fast if fast is None or fast.fits else lean_pass(target, PackedLinear, torch.float32)


def _refuse_to_save(*_: object, **__: object) -> None:
    raise ValueError("the weights of this model are laid out for the CPU and cannot be saved: load it with pack=False")


def pack_drafter(drafter: Drafter) -> Drafter:
    """Lay out an attached bfloat16 drafter for fast drafts on a CPU, in place; leave any other alone. Returns the drafter.

    The weights that are saved do not change.
    """
    inside = [module.weight for module in drafter.layers.modules() if type(module) is nn.Linear]
    if not all(map(can_pack, [drafter.head_weight, drafter.fc.weight, *inside])):
        return drafter
    pack_linears(drafter, partial(PackedLinear, keep_weight=True))
    object.__setattr__(drafter, "head", PackedLinear(drafter.head_weight))  # borrowed from the target, so no submodule: it is never saved
    if not drafter.config.unusual().keys() & OTHER_LAYERS:
        from dspark.cpu.compiled import CompiledBackbone

        usual = type(drafter) is Drafter and not drafter.config.convolution_kernel
        drafter.fused = CompiledBackbone(drafter, PackedLinear) if usual else None
        if not usual or not drafter.fused.fits:
            drafter.fused = FusedBackbone(drafter, PackedLinear)
    return drafter


def is_packed(module: nn.Module) -> bool:
    """Whether :func:`pack_target` or :func:`pack_drafter` changed a model or a drafter."""
    return any(isinstance(part, PackedLinear) for part in module.modules())
