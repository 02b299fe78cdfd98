"""What a window needs to break even, and what drafting costs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import tiny_drafter, tiny_target

from dspark import generate
from dspark.cpu import pack_target
from dspark.cpu.packed import can_pack
from dspark.load import default_drafter
from dspark.train.start import BLOCK_SIZE, DRAFT_VOCAB, LAYERS, MARKOV_RANK, untrained_drafter
from dspark.tune.predict import break_even
from dspark.tune.profile import SPSCurve, profile_draft


def test_break_even_is_the_formula_solved_for_tau():
    curve = SPSCurve((1, 8), (0.030, 0.044))
    points = {(p.window, p.speedup): p for p in break_even(curve, (1, 7), 0.006, (1.0, 1.57)).itertuples()}
    assert points[7, 1.0].required == pytest.approx(50 / 30) and points[7, 1.0].free == pytest.approx(44 / 30)
    assert points[7, 1.57].required == pytest.approx(1.57 * 50 / 30) and points[7, 1.57].reachable
    assert points[1, 1.57].required == pytest.approx(1.57 * 38 / 30) and points[1, 1.57].reachable == (1.57 * 38 / 30 <= 2)


def test_break_even_counts_what_a_target_with_states_runs_again():
    curve = SPSCurve((1, 17), (0.030, 0.046))  # a millisecond more a token
    needed = break_even(curve, (4,), 0.006, (1.0, 2.0), replayed=16).set_index("speedup")["required"]
    assert needed[1.0] == pytest.approx((6 + 30 + 4 + 8) / (30 - 45 / 16))  # half of them in a pass, and a pass over 16 every 16 tokens
    assert needed[2.0] == pytest.approx(48 / (15 - 45 / 16))
    assert break_even(curve, (4,), 0.006, (20.0,), replayed=16)["required"].tolist() == [math.inf]


def test_drafting_is_timed_at_the_context_asked_for(monkeypatch):
    target = tiny_target()
    drafter, known, seen = tiny_drafter(target), [], []
    propose, extend = drafter.propose, drafter.extend
    monkeypatch.setattr(drafter, "extend", lambda state, ids, taps: (known.extend(ids), extend(state, ids, taps))[1])
    monkeypatch.setattr(drafter, "propose", lambda asks: (seen.append(len(known)), propose(asks))[1])
    assert profile_draft(target, drafter, context=20, repeats=3) > 0
    assert seen == [20, 21, 22, 23]


def test_an_untrained_drafter_costs_what_a_trained_one_does_and_drafts_like_one():
    """The default shape is the shipped drafter's, and where the target is laid out for fast passes, so is the untrained drafter."""
    shipped = json.loads((default_drafter() / "config.json").read_text(encoding="utf-8"))
    named = {"num_hidden_layers": LAYERS, "block_size": BLOCK_SIZE, "markov_rank": MARKOV_RANK, "draft_vocab_size": DRAFT_VOCAB}
    assert {name: shipped[name] for name in named} == named
    target = pack_target(tiny_target(dtype=torch.bfloat16))
    fresh = untrained_drafter(target, layers=1, block_size=3)
    assert (fresh.config.num_hidden_layers, fresh.block_size, fresh.training) == (1, 3, False)
    assert untrained_drafter(tiny_target(num_hidden_layers=2), layers=3).config.num_hidden_layers == 3, "as many as were asked for"
    assert (fresh.fused is None) is not can_pack(target.head_weight)
    assert profile_draft(target, fresh, context=10, repeats=1) > 0
    single = tiny_target(num_hidden_layers=1)
    for model, drafter in ((target, fresh), (single, untrained_drafter(single))):
        assert len(generate(model, drafter, [1, 2, 3], max_new_tokens=4).token_ids) == 4
