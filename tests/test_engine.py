"""The engine: a request's text is its own, whatever its neighbours do; nothing is lost when one fails."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from static import static_target
from test_decode import Oracle, greedy_reference, policies
from tiny import letter_tokenizer, tiny_drafter, tiny_target

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


@pytest.mark.parametrize("make", [tiny_target, lean_target, static_target], ids=["transformers", "lean", "static"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_is_what_it_is_alone_while_neighbours_join_and_leave(make: object, seed: int) -> None:
    """Random mixtures: a policy, lengths, copying, joins and cancels differ from seed to seed."""
    draw = random.Random(seed)
    target = make()
    drafter = tiny_drafter(target)
    source = dspark.ContextLookup(drafter, 1) if seed % 2 else drafter
    engine = Engine(target, source, draw.choice(policies(4)), max_requests=draw.randint(2, 5))
    limits = [draw.randint(1, 16) for _ in range(7)]
    requests, todo = [], list(zip(prompts(seed, 7), limits, strict=True))
    while todo or engine.waiting or engine.active:
        if todo and draw.random() < 0.6:
            prompt, limit = todo.pop()
            requests.append(engine.submit(prompt, max_new_tokens=limit))
        if engine.active and draw.random() < 0.05:
            engine.cancel(draw.choice(engine.active))
        engine.step()
    for request in requests:
        expected = greedy_reference(target, request.prompt, request.limit)
        assert request.status == "finished" or request.status == "cancelled"
        assert request.token_ids == expected[: len(request.token_ids)]
        assert request.status == "cancelled" or request.token_ids == expected


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
        target_bytes = held(layer.kv for layer in request.slot.layers)
    assert request.slot.length == state.layers[0].length == len(request.prompt) + len(request.token_ids) - 1
    assert target_bytes + held(state.layers) == engine.bytes_per_token * request.slot.length


def test_a_large_request_is_not_passed_by_small_ones_that_keep_arriving() -> None:
    target = lean_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    engine = Engine(target, drafter, max_requests=8, memory=room_for(target, drafter, 40))
    before = [engine.submit([5, 6], max_new_tokens=8) for _ in range(4)]
    engine.step()
    large = engine.submit([8, 9], max_new_tokens=38)  # needs all of the memory
    after = []
    while not large.done:
        after.append(engine.submit([5, 6], max_new_tokens=2))
        assert engine._bytes(*engine.active) <= engine.memory
        assert all(request.status == "waiting" for request in after)
        engine.step()
    list(engine.run())
    assert {request.status for request in (*before, large, *after)} == {"finished"} and len(after) < 60


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
    assert failing.status == "failed" and isinstance(failing.error, ConnectionError) and not failing.streamer.ended
    assert other.token_ids == greedy_reference(target, [8, 9], 10) and watched.ended
    with pytest.raises(ConnectionError):
        dspark.generate(target, None, [5, 6, 7], max_new_tokens=10, streamer=Failing(0))


@pytest.mark.parametrize("where", ["draft", "verify", "prefill"])
def test_after_an_interrupt_the_engine_goes_on_with_every_request(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = lean_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    engine = Engine(target, drafter, max_requests=2)
    one = engine.submit([5, 6, 7], max_new_tokens=12)
    engine.step()
    if where == "prefill":
        two = engine.submit([8, 9], max_new_tokens=12)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((drafter, "_sample") if where == "draft" else (engine, "verifier")), interrupt)
        engine.step()
    if where != "prefill":
        two = engine.submit([8, 9], max_new_tokens=12)
    list(engine.run())
    assert [r.token_ids for r in (one, two)] == [greedy_reference(target, p, 12) for p in ([5, 6, 7], [8, 9])]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_cancelled_request_keeps_what_it_wrote_and_frees_its_place() -> None:
    target = lean_target(eos_token_id=None)
    engine = Engine(target, None, max_requests=1)
    first, second = (engine.submit([5, 6, 7], max_new_tokens=9) for _ in range(2))
    engine.step()
    engine.cancel(first)
    assert len(first.token_ids) == 1 and first.status == "cancelled"
    list(engine.run())
    assert second.status == "finished"
    with pytest.raises(ValueError, match="is cancelled here"):
        engine.cancel(first)


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
        ({"memory": 0}, "memory"),
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
