"""Layers that keep a state: after a rewind they are as they were, and what stays is run again without being seen outside."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from test_engine import interrupted
from test_families import model_of
from tiny import Wavering, random_prompt, tiny_drafter
from torch import Tensor, nn

import dspark
from dspark.engine import Engine
from dspark.rewind import GrowingKV
from dspark.target import states as module
from dspark.target.states import StateCache
from dspark.target.target import Target

KINDS = ["Qwen3Next", "Lfm2", "FalconH1", "Mamba2"]  # linear attention, convolutions, both in one layer, states alone
kinds = pytest.mark.parametrize("kind", KINDS)


def target_of(kind: str) -> Target:
    return Target(model_of(kind), None, kind)


def text_of(length: int) -> Tensor:
    return torch.tensor([random_prompt(0, length, 60)])


def states(cache: StateCache) -> list[Tensor]:
    return [
        x.clone()
        for layer in cache.layers
        for kept in vars(layer).values()
        if isinstance(kept, dict)
        for x in kept.values()
        if isinstance(x, Tensor)
    ]


def expected_text(target: Target, prompt: list[int], length: int) -> list[int]:
    return target.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=length)[0, len(prompt) :].tolist()


def lengths_of_passes(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of tokens of each pass from now on."""
    found, real = [], target.model.forward

    def forward(*arguments: object, input_ids: Tensor, **options: object) -> object:
        found.append(input_ids.shape[1])
        return real(*arguments, input_ids=input_ids, **options)

    monkeypatch.setattr(target.model, "forward", forward)
    return found


@kinds
@pytest.mark.parametrize("first", [1, 20])
def test_a_rewind_to_where_a_pass_began_brings_back_every_state(kind: str, first: int) -> None:
    target, text, cache = target_of(kind), text_of(30), None
    cache = target.new_cache()
    target.forward(text[:, :first], cache)
    before = states(cache)
    assert before
    for again in range(2):
        target.forward(text[:, first : first + 4 + again], cache)
        assert not all(map(torch.equal, before, states(cache)))
        cache.rewind(first)
        assert all(map(torch.equal, before, states(cache)))
    assert cache.length == first and all(layer.length == first for layer in cache.layers if isinstance(layer, GrowingKV))


@kinds
def test_what_stays_is_run_again_in_the_next_pass_and_only_what_is_new_is_returned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, text, cache = target_of(kind), text_of(40), None
    whole, taps = target.forward(text, None, (0, 2))
    cache, passes = target.new_cache(), lengths_of_passes(target, monkeypatch)
    target.forward(text[:, :20], cache)
    at, expected = 20, [20]
    for kept in (3, 0, 5, 2, 4, 4, 1, 6):  # of six tokens; those of several passes pile up
        behind = cache.length - cache.reached
        logits, tapped = target.forward(text[:, at : at + 6], cache, (0, 2))
        size = len(logits[0])
        assert size == tapped.shape[1] == len(text[0, at : at + 6])
        assert (logits - whole[:, at : at + 6]).abs().max() < 1e-3
        assert (tapped - taps[:, at : at + 6]).abs().max() < 1e-3 * taps.abs().max()
        expected += [behind, size] if behind > StateCache.most_replayed else [behind + size]
        at += min(kept, size)
        cache.rewind(at)
    assert passes == expected and any(n > 16 for n in expected[1:]), "nothing was ever caught up with"


@kinds
def test_a_rewind_may_go_further_back_than_one_pass(kind: str) -> None:
    target, text, cache = target_of(kind), text_of(30), None
    whole, _ = target.forward(text, None)
    cache = target.new_cache()
    for part in text[:, :24].split(8, 1):
        target.forward(part, cache)
    for length in (11, 3, 0):
        cache.rewind(length)
        rest, _ = target.forward(text[:, length:], cache)
        assert (rest - whole[:, length:]).abs().max() < 1e-3
    for length in (-1, 31):
        with pytest.raises(ValueError, match=f"cannot rewind to {length}"):
            cache.rewind(length)


