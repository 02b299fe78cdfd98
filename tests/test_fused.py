"""A packed drafter drafts by shortcuts: they give what the plain backbone gives, and the law it reports is the law it drew from."""

from __future__ import annotations

import pytest
import torch
from test_draft import HEADS, ready
from test_eagle import draft_behind, eagle
from tiny import tiny_drafter, tiny_target
from torch import Tensor, nn

import dspark.cpu.fused
from dspark.cpu import pack_drafter
from dspark.cpu.fused import FusedBackbone
from dspark.cpu.packed import PackedLinear, QuantizedLinear, can_pack, can_quantize, has_vnni
from dspark.draft.drafter import Draft, Drafter
from dspark.draft.eagle import EagleDrafter
from dspark.target.target import Target
from dspark.verify.sampling import Chance, Sampling

TEXT = [5, 9, 11, 4, 30, 8, 2, 61]

needs_kernels = pytest.mark.skipif(
    not can_quantize(torch.zeros(8, 8, dtype=torch.bfloat16)), reason="this CPU or this build of PyTorch has no kernels to pack for"
)


def plain(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def drafts(drafter: Drafter, target: Target) -> list[Draft]:
    """Two blocks, the second behind one token more of context."""
    state, taps = ready(target, drafter, TEXT)
    found = [drafter.draft(state, 17, 4, Sampling(1.0), Chance(torch.Generator().manual_seed(0)))]
    drafter.extend(state, [17], taps[:, :1])
    return [*found, drafter.draft(state, 21, 3, Sampling(1.0), Chance(torch.Generator().manual_seed(1)))]


def assert_same_law(ours: Draft, theirs: Draft) -> None:
    assert ours.tokens == theirs.tokens
    assert torch.allclose(ours.probs, theirs.probs, atol=1e-5)
    assert torch.allclose(ours.confidence, theirs.confidence, atol=1e-5)


@pytest.mark.parametrize("first_table", [1024, 2])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_fused_backbone_drafts_as_the_plain_one(head: dict[str, object], first_table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same weights in float32, whatever the head, and where the table of rotations has to grow."""
    monkeypatch.setattr(dspark.cpu.fused, "FIRST_TABLE", first_table)
    target = tiny_target()
    drafter = tiny_drafter(target, **head)
    generator = torch.Generator().manual_seed(0)
    for norm in (module for module in drafter.modules() if isinstance(module, nn.RMSNorm)):
        norm.weight.data = 0.5 + torch.rand(norm.weight.shape, generator=generator)
    expected = drafts(drafter, target)
    drafter.fused = FusedBackbone(drafter, plain, plain)
    for ours, theirs in zip(drafts(drafter, target), expected, strict=True):
        assert_same_law(ours, theirs)


def test_the_fused_layer_steps_as_the_plain_one() -> None:
    """The autoregressive drafter runs the layer once a token."""
    target = tiny_target()
    drafter = eagle(target)
    expected = draft_behind(drafter, target, TEXT, 17)
    drafter.fused = FusedBackbone(drafter, plain, plain)
    assert_same_law(draft_behind(drafter, target, TEXT, 17), expected)


@needs_kernels
@pytest.mark.parametrize("kind", [Drafter, EagleDrafter])
def test_a_packed_drafter_reports_the_law_that_it_drew_from(kind: type[Drafter]) -> None:
    """Rounded weights draft from another law than plain ones, a close one; what counts is that it is the reported one."""
    target = tiny_target(dtype=torch.bfloat16)
    shape = {} if kind is Drafter else {"kind": kind, "num_hidden_layers": 1, "markov_rank": 0}
    packed, unpacked = (tiny_drafter(target, **shape) for _ in range(2))
    pack_drafter(packed)

    class Watching(Chance):
        def choose(self, probs: Tensor) -> int:
            seen.append(probs)
            return super().choose(probs)

    seen: list[Tensor] = []
    state, _ = ready(target, packed, TEXT)
    draft = packed.draft(state, 17, 4, Sampling(1.0), Watching(torch.Generator().manual_seed(0)))
    assert torch.equal(draft.probs[:, packed.d2t], torch.stack(seen))
    other = drafts(unpacked, target)[0]
    assert (draft.probs[0] - other.probs[0]).abs().sum() / 2 < (0.05 if has_vnni() else 0.1)  # 7 bits are coarser than 8
    assert isinstance(packed.fused.layers[0].down, QuantizedLinear) and isinstance(packed.fused.keys_values, PackedLinear)


def test_packing_leaves_the_weights_that_are_saved() -> None:
    target = tiny_target(dtype=torch.bfloat16)
    packed, unpacked = (tiny_drafter(target) for _ in range(2))
    pack_drafter(packed)
    assert packed.state_dict().keys() == unpacked.state_dict().keys()
    assert all(torch.equal(weight, unpacked.state_dict()[name]) for name, weight in packed.state_dict().items())


def test_only_what_has_kernels_is_packed() -> None:
    """A float32 drafter stays as it is."""
    target = tiny_target()
    assert not can_pack(target.head_weight) and not can_quantize(target.head_weight)
    assert pack_drafter(tiny_drafter(target)).fused is None
