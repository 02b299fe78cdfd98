"""What explains a speed-up and what a window needs: from frames whose truth is known."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from tiny import tiny_drafter, tiny_target

from dspark import generate
from dspark.bench.explained import check_predictions, explained
from dspark.bench.policies import timed_against_windows
from dspark.cpu import pack_target
from dspark.cpu.packed import can_pack
from dspark.load import default_drafter
from dspark.train.start import BLOCK_SIZE, DRAFT_VOCAB, LAYERS, MARKOV_RANK, untrained_drafter
from dspark.tune.predict import break_even
from dspark.tune.profile import SPSCurve, profile_draft

PLAIN_MS, DRAFT_MS, VERIFY_MS = 30.0, 6.0, 34.0


def run_of(taus: dict[str, float], other_ms: float = 0.0) -> pd.DataFrame:
    """A run of plain and fixed:3 that follows the formula exactly, but for ``other_ms`` a round; domain → τ, 100 rounds a prompt."""
    rows = []
    for domain, tau in taus.items():
        for i in range(4):
            about = {"domain": domain, "prompt_id": f"{domain}/{i}", "theme": "creative" if i == 3 else "x", "temperature": 0.0}
            about |= {"dtype": "float32", "equals_baseline": True, "baseline": "plain"}
            first = round(100 * (tau - 1) / 2)  # of 100 rounds so many keep the first draft, and as many of those the second
            for arm, counts, ms in (
                ("plain", ([], []), PLAIN_MS),
                ("fixed:3", ([100, first, first], [first, first, 0]), (DRAFT_MS + VERIFY_MS + other_ms)),
            ):
                tokens = 100 + sum(counts[1])
                seconds = 100 * ms / 1e3
                row = {"arm": arm, "rounds": 100, "decoded_tokens": tokens, "checked": 300 if counts[0] else 0, "accepted": sum(counts[1])}
                inside = seconds - 100 * (other_ms if counts[0] else 0) / 1e3
                row |= {"reached_at": counts[0], "accepted_at": counts[1], "seconds": seconds, "model_seconds": inside}
                row |= {"latency_ms": 1e3 * seconds / tokens, "round_ms": ms, "tokens_per_round": tokens / 100}
                row |= {"draft_ms": DRAFT_MS if counts[0] else math.nan, "verify_ms": VERIFY_MS if counts[0] else PLAIN_MS}
                rows.append(about | row)
    return pd.DataFrame(rows)


def test_a_run_that_follows_the_formula_is_predicted_exactly():
    frame = run_of({"code": 2.0, "chat": 1.4})
    points = explained(frame)
    assert points["predicted"].to_numpy() == pytest.approx(points["speedup"].to_numpy())
    assert set(points["acceptance"].round(6)) == {round(100 / 300, 6), round(40 / 300, 6)}
    checked = check_predictions(frame)
    assert checked["window"].tolist() == [3, 3] and checked["tokens_per_round"].tolist() == pytest.approx([2.0, 1.4])
    assert checked["error"].abs().max() < 1e-9 and checked["within"].all()


def test_time_outside_the_models_shows_as_an_error_of_the_prediction():
    frame = run_of({"code": 2.0}, other_ms=8.0)
    checked, points = check_predictions(frame), explained(frame)
    assert checked["error"].iloc[0] == pytest.approx(48 / 40 - 1) and not checked["within"].any()
    assert (points["predicted"] / points["speedup"]).tolist() == pytest.approx([48 / 40] * 4)


def test_where_most_drafts_are_looked_up_their_median_time_predicts_nothing_and_the_mean_does():
    frame = run_of({"code": 2.0, "chat": 1.4})
    frame.loc[frame["arm"] == "fixed:3", "draft_ms"] = 0.1
    points = explained(frame)
    assert points["predicted"].to_numpy() == pytest.approx(points["speedup"].to_numpy())


def test_a_curve_from_elsewhere_is_used_where_it_is_given():
    slow = SPSCurve((1, 4), (PLAIN_MS / 1e3, 2 * VERIFY_MS / 1e3))
    expected = 2.0 * PLAIN_MS / (DRAFT_MS + 2 * VERIFY_MS)
    assert check_predictions(run_of({"code": 2.0}), slow)["predicted"].iloc[0] == pytest.approx(expected)


def test_break_even_is_the_formula_solved_for_tau():
    curve = SPSCurve((1, 8), (0.030, 0.044))
    points = {(p.window, p.speedup): p for p in break_even(curve, (1, 7), 0.006, (1.0, 1.57))}
    assert points[7, 1.0].required == pytest.approx(50 / 30) and points[7, 1.0].free == pytest.approx(44 / 30)
    assert points[7, 1.57].required == pytest.approx(1.57 * 50 / 30) and points[7, 1.57].reachable
    assert points[1, 1.57].required == pytest.approx(1.57 * 38 / 30) and points[1, 1.57].reachable is (1.57 * 38 / 30 <= 2)


def test_drafting_is_timed_at_the_context_asked_for(monkeypatch):
    target = tiny_target()
    drafter, seen = tiny_drafter(target), []
    draft = drafter.draft
    monkeypatch.setattr(drafter, "draft", lambda state, *rest: (seen.append(state.length), draft(state, *rest))[1])
    assert profile_draft(target, drafter, context=20, repeats=3) > 0
    assert seen == [20, 21, 22, 23]


def test_the_clock_compares_a_policy_with_the_fastest_window_of_the_run():
    run = run_of({"code": 2.0, "chat": 1.4})
    slower = run[run["arm"] == "fixed:3"].assign(arm="fixed:1", latency_ms=lambda rows: 2 * rows["latency_ms"])
    policy = run[run["arm"] == "fixed:3"].assign(arm="prefix", latency_ms=lambda rows: rows["latency_ms"] / 1.25)
    found = timed_against_windows(pd.concat([run, slower, policy]).assign(n=1))
    assert found["best_single"] == "fixed:3" and found["single"] == found["low"] == found["high"] == pytest.approx(1.25)
    with pytest.raises(ValueError, match=r"'prefix' is compared.*measure both"):
        timed_against_windows(run)


def test_a_sketch_costs_what_a_trained_drafter_will_and_drafts_like_one():
    """The default shape is the shipped drafter's, and where the target is laid out for fast passes, the sketch is, too."""
    shipped = json.loads((default_drafter() / "config.json").read_text(encoding="utf-8"))
    named = {"num_hidden_layers": LAYERS, "block_size": BLOCK_SIZE, "markov_rank": MARKOV_RANK, "draft_vocab_size": DRAFT_VOCAB}
    assert {name: shipped[name] for name in named} == named
    target = pack_target(tiny_target(dtype=torch.bfloat16))
    sketch = untrained_drafter(target, layers=1, block_size=3)
    assert (sketch.config.num_hidden_layers, sketch.block_size, sketch.training) == (1, 3, False)
    assert untrained_drafter(tiny_target(num_hidden_layers=2), layers=3).config.num_hidden_layers == 3, "as many as were asked for"
    assert (sketch.fused is None) is not can_pack(target.head_weight)
    assert profile_draft(target, sketch, context=10, repeats=1) > 0
    single = tiny_target(num_hidden_layers=1)
    for model, drafter in ((target, sketch), (single, untrained_drafter(single))):
        assert len(generate(model, drafter, [1, 2, 3], max_new_tokens=4).token_ids) == 4
