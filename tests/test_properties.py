"""What holds for every input, searched for a counterexample: the rule, the law of sampling, the policies, the caches, the interleaving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny import tiny_drafter, tiny_target
from torch import Tensor

import dspark
from dspark.decode import DraftSource, Round
from dspark.draft.drafter import Draft, Drafter
from dspark.draft.lookup import LEAST_SURVIVAL, RATES, LookupState
from dspark.rewind import GrowingKV, RewindCache
from dspark.schedule import Policy
from dspark.target.target import Target
from dspark.verify.accept import accept, residual
from dspark.verify.sampling import Chance, Sampling


def examples(count: int) -> settings:
    """The same ``count`` examples in every run, on every machine."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


VOCAB, BLOCK, TAPS = 100, 4, (-1, 0)
WEIGHT = st.one_of(st.integers(0, 4).map(float), st.floats(2**-20, 1.0, width=32))  # with zeros and with equal ones
UNIFORM = st.one_of(st.sampled_from([0.0, 0.5, 1 - 2**-53]), st.floats(0, 1, exclude_max=True))


@st.composite
def rows(draw: st.DrawFn, count: int, vocab: int) -> Tensor:
    """[count, vocab] float32 distributions."""
    weights = st.lists(WEIGHT, min_size=vocab, max_size=vocab).filter(any)
    found = torch.tensor(draw(st.lists(weights, min_size=count, max_size=count)), dtype=torch.float64)
    return (found / found.sum(-1, keepdim=True)).float()


class Told(Chance):
    """Draws the numbers that it is told, in order, and then ½ for ever."""

    def __init__(self, uniforms: Sequence[float]) -> None:
        self.uniforms = iter(uniforms)

    def _uniform(self, device: torch.device) -> Tensor:
        return torch.tensor(next(self.uniforms, 0.5), dtype=torch.float64, device=device)


# ---- the rule


@examples(200)
@given(st.integers(2, 7).flatmap(lambda vocab: rows(2, vocab)))
def test_the_residual_is_a_distribution_over_the_tokens_that_the_draft_gave_too_little(pair: Tensor) -> None:
    p_target, p_draft = pair
    assume((p_target > p_draft).any())
    found = residual(p_target, p_draft)
    assert (found >= 0).all() and found.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(found > 0, p_target > p_draft)


@st.composite
def checks(draw: st.DrawFn) -> tuple[list[int], Tensor, Tensor, Told]:
    """Drafts that p_d allows, p_d, p_t, and what chance will say."""
    vocab, length = draw(st.integers(2, 6)), draw(st.integers(0, BLOCK))
    p_draft, p_target = draw(rows(max(length, 1), vocab)), draw(rows(length + 1, vocab))
    tokens = [draw(st.sampled_from(row.nonzero()[:, 0].tolist())) for row in p_draft[:length]]
    return tokens, p_draft, p_target, Told(draw(st.lists(UNIFORM, max_size=2 * BLOCK)))


@examples(200)
@given(checks())
def test_a_verification_keeps_a_prefix_and_adds_a_token_that_the_target_allows(case: tuple[list[int], Tensor, Tensor, Told]) -> None:
    tokens, p_draft, p_target, chance = case
    accepted, token = accept(tokens, p_draft, p_target, chance)
    assert 0 <= accepted <= len(tokens)
    assert p_target[accepted, token] > 0
    assert all(p_target[k, tokens[k]] > 0 for k in range(accepted))
    assert accepted == len(tokens) or p_target[accepted, tokens[accepted]] < p_draft[accepted, tokens[accepted]]


@examples(100)
@given(checks())
def test_a_draft_from_the_targets_own_law_is_accepted_whole(case: tuple[list[int], Tensor, Tensor, Told]) -> None:
    tokens, p, _, chance = case
    accepted, token = accept(tokens, p, torch.cat([p[: len(tokens)], p[-1:]]), chance)
    assert accepted == len(tokens) and p[-1, token] > 0


