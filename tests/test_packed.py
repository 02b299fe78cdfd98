"""Weights in another layout: the same product, whatever kernels the processor has, and 8-bit ones nearly that product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_drafter, tiny_target
from torch import nn

import dspark.cpu.packed
from dspark.cpu import pack_drafter, pack_target
from dspark.cpu.packed import PackedLinear, QuantizedLinear, can_pack, can_quantize, has_bfloat16_kernels
from dspark.target.target import Target
from dspark.verify.passes import pass_of

MATRIX = torch.zeros(16, 16, dtype=torch.bfloat16)
needs_8_bits = pytest.mark.skipif(not can_quantize(MATRIX), reason="this CPU or this build of PyTorch has no 8-bit kernels")


@pytest.fixture(params=["PyTorch's", "ours"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds where PyTorch has some for this processor."""
    if request.param != "ours" and not has_bfloat16_kernels():
        pytest.skip("this CPU or this build of PyTorch has no bfloat16 kernels")
    monkeypatch.setattr(dspark.cpu.packed, "has_bfloat16_kernels", lambda: request.param != "ours")
    return request.param


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (2, 8, 64), (40, 64)], ids=str)
def test_a_packed_layer_gives_the_product_of_the_plain_one(kernels: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(49, 64, generator=generator).bfloat16(), torch.randn(49, generator=generator).bfloat16()
    x = torch.randn(shape, generator=generator).bfloat16()
    packed, plain = PackedLinear(weight, bias)(x), nn.functional.linear(x.float(), weight.float(), bias.float())
    assert packed.shape == plain.shape and packed.dtype == torch.bfloat16
    assert (packed.float() - plain).abs().max() <= plain.abs().max() * 2**-7  # bfloat16 keeps 8 bits
    packed = PackedLinear(weight, bias)(x.float())
    assert packed.dtype == torch.float32
    assert (packed - plain).abs().max() <= plain.abs().max() * (1e-5 if kernels == "ours" else 2**-7)  # nothing is rounded


@pytest.mark.parametrize("make", [PackedLinear, pytest.param(QuantizedLinear, marks=needs_8_bits)])
def test_a_packed_layer_takes_a_single_row(kernels: str, make: type[nn.Module]) -> None:
    """The Markov head reads one vector at a time."""
    layer, x = make(torch.eye(16, dtype=torch.bfloat16)), torch.arange(16.0)
    assert torch.allclose(layer(x).float(), x, atol=0.1)


def test_our_layout_holds_bfloat16_weights_to_the_last_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dspark.cpu.packed, "has_bfloat16_kernels", lambda: False)
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


@pytest.mark.parametrize("make", [lambda: tiny_target(dtype=torch.bfloat16), unknown_family], ids=["lean", "modules"])
def test_packing_changes_neither_logits_nor_the_digest_of_any_target_of_that_model(make: object, kernels: str) -> None:
    plain, packed = make(), make()
    pack_target(packed)
    again = Target(packed.model, None, "the same model once more")
    assert isinstance((packed.verifier or packed).head, PackedLinear) and packed.digest == again.digest == plain.digest
    assert again.verifier is packed.verifier and again.pass_name == packed.pass_name
    rounds_nothing = packed.verifier is not None and kernels == "ours"
    expected = logits(Target(make().model.float(), None, "in float32") if rounds_nothing else plain)
    assert (logits(packed) - expected).abs().max() <= expected.abs().max() * (1e-3 if rounds_nothing else 2**-5)
    assert packed.verifier is None or packed.verifier.dtype == (torch.float32 if kernels == "ours" else torch.bfloat16)


def test_a_model_with_a_lean_pass_is_saved_whole(kernels: str, tmp_path: Path) -> None:
    target = pack_target(tiny_target(dtype=torch.bfloat16))
    target.model.save_pretrained(tmp_path)
    saved = type(target.model).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in target.model.state_dict().items())


def test_packed_modules_refuse_to_be_saved_instead_of_losing_weights(kernels: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack=False"):
        pack_target(unknown_family()).model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_8_bits
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64)], ids=str)
def test_a_quantized_layer_gives_nearly_the_product(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 64, generator=generator).bfloat16(), torch.randn(48, generator=generator).bfloat16()
    weight[0] = 0  # a scale of zero would divide by zero
    x = torch.randn(shape, generator=generator)
    ours, theirs = QuantizedLinear(weight, bias)(x), nn.functional.linear(x, weight.float(), bias.float())
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@needs_8_bits
def test_8_bit_products_do_not_overflow() -> None:
    """Inputs and weights at their largest: a processor that adds pairs of products in 16 bits would clip them."""
    weight, x = torch.ones(8, 64, dtype=torch.bfloat16), torch.ones(2, 64)
    assert torch.allclose(QuantizedLinear(weight)(x), torch.tensor(64.0), rtol=0.02)


def test_a_packed_drafter_holds_no_weight_twice(kernels: str) -> None:
    """Except in its own layers, which are saved: joined weights are kept in their packed form only."""
    drafter = pack_drafter(tiny_drafter(tiny_target(dtype=torch.bfloat16)))
    shortcuts = [drafter.head, drafter.fused.keys_values]
    shortcuts += [part for layer in drafter.fused.layers for part in (layer.project, layer.out, layer.gate_and_up, layer.down)]
    assert not any(hasattr(part, "weight") for part in shortcuts)
    assert hasattr(drafter.fc, "weight") and hasattr(drafter.markov_head.markov_w2, "weight")


def test_what_no_kernel_takes_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dspark.cpu.packed, "has_bfloat16_kernels", lambda: False)
    assert not can_pack(MATRIX[:, :8]) and not can_quantize(MATRIX[:, :8])
    assert type(pack_target(tiny_target(dtype=torch.bfloat16, hidden_size=40)).head) is nn.Linear


def test_only_bfloat16_on_a_cpu_is_packed() -> None:
    assert not can_pack(MATRIX.float()) and not can_pack(MATRIX.half()) and not can_pack(MATRIX.to("meta"))
