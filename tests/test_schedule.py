"""The policies, as functions of the past and of confidence."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from dspark.schedule import (
    MTP1,
    AdaptiveWindow,
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
]


def past(window: int, masses: tuple[float, ...]) -> SimpleNamespace:
    return SimpleNamespace(window=window, verify_length=len(masses), accepted=0, target_probs_of_drafts=masses)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_lengths_never_exceed_what_was_drafted(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        confidence = [torch.rand(int(n), generator=generator) for n in torch.randint(0, 8, (4,), generator=generator)]
        lengths = policy.lengths(confidence)
        assert len(lengths) == 4 and all(0 <= n <= len(c) for n, c in zip(lengths, confidence, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_whether_a_token_is_checked_does_not_depend_on_later_confidence(policy: Policy) -> None:
    """The confidences after c_k are functions of x_k: reading them to decide on x_k would bias the distribution (Appendix A)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        confidence = torch.rand(6, generator=generator)
        length = policy.lengths([confidence])[0]
        for k in range(1, 6):
            changed = torch.cat([confidence[:k], torch.rand(6 - k, generator=generator)])
            assert (policy.lengths([changed])[0] >= k) == (length >= k)


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
