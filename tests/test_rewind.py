"""The cache: rewinding is forgetting."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_target
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from dspark.rewind import GrowingKV
from dspark.target.target import Target


def sliding_target(attention: str) -> Target:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=512,
        attn_implementation=attention,
    )
    return Target(Gemma3ForCausalLM(config), None, "tiny-gemma3")


def random_ids(count: int, vocab: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, vocab, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [tiny_target, lambda: sliding_target("eager"), lambda: sliding_target("sdpa")])
def test_rewinding_and_extending_equals_never_having_been_there(make: object) -> None:
    target = make()
    text, detour = random_ids(30), random_ids(9, seed=1)
    straight, there_and_back = target.new_cache(), target.new_cache()
    for cache in (straight, there_and_back):
        target.forward(text[:, :20], cache)
    target.forward(detour, there_and_back)
    there_and_back.rewind(20)
    expected, _ = target.forward(text[:, 20:], straight)
    found, _ = target.forward(text[:, 20:], there_and_back)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_model_sees_the_same_through_the_cache_as_without_it(attention: str) -> None:
    target, text = sliding_target(attention), random_ids(40)
    whole, _ = target.forward(text, None)
    cache = target.new_cache()
    parts = [target.forward(part, cache)[0] for part in text.split((17, 5, 1, 9, 8), dim=1)]
    assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-5)


def test_growing_keeps_what_was_written() -> None:
    kv, written = GrowingKV(), torch.randn(1, 2, 700, 4, generator=torch.Generator().manual_seed(0))
    for part in written.split(90, dim=2):
        kv.append(part, -part)
    keys, values = kv.view()
    assert torch.equal(keys, written) and torch.equal(values, -written)
    assert kv.capacity == 1024  # doubled, not grown to fit


def test_rewinding_moves_no_data() -> None:
    target = tiny_target()
    cache = target.new_cache()
    target.forward(random_ids(50), cache)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    cache.rewind(7)
    assert cache.length == cache.get_seq_length() == 7
    assert before == [layer.keys.data_ptr() for layer in cache.layers]


@pytest.mark.parametrize("length", [-1, 11])
def test_rewinding_beyond_what_is_held_is_refused(length: int) -> None:
    kv = GrowingKV()
    kv.append(torch.zeros(1, 1, 10, 2), torch.zeros(1, 1, 10, 2))
    with pytest.raises(ValueError, match=str(length)):
        kv.rewind(length)


def test_taps_are_the_residual_stream_after_the_named_layers() -> None:
    target, ids = tiny_target(), random_ids(12)
    hidden = target.model(ids, output_hidden_states=True).hidden_states
    _, taps = target.forward(ids, target.new_cache(), (-1, 0, 2))
    assert torch.allclose(taps, torch.cat([hidden[0], hidden[1], hidden[3]], -1))


@pytest.mark.parametrize("layer", [-2, 3, 4])
def test_the_last_layer_and_what_lies_outside_are_not_legal_taps(layer: int) -> None:
    with pytest.raises(ValueError, match="legal tap"):
        tiny_target().check_taps((0, layer))
