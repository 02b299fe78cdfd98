"""What holds for every input, searched for a counterexample: sampling, the policies, decoding, copying."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_drafter, tiny_target
from torch import Tensor

import dspark
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import LEAST_SURVIVAL, RATES
from dspark.draft.source import DraftSource
from dspark.round import Round
from dspark.schedule import AsyncTopK, Policy
from dspark.target.target import Target
from dspark.verify.sampling import OneHot, Rng, Sampling

VOCAB, BLOCK, TAPS = 100, 4, (-1, 0)
CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))  # with ties
SPEEDS = st.lists(st.floats(0.01, 10), min_size=25, max_size=25)


def examples(count: int) -> settings:
    """The same ``count`` examples in every run, on every machine."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@cache
def models() -> tuple[Target, Drafter]:
    target = tiny_target(num_hidden_layers=2, eos_token_id=None)
    return target, tiny_drafter(target, target_layer_ids=TAPS, num_hidden_layers=1)


def source(copying: bool) -> DraftSource:
    return dspark.ContextLookup(models()[1], 1, max_copy=6) if copying else models()[1]


# ---- sampling


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[2, vocab] of any float type: ordinary, huge, equal, or −∞ but for one."""
    vocab, dtype = draw(st.integers(1, 9)), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    value = draw(st.sampled_from([st.floats(-8, 8, width=16), st.floats(-6e4, 6e4, width=16), st.just(3.0), st.just(-torch.inf)]))
    found = torch.tensor(draw(st.lists(st.lists(value, min_size=vocab, max_size=vocab), min_size=2, max_size=2)))
    found[:, draw(st.integers(0, vocab - 1))] = draw(st.floats(-8, 8, width=16))
    return found.to(dtype)


TEMPERATURE = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1e3), st.floats(1e-45, 1e-3))
TOP_P = st.one_of(st.just(1.0), st.floats(1e-6, 1.0))


@examples(250)
@given(logits(), TEMPERATURE, st.integers(0, 11), TOP_P)
def test_processed_logits_are_distributions_that_keep_the_order(x: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    p = Sampling(temperature, top_k, top_p).probs(x)
    assert p.dtype == torch.float32 and p.shape == x.shape
    assert (p >= 0).all() and torch.allclose(p.sum(-1), torch.ones(2), atol=1e-5)
    full = Sampling(temperature).probs(x)  # where two logits are so close that these are equal, either may be kept
    larger = full[:, :, None] > full[:, None, :]
    assert (p[:, :, None] >= p[:, None, :])[larger].all()
    assert (p > 0)[range(2), x.argmax(-1)].all()


# ---- policies


def policies(block_size: int) -> st.SearchStrategy[Policy]:
    """Any policy that can serve such a drafter."""
    thresholds = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted)
    return st.one_of(
        st.sampled_from([dspark.Autoregressive(), dspark.MTP1()]),
        st.builds(dspark.FixedWindow, st.none() | st.integers(1, block_size)),
        thresholds.map(lambda t: dspark.AdaptiveWindow(*reversed(t))),
        st.builds(dspark.ConfidenceThreshold, st.floats(0, 1), st.sampled_from(["survival", "conditional"])),
        SPEEDS.map(lambda speeds: dspark.PrefixScheduler(speeds.__getitem__)),
        SPEEDS.map(lambda speeds: AsyncTopK(speeds.__getitem__)),
    )


@examples(150)
@given(st.data(), st.integers(1, 8))
def test_windows_and_lengths_stay_in_bounds_whatever_happened_before(data: st.DataObject, block_size: int) -> None:
    policy, last = data.draw(policies(block_size)), None
    policy.check(block_size, has_confidence=True)
    for index in range(data.draw(st.integers(1, 8))):
        window = policy.window(last, block_size)
        assert 0 <= window <= block_size
        drafted = data.draw(st.integers(0, window))  # the length limit may leave room for fewer
        [length] = policy.lengths([torch.tensor(data.draw(st.lists(CONFIDENCE, min_size=drafted, max_size=drafted)))])
        assert 0 <= length <= drafted
        probs = tuple(data.draw(st.lists(st.floats(0, 1), min_size=length, max_size=length)))
        last = Round(index=index + 1, committed=(0,), window=window, verify_length=length, target_probs_of_drafts=probs)


ROUNDS = st.lists(CONFIDENCE, max_size=5).map(lambda c: Round(index=1, committed=(0,), draft_tokens=(0,) * len(c), confidence=tuple(c)))
PASTS = st.lists(st.lists(ROUNDS, min_size=1, max_size=4), min_size=4, max_size=4)  # of four requests


@examples(300)
@given(st.data(), policies(8), st.lists(st.lists(CONFIDENCE, min_size=1, max_size=5), min_size=1, max_size=4), PASTS)
def test_later_confidences_never_decide_over_an_earlier_draft(
    data: st.DataObject, policy: Policy, requests: list[list[float]], pasts: list
) -> None:
    r = data.draw(st.integers(0, len(requests) - 1))
    j = data.draw(st.integers(1, len(requests[r])))
    changed = [*requests[:r], requests[r][:j] + data.draw(st.lists(CONFIDENCE, max_size=5 - j)), *requests[r + 1 :]]
    one, other = (policy.lengths([torch.tensor(v) for v in side], pasts[: len(requests)])[r] for side in (requests, changed))
    assert (one >= j) == (other >= j)


@examples(300)
@given(SPEEDS, st.lists(st.lists(CONFIDENCE, max_size=5), min_size=1, max_size=4))
def test_the_prefix_scheduler_is_algorithm_1_read_from_the_page(speeds: list[float], requests: list[list[float]]) -> None:
    """All candidates sorted by survival, admitted one by one while Θ = expected tokens · SPS(B) rises, up to the first fall."""
    confidence, count = [torch.tensor(values) for values in requests], len(requests)
    candidates = sorted((-a, r, j) for r, c in enumerate(confidence) for j, a in enumerate(c.cumprod(-1).tolist()))
    expected, admitted, best = float(count), [0] * count, count * speeds[count]
    for budget, (negative, r, _) in enumerate(candidates, start=count + 1):
        throughput = (expected - negative) * speeds[budget]
        if throughput <= best:
            break
        best, expected, admitted[r] = throughput, expected - negative, admitted[r] + 1
    assert dspark.PrefixScheduler(speeds.__getitem__).lengths(confidence) == admitted


# ---- decoding


@examples(60)
@given(st.data(), st.booleans(), st.integers(1, 16), st.frozensets(st.integers(0, VOCAB - 1), max_size=12), st.integers(0, 3))
def test_the_text_is_the_sum_of_its_rounds_and_respects_every_limit(
    data: st.DataObject, copying: bool, limit: int, ends: frozenset[int], seed: int
) -> None:
    target, drafts = models()[0], source(copying)
    policy, temperature = data.draw(policies(drafts.block_size)), data.draw(st.sampled_from([0.0, 1.0]))
    prompt = data.draw(st.lists(st.integers(4, 9), min_size=1, max_size=8))
    target.eos_token_ids = ends
    out = dspark.generate(target, drafts, prompt, policy=policy, max_new_tokens=limit, temperature=temperature, seed=seed)
    assert out.token_ids == [token for r in out.rounds for token in r.committed]
    assert not ends & set(out.token_ids[:-1])
    assert len(out.token_ids) == limit or (len(out.token_ids) < limit and out.token_ids[-1] in ends)
    done, anchor = 1, out.token_ids[0]
    for r in out.rounds[1:]:
        assert r.anchor == anchor and len(r.confidence) == len(r.draft_probs_of_drafts) == len(r.draft_tokens)
        assert r.accepted <= r.verify_length <= len(r.draft_tokens) <= max(0, min(r.window, limit - done - 1))
        assert len(r.committed) == r.accepted + 1 or (r.committed[-1] in ends and len(r.committed) <= r.accepted)
        assert r.committed[: r.accepted] == r.draft_tokens[: min(r.accepted, len(r.committed))]
        done, anchor = done + len(r.committed), r.committed[-1]
    if temperature == 0:
        assert out.token_ids == dspark.generate(target, None, prompt, max_new_tokens=limit).token_ids


# ---- copying


def naive_copy(text: list[int], window: int, min_match: int) -> tuple[list[int], list[float]]:
    """Copying written down naively: the whole text is searched for every draft."""
    drafts, rates = [], []
    while len(drafts) < window:
        said = [*text, *drafts]
        lengths = range(min(max(RATES), len(said)), min_match - 1, -1)
        found = [(text[end], RATES[n]) for n in lengths for end in range(len(text) - 1, n - 1, -1) if text[end - n : end] == said[-n:]]
        if not found or math.prod([*rates, found[0][1]]) < LEAST_SURVIVAL:
            break
        drafts.append(found[0][0])
        rates.append(found[0][1])
    return drafts, rates


@examples(120)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.integers(2, 5))
def test_copying_equals_a_naive_search_in_two_requests(data: st.DataObject, min_match: int, max_copy: int, letters: int) -> None:
    """Two requests on one source, extended and asked in any order."""
    copying, letter = dspark.ContextLookup(models()[1], min_match, max_copy), st.integers(5, 4 + letters)
    states, texts = [copying.new_state() for _ in range(2)], [[], []]
    for _ in range(data.draw(st.integers(2, 8))):
        i, tokens = data.draw(st.integers(0, 1)), data.draw(st.lists(letter, min_size=1, max_size=6))
        copying.extend(states[i], tokens, torch.zeros(1, len(tokens), len(TAPS) * 32))
        texts[i] += tokens
        anchor, window = data.draw(letter), data.draw(st.integers(1, copying.block_size))
        draft = copying.draft(states[i], anchor, window, Sampling(), Rng())
        expected, rates = naive_copy([*texts[i], anchor], min(window, max_copy), min_match)
        if expected:
            assert (draft.source, draft.tokens) == ("copy", expected)
            assert draft.confidence.tolist() == pytest.approx(rates)
            assert draft.probs == [*map(OneHot, draft.tokens)]
        else:
            assert draft.source == "drafter" and len(draft.tokens) == min(window, models()[1].block_size)
