"""The policies, as functions of the past and of confidence."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from dspark.round import Round
from dspark.schedule import (
    MTP1,
    AdaptiveWindow,
    AsyncTopK,
    Autoregressive,
    ConfidenceThreshold,
    FixedWindow,
    Policy,
    PrefixScheduler,
)


def flat(_: int) -> float:
    return 1.0


def linear(budget: int) -> float:
    return 1.0 / budget


def drafted(*confidence: float) -> Round:
    return Round(index=1, committed=(1,), draft_tokens=(1,) * len(confidence), confidence=confidence, context=9)


def history(*rounds: Round) -> list[Round]:
    return [Round(index=0, committed=(1,), context=8), *rounds]


HISTORY = history(drafted(0.9, 0.9, 0.6, 0.3), drafted(0.5, 0.5))
PLAIN = Round(index=2, committed=(1,), context=10)
STAIRS = {4: 1.0, 5: 0.6, 6: 0.6, 7: 0.6, 8: 0.6}  # SPS at 4 to 8 tokens: the fifth pays only together with others

POLICIES = [
    Autoregressive(),
    FixedWindow(),
    FixedWindow(3),
    MTP1(),
    AdaptiveWindow(),
    ConfidenceThreshold(0.5),
    ConfidenceThreshold(0.5, on="conditional"),
    PrefixScheduler(flat),
    PrefixScheduler(lambda b: 1 / (1 + 0.2 * b)),
    PrefixScheduler(lambda b: 1 / (1 + 0.2 * b), draft_seconds=2.0),
    AsyncTopK(lambda b: 1 / (1 + 0.2 * b)),
]


def past(window: int, masses: tuple[float, ...]) -> SimpleNamespace:
    return SimpleNamespace(window=window, verify_length=len(masses), accepted=0, target_probs_of_drafts=masses)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_lengths_never_exceed_what_was_drafted(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        confidence = [torch.rand(int(n), generator=generator) for n in torch.randint(0, 8, (4,), generator=generator)]
        lengths = policy.lengths(confidence, [HISTORY] * 4)
        assert len(lengths) == 4 and all(0 <= n <= len(c) for n, c in zip(lengths, confidence, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_whether_a_token_is_checked_does_not_depend_on_later_confidence(policy: Policy) -> None:
    """The confidences after c_k are functions of x_k: reading them to decide on x_k would bias the distribution (Appendix A)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        confidence = torch.rand(6, generator=generator)
        length = policy.lengths([confidence], [HISTORY])[0]
        for k in range(1, 6):
            changed = torch.cat([confidence[:k], torch.rand(6 - k, generator=generator)])
            assert (policy.lengths([changed], [HISTORY])[0] >= k) == (length >= k)


def test_the_threshold_cuts_before_the_first_token_under_it() -> None:
    confidence = [torch.tensor([0.9, 0.6, 0.9, 0.2])]
    assert ConfidenceThreshold(0.5, on="conditional").lengths(confidence) == [3]
    assert ConfidenceThreshold(0.5, on="survival").lengths(confidence) == [2]  # .9, .54, .486
    assert ConfidenceThreshold(0.0).lengths(confidence) == [4]
    assert ConfidenceThreshold(1.0).lengths(confidence) == [0]


def test_the_prefix_scheduler_admits_all_when_checking_is_free_and_nothing_when_it_is_not() -> None:
    confidence = [torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2])]
    assert PrefixScheduler(flat).lengths(confidence) == [3, 1]
    assert PrefixScheduler(linear).lengths(confidence) == [0, 0]


def test_the_prefix_scheduler_takes_the_likeliest_survivors_first() -> None:
    sps = {2: 1.0, 3: 0.95, 4: 0.9, 5: 0.5, 6: 0.4}.__getitem__
    confidence = [torch.tensor([0.9, 0.9]), torch.tensor([0.3, 0.9])]
    # Θ: 2 → 2.9·.95 = 2.755 → 3.71·.9 = 3.339 → 4.01·.5 = 2.005, a fall
    assert PrefixScheduler(sps).lengths(confidence) == [2, 0]


def test_the_prefix_scheduler_does_not_fall_for_the_appendix_a_counterexample() -> None:
    """SPS = (1, .5, .45), c_1 = .8, c_2 = .9 after one token and 0 after the other: the first fall ends it either way."""
    sps = {1: 1.0, 2: 0.5, 3: 0.45}.__getitem__
    assert PrefixScheduler(sps).lengths([torch.tensor([0.8, 0.9])]) == PrefixScheduler(sps).lengths([torch.tensor([0.8, 0.0])]) == [0]


