"""The prediction is L = (T_draft + T_verify) / τ, nothing else."""

from __future__ import annotations

import pytest

from dspark.tune.predict import expected_tokens_per_round, predict_speedup, required_tokens_per_round
from dspark.tune.profile import SPSCurve

FLAT = SPSCurve((1, 8), (0.04, 0.04))
STEEP = SPSCurve((1, 8), (0.04, 0.32))


@pytest.mark.parametrize(("acceptance", "tau"), [([], 1), ([0.0, 1.0], 1), ([1.0] * 5, 6), ([0.5, 0.5], 1.75), ([0.8, 0.0, 1.0], 1.8)])
def test_a_round_yields_one_token_and_every_surviving_draft(acceptance: list[float], tau: float) -> None:
    assert expected_tokens_per_round(acceptance) == pytest.approx(tau)


def test_free_drafting_on_a_flat_curve_gains_tau() -> None:
    assert predict_speedup(FLAT, [0.5, 0.5], 0) == pytest.approx(1.75)
    assert predict_speedup(FLAT, [1.0] * 7, 0) == pytest.approx(8)


def test_drafting_and_wider_passes_cost_their_time() -> None:
    assert predict_speedup(FLAT, [0.5, 0.5], 0.01) == pytest.approx(1.75 * 0.04 / 0.05)
    assert predict_speedup(STEEP, [1.0] * 7, 0) == pytest.approx(1)  # eight tokens in eight times the time


def test_the_required_tau_is_what_the_prediction_needs() -> None:
    acceptance, draft = [0.7, 0.6, 0.5], 0.006
    speedup = predict_speedup(STEEP, acceptance, draft)
    assert required_tokens_per_round(STEEP, 3, draft, speedup) == pytest.approx(expected_tokens_per_round(acceptance))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: predict_speedup(FLAT, [0.5, 1.5], 0), "1.5"),
        (lambda: predict_speedup(FLAT, [-0.1], 0), "-0.1"),
        (lambda: predict_speedup(FLAT, [0.5], -1), "draft_seconds"),
        (lambda: required_tokens_per_round(FLAT, 0, 0.01), "window"),
        (lambda: required_tokens_per_round(FLAT, 3, 0.01, 0), "speedup"),
    ],
)
def test_impossible_numbers_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