@examples(100)
@given(st.integers(2, 6).flatmap(lambda vocab: rows(1, vocab)), st.data(), st.just(1 - 2**-53), UNIFORM)
def test_rows_that_differ_by_rounding_alone_still_give_a_token_that_the_target_allows(
    row: Tensor, data: st.DataObject, coin: float, uniform: float
) -> None:
    """No token may have more than p_d then, so nothing is owed although a draft may be rejected."""
    row = torch.cat([row, torch.zeros(1, 1)], 1)  # a last token that nobody allows
    p_draft = row[0]
    lower = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(p_draft), max_size=len(p_draft))))
    p_target = torch.where(lower, torch.nextafter(p_draft, torch.tensor(0.0)), p_draft)
    token = data.draw(st.sampled_from(p_draft.nonzero()[:, 0].tolist()))
    accepted, chosen = accept([token], row, torch.stack([p_target, p_target]), Told([coin, uniform]))
    assert accepted in (0, 1) and p_target[chosen] > 0


@examples(200)
@given(st.integers(1, 6).flatmap(lambda vocab: rows(1, vocab)), UNIFORM)
def test_a_token_without_probability_is_never_chosen(row: Tensor, uniform: float) -> None:
    token = Told([uniform]).choose(row[0])
    assert row[0, token] > 0
    before = row[0, :token].double().sum().item()
    assert before <= uniform * row[0].double().sum().item() + 1e-12 and uniform - 1e-6 <= before + row[0, token].item()


# ---- the law of sampling


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """[2, vocab] of any float type: ordinary, huge, equal, or −∞ but for one."""
    vocab = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    value = draw(st.sampled_from([st.floats(-8, 8, width=16), st.floats(-6e4, 6e4, width=16), st.just(3.0), st.just(-torch.inf)]))
    found = torch.tensor(draw(st.lists(st.lists(value, min_size=vocab, max_size=vocab), min_size=2, max_size=2)))
    found[:, draw(st.integers(0, vocab - 1))] = draw(st.floats(-8, 8, width=16))
    return found.to(dtype)


TEMPERATURE = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 1e3), st.floats(1e-45, 1e-3))
TOP_K, TOP_P = st.integers(0, 11), st.one_of(st.just(1.0), st.floats(1e-6, 1.0))


@examples(250)
@example(torch.tensor([[1.0, 2.0, 1.0]] * 2), 1e-45, 0, 1.0)
@given(logits(), TEMPERATURE, TOP_K, TOP_P)
def test_processed_logits_are_distributions_that_keep_the_order(x: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    p = Sampling(temperature, top_k, top_p).probs(x)
    assert p.dtype == torch.float32 and p.shape == x.shape
    assert (p >= 0).all() and torch.allclose(p.sum(-1), torch.ones(2), atol=1e-5)
    larger = x[:, :, None] > x[:, None, :]
    assert (p[:, :, None] >= p[:, None, :])[larger].all()
    assert (p > 0)[range(2), x.argmax(-1)].all()


@examples(300)
@given(logits(), st.floats(1e-3, 1e3), st.lists(TOP_P, min_size=2, max_size=2), st.lists(st.integers(1, 10), min_size=2, max_size=2))
def test_a_smaller_top_k_or_top_p_keeps_a_part_of_what_a_larger_one_keeps(
    x: Tensor, temperature: float, shares: list[float], counts: list[int]
) -> None:
    for few, many in (
        [Sampling(temperature, top_k=k) for k in sorted(counts)],
        [Sampling(temperature, counts[0], p) for p in sorted(shares)],
        [Sampling(temperature, counts[0]), Sampling(temperature)],
    ):
        assert not ((few.probs(x) > 0) & ~(many.probs(x) > 0)).any(), (few, many)


@examples(200)
@given(logits(), st.floats(0.01, 100), st.integers(1, 10), TOP_P)
def test_top_k_and_top_p_keep_no_more_than_they_say(x: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    plain = Sampling(temperature).probs(x)
    for row, kept, every in zip(x, Sampling(temperature, top_k).probs(x), plain, strict=True):
        if len(set(row.tolist())) == len(row):  # equal logits are kept or dropped together
            assert (kept > 0).sum() <= top_k
        assert every[kept > 0].sum() >= every[kept == 0].sum() * min(top_k, len(row)) / len(row) - 1e-6
    nucleus = Sampling(temperature, top_p=top_p).probs(x)
    for kept, every in zip(nucleus > 0, plain, strict=True):
        assert every[kept].sum() >= top_p - 1e-5  # enough,
        assert kept.sum() == 1 or every[kept].sum() - every[kept].min() < top_p + 1e-5  # and not one token more


# ---- policies

THRESHOLDS = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted)
STEPS = st.lists(st.floats(0.01, 10), min_size=20, max_size=20)
CONFIDENCE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))  # with ties