def test_the_path_shows_every_step_up_to_the_first_fall() -> None:
    sps = {2: 1.0, 3: 0.95, 4: 0.9, 5: 0.5, 6: 0.4}.__getitem__
    policy, confidence = PrefixScheduler(sps), [torch.tensor([0.9, 0.9]), torch.tensor([0.3, 0.9])]
    path = list(policy.admissions([c.cumprod(-1).tolist() for c in confidence]))
    assert [(step.request, step.position, step.admitted) for step in path] == [(0, 0, True), (0, 1, True), (0, 2, True), (1, 1, False)]
    assert [step.throughput for step in path] == pytest.approx([2.0, 2.755, 3.339, 2.005])
    assert [step.budget for step in path] == [2, 3, 4, 5]


def test_top_k_finds_a_budget_after_a_step_of_the_curve_where_the_prefix_scheduler_stops() -> None:
    sure = [torch.tensor([0.95] * 4)] * 4
    assert PrefixScheduler(STAIRS.__getitem__).lengths(sure) == [0] * 4
    policy, histories = AsyncTopK(STAIRS.__getitem__), [history(drafted(0.95), PLAIN)] * 4
    assert policy.budget(histories) == 4 and sum(policy.lengths(sure, histories)) == 4


def test_top_ks_budget_comes_from_two_rounds_ago_and_its_drafts_from_now() -> None:
    policy = AsyncTopK(lambda b: 1 / (1 + 0.2 * b))
    sure, vain = drafted(0.9, 0.9), drafted(0.1, 0.1)
    for last in (sure, vain):
        assert policy.budget([history(sure, last)] * 2) == 4 and policy.budget([history(vain, last)] * 2) == 0
    assert policy.budget([history(sure, sure), history(vain, vain)]) == 2
    now = [torch.tensor([0.2, 0.9]), torch.tensor([0.9, 0.7])]
    assert policy.lengths(now, [history(sure, vain), history(vain, sure)]) == [0, 2]


def test_young_requests_lend_the_budget_nothing_and_take_their_share() -> None:
    """Old confidences are those of the same request: one without any counts as the mean of the others."""
    policy, sure, vain = AsyncTopK(lambda b: 1 / (1 + 0.02 * b)), drafted(0.9, 0.9), drafted(0.01, 0.01)
    assert policy.budget([history(), history(sure)]) is None
    assert policy.lengths([torch.tensor([0.1, 0.1])], [history(sure)]) == [2]
    assert policy.budget([history(sure, sure), history(vain), history()]) == 6
    assert policy.budget([history(vain, vain), history(sure), history()]) == 0


def test_equal_survivals_are_taken_prefix_first() -> None:
    policy = AsyncTopK(lambda b: 1.0 if b <= 4 else 0.1)
    assert policy.lengths([torch.ones(3), torch.ones(3)], [history(drafted(1.0), PLAIN)] * 2) == [2, 0]


def test_a_dearer_draft_lets_the_scheduler_check_no_less() -> None:
    generator = torch.Generator().manual_seed(0)
    checked = []
    for seconds in (0.0, 0.5, 5.0, 500.0):
        policy = PrefixScheduler(lambda b: 1 / (1 + 0.3 * b), seconds)
        generator.manual_seed(0)
        checked.append([policy.lengths([torch.rand(6, generator=generator)])[0] for _ in range(50)])
    for fewer, more in pairwise(checked):
        assert all(a <= b for a, b in zip(fewer, more, strict=True)) and fewer != more


def test_the_adaptive_window_follows_the_mass_that_the_target_gave() -> None:
    policy = AdaptiveWindow(widen_threshold=0.6, narrow_threshold=0.3, fallback_threshold=0.1, min_window=1, max_window=4)
    assert policy.window(past(2, (0.9, 0.8)), 5) == 3
    assert policy.window(past(2, (0.4, 0.5)), 5) == 2
    assert policy.window(past(2, (0.2, 0.2)), 5) == 1
    assert policy.window(past(1, (0.2,)), 5) == 1
    assert policy.window(past(4, (1.0,) * 4), 5) == 4
    assert policy.window(past(3, (0.05, 0.05)), 5) == 0
    assert policy.window(past(0, ()), 5) == 1  # drafting resumes after the plain step


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedWindow(0),
        lambda: ConfidenceThreshold(1.2),
        lambda: ConfidenceThreshold(-0.1),
        lambda: ConfidenceThreshold(0.5, on="luck"),
        lambda: AdaptiveWindow(widen_threshold=0.2, narrow_threshold=0.5),
        lambda: AdaptiveWindow(fallback_threshold=-0.1),
        lambda: PrefixScheduler(flat, draft_seconds=-1.0),
        lambda: AdaptiveWindow(min_window=0),
        lambda: AdaptiveWindow(min_window=3, max_window=2),
    ],
)
def test_impossible_settings_are_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()
