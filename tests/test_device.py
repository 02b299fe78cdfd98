"""The round that stays on the device writes what every other round writes, and asks the host once or twice."""

from __future__ import annotations

import random

import pytest
import torch
from static import static_target
from test_decode import greedy_reference
from tiny import HEADS, tiny_drafter, tiny_target

import dspark
from dspark.decode import rounds
from dspark.device.round import StaticRound, static_round
from dspark.engine import Engine
from dspark.request import Request
from dspark.schedule import POLICIES, Policy, make_policy
from dspark.tune.profile import profile_drafts
from dspark.verify import graphs
from dspark.verify.lean import lean_pass
from dspark.verify.sampling import Rng, Sampling

LOOSE = {"adaptive": {"widen": 0.02, "narrow": 0.01, "fallback": 0.001}, "confidence": {"threshold": 0.3}}


def registry(name: str) -> Policy:
    return make_policy(name, LOOSE.get(name), lambda: lambda b: 1 / (1 + 0.1 * b))


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_texts_are_those_of_model_generate_for_every_policy_and_number_of_requests(name: str) -> None:
    """Requests of different lengths join one engine, leave it and are cancelled; drafted, and copied where the text repeats itself."""
    draw, target = random.Random(name), static_target()
    drafter = tiny_drafter(target, **HEADS[len(name) % len(HEADS)], draft_vocab_size=60 if len(name) % 2 else None)
    for most in range(1, 6):
        source = dspark.ContextLookup(drafter, 1) if most % 2 else drafter
        engine = Engine(target, source, registry(name), max_requests=most)
        assert isinstance(engine.static, StaticRound)
        requests = []
        while len(requests) < most + 2 or engine.waiting or engine.active:
            if len(requests) < most + 2 and draw.random() < 0.7:
                prompt = [draw.randrange(4, 100) for _ in range(draw.randint(1, 20))] * draw.randint(1, 2)
                requests.append(engine.submit(prompt, max_new_tokens=draw.randint(1, 14)))
            if engine.active and draw.random() < 0.05:
                engine.cancel(draw.choice(engine.active))
            engine.step()
        for request in requests:
            expected = greedy_reference(target, request.prompt, request.limit)
            assert request.token_ids == (expected if request.status == "finished" else expected[: len(request.token_ids)]), (name, most)


def test_rounds_record_what_other_rounds_record() -> None:
    """Windows, drafts, confidences, probabilities, sources: policies, traces and figures read them."""
    plain, static = tiny_target(eos_token_id=None), static_target(eos_token_id=None)
    prompt = [5, 6, 7, 5, 6]
    for build in (
        lambda t: tiny_drafter(t),
        lambda t: dspark.ContextLookup(tiny_drafter(t), 1),
        lambda t: dspark.ContextLookup(None, target=t),
    ):
        policy = dspark.ConfidenceThreshold(0.3)
        ours, others = (dspark.generate(t, build(t), prompt, max_new_tokens=25, policy=policy).rounds for t in (static, plain))
        assert len(ours) == len(others)
        for mine, theirs in zip(ours, others, strict=True):
            for field in ("index", "committed", "anchor", "window", "draft_tokens", "verify_length", "accepted", "source"):
                assert getattr(mine, field) == getattr(theirs, field), field
            for field in ("confidence", "target_probs_of_drafts", "draft_probs_of_drafts"):
                assert getattr(mine, field) == pytest.approx(getattr(theirs, field), rel=1e-3, abs=1e-6, nan_ok=True), field
            assert mine.draft_seconds >= 0 and mine.verify_seconds > 0


class Blocks(Rng):
    """For the token-by-token rule, the stream of the round on the device: 2W + 1 numbers a round, for drafts, tests and the last token."""

    def __init__(self, seed: int, block_size: int) -> None:
        self.generator, self.width = torch.Generator().manual_seed(seed), block_size
        self.numbers, self.drafted, self.tested = None, 0, 0

    def choose(self, probs: torch.Tensor) -> int:
        if self.numbers is None:  # the prefill
            self.numbers = []
            return super().choose(probs)
        if self.tested:
            self.next, self.drafted, self.tested = self.numbers[-1], 0, 0
        else:
            if not self.drafted:
                self.numbers = torch.rand(2 * self.width + 1, generator=self.generator, dtype=torch.float64)
            self.next, self.drafted = self.numbers[self.drafted], self.drafted + 1
        return super().choose(probs)

    def accepts(self, p_target: torch.Tensor, p_draft: torch.Tensor) -> bool:
        self.next, self.tested = self.numbers[self.width + self.tested], self.tested + 1
        return super().accepts(p_target, p_draft)

    def _uniform(self) -> torch.Tensor:
        return self.next if len(self.numbers) else super()._uniform()


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, 40), Sampling(1.5, 0, 0.8)], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=lambda head: str(next(iter(head.values()))))
def test_given_the_same_stream_a_sampled_text_is_that_of_the_rule_token_by_token(sampling: Sampling, head: dict[str, object]) -> None:
    target, static = (make(eos_token_id=None, initializer_range=0.1) for make in (tiny_target, static_target))
    prompt, accepted = [5, 6, 7], 0
    for seed in range(3):
        found = []
        for each, rng in ((target, Blocks(seed, 4)), (static, Rng(torch.Generator().manual_seed(seed)))):
            drafter = tiny_drafter(each, **head, draft_vocab_size=80, std=0.05)
            engine = Engine(each, drafter, dspark.FixedWindow())
            found.append(list(rounds(engine, engine.enqueue(Request(prompt=prompt, limit=30, sampling=sampling, rng=rng)))))
        assert [r.committed for r in found[0][:-1]] == [r.committed for r in found[1][:-1]]  # the last round may draft nothing
        accepted += sum(r.accepted for r in found[0])
    assert accepted > 3