def prefix_scheduler(speeds: list[float]) -> dspark.PrefixScheduler:
    return dspark.PrefixScheduler(lambda tokens: speeds[tokens])


@st.composite
def adaptive(draw: st.DrawFn, block_size: int) -> dspark.AdaptiveWindow:
    fallback, narrow, widen = draw(THRESHOLDS)
    least = draw(st.integers(1, block_size))
    return dspark.AdaptiveWindow(widen, narrow, fallback, least, draw(st.none() | st.integers(least, block_size)))


def policies(block_size: int) -> st.SearchStrategy[Policy]:
    """Any policy that can serve such a drafter."""
    return st.one_of(
        st.just(dspark.Autoregressive()),
        st.builds(dspark.FixedWindow, st.none() | st.integers(1, block_size)),
        st.just(dspark.MTP1()),
        adaptive(block_size),
        st.builds(dspark.ConfidenceThreshold, st.floats(0, 1), st.sampled_from(["survival", "conditional"])),
        STEPS.map(prefix_scheduler),
    )


def as_confidence(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True)
class Last:
    """A past round, as far as a policy may see it."""

    window: int
    verify_length: int
    accepted: int
    target_probs_of_drafts: tuple[float, ...]


@examples(150)
@given(st.data(), st.integers(1, 8))
def test_windows_and_lengths_stay_in_bounds_whatever_happened_before(data: st.DataObject, block_size: int) -> None:
    policy = data.draw(policies(block_size))
    policy.check(block_size, has_confidence=True)
    last = None
    for _ in range(data.draw(st.integers(1, 8))):
        window = policy.window(last, block_size)
        assert 0 <= window <= block_size
        drafted = data.draw(st.integers(0, window))  # the length limit may leave room for fewer
        confidence = as_confidence(data.draw(st.lists(CONFIDENCE, min_size=drafted, max_size=drafted)))
        [length] = policy.lengths([confidence])
        assert 0 <= length <= drafted
        masses = tuple(data.draw(st.lists(st.floats(0, 1), min_size=length, max_size=length)))
        last = Last(window, length, data.draw(st.integers(0, length)), masses)


@examples(300)
@given(st.data(), policies(8), st.lists(CONFIDENCE, min_size=1, max_size=8))
def test_later_confidences_never_decide_over_an_earlier_draft(data: st.DataObject, policy: Policy, values: list[float]) -> None:
    k = data.draw(st.integers(1, len(values)))
    changed = values[:k] + data.draw(st.lists(CONFIDENCE, max_size=8 - k))
    [one], [other] = policy.lengths([as_confidence(values)]), policy.lengths([as_confidence(changed)])
    assert (one >= k) == (other >= k)


REQUESTS = st.lists(st.lists(CONFIDENCE, max_size=5), min_size=1, max_size=4)
SPEEDS = st.lists(st.floats(0.01, 10), min_size=25, max_size=25)


@examples(250)
@given(st.data(), SPEEDS, REQUESTS.filter(lambda requests: any(requests)))
def test_among_many_requests_later_confidences_never_decide_over_an_earlier_draft(
    data: st.DataObject, speeds: list[float], requests: list[list[float]]
) -> None:
    policy = prefix_scheduler(speeds)
    r = data.draw(st.sampled_from([r for r, values in enumerate(requests) if values]))
    j = data.draw(st.integers(1, len(requests[r])))
    changed = list(requests)
    changed[r] = requests[r][:j] + data.draw(st.lists(CONFIDENCE, max_size=5 - j))
    one, other = (policy.lengths([as_confidence(values) for values in side])[r] for side in (requests, changed))
    assert (one >= j) == (other >= j)


