"""The policy that nobody has to choose: it drafts where past rounds say that it pays, and is plain decoding elsewhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import random_prompt, tiny_drafter, tiny_target

import dspark
from dspark.engine import Engine
from dspark.round import Round
from dspark.schedule import Auto, PrefixScheduler
from dspark.schedule.auto import RETRY, TRIAL
from dspark.tune import profile
from dspark.tune.curve import Extra, SPSCurve
from dspark.tune.profile import step_times

BLOCK = 4
FLAT = SPSCurve((1, 64), (1.0, 1.0))  # further tokens are free
STEEP = SPSCurve((1, 64), (1.0, 64.0))  # every token costs a whole step
KNEE = SPSCurve((1, 16, 64), (1.0, 1.0, 16.0))  # free up to 16 tokens, then dear


def drafted(confidence: float, accepted: int = BLOCK) -> Round:
    """A round that checked a whole block."""
    return Round(
        index=1,
        committed=(1,),
        window=BLOCK,
        draft_tokens=(1,) * BLOCK,
        confidence=(confidence,) * BLOCK,
        verify_length=BLOCK,
        accepted=accepted,
    )


PREFILL, PLAIN = Round(index=0, committed=(1,)), Round(index=1, committed=(1,))


def history(*rounds: Round) -> list[Round]:
    return [PREFILL, *rounds]


def test_it_drafts_until_a_few_drafts_are_known():
    auto = Auto(STEEP)
    for known in range(TRIAL):
        assert auto.windows([history(*[drafted(0.1)] * known)], BLOCK) == [BLOCK]
    assert auto.windows([history(*[drafted(0.1)] * TRIAL)], BLOCK) == [0]


@pytest.mark.parametrize(("curve", "window"), [(FLAT, BLOCK), (STEEP, 0)])
def test_it_drafts_exactly_where_further_tokens_are_cheaper_than_what_they_bring(curve, window):
    assert Auto(curve).windows([history(*[drafted(0.8)] * TRIAL)], BLOCK) == [window]


@pytest.mark.parametrize(("seconds", "window"), [(0.1, BLOCK), (5.0, 0)])
def test_the_time_of_drafting_counts(seconds, window):
    times = SPSCurve(FLAT.widths, FLAT.seconds, draft=SPSCurve((1,), (seconds,)))
    assert Auto(times).windows([history(*[drafted(0.8)] * TRIAL)], BLOCK) == [window]


@pytest.mark.parametrize(("requests", "drafting"), [(2, 2), (32, 0)])
def test_a_busy_engine_decodes_plainly(requests, drafting):
    windows = Auto(KNEE).windows([history(*[drafted(0.8)] * TRIAL)] * requests, BLOCK)
    assert sum(w > 0 for w in windows) == drafting


def test_where_not_all_can_draft_those_with_the_best_outlook_do():
    histories = [history(*[drafted(c)] * 8) for c in (0.1, 0.95) * 6]  # the pass is nearly full with their anchors
    windows = Auto(KNEE).windows(histories, BLOCK)
    assert 0 < sum(w > 0 for w in windows) < 12 and not any(windows[::2])


def test_a_new_request_is_judged_by_its_neighbours():
    old = history(*[drafted(0.8)] * TRIAL)
    assert Auto(STEEP).windows([old, history()], BLOCK) == [0, 0]
    assert Auto(FLAT).windows([old, history()], BLOCK) == [BLOCK, BLOCK]


def test_confidences_that_do_not_come_true_lose_their_weight():
    curve = SPSCurve((1, 64), (1.0, 20.0))
    assert Auto(curve).windows([history(*[drafted(0.9, accepted=4)] * 8)], BLOCK) == [BLOCK]
    assert Auto(curve).windows([history(*[drafted(0.9, accepted=0)] * 8)], BLOCK) == [0]


@pytest.mark.parametrize(("accepted", "window"), [(BLOCK, BLOCK), (0, 0)])
def test_without_confidences_it_reads_what_was_accepted(accepted, window):
    curve = SPSCurve((1, 64), (1.0, 20.0))
    assert Auto(curve).windows([history(*[drafted(float("nan"), accepted)] * 8)], BLOCK) == [window]


@pytest.mark.parametrize("requests", [1, 3])
def test_one_plain_request_looks_again_every_so_many_rounds(requests):
    histories = [history(*[drafted(0.1)] * TRIAL, *[PLAIN] * r) for r in range(requests)]
    looks = []
    for step in range(2 * RETRY * requests):
        windows = Auto(STEEP).windows(histories, BLOCK)
        looks += [step] * sum(w > 0 for w in windows)
        for rounds, window in zip(histories, windows, strict=True):
            rounds.append(drafted(0.1) if window else PLAIN)
    assert len(looks) == pytest.approx(2 * requests, abs=requests) and len(set(looks)) == len(looks)


def test_it_checks_what_the_prefix_scheduler_admits():
    curve = SPSCurve((1, 64), (1.0, 20.0), draft=SPSCurve((1, 2), (0.5, 2.0)))
    confidence = [torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.7, 0.9]), torch.empty(0)]
    assert Auto(curve).lengths(confidence) == PrefixScheduler(curve, 2.0).lengths(confidence) != PrefixScheduler(curve).lengths(confidence)
    assert Auto(curve).lengths([torch.full((3,), torch.nan)]) == [3]


def test_a_convex_curve_has_no_staircase_and_keeps_its_ends():
    curve = SPSCurve((1, 2, 4, 6, 8, 16), (1.0, 3.0, 3.0, 3.5, 6.0, 8.0), draft=FLAT)
    smooth = curve.convex()
    slopes = [smooth.step_seconds(b + 1) - smooth.step_seconds(b) for b in range(1, 16)]
    assert all(a <= b + 1e-12 for a, b in pairwise(slopes)) and smooth.draft is FLAT
    assert (smooth.step_seconds(1), smooth.step_seconds(16)) == pytest.approx((1.0, 8.0))
    assert smooth.convex() == smooth


def test_after_long_contexts_it_drafts_only_where_tokens_are_still_cheap():
    """Every token of the pass attends to the whole context, so what is free after a short one is dear after a long one."""
    curve = SPSCurve((1, 64), (1.0, 1.0), extra=Extra(context=100, attending=0.01))
    for context, window in ((100, BLOCK), (1000, 0)):
        rounds = [replace(r, context=context) for r in history(*[drafted(0.5)] * TRIAL)]
        assert Auto(curve).windows([rounds], BLOCK) == [window]
        assert Auto(curve).lengths([torch.full((BLOCK,), 0.5)], [rounds]) == [BLOCK * (window > 0)]


def test_without_a_policy_the_text_is_the_same_and_times_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    measured, medians = [], profile.medians
    monkeypatch.setattr("dspark.tune.auto.step_times", step_times)
    monkeypatch.setattr(profile, "medians", lambda step, widths, *_: measured.append(widths) or medians(step, widths, 1))
    target = tiny_target()
    drafter, prompt = tiny_drafter(target), random_prompt(0, 6) * 3
    outputs = [dspark.generate(target, drafter, prompt, max_new_tokens=24) for _ in range(2)]
    plain = dspark.generate(target, None, prompt, max_new_tokens=24)
    assert outputs[0].token_ids == outputs[1].token_ids == plain.token_ids
    passes, widths, drafts = (list(zip(*kinds, strict=True)) for kinds in measured)
    assert passes[2][0] == profile.CONTEXT and len(passes[0]) == len(profile.SHAPES)
    assert widths[1] == profile.WIDTHS and drafts[0] == profile.REQUESTS
    assert isinstance(Engine(target, drafter).drafter, dspark.ContextLookup)


@pytest.mark.parametrize("context", [16, 128])
def test_step_times_of_a_short_context_are_measured_in_it(context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = tiny_target(max_position_embeddings=context)
    curve = step_times(target, tiny_drafter(target))
    assert max(curve.widths) == context // 2 and curve.draft_seconds(3) > 0


def test_step_times_of_copying_alone_need_no_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    target = tiny_target()
    assert step_times(target, dspark.ContextLookup(None, target=target)).draft_seconds(3) == 0
    assert step_times(target, dspark.ContextLookup(tiny_drafter(target))).draft_seconds(3) > 0