@kinds
def test_a_round_that_is_accepted_whole_leaves_nothing_to_run_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, prompt = target_of(kind), random_prompt(1, 10, 60)
    expected = expected_text(target, prompt, 21)
    passes = lengths_of_passes(target, monkeypatch)
    output = dspark.generate(target, Wavering(target, expected, 4, errors=0.0), prompt, policy=dspark.FixedWindow(), max_new_tokens=21)
    assert output.token_ids == expected and passes == [10, 5, 5, 5, 5]


@kinds
@pytest.mark.parametrize("length", [1, 150])
def test_a_prompt_of_any_length_is_continued_exactly(kind: str, length: int) -> None:
    """Linear attention takes a prompt in chunks of 64."""
    target, prompt = target_of(kind), random_prompt(2, length, 60)
    expected = expected_text(target, prompt, 20)
    output = dspark.generate(target, Wavering(target, expected, 4), prompt, policy=dspark.FixedWindow(), max_new_tokens=20)
    assert output.token_ids == expected and any(r.verify_length > r.accepted for r in output.rounds)


@kinds
def test_requests_with_states_do_not_disturb_each_other_and_slots_are_free_again(kind: str) -> None:
    target = target_of(kind)
    asked = [random_prompt(seed, 3 + 4 * seed, 60) for seed in range(5)]
    expected = [expected_text(target, prompt, 10) for prompt in asked]
    engine = Engine(target, tiny_drafter(target), dspark.FixedWindow(), max_requests=2)
    requests = [engine.submit(prompt, max_new_tokens=10) for prompt in asked]
    engine.step(), engine.step()
    engine.cancel(requests[0])
    list(engine.run())
    assert [r.status for r in requests] == ["cancelled", *["finished"] * 4]
    assert [r.token_ids for r in requests[1:]] == expected[1:]
    assert requests[0].token_ids == expected[0][: len(requests[0].token_ids)]


def stopped(module: nn.Module, n: int) -> torch.utils.hooks.RemovableHandle:
    """Ctrl-C after the module's n-th call."""
    calls = count(1)

    def hook(*_: object) -> None:
        if next(calls) == n:
            raise KeyboardInterrupt

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("kind", ["Qwen3Next", "Lfm2"])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_after_an_interrupt_in_a_layer_the_text_goes_on(kind: str, layer: int, rounds: int) -> None:
    target, prompt = target_of(kind), random_prompt(3, 12, 60)
    expected = expected_text(target, prompt, 16)
    engine = Engine(target, Wavering(target, expected, 4), dspark.FixedWindow())
    request = engine.submit(prompt, max_new_tokens=16)
    for _ in range(rounds):
        engine.step()
    hook = stopped(target.layers[layer], 1)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    list(engine.run())
    assert request.token_ids == expected


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("n", range(1, 9))
def test_after_an_interrupt_while_states_are_copied_or_brought_back_the_text_goes_on(
    n: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, prompt = target_of("Qwen3Next"), random_prompt(3, 12, 60)
    expected = expected_text(target, prompt, 16)
    engine = Engine(target, Wavering(target, expected, 4, errors=0.5), dspark.FixedWindow())
    request = engine.submit(prompt, max_new_tokens=16)
    engine.step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_copied", interrupted(module._copied, n, after))
        list(engine.run())
    list(engine.run())
    assert request.token_ids == expected


def test_memory_has_room_for_the_states_and_their_copies() -> None:
    target = target_of("Qwen3Next")
    engine = Engine(target, None)
    request = engine.submit(random_prompt(0, 5, 60), max_new_tokens=7)
    engine.step()
    held = 2 * sum(x.nbytes for x in states(request.slot))
    assert engine._bytes(request) == 12 * engine.bytes_per_token + held
    with pytest.raises(ValueError, match=f"needs {engine._bytes(request)} bytes of keys, values and states"):
        Engine(target, None, memory=engine._bytes(request) - 1).submit(random_prompt(0, 5, 60), max_new_tokens=7)


def test_several_texts_of_one_length_share_a_cache() -> None:
    """As self-play runs them."""
    target, text = target_of("Lfm2"), torch.cat([text_of(30), text_of(30).flip(1)])
    whole, _ = target.forward(text, None)
    cache = target.new_cache()
    rows = [target.forward(part, cache)[0] for part in text.split((20, 1, 1, 8), 1)]
    assert (torch.cat(rows, 1) - whole).abs().max() < 1e-3