@examples(400)
@given(SPEEDS, REQUESTS)
def test_the_prefix_scheduler_is_algorithm_1_read_from_the_page(speeds: list[float], requests: list[list[float]]) -> None:
    """All candidates sorted by survival, admitted one by one while Θ = expected tokens · SPS(B) rises, up to the first fall."""
    confidence = [as_confidence(values) for values in requests]
    survival = [c.cumprod(-1).tolist() for c in confidence]
    candidates = sorted((-a, r, j) for r, values in enumerate(survival) for j, a in enumerate(values))
    count = len(requests)
    expected, admitted, best = float(count), [0] * count, count * speeds[count]
    for budget, (negative, r, _) in enumerate(candidates, start=count + 1):
        throughput = (expected - negative) * speeds[budget]
        if throughput <= best:
            break
        best, expected, admitted[r] = throughput, expected - negative, admitted[r] + 1
    assert prefix_scheduler(speeds).lengths(confidence) == admitted


# ---- decoding


@cache
def models() -> tuple[Target, Drafter]:
    target = tiny_target(num_hidden_layers=2, eos_token_id=None)
    return target, tiny_drafter(target, target_layer_ids=TAPS, num_hidden_layers=1)


def source(copying: bool) -> DraftSource:
    drafter = models()[1]
    return dspark.ContextLookup(drafter, 1, max_copy=6) if copying else drafter


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
    assert len(out.token_ids) <= limit
    assert not ends & set(out.token_ids[:-1])
    assert len(out.token_ids) == limit or out.token_ids[-1] in ends
    done, anchor = 1, out.token_ids[0]
    for r in out.rounds[1:]:
        assert r.anchor == anchor
        assert r.accepted <= r.verify_length <= len(r.draft_tokens) <= max(0, min(r.window, limit - done - 1))
        assert len(r.committed) == r.accepted + 1 or (r.committed[-1] in ends and len(r.committed) <= r.accepted)
        assert r.committed[: r.accepted] == r.draft_tokens[: min(r.accepted, len(r.committed))]
        done, anchor = done + len(r.committed), r.committed[-1]
    if temperature == 0:
        assert out.token_ids == dspark.generate(target, None, prompt, max_new_tokens=limit).token_ids


INTERLEAVED = (dspark.FixedWindow(), dspark.AdaptiveWindow(0.02, 0.01, 0.001), dspark.ConfidenceThreshold(0.4))
PROMPTS = ((5, 6, 7), (8, 9) * 6, (5, 6, 5, 6, 5), (40,))


def untimed(r: Round) -> Round:
    return replace(r, draft_seconds=0.0, verify_seconds=0.0, seconds=0.0)


def stream(sources: DraftSource, prompt: int, policy: Policy, temperature: float) -> object:
    return dspark.decode(models()[0], sources, PROMPTS[prompt], policy=policy, max_new_tokens=10, temperature=temperature, seed=prompt)


@cache
def alone(copying: bool, prompt: int, policy: int, temperature: float) -> list[Round]:
    """The rounds of a request that has the models, fresh ones at that, to itself."""
    return [untimed(r) for r in stream(source(copying), prompt, INTERLEAVED[policy], temperature)]


@examples(25)
@given(st.data(), st.booleans(), st.sampled_from([0.0, 1.0]), st.sampled_from(range(len(INTERLEAVED))))
def test_requests_that_take_turns_get_the_rounds_they_would_get_alone(
    data: st.DataObject, copying: bool, temperature: float, policy: int
) -> None:
    models()[0].eos_token_ids = frozenset()
    prompts = data.draw(st.lists(st.sampled_from(range(len(PROMPTS))), min_size=2, max_size=3))
    shared = source(copying)
    waiting = {i: stream(shared, prompt, INTERLEAVED[policy], temperature) for i, prompt in enumerate(prompts)}
    found: list[list[Round]] = [[] for _ in prompts]
    while waiting:
        turn = data.draw(st.sampled_from(sorted(waiting)))
        r = next(waiting[turn], None)
        if r is None:
            del waiting[turn]
        else:
            found[turn].append(untimed(r))
    for prompt, rounds in zip(prompts, found, strict=True):
        assert rounds == alone(copying, prompt, policy, temperature)


# ---- memory