def test_a_requests_sampled_text_does_not_depend_on_its_neighbours() -> None:
    target = static_target(eos_token_id=None)
    source = dspark.ContextLookup(tiny_drafter(target), 1)
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_k": 30, "seed": 3}
    alone = dspark.generate(target, source, [5, 6, 7], policy=dspark.FixedWindow(), **options).token_ids
    engine = Engine(target, source, dspark.FixedWindow(), max_requests=4)
    engine.submit([8, 9], max_new_tokens=9)
    engine.submit([9, 9], max_new_tokens=30, temperature=2.0, seed=9)
    engine.step()
    mine = engine.submit([5, 6, 7], **options)
    engine.submit([5, 6, 7], max_new_tokens=7, temperature=0.8, top_p=0.5, seed=4)
    list(engine.run())
    assert mine.token_ids == alone and engine.static


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_round_waits_for_the_device_once_or_twice(name: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice where the policy reads confidences. Inside the programs, pretended graphs allow no waiting at all."""
    target, policy, waits, real = static_target(eos_token_id=None), registry(name), [], graphs.to_host
    engine = Engine(target, tiny_drafter(target), policy, max_requests=3)
    for i in range(3):
        engine.submit([5, 6, 7 + i], max_new_tokens=20, temperature=temperature)
    engine.step()
    monkeypatch.setattr(graphs, "to_host", lambda x: waits.append(x) or real(x))
    while engine.active:
        waits.clear()
        drafted = any(r.draft_tokens for _, r in engine.step())
        assert len(waits) == (2 if drafted and policy.reads_confidence else 1)


@pytest.mark.parametrize(("temperature", "neighbours"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_damaged_logits_end_the_requests_that_they_concern(temperature: float, neighbours: float) -> None:
    target = static_target(eos_token_id=None)
    engine = Engine(target, tiny_drafter(target), max_requests=3)
    bad, good, _ = (engine.submit([5, 6, 7], max_new_tokens=9, temperature=t, seed=1) for t in (temperature, 0.0, neighbours))
    engine.step()
    real = engine.static.programs.verifier.lean.logits
    engine.static.programs.verifier.lean.logits = lambda x: real(x).index_fill(0, torch.tensor(0), torch.nan)  # the first row is bad's
    engine.step()
    del engine.static.programs.verifier.lean.logits
    list(engine.run())
    assert bad.status == "failed" and "damaged" in str(bad.error)
    assert good.token_ids == greedy_reference(target, [5, 6, 7], 9)


def test_a_source_without_a_static_form_drafts_on_the_host_and_the_pass_stays() -> None:
    target = static_target(eos_token_id=None)

    class Own(type(tiny_drafter(target))):
        """A drafter that computes something else."""

    drafter = tiny_drafter(target)
    drafter.__class__ = Own
    engine = Engine(target, drafter, dspark.FixedWindow())
    assert engine.static is None and static_round(lean_pass(target), drafter) is None
    request = engine.submit([5, 6, 7], max_new_tokens=20)
    list(engine.run())
    assert request.token_ids == greedy_reference(target, [5, 6, 7], 20)


def test_drafts_are_timed_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device, not token by token from the host: schedules rest on these times."""
    target = static_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    monkeypatch.setattr(drafter, "propose", None)
    curve = profile_drafts(target, drafter, requests=(1, 2, 5), repeats=2)
    assert curve.widths == (1, 2, 5) and all(seconds > 0 for seconds in curve.seconds)
    found = dspark.generate(target, drafter, [5, 6, 7], max_new_tokens=9, policy=dspark.FixedWindow()).token_ids
    assert found == greedy_reference(target, [5, 6, 7], 9)  # on the buffers that the measurement left
