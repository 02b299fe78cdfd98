"""The engine: a request's text is its own, whatever its neighbours do; nothing is lost when one fails."""

from __future__ import annotations

import pkgutil
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count

import pytest
import torch
from static import static_target
from test_decode import Oracle, greedy_reference
from tiny import letter_tokenizer, tiny_drafter, tiny_target
from transformers import TextStreamer

import dspark
from dspark.draft.source import DraftSource
from dspark.engine import Engine
from dspark.load import ready
from dspark.target.target import Target
from dspark.verify.lean import lean_pass


def lean_target(**config: object) -> Target:
    target = tiny_target(**config)
    target.verifier = lean_pass(target)
    return target


def prompts(seed: int, count: int) -> list[list[int]]:
    random.seed(seed)
    return [[random.randrange(4, 100) for _ in range(random.randint(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_requests_draws_are_its_own(temperature: float) -> None:
    target = lean_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    policy = dspark.FixedWindow()
    alone = dspark.generate(target, drafter, [5, 6, 7], policy=policy, max_new_tokens=20, temperature=temperature, seed=3).token_ids
    engine = Engine(target, drafter, policy, max_requests=3)
    engine.submit([8, 9], max_new_tokens=30, temperature=2.0, seed=9)
    engine.step()
    mine = engine.submit([5, 6, 7], max_new_tokens=20, temperature=temperature, seed=3)
    engine.submit([5, 6, 7], max_new_tokens=7, temperature=temperature, seed=4)
    list(engine.run())
    assert mine.token_ids == alone


def test_several_prompts_are_several_texts_and_one_chat_is_one() -> None:
    target = lean_target()
    drafter = tiny_drafter(target)
    outputs = dspark.generate(target, drafter, [[5, 6, 7], [8, 9]], max_new_tokens=8)
    assert [o.token_ids for o in outputs] == [greedy_reference(target, p, 8) for p in ([5, 6, 7], [8, 9])]
    assert dspark.generate(target, drafter, [5, 6, 7], max_new_tokens=8).token_ids == outputs[0].token_ids


def test_many_prompts_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    target, engines, names = lean_target(), [], dspark.generate.__globals__
    monkeypatch.setitem(names, "AT_ONCE", 2)
    monkeypatch.setitem(names, "Engine", lambda *a, **k: engines.append(Engine(*a, **k)) or engines[-1])
    outputs = dspark.generate(target, None, [[5, 6, i] for i in range(4, 9)], max_new_tokens=8)
    assert [o.token_ids for o in outputs] == [greedy_reference(target, [5, 6, i], 8) for i in range(4, 9)]
    assert len(engines[0].cache.layers[0][0]) == 2


def test_rounds_that_a_caller_did_not_wait_for_come_later() -> None:
    target = lean_target(eos_token_id=None)
    engine = Engine(target, tiny_drafter(target), max_requests=3)
    requests, seen = [engine.submit([5, 6, i], max_new_tokens=9) for i in range(3)], []
    while engine.waiting or engine.active:
        for request, finished in engine.run():
            seen.append((request, finished))
            break
    seen += engine.run()
    assert [[r for owner, r in seen if owner is request] for request in requests] == [request.rounds for request in requests]


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_streamer_of_transformers_prints_the_whole_text(skip_prompt: bool, capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_target(eos_token_id=None)
    target.tokenizer = letter_tokenizer()
    streamer = TextStreamer(target.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    for _ in range(2):
        text = dspark.generate(target, tiny_drafter(target), [5, 6, 7], max_new_tokens=9, streamer=streamer).text
        assert capsys.readouterr().out.strip() == text.strip() != ""
    with pytest.raises(ValueError, match="2 prompts"):
        dspark.generate(target, None, [[5, 6], [7]], streamer=streamer)


def room_for(target: Target, drafter: DraftSource | None, tokens: int) -> int:
    """Bytes that this many tokens of one text need."""
    return tokens * Engine(target, drafter).bytes_per_token


def test_requests_wait_in_order_until_the_memory_has_room() -> None:
    target = lean_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    engine = Engine(target, drafter, max_requests=8, memory=room_for(target, drafter, 20))
    first, second, third = (engine.submit([5, 6], max_new_tokens=n) for n in (8, 12, 2))
    engine.step()
    assert [r.status for r in (first, second, third)] == ["active", "waiting", "waiting"]
    finished = [request for request, _ in engine.run() if request.done]
    assert finished[0] is first and second.status == third.status == "finished"
    for prompt, limit in (([5] * 20, 2), ([5], 20), ([5] * 3, 18)):
        with pytest.raises(ValueError, match=f"needs {room_for(target, drafter, len(prompt) + limit)} bytes .* memory is {engine.memory}"):
            engine.submit(prompt, max_new_tokens=limit)
    assert engine.submit([5], max_new_tokens=19).status == "waiting"


def held(entry: object) -> int:
    """Bytes of keys and values of the tokens that a cache of one text holds."""
    return sum(2 * kv.keys[0, :, : kv.length].numel() * kv.keys.itemsize for kv in entry)


@pytest.mark.parametrize("make", [tiny_target, lean_target], ids=["transformers", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copying", [False, True], ids=["drafter", "copying"])
def test_memory_counts_what_target_and_drafter_hold_of_each_token(make: object, dtype: torch.dtype, copying: bool) -> None:
    target = make(dtype=dtype, eos_token_id=None)
    drafter = ready(tiny_drafter(target), target)
    engine = Engine(target, dspark.ContextLookup(drafter, 9) if copying else drafter, dspark.FixedWindow())
    request = engine.submit([5, 6, 7, 8, 9], max_new_tokens=9)
    engine.step(), engine.step(), engine.step()
    state = request.state.drafter if copying else request.state
    with torch.inference_mode():
        drafter._absorb([state])
    if engine.verifier.name == "lean":
        target_bytes = sum(buffer[0, :, : request.slot.length].numel() * buffer.itemsize for kv in engine.cache.layers for buffer in kv)
    else:
        target_bytes = held(request.slot.layers)
    assert request.slot.length == state.layers[0].length == len(request.prompt) + len(request.token_ids) - 1
    assert target_bytes + held(state.layers) == engine.bytes_per_token * request.slot.length


def test_a_large_request_is_not_passed_by_small_ones_that_keep_arriving() -> None:
    target = lean_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    engine = Engine(target, drafter, max_requests=8, memory=room_for(target, drafter, 40))
    before = [engine.submit([5, 6], max_new_tokens=n) for n in (4, 6, 8, 14)]  # leave one after the other
    engine.step()
    large = engine.submit([8, 9], max_new_tokens=38)  # needs all of the memory
    after = []
    while not large.done:
        after.append(engine.submit([5, 6], max_new_tokens=2))
        assert engine._bytes(*engine.active) <= engine.memory
        assert all(request.status == "waiting" for request in after) and len(after) < 60
        engine.step()
    list(engine.run())
    assert {request.status for request in (*before, large, *after)} == {"finished"}


class Failing:
    """A streamer whose reader went away."""

    def __init__(self, after: int) -> None:
        self.after, self.ended = after, False

    def put(self, value: torch.Tensor) -> None:
        self.after -= 1
        if self.after < 0:
            raise ConnectionError("the reader went away")

    def end(self) -> None:
        self.ended = True


def test_a_streamer_that_raises_ends_its_own_request_alone() -> None:
    target = lean_target(eos_token_id=None)
    engine = Engine(target, tiny_drafter(target), max_requests=2)
    failing = engine.submit([5, 6, 7], max_new_tokens=10, streamer=Failing(2))
    watched = Failing(99)
    other = engine.submit([8, 9], max_new_tokens=10, streamer=watched)
    list(engine.run())
    assert failing.status == "failed" and isinstance(failing.error, ConnectionError) and failing.streamer.ended
    assert other.token_ids == greedy_reference(target, [8, 9], 10) and watched.ended
    with pytest.raises(ConnectionError):
        dspark.generate(target, None, [5, 6, 7], max_new_tokens=10, streamer=Failing(0))


def interrupted(function: Callable[..., object], n: int, after: bool = False) -> Callable[..., object]:
    """The function, as if Ctrl-C came at its n-th call, before it does its work or after."""
    calls = count(1)

    def trap(*arguments: object, **options: object) -> object:
        call = next(calls)
        if call == n and not after:
            raise KeyboardInterrupt
        result = function(*arguments, **options)
        if call == n:
            raise KeyboardInterrupt
        return result

    return trap


PLACES = [  # functions that a step calls in each of its stages, and the call that is interrupted
    ("dspark.draft.drafter.Drafter.new_state", 1),  # the prefill
    ("dspark.draft.drafter.Drafter.extend", 1),
    ("dspark.draft.drafter.Drafter._absorb", 1),  # drafting
    ("dspark.draft.drafter.Drafter._sample", 1),
    ("dspark.schedule.policies.Policy.lengths", 1),
    ("dspark.engine.accept", 1),  # judging one request after the other
    ("dspark.engine.accept", 2),
    ("dspark.draft.drafter.Drafter.extend", 3),
    ("dspark.engine.until_stop", 3),
    *(("torch.nn.functional.scaled_dot_product_attention", n) for n in (1, 3, 9, 11)),  # layers of the prefill and of the verification
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
@pytest.mark.parametrize("make", [tiny_target, lean_target], ids=["transformers", "lean"])
def test_after_an_interrupt_the_engine_goes_on_with_every_request(
    make: object, place: tuple[str, int], after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests are in the middle of their texts and one joins when Ctrl-C comes; a second Ctrl-C comes where the round is repeated."""
    where, n = place
    target = make(eos_token_id=None)
    drafter = tiny_drafter(target)
    asked = {(5, 6, 7): 12, (8, 9): 9, tuple(range(10, 30)): 7}
    expected = [greedy_reference(target, list(prompt), limit) for prompt, limit in asked.items()]
    engine = Engine(target, drafter, dspark.FixedWindow(), max_requests=3)
    requests = []
    for i, (prompt, limit) in enumerate(asked.items()):
        requests.append(engine.submit(list(prompt), max_new_tokens=limit))
        if i < 2:
            engine.step()
    owner, name = where.rsplit(".", 1)
    real = pkgutil.resolve_name(owner).__dict__[name]
    for expecting in (pytest.raises(KeyboardInterrupt), suppress(KeyboardInterrupt)):
        with monkeypatch.context() as patch, expecting:
            patch.setattr(pkgutil.resolve_name(owner), name, interrupted(real, n, after))
            engine.step()
    list(engine.run())
    assert [request.token_ids for request in requests] == expected
    assert not engine.active and not getattr(engine.cache, "slots", ())


@pytest.mark.parametrize("n", range(1, 8))
def test_an_interrupt_in_a_streamer_loses_no_token_and_ends_the_text_in_time(n: int) -> None:
    target = lean_target(eos_token_id=None)
    expected = greedy_reference(target, [5, 6, 7], 7)
    engine = Engine(target, None)
    streamer = Failing(99)
    streamer.put = interrupted(streamer.put, n, after=True)
    request = engine.submit([5, 6, 7], max_new_tokens=7, streamer=streamer)
    found = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(engine.run())
    while engine.active or engine._finished:
        found.extend(engine.step())
    assert request.token_ids == expected and request.status == "finished"
    assert len(request.rounds) == 7 and [r for _, r in found] == request.rounds[-len(found) :]


def test_an_interrupt_while_a_slot_opens_loses_neither_the_request_nor_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    target = lean_target(eos_token_id=None)
    asked = [[5, 6, 7], [8, 9], [10, 11]]
    expected = [greedy_reference(target, prompt, 8) for prompt in asked]
    engine = Engine(target, None, max_requests=3)
    requests = [engine.submit(prompt, max_new_tokens=8) for prompt in asked[:1]]
    engine.step()
    requests += [engine.submit(prompt, max_new_tokens=8) for prompt in asked[1:]]
    for n in (1, 2, 5):  # in one layer after the other while the buffers grow
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.Tensor, "new_zeros", interrupted(torch.Tensor.new_zeros, n))
            engine.step()
    list(engine.run())
    assert [request.token_ids for request in requests] == expected and not engine.cache.slots


def test_a_streamer_may_cancel_its_own_request_and_others() -> None:
    target = lean_target(eos_token_id=None)
    engine = Engine(target, tiny_drafter(target), max_requests=3)
    cancelling = Failing(99)
    first = engine.submit([5, 6, 7], max_new_tokens=9, streamer=cancelling)
    second, third = (engine.submit(prompt, max_new_tokens=9) for prompt in ([8, 9], [10]))
    cancelling.put = lambda _: [engine.cancel(request) for request in (first, second) if len(first.rounds) == 3]
    list(engine.run())
    assert [r.status for r in (first, second, third)] == ["cancelled", "cancelled", "finished"] and cancelling.ended
    assert third.token_ids == greedy_reference(target, [10], 9) and len(first.rounds) == 3 and len(second.rounds) == 2


@pytest.mark.parametrize("fails", ["prefill", "round", "everything"])
def test_nothing_is_lost_when_a_pass_fails(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill without memory fails its request alone; a round that fails is raised, and can be repeated."""
    target = lean_target(eos_token_id=None)
    engine = Engine(target, tiny_drafter(target), max_requests=3)
    one = engine.submit([5, 6, 7], max_new_tokens=8)
    engine.step()
    two = engine.submit([8, 9], max_new_tokens=8)
    verifier = engine.verifier

    def out_of_memory(tokens: list[list[int]], *arguments: object, last_only: bool = False) -> object:
        if fails == "everything" or last_only == (fails == "prefill"):
            raise MemoryError("no room")
        return verifier(tokens, *arguments, last_only=last_only)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "verifier", out_of_memory)
        if fails == "prefill":
            engine.step()
        else:
            with pytest.raises(MemoryError):
                engine.step()
    list(engine.run())
    assert one.token_ids == greedy_reference(target, [5, 6, 7], 8)
    assert two.status == ("finished" if fails == "round" else "failed") and (fails == "round" or isinstance(two.error, MemoryError))
    assert not engine.cache.slots and two.token_ids == (greedy_reference(target, [8, 9], 8) if fails == "round" else [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_nan_end_their_request_alone(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    target = lean_target(eos_token_id=None)
    engine = Engine(target, tiny_drafter(target), max_requests=2)
    bad, good = (engine.submit([5, 6, i], max_new_tokens=8, temperature=t) for i, t in ((7, temperature), (8, 0.0)))
    engine.step()
    verifier = engine.verifier

    def damaged(*arguments: object, **options: object) -> object:
        (first, *others), taps = verifier(*arguments, **options)
        return [torch.full_like(first, torch.nan), *others], taps

    with monkeypatch.context() as patch:
        patch.setattr(engine, "verifier", damaged)
        engine.step()
    list(engine.run())
    assert bad.status == "failed" and "damaged" in str(bad.error)
    assert good.token_ids == greedy_reference(target, [5, 6, 8], 8)


def test_a_cancelled_request_keeps_what_it_wrote_and_frees_its_place() -> None:
    target = lean_target(eos_token_id=None)
    engine = Engine(target, None, max_requests=1)
    first, second = (engine.submit([5, 6, 7], max_new_tokens=9) for _ in range(2))
    engine.step()
    engine.cancel(first)
    assert len(first.token_ids) == 1 and first.status == "cancelled"
    list(engine.run())
    assert second.status == "finished"
    for request, status in ((first, "cancelled"), (second, "finished")):
        with pytest.raises(ValueError, match=f"is {status} here"):
            engine.cancel(request)
    with pytest.raises(ValueError, match="is waiting here"):
        engine.cancel(Engine(target, None).submit([5]))
    assert engine.submit([5], id=first.id).id == first.id, "the id of a request that left is free again"


@pytest.mark.parametrize("wrap", [int, lambda i: [i], torch.tensor, lambda i: torch.tensor([i]), lambda i: iter([i])])
def test_one_stop_id_may_come_without_a_list(wrap: Callable[[int], object]) -> None:
    target = tiny_target(eos_token_id=None)
    text = greedy_reference(target, [5, 6, 7], 12)
    expected = text[: text.index(text[6]) + 1]
    assert dspark.generate(target, None, [5, 6, 7], max_new_tokens=12, stop_ids=wrap(text[6])).token_ids == expected


def test_a_stop_string_may_be_a_special_token() -> None:
    """It is not in the text, which is decoded without special tokens."""
    target = tiny_target(eos_token_id=None)
    target.tokenizer = letter_tokenizer()
    with torch.no_grad():
        target.head_weight[3] = 2 * target.head_weight[greedy_reference(target, [5, 6, 7], 5)[4]]  # <mask> comes fifth at the latest
    text = greedy_reference(target, [5, 6, 7], 12)
    out = dspark.generate(target, tiny_drafter(target), [5, 6, 7], max_new_tokens=12, stop=["<mask>", "no such text"])
    assert out.token_ids == text[: text.index(3) + 1] and "<mask>" not in out.text


def test_the_text_ends_with_the_first_stop_string() -> None:
    target = tiny_target(eos_token_id=None)
    target.tokenizer = letter_tokenizer()
    text = greedy_reference(target, [5, 6, 7], 20)
    stop = target.decode(text[6:9])
    oracle = Oracle(tiny_drafter(target), text)  # whole blocks are accepted, so the stop lies inside one
    found = dspark.generate(target, oracle, [5, 6, 7], max_new_tokens=20, stop=stop)
    assert found.text.endswith(stop) and found.text.count(stop) == 1 and found.token_ids == text[: len(found.token_ids)]
    assert dspark.generate(target, None, [5, 6, 7], max_new_tokens=20, stop_ids=[text[4]]).token_ids == text[: text.index(text[4]) + 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_requests": 0}, "max_requests"),
        ({"max_requests": -1}, "max_requests"),
        ({"max_requests": 1.5}, "max_requests"),
        ({"max_requests": True}, "max_requests"),
        ({"max_requests": None}, "max_requests"),
        ({"memory": 0}, "memory"),
        ({"memory": -5}, "memory"),
        ({"memory": True}, "memory"),
        ({"memory": float("nan")}, "memory"),
    ],
)
def test_an_impossible_engine_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Engine(tiny_target(), None, **settings)


def test_bad_requests_are_refused_before_anything_runs() -> None:
    target = tiny_target(max_position_embeddings=32)
    engine = Engine(target, None)
    engine.submit([5], id="mine")
    for options, words in (
        ({"id": "mine"}, "is taken"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"seed": None}, "seed"),
        ({"temperature": None}, "temperature"),
        ({"stop": "x"}, "no tokenizer"),
        ({"stop_ids": "x"}, "stop_ids must be token ids, got 'x'"),
        ({"stop_ids": [None]}, "stop_ids must be token ids"),
        ({"stop_ids": 2.5}, "stop_ids must be token ids, got 2.5"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.submit([5, 6], **options)
    with pytest.raises(ValueError, match="at most 32"):
        engine.submit([5] * 40)
    with pytest.raises(ValueError, match="confidence head"):
        Engine(target, tiny_drafter(target, enable_confidence_head=False), dspark.ConfidenceThreshold(0.3))


@pytest.mark.parametrize("make", [tiny_target, lean_target, static_target], ids=["transformers", "lean", "static"])
def test_threads_that_share_a_target_and_a_drafter_do_not_disturb_each_other(make: object) -> None:
    target = make(eos_token_id=None)
    drafter = tiny_drafter(target)
    expected = {tuple(p): greedy_reference(target, p, 12) for p in prompts(0, 12)}
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda p: dspark.generate(target, drafter, list(p), max_new_tokens=12).token_ids, expected)
    assert list(found) == list(expected.values())
    groups = [[list(p) for p in expected][i::2] for i in range(2)]
    with ThreadPoolExecutor(2) as pool:  # two engines of several requests each
        both = pool.map(lambda group: [out.token_ids for out in dspark.generate(target, drafter, group, max_new_tokens=12)], groups)
    assert list(both) == [[expected[tuple(p)] for p in group] for group in groups]
