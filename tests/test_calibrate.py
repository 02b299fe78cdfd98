"""Calibration: a calibrated confidence is left alone, a distorted one is corrected."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.round import Round
from dspark.tune.calibrate import (
    AS_TRAINED,
    Calibration,
    Rollouts,
    calibrate,
    calibration_error,
    calibration_report,
    fit_offset,
    fit_sts,
    log_loss,
    ranking_quality,
    ranking_together,
    rollouts,
)


def blocks(logits: torch.Tensor, survived: torch.Tensor, checked: torch.Tensor) -> Rollouts:
    """Their acceptance is unknown."""
    return Rollouts(logits, survived, checked, torch.full(logits.shape, math.nan))


def calibrated(n: int = 20_000, block_size: int = 3, seed: int = 0) -> Rollouts:
    """Blocks whose tokens survive with exactly the probability that the head states."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1 + torch.randn(n, block_size, generator=generator)  # around 0 even a constant 0.5 would be calibrated
    survived = (torch.rand(n, block_size, generator=generator) < logits.sigmoid()).int().cumprod(-1).bool()
    return blocks(logits, survived, torch.ones_like(survived))


def distorted(data: Rollouts, factors: list[float]) -> Rollouts:
    return blocks(data.logits * torch.tensor(factors), data.survived, data.checked)


def test_the_error_is_the_gap_between_confidence_and_frequency() -> None:
    assert calibration_error(torch.full((10,), 0.8), torch.arange(10) < 8) == pytest.approx(0, abs=1e-7)
    assert calibration_error(torch.full((10,), 0.8), torch.arange(10) < 5) == pytest.approx(0.3)
    confidence, outcome = torch.tensor([0.1, 0.1, 0.9, 0.9]), torch.tensor([False, True, True, True])
    assert calibration_error(confidence, outcome) == pytest.approx((0.4 + 0.1) / 2)


def test_too_high_in_one_bin_does_not_make_up_for_too_low_in_another() -> None:
    confidence, outcome = torch.tensor([0.1, 0.1, 0.9, 0.9]), torch.tensor([False, True, False, True])
    assert calibration_error(confidence, outcome) == pytest.approx(0.4)


def test_a_calibrated_head_has_next_to_no_error() -> None:
    data = calibrated(80_000)
    assert all(calibration_error(*data.at(k)) < 0.01 for k in range(3))


def test_a_head_that_knew_both_distributions_ranks_better_than_one_that_guesses() -> None:
    """Where the acceptance is unknown, it is NaN."""
    data = calibrated()
    guessing = data.logits + 2 * torch.randn(data.logits.shape, generator=torch.Generator().manual_seed(1))
    report = calibration_report(Rollouts(guessing, data.survived, data.checked, data.logits.sigmoid()), AS_TRAINED)
    for k, row in enumerate(report):
        assert row["auc_best"] == ranking_quality(*data.at(k)) > row["auc_before"] + 0.05
    assert all(math.isnan(row["auc_best"]) for row in calibration_report(data, AS_TRAINED))


def test_all_positions_are_ranked_together_over_their_checked_drafts() -> None:
    """A head of constant c_k knows only the position; one that knew both distributions knows more, and a calibrated one as much."""
    data = calibrated()
    data.checked[::2, 2] = False
    informed = ranking_together(replace(data, acceptance=data.logits.sigmoid()), AS_TRAINED)
    assert informed["n"] == 2.5 * len(data.logits) and informed["auc"] == pytest.approx(informed["auc_best"], abs=1e-6)
    assert informed["auc"] > informed["auc_position"] + 0.05
    constant = ranking_together(replace(data, logits=torch.ones_like(data.logits)), AS_TRAINED)
    assert constant["auc"] == constant["auc_position"] == informed["auc_position"] > 0.55
    assert math.isnan(constant["auc_best"])


def test_scaling_finds_the_temperature_of_every_position() -> None:
    found = fit_sts(distorted(calibrated(), [3.0, 0.5, 2.0]))
    assert found == pytest.approx([3.0, 0.5, 2.0], rel=0.2)


def test_scaling_never_lowers_the_likelihood_of_its_own_data() -> None:
    for seed in range(3):
        data = distorted(calibrated(500, seed=seed), [1.7, 0.8, 1.0])
        found = fit_sts(data)
        for k in range(3):
            scaled, unscaled = Calibration(0.0, found), Calibration(0.0, (*found[:k], 1.0))
            assert log_loss(*data.at(k, scaled)) <= log_loss(*data.at(k, unscaled))


