"""A packed drafter drafts as the plain one does, and reports the distribution that it drew from."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import DFLASH2, HEADS, dense, tiny_drafter, tiny_target
from torch import Tensor, nn

import dspark.cpu.fused
from dspark.cpu import pack_drafter
from dspark.cpu.compiled import CompiledBackbone
from dspark.cpu.fused import FusedBackbone
from dspark.cpu.packed import PackedLinear, can_pack, pack_linears
from dspark.draft.drafter import Drafter
from dspark.draft.eagle import EagleDrafter
from dspark.draft.source import Draft
from dspark.target.target import Target
from dspark.verify.lean import plain_product
from dspark.verify.sampling import Rng, Sampling

TEXT = [5, 9, 11, 4, 30, 8, 2, 61]
REDUCED = {"d2t": torch.arange(1, 98, 2)}  # 49 tokens, which no register divides
EAGLE = {"kind": EagleDrafter, "num_hidden_layers": 1, "markov_rank": 0}  # its layer runs once per token


def drafts(drafter: Drafter, target: Target, rng: type[Rng] = Rng) -> list[Draft]:
    """Two blocks, the second after one more token of context."""
    state = drafter.new_state(TEXT)
    _, taps = target.forward(torch.tensor([TEXT]), None, drafter.target_layer_ids)
    drafter.extend(state, TEXT, taps)
    found = [drafter.draft(state, 17, 4, Sampling(1.0), rng(torch.Generator().manual_seed(0)))]
    drafter.extend(state, [17], taps[:, :1])
    return [*found, drafter.draft(state, 21, 3, Sampling(1.0), rng(torch.Generator().manual_seed(1)))]


@pytest.mark.parametrize("first_table", [1024, 2])
@pytest.mark.parametrize("kind", [FusedBackbone, CompiledBackbone])
@pytest.mark.parametrize("shape", [*HEADS, REDUCED, EAGLE], ids=str)
def test_the_fused_backbone_drafts_as_the_plain_one(
    shape: dict[str, object], kind: type[FusedBackbone], first_table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights in float32, whatever the head, and where the table of rotations has to grow."""
    if kind is CompiledBackbone and "convolution_kernel" in shape:
        pytest.skip("has no convolutions")
    monkeypatch.setattr(dspark.cpu.fused, "FIRST_TABLE", first_table)
    target = tiny_target(head_dim=16)
    drafter = tiny_drafter(target, **shape).bfloat16().float()  # weights that both kinds hold to the last digit
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in drafter.modules() if isinstance(module, nn.RMSNorm)):
        norm.weight.data = (0.5 + torch.rand(norm.weight.shape, generator=generator)).bfloat16().float()
    expected = drafts(drafter, target)
    if kind is CompiledBackbone:
        pack_linears(drafter.bfloat16(), partial(PackedLinear, keep_weight=True))
    drafter.fused = kind(drafter, PackedLinear if kind is CompiledBackbone else plain_product)
    for ours, theirs in zip(drafts(drafter, target), expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert torch.allclose(dense(ours), dense(theirs), atol=1e-5)
        assert torch.allclose(ours.confidence, theirs.confidence, atol=1e-5)


@pytest.mark.parametrize("shape", [{}, DFLASH2 | {"std": 0.1}, EAGLE], ids=["block", "selector", "one by one"])
def test_a_packed_drafter_reports_the_distribution_that_it_drew_from(shape: dict[str, object]) -> None:
    target = tiny_target(dtype=torch.bfloat16, head_dim=16)
    packed, unpacked = (tiny_drafter(target, **shape) for _ in range(2))
    pack_drafter(packed)
    seen: list[Tensor] = []

    class Watching(Rng):
        def choose(self, probs: Tensor) -> int:
            seen.append(probs)
            return super().choose(probs)

    draft, other = drafts(packed, target, Watching)[0], drafts(unpacked, target)[0]
    assert torch.equal(dense(draft)[:, packed.d2t], torch.stack(seen[:4]))
    assert (dense(draft)[0] - dense(other)[0]).abs().sum() / 2 < 0.05
    assert isinstance(packed.fused.layers[0].down, PackedLinear) and isinstance(packed.fused.keys_values, PackedLinear)


def test_packing_leaves_the_weights_that_are_saved() -> None:
    target = tiny_target(dtype=torch.bfloat16, head_dim=16)
    packed, unpacked = (tiny_drafter(target) for _ in range(2))
    pack_drafter(packed)
    assert packed.state_dict().keys() == unpacked.state_dict().keys()
    assert all(torch.equal(weight, unpacked.state_dict()[name]) for name, weight in packed.state_dict().items())


def test_only_what_has_kernels_is_packed() -> None:
    """A float32 drafter stays as it is."""
    target = tiny_target()
    assert not can_pack(target.head_weight)
    assert pack_drafter(tiny_drafter(target)).fused is None
