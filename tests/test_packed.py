"""Weights in another layout: the same product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_drafter, tiny_target
from torch import nn

import dspark
from dspark.cpu import pack_drafter, pack_target
from dspark.cpu.packed import PackedLinear, can_pack
from dspark.target.target import Target
from dspark.verify.passes import pass_of

MATRIX = torch.zeros(16, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (2, 8, 64), (40, 64)], ids=str)
def test_a_packed_layer_gives_the_product_of_the_plain_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(49, 64, generator=generator).bfloat16(), torch.randn(49, generator=generator).bfloat16()
    x = torch.randn(shape, generator=generator).bfloat16()
    packed, plain = PackedLinear(weight, bias)(x), nn.functional.linear(x.float(), weight.float(), bias.float())
    assert packed.shape == plain.shape and packed.dtype == torch.bfloat16
    assert (packed.float() - plain).abs().max() <= plain.abs().max() * 2**-7  # bfloat16 keeps 8 bits
    packed = PackedLinear(weight, bias)(x.float())
    assert packed.dtype == torch.float32
    assert (packed - plain).abs().max() <= plain.abs().max() * 1e-5  # nothing is rounded


def test_a_packed_layer_takes_a_single_row() -> None:
    """The Markov head reads one vector at a time."""
    layer, x = PackedLinear(torch.eye(16, dtype=torch.bfloat16)), torch.arange(16.0)
    assert torch.allclose(layer(x).float(), x, atol=0.1)


def test_our_layout_holds_bfloat16_weights_to_the_last_digit() -> None:
    every = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)  # the finite ones, from 0 up
    weight = torch.cat([every, -every]).view(-1, 16)
    assert torch.equal(PackedLinear(weight)(torch.eye(16)).T, weight.float())


def unknown_family() -> Target:
    target = tiny_target(dtype=torch.bfloat16)
    target.config.model_type = "without a lean row"
    return target


def logits(target: Target) -> torch.Tensor:
    ids = torch.randint(4, 100, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    run = pass_of(target)
    cache = run.new_cache()
    return run([ids], [cache.open()], cache)[0][0]


@pytest.mark.parametrize("make", [lambda: tiny_target(dtype=torch.bfloat16, head_dim=16), unknown_family], ids=["compiled", "modules"])
def test_packing_changes_neither_logits_nor_the_digest_of_any_target_of_that_model(make: object) -> None:
    plain, packed = make(), make()
    pack_target(packed)
    again = Target(packed.model, None, "the same model once more")
    assert isinstance((packed.verifier or packed).head, PackedLinear) and packed.digest == again.digest == plain.digest
    assert again.verifier is packed.verifier and again.pass_name == packed.pass_name
    rounds_nothing = packed.verifier is not None
    expected = logits(Target(make().model.float(), None, "in float32") if rounds_nothing else plain)
    assert (logits(packed) - expected).abs().max() <= expected.abs().max() * (1e-3 if rounds_nothing else 2**-5)
    assert packed.verifier is None or packed.verifier.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_is_refused_once_the_weights_have_changed(dtype: torch.dtype) -> None:
    """It holds some of them in a layout of its own, so it would mix old and new ones."""
    target = pack_target(tiny_target(dtype=dtype))
    dspark.generate(target, None, [5, 6, 7], max_new_tokens=4)
    target.model.load_state_dict(tiny_target(seed=5, dtype=dtype).model.state_dict())
    for changed in (target, Target(target.model, None, "tiny")):
        with pytest.raises(ValueError, match="the weights of tiny changed"):
            dspark.generate(changed, None, [5, 6, 7], max_new_tokens=4)
    again = pack_target(Target(target.model, None, "tiny"))
    expected = pack_target(tiny_target(seed=5, dtype=dtype))
    assert again.pass_name == expected.pass_name != "transformers"
    assert len({tuple(dspark.generate(t, None, [5, 6, 7], max_new_tokens=9).token_ids) for t in (again, expected)}) == 1


def test_a_model_with_a_lean_pass_is_saved_whole(tmp_path: Path) -> None:
    target = pack_target(tiny_target(dtype=torch.bfloat16))
    target.model.save_pretrained(tmp_path)
    saved = type(target.model).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in target.model.state_dict().items())


def test_packed_modules_refuse_to_be_saved_instead_of_losing_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack=False"):
        pack_target(unknown_family()).model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_packed_drafter_holds_no_weight_twice() -> None:
    """Except in its own layers, which are saved: joined weights are kept in their packed form only."""
    drafter = pack_drafter(tiny_drafter(tiny_target(dtype=torch.bfloat16)))
    shortcuts = [drafter.head, drafter.fused.keys_values]
    shortcuts += [part for layer in drafter.fused.layers for part in (layer.project, layer.out, layer.gate_and_up, layer.down)]
    assert not any(hasattr(part, "weight") for part in shortcuts)
    assert hasattr(drafter.fc, "weight") and hasattr(drafter.markov_head.markov_w2, "weight")


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(MATRIX.float()) and not can_pack(MATRIX.half()) and not can_pack(MATRIX.to("meta"))