def test_a_head_that_is_too_confident_is_corrected_by_an_offset_and_temperatures() -> None:
    """No temperature alone can: it moves high and low confidences to opposite sides."""
    right = calibrated(40_000)
    data = blocks(1.5 * right.logits + 0.8, right.survived, right.checked)
    scaled, found = Calibration(0.0, fit_sts(data)), calibrate(data)
    assert calibration_error(*data.at(0, scaled)) > 0.03
    assert all(calibration_error(*data.at(k, found)) < 0.012 for k in range(3))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_offset_is_found_whatever_the_temperature(factor: float) -> None:
    right = calibrated(40_000)
    assert fit_offset(blocks(factor * right.logits - 0.7, right.survived, right.checked)) == pytest.approx(0.7, abs=0.05)


def test_a_calibrated_head_gets_no_offset_and_an_unchecked_one_neither() -> None:
    data = calibrated(80_000)
    assert fit_offset(data) == pytest.approx(0, abs=0.03)
    assert fit_offset(blocks(data.logits, data.survived, torch.zeros_like(data.checked))) == 0


@pytest.mark.parametrize("kept", [False, True])
def test_the_offset_stays_finite_where_all_drafts_have_the_same_outcome(kept: bool) -> None:
    data = blocks(torch.zeros(50, 1), torch.full((50, 1), kept), torch.ones(50, 1, dtype=torch.bool))
    assert 1 < fit_offset(data) * (1 if kept else -1) < 4


def test_a_constant_head_is_left_alone_when_it_is_right() -> None:
    n = 1000
    data = blocks(torch.zeros(n, 1), (torch.arange(n) % 2 == 0)[:, None], torch.ones(n, 1, dtype=torch.bool))
    assert fit_sts(data) == (1.0,)


def test_unchecked_positions_say_nothing() -> None:
    data = calibrated()
    checked = torch.zeros_like(data.checked)
    checked[:, 0] = True
    assert fit_sts(blocks(data.logits, data.survived, checked))[1:] == (1.0, 1.0)


def test_each_position_counts_the_blocks_that_reached_it() -> None:
    checked = torch.tensor([[True, True], [True, False], [True, True]])
    data = blocks(torch.zeros(3, 2), torch.tensor([[True, False], [False, False], [True, True]]), checked)
    assert data.at(0)[1].tolist() == [True, False, True]
    assert data.at(1)[1].tolist() == [False, True]


def test_ranking_quality_is_the_share_of_pairs_in_order() -> None:
    outcome = torch.tensor([False, False, True, True])
    assert ranking_quality(torch.tensor([0.1, 0.2, 0.3, 0.4]), outcome) == 1
    assert ranking_quality(torch.tensor([0.4, 0.3, 0.2, 0.1]), outcome) == 0
    assert ranking_quality(torch.tensor([0.1, 0.3, 0.2, 0.4]), outcome) == 0.75
    assert ranking_quality(torch.full((4,), 0.5), outcome) == 0.5
    assert math.isnan(ranking_quality(torch.rand(2), torch.tensor([True, True])))


def test_rollouts_give_back_the_logits_and_leave_unchecked_positions_out() -> None:
    target = tiny_target(eos_token_id=None)
    policy = dspark.FixedWindow()
    rounds = dspark.generate(target, tiny_drafter(target), [5, 6, 7], policy=policy, max_new_tokens=40, temperature=1.0).rounds
    data, drafted = rollouts(rounds, 4), [r for r in rounds if r.source]
    for row, r in zip(data.logits, drafted, strict=True):
        assert torch.allclose(row[: len(r.confidence)].sigmoid(), torch.tensor(r.confidence), atol=1e-6)
    assert data.checked.sum(-1).tolist() == [r.verify_length for r in drafted] and not (data.survived & ~data.checked).any()


def test_a_block_that_ended_the_text_is_left_out() -> None:
    whole = Round(index=1, committed=(6, 7, 8, 9, 10), confidence=(0.5,) * 4, verify_length=4, accepted=4, source="drafter")
    ended = replace(whole, committed=(6, 7))  # an end-of-text token at the second place
    assert len(rollouts([whole, ended], 4).logits) == 1


def test_rounds_without_a_checked_draft_are_refused() -> None:
    with pytest.raises(ValueError, match="FixedWindow"):
        rollouts(dspark.generate(tiny_target(), None, [5, 6], max_new_tokens=5).rounds, 4)
