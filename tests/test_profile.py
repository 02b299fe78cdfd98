"""The measured step-time curve: monotone whatever was measured, and measured once."""

from __future__ import annotations

import os
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import tiny_target

from dspark.tune import profile
from dspark.tune.curve import Extra, SPSCurve
from dspark.tune.profile import profile_sps, sps_curve


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))


def test_steps_per_second_never_rise_however_noisy_the_times():
    curve = SPSCurve((1, 2, 4, 8), (0.030, 0.020, 0.045, 0.040))
    speeds = [curve(tokens) for tokens in range(1, 40)]
    assert all(a >= b for a, b in pairwise(speeds))


def test_between_widths_the_step_time_is_linear():
    curve = SPSCurve((1, 5), (0.010, 0.030))
    assert curve.step_seconds(3) == pytest.approx(0.020)
    assert curve(3) == pytest.approx(50)


def test_tokens_beyond_the_last_width_are_never_free():
    curve = SPSCurve((1, 8, 16), (0.010, 0.040, 0.040))
    assert curve.step_seconds(31) == pytest.approx(0.040 + 15 * 0.002)


def test_a_curve_of_one_width_is_flat():
    assert SPSCurve((1,), (0.02,))(100) == pytest.approx(50)


@pytest.mark.parametrize(("widths", "seconds"), [((), ()), ((1, 2), (0.1,)), ((2, 1), (0.1, 0.1)), ((0,), (0.1,)), ((1,), (0.0,))])
def test_a_curve_that_cannot_be_is_refused(widths, seconds):
    with pytest.raises(ValueError):
        SPSCurve(widths, seconds)


def test_profile_measures_every_width_and_leaves_a_monotone_curve():
    curve = profile_sps(tiny_target(), context=16, widths=(4, 1, 2), repeats=2)
    assert curve.widths == (1, 2, 4)
    assert curve.seconds == tuple(sorted(curve.seconds))


@pytest.mark.parametrize("wrong", [{"context": 0}, {"context": 5000}, {"repeats": 0}, {"widths": (0, 1)}, {"widths": ()}])
def test_profile_refuses_what_cannot_be_measured(wrong):
    with pytest.raises(ValueError):
        profile_sps(tiny_target(), **({"context": 8, "widths": (1, 2), "repeats": 1} | wrong))


def test_what_requests_and_contexts_add_is_found_from_the_steps(monkeypatch: pytest.MonkeyPatch):
    """Without noise the coefficients come back; nothing that was measured faster than it can be makes tokens free."""
    base, true = profile.CONTEXT, Extra(profile.CONTEXT, 0.002, 3e-6, 1e-6)

    def time(requests: int, tokens: int, context: int) -> float:
        added = true.joining * (requests - 1) + true.reading * requests * (context - base) + true.attending * tokens * (context - base)
        return 0.01 + 0.001 * tokens + added

    monkeypatch.setattr(profile, "medians", lambda step, shapes, *_: {shape: (step(shape), time(*shape))[1] for shape in shapes})
    found = profile.profile_extra(tiny_target())
    assert astuple(found) == pytest.approx(astuple(true))
    true = Extra(base, -0.002, 3e-6, 1e-6)
    assert min(astuple(profile.profile_extra(tiny_target()))) == 0


def test_the_line_for_these_requests_adds_what_they_add():
    curve = SPSCurve((1, 8), (0.01, 0.02), extra=Extra(100, 0.003, 1e-5, 2e-6))
    line = curve.at([200, 300])
    assert line.step_seconds(8) == pytest.approx(0.02 + 0.003 + 1e-5 * 2 * 200 + 2e-6 * 8 * 200) and line.extra is None
    assert curve.at([]) == curve and curve.at([100]).seconds == curve.seconds
    assert min(SPSCurve((1,), (0.01,), extra=Extra(1000, 0, 1e-3)).at([1]).seconds) == pytest.approx(0.005)


def test_a_profile_of_another_machine_is_refused_by_name_and_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog):
    target = tiny_target()
    monkeypatch.setattr(profile, "profile_sps", lambda *_args, **_options: SPSCurve((1,), (0.01,)))
    monkeypatch.setattr(profile, "cpu_name", lambda: "machine A")
    sps_curve(target)
    (theirs,) = (tmp_path / "cache" / "profiles").iterdir()
    monkeypatch.setattr(profile, "cpu_name", lambda: "machine B")
    monkeypatch.setattr(profile, "profile_sps", lambda *_args, **_options: SPSCurve((1,), (0.02,)))
    sps_curve(target)
    (ours,) = set((tmp_path / "cache" / "profiles").iterdir()) - {theirs}
    ours.write_bytes(theirs.read_bytes())
    assert sps_curve(target).seconds == (0.02,) and "measured on machine A" in caplog.text


def test_the_curve_is_measured_once_per_target_and_thread_count(monkeypatch: pytest.MonkeyPatch):
    measured = []

    def measure(target, **_):
        measured.append(target.digest)
        return SPSCurve((1, 2), (0.01, 0.01 + len(measured) / 1000))

    monkeypatch.setattr(profile, "profile_sps", measure)
    one, other = tiny_target(seed=0), tiny_target(seed=1)
    assert sps_curve(one) == sps_curve(one)
    assert measured == [one.digest]
    assert sps_curve(other) != sps_curve(one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    sps_curve(one)
    assert measured == [one.digest, other.digest, one.digest]


def test_step_times_of_a_busy_machine_are_not_kept(monkeypatch: pytest.MonkeyPatch, caplog):
    measured = iter((0.05, 0.01, 0.02))
    monkeypatch.setattr(profile, "profile_sps", lambda *_args, **_options: SPSCurve((1,), (next(measured),)))
    target = tiny_target()
    monkeypatch.setattr(os, "getloadavg", lambda: (os.cpu_count() + 1.0, 0.0, 0.0))
    assert sps_curve(target).seconds == sps_curve(target).seconds == (0.05,) and "busy" in caplog.text
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    assert sps_curve(target).seconds == sps_curve(target).seconds == (0.01,)


def test_a_damaged_profile_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fresh = SPSCurve((1, 2), (0.01, 0.02))
    monkeypatch.setattr(profile, "profile_sps", lambda *_args, **_options: fresh)
    target = tiny_target()
    sps_curve(target)
    (kept,) = (tmp_path / "cache" / "profiles").iterdir()
    whole = kept.read_text()
    kept.write_text(whole[: len(whole) // 2])
    assert sps_curve(target) == fresh
    assert kept.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "file"))
    fresh = SPSCurve((1, 2), (0.01, 0.02))
    monkeypatch.setattr(profile, "profile_sps", lambda *_args, **_options: fresh)
    assert sps_curve(tiny_target()) == fresh