class Cache(RuleBasedStateMachine):
    """A cache of three layers beside a plain list of the tokens that it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.alone, self.tokens, self.next = RewindCache(3), GrowingKV(), [], 0

    def numbers(self, tokens: Sequence[int], layer: int) -> Tensor:
        """[2, 2, tokens, 3], another number in every place."""
        place = torch.arange(12.0).view(2, 2, 1, 3) / 16
        return torch.tensor(tokens, dtype=torch.float32).view(1, 1, -1, 1) * 4 + layer + place

    @rule(count=st.one_of(st.integers(1, 9), st.integers(200, 300)))
    def append(self, count: int) -> None:
        new = list(range(self.next, self.next + count))
        self.next += count
        self.tokens += new
        for layer in range(3):
            keys, values = self.cache.update(self.numbers(new, layer), -self.numbers(new, layer), layer)
            assert torch.equal(keys, self.numbers(self.tokens, layer)) and torch.equal(values, -keys)
        self.alone.append(self.numbers(new, 9), -self.numbers(new, 9))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        near = st.integers(max(0, len(self.tokens) - 9), len(self.tokens))
        length = data.draw(near | st.integers(0, len(self.tokens)))
        del self.tokens[length:]
        self.cache.rewind(length)
        self.alone.rewind(length)

    @precondition(lambda self: self.next)
    @rule(beyond=st.integers(1, 300))
    def refuse(self, beyond: int) -> None:
        for held in (self.cache, self.alone):
            with pytest.raises(ValueError, match="cannot rewind"):
                held.rewind(len(self.tokens) + beyond)

    @precondition(lambda self: self.next)
    @invariant()
    def every_layer_holds_the_list(self) -> None:
        assert self.cache.length == self.cache.get_seq_length() == self.alone.length == len(self.tokens)
        for layer, kv in enumerate([*(layer.kv for layer in self.cache.layers)]):
            assert self.cache.get_seq_length(layer) == len(self.tokens)
            assert torch.equal(kv.view()[0], self.numbers(self.tokens, layer)) and torch.equal(kv.view()[1], -kv.view()[0])
        assert torch.equal(self.alone.view()[0], self.numbers(self.tokens, 9))


TestTheCacheIsAList = Cache.TestCase
TestTheCacheIsAList.settings = settings(examples(30), stateful_step_count=20)

PART = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=7)


def run(target: Target, cache: RewindCache, part: Sequence[int]) -> tuple[Tensor, Tensor]:
    return target.forward(torch.tensor([part]), cache, TAPS)


@examples(60)
@given(st.lists(PART, min_size=2, max_size=4), st.lists(st.tuples(PART, st.integers(0, 6)), min_size=1, max_size=3))
def test_rewinding_and_extending_equals_never_having_been_there(text: list[list[int]], detours: list[tuple[list[int], int]]) -> None:
    """Logits and taps, bit for bit: both caches run the same parts, one of them leaves its way before each of them. A detour that
    keeps some of its tokens and rewinds twice changes nothing either. One pass over the whole text agrees up to float32 rounding."""
    target = models()[0]
    straight, wandering = target.new_cache(), target.new_cache()
    found = []
    for part in text:
        here = wandering.length
        for detour, kept in detours:
            run(target, wandering, detour)
            wandering.rewind(here + min(kept, len(detour)))
        wandering.rewind(here)
        expected, logits_and_taps = run(target, straight, part), run(target, wandering, part)
        assert all(map(torch.equal, expected, logits_and_taps))
        found.append(logits_and_taps)
    whole = run(target, target.new_cache(), [*chain(*text)])
    for at_once, parts in zip(whole, zip(*found, strict=True), strict=True):
        assert torch.allclose(at_once, torch.cat(parts, 1), atol=1e-4)


@examples(40)
@given(PART, st.data())
def test_what_lies_inside_a_part_is_rewound_as_well(part: list[int], data: st.DataObject) -> None:
    """Rewinding to the middle of a pass: the shapes of the passes differ then, so float32 rounding is all that may differ."""
    target, kept = models()[0], data.draw(st.integers(1, len(part)))
    rest = data.draw(PART)
    rewound, fresh = target.new_cache(), target.new_cache()
    run(target, rewound, part)
    rewound.rewind(kept)
    run(target, fresh, part[:kept])
    for one, other in zip(run(target, rewound, rest), run(target, fresh, rest), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def taps_of(parts: Sequence[Sequence[int]]) -> list[Tensor]:
    target = models()[0]
    every = target.forward(torch.tensor([[*chain(*parts)]]), None, TAPS)[1]
    return list(every.split([len(part) for part in parts], 1))


def same(one: Draft, other: Draft) -> bool:
    return one.tokens == other.tokens and torch.equal(one.probs, other.probs) and torch.equal(one.confidence, other.confidence)


@examples(30)
@given(
    st.lists(PART, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, VOCAB - 1), st.integers(1, BLOCK)), min_size=5, max_size=5),
    st.sampled_from([Sampling(), Sampling(1.0), Sampling(0.7, top_p=0.9)]),
)
def test_a_draft_leaves_nothing_behind_in_the_drafters_state(
    parts: list[list[int]], before: list[tuple[int, int]], sampling: Sampling
) -> None:
    """Bit for bit against a state that drafted other blocks on its way; up to rounding against one that got the context at once."""
    drafter, taps = models()[1], taps_of(parts)

    def draft(state: object, anchor: int, window: int) -> Draft:
        return drafter.draft(state, anchor, window, sampling, Chance(torch.Generator().manual_seed(3)))

    one, other, fresh = (drafter.new_state() for _ in range(3))
    for i, (part, tapped, (anchor, window)) in enumerate(zip(parts, taps, before, strict=False)):
        if i:
            draft(one, anchor, window)
            draft(other, (anchor + 1) % VOCAB, BLOCK + 1 - window)
        for state in (one, other, fresh):
            drafter.extend(state, part, tapped)
        assert one.length == other.length == fresh.length
    found, expected, at_once = (draft(state, *before[-1]) for state in (one, other, fresh))
    assert same(found, expected)
    assert found.tokens == at_once.tokens
    assert torch.allclose(found.probs, at_once.probs, atol=1e-4) and torch.allclose(found.confidence, at_once.confidence, atol=1e-4)


# ---- copying


@dataclass
class Copied:
    """Copying from the context, written down naively: search the whole text each time, for each draft."""

    min_match: int
    max_copy: int
    tokens: list[int] = field(default_factory=list)

    def draft(self, anchor: int, window: int) -> tuple[list[int], list[float]]:
        text, drafts, rates = [*self.tokens, anchor], [], []
        while len(drafts) < min(window, self.max_copy) and (found := self.follower(text, [*text, *drafts])):
            if math.prod([*rates, found[1]]) < LEAST_SURVIVAL:
                break
            drafts.append(found[0])
            rates.append(found[1])
        return drafts, rates

    def follower(self, text: list[int], said: list[int]) -> tuple[int, float] | None:
        for length in range(max(RATES), self.min_match - 1, -1):
            ends = [end for end in range(length, len(text)) if text[end - length : end] == said[-length:]]
            if ends and length <= len(said):
                return text[ends[-1]], RATES[length]
        return None


@examples(120)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.integers(2, 5))
def test_copying_equals_a_naive_search_in_each_of_two_requests(data: st.DataObject, min_match: int, max_copy: int, letters: int) -> None:
    """Two requests on one source, extended and asked in any order."""
    drafter = models()[1]
    copying = dspark.ContextLookup(drafter, min_match, max_copy)
    pairs: list[tuple[LookupState, Copied]] = [(copying.new_state(), Copied(min_match, max_copy)) for _ in range(2)]
    letter = st.integers(5, 4 + letters)
    for _ in range(data.draw(st.integers(2, 8))):
        state, naive = data.draw(st.sampled_from(pairs))
        tokens = data.draw(st.lists(letter, min_size=1, max_size=6))
        copying.extend(state, tokens, torch.zeros(1, len(tokens), len(TAPS) * 32))
        naive.tokens += tokens
        anchor, window = data.draw(letter), data.draw(st.integers(1, copying.block_size))
        draft, expected = copying.draft(state, anchor, window, Sampling(), Chance()), naive.draft(anchor, window)
        if not expected[0]:
            assert draft.source == "drafter" and len(draft.tokens) == min(window, drafter.block_size)
        else:
            assert (draft.source, draft.tokens) == ("copy", expected[0])
            assert draft.confidence.tolist() == pytest.approx(expected[1])
            assert torch.equal(draft.probs, torch.eye(VOCAB)[draft.tokens])
