"""Rollouts and traces of the prompt sets: each run once, from the right prompts; temperatures that are stored change nothing else."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.bench import replay as policies
from dspark.bench import rollouts, sps, traces
from dspark.bench.arms import Models
from dspark.bench.plan import Plan
from dspark.bench.prompts import load_prompts
from dspark.bench.replay import replay
from dspark.bench.results import read_results, read_rows, write_results
from dspark.bench.trace import StepTimes
from dspark.decode import generate
from dspark.draft.lookup import ContextLookup
from dspark.target.target import Target
from dspark.tune.calibrate import AS_TRAINED, Calibration, calibrate, calibration_noise, calibration_report, reliability
from dspark.verify.sampling import Sampling

PLAN = Plan(arms="fixed", baseline="fixed", split="dev", domains="code,chat", prompts=4, tokens=12, repeats=2)


def ids_of(self: Target, prompt: object) -> list[int]:
    """Any prompt as a few token ids that depend on its text."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return [4 + sum(text[i::5].encode()) % 90 for i in range(5)]


def tiny_models() -> Models:
    target = tiny_target()
    return Models(target, tiny_drafter(target))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "encode", ids_of)


@pytest.fixture
def models() -> Models:
    return tiny_models()


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """One run of PLAN, shared by the tests that only read it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Target, "encode", ids_of)
        return rollouts.measure_rollouts(PLAN, tiny_models(), tmp_path_factory.mktemp("rolled") / "r.parquet")


@pytest.fixture(scope="module")
def stepped() -> pd.DataFrame:
    """The step times of the tiny models, measured once each."""
    return sps.measure_here(PLAN, tiny_models(), repeats=1)


def interrupted_after(n: int, monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """The n-th call of module.name is cut short by Ctrl-C."""
    real, calls = getattr(module, name), []

    def cut(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, cut)


def test_an_interrupted_rollout_goes_on_and_no_run_is_there_twice(
    models: Models, rolled: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(rolled) == 8 + 16  # greedy once, sampled twice
    assert not rolled.duplicated(["temperature", "prompt_id", "repeat"]).any()
    with monkeypatch.context() as patched:
        interrupted_after(6, patched, rollouts, "generate")
        with pytest.raises(KeyboardInterrupt):
            rollouts.measure_rollouts(PLAN, models, tmp_path / "cut.parquet")
    assert not (tmp_path / "cut.parquet").exists()
    again = rollouts.measure_rollouts(PLAN, models, tmp_path / "cut.parquet")
    pd.testing.assert_frame_equal(again.drop(columns="utc"), rolled.drop(columns="utc"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_observing_changes_no_token_and_gives_the_acceptance_of_every_checked_draft(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, each draft's acceptance is 0 or 1 and adds up to the accepted ones; sampled, it is their frequency."""
    monkeypatch.undo()  # prompts are token ids here
    plain = tiny_target(vocab_size=8, eos_token_id=None)  # so few tokens that drafts and copies are often right
    expected, kept, drafter = 0.0, 0, ContextLookup(tiny_drafter(plain))
    for seed in range(4):
        target, source, acceptances = rollouts.observed(plain, drafter, Sampling(temperature))
        options = {"max_new_tokens": 60, "temperature": temperature, "seed": seed, "policy": dspark.FixedWindow()}
        ours = generate(target, source, [5, 6, 4 + seed], **options)
        assert ours.token_ids == generate(plain, drafter, [5, 6, 4 + seed], **options).token_ids
        for found, r in zip(acceptances[1:], ours.rounds[1:], strict=True):
            assert len(found) == r.verify_length and all(0 <= a <= 1.0001 for a in found)
            if not temperature:
                assert sum(np.cumprod(found)) == r.accepted
            expected, kept = expected + sum(found[:1]), kept + (r.accepted > 0)
    assert kept > 20 and kept == pytest.approx(expected, abs=4 * np.sqrt(expected))


def test_one_half_of_the_dev_prompts_fits_and_the_other_judges(rolled: pd.DataFrame) -> None:
    halves = rolled.groupby("half")["prompt_id"].agg(set)
    assert halves["fit"].isdisjoint(halves["judge"])
    assert (rolled.groupby(["domain", "half"])["prompt_id"].nunique() == 2).all()
    tests = {item.id for domain in ("code", "chat") for item in load_prompts(domain, "test")}
    assert tests.isdisjoint(rolled["prompt_id"])
    assert len(rollouts.rollouts_of(rolled, half="fit").logits) == rolled.loc[rolled["half"] == "fit", "blocks"].sum()
    with pytest.raises(ValueError, match="roll out more"):
        rollouts.rollouts_of(rolled, half="fit", temperature=0.5)


def test_rollouts_do_not_depend_on_temperatures_that_the_drafter_carries(models: Models, tmp_path: Path) -> None:
    plan = replace(PLAN, prompts=2, repeats=1)
    plain = rollouts.measure_rollouts(plan, models, tmp_path / "a.parquet")
    models.drafter.sts_temperatures = (2.0, 3.0, 0.5, 1.0)
    carried = rollouts.measure_rollouts(plan, models, tmp_path / "b.parquet")
    assert [list(x) for x in carried["logits"]] == [list(x) for x in plain["logits"]]
    assert len(rollouts.measure_rollouts(plan, models, tmp_path / "a.parquet")) == len(plain)  # and the finished file still fits


def test_storing_moves_the_heads_bias_and_keeps_all_else(tmp_path: Path) -> None:
    target = tiny_target()
    dspark.save_drafter(tiny_drafter(target), target, tmp_path / "d", training={"steps": 7})
    before = dspark.load_drafter(tmp_path / "d", target)
    put_right = Calibration(-0.25, (2.0, 1.5, 1.0, 0.5))
    assert rollouts.store(put_right, str(tmp_path / "d"), target) == tmp_path / "d"
    after = dspark.load_drafter(tmp_path / "d", target)
    assert after.sts_temperatures == (2.0, 1.5, 1.0, 0.5)
    assert json.loads((tmp_path / "d" / "config.json").read_text())["training"] == {"steps": 7}
    for (name, old), (same, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        moved = -0.25 if name == "confidence_head.proj.bias" else 0.0
        assert name == same and torch.allclose(old + moved, new, atol=1e-3 if moved else 0.0)  # bfloat16 on disk
    with pytest.raises(ValueError, match="folder"):
        rollouts.store(put_right, "org/name", target)


def test_a_drafter_states_what_was_stored_and_a_file_of_the_head_before_is_refused(models: Models, tmp_path: Path) -> None:
    folder, target, plan = tmp_path / "d", models.target, replace(PLAN, prompts=2, repeats=1)
    dspark.save_drafter(models.drafter, target, folder)
    frame = rollouts.measure_rollouts(plan, Models(target, dspark.load_drafter(folder, target)), tmp_path / "r.parquet")
    before, found = rollouts.rollouts_of(frame, temperature=1.0), Calibration(-0.5, (2.0, 1.5, 1.0, 0.5))
    rollouts.store(found, str(folder), target)
    drafter = dspark.load_drafter(folder, target)
    assert drafter.sts_temperatures == found.temperatures
    with pytest.raises(ValueError, match="drafter_digest"):
        rollouts.measure_rollouts(plan, Models(target, drafter), tmp_path / "r.parquet")
    after = rollouts.measure_rollouts(plan, Models(target, drafter), tmp_path / "again.parquet")
    again = rollouts.rollouts_of(after, temperature=1.0)
    assert torch.equal(before.survived, again.survived)  # confidence decides nothing where the whole block is checked
    for k in range(4):
        assert torch.allclose(before.at(k, found)[0], again.at(k, Calibration(0.0, found.temperatures))[0], atol=1e-3)


def test_a_drafter_without_confidence_is_refused(models: Models, tmp_path: Path) -> None:
    without = Models(models.target, tiny_drafter(models.target, enable_confidence_head=False))
    with pytest.raises(ValueError, match="no confidence head"):
        rollouts.measure_rollouts(PLAN, without, tmp_path / "r.parquet")


def test_an_interrupted_recording_goes_on_with_the_same_step_times(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = Plan(arms="fixed+copy", baseline="fixed+copy", domains="code,chat", prompts=2, tokens=8), tmp_path / "t.parquet"
    with monkeypatch.context() as patched:
        interrupted_after(4, patched, traces, "record")  # one is the warm-up's
        with pytest.raises(KeyboardInterrupt):
            traces.record_traces(plan, models, out)
    frame = traces.record_traces(plan, models, out)
    assert len(frame) == 4 and not frame.duplicated("prompt_id").any()
    found = traces.load_traces(out)
    assert len({json.dumps(trace.about["verify_seconds"]) for _, trace in found}) == 1
    for about, trace in found:
        item = next(item for item in load_prompts(about["domain"], "test") if item.id == about["prompt_id"])
        source = dspark.ContextLookup(models.drafter)
        expected = dspark.generate(models.target, source, item.messages, max_new_tokens=8).rounds
        assert [r.committed for r in replay(trace, dspark.FixedWindow())] == [r.committed for r in expected]


def test_files_of_another_version_or_without_rows_name_the_command(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    frame = rollouts.measure_rollouts(Plan(arms="fixed", baseline="fixed", split="dev", domains="code", prompts=1, tokens=4), models, path)
    for read, command in ((lambda path: read_rows(path, rollouts.COMMAND), "bench.rollouts"), (traces.load_traces, "bench.traces")):
        write_results(frame.assign(schema_version=99), path)
        with pytest.raises(ValueError, match=f"schema version 99.*{command}"):
            read(path)
        write_results(frame.drop(columns="schema_version"), path)
        with pytest.raises(ValueError, match=f"schema version none.*{command}"):
            read(path)
        write_results(frame[:0], path)
        with pytest.raises(ValueError, match=f"no rows.*{command}"):
            read(path)
        with pytest.raises(ValueError, match=f"no results.*{command}"):
            read(tmp_path / "none.parquet")


def test_step_times_have_every_context_kind_and_width(stepped: pd.DataFrame, tmp_path: Path) -> None:
    write_results(stepped, tmp_path / "sps.parquet")
    assert set(stepped["context"]) == set(sps.CONTEXTS) and (stepped["seconds"] > 0).all()
    assert list(stepped.loc[(stepped["context"] == 128) & (stepped["kind"] == "draft"), "tokens"]) == [1, 2, 3, 4]
    assert sps.curve_of(read_results(tmp_path / "sps.parquet"), 128)(1) > 0
    with pytest.raises(ValueError, match="128, 512, 1536"):
        sps.curve_of(stepped, 100)


def test_step_times_are_kept_as_measured_and_only_the_schedulers_curve_never_falls(models: Models, monkeypatch) -> None:
    measured = {1: 0.03, 2: 0.02, 4: 0.04}
    monkeypatch.setattr(sps, "median_steps", lambda *_args, **_options: measured)
    frame = sps.measure_here(PLAN, models, repeats=1)
    passes = frame[(frame["kind"] == "verify") & (frame["context"] == 128)]
    assert dict(zip(passes["tokens"], passes["seconds"], strict=True)) == measured
    assert sps.curve_of(frame, 128).seconds == (0.03, 0.03, 0.04)


def test_the_median_of_several_processes_counts_pass_by_pass(
    stepped: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([stepped.assign(seconds=stepped["seconds"] * factor) for factor in (3.0, 1.0, 2.0)])
    monkeypatch.setattr(sps, "in_new_process", lambda *_: next(found))
    together = sps.measure_sps(PLAN, tmp_path / "sps.parquet", processes=3)
    assert together["seconds"].to_numpy() == pytest.approx(2 * stepped["seconds"].to_numpy())
    assert set(together["processes"]) == {3} and len(together) == len(stepped)
    assert read_results(tmp_path / "sps.parquet").attrs == stepped.attrs


def test_step_times_of_no_process_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        sps.measure_sps(PLAN, tmp_path / "sps.parquet", processes=0)


@pytest.mark.parametrize("wrong", ["fixd:3", "prefix+copy", "generate", "fixed:x", ""])
def test_a_misspelled_policy_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(ValueError, match=repr(wrong).replace("+", r"\+")):
        policies.policy_of(wrong)


def test_policies_are_compared_on_the_same_tokens_and_by_the_traces_seconds(models: Models, tmp_path: Path) -> None:
    plan = Plan(arms="fixed", baseline="fixed", domains="code,chat", prompts=2, tokens=16)
    traces.record_traces(plan, models, tmp_path / "t.parquet")
    found = traces.load_traces(tmp_path / "t.parquet")
    names = ["plain", *policies.windows(4), "prefix", "adaptive", "confidence:0.5", policies.ORACLE]
    frame = policies.replayed(found, names)
    assert (frame.groupby("prompt_id")["tokens"].nunique() == 1).all()
    lines = policies.pooled(frame).set_index(["policy", "domain"])
    assert (lines.loc["plain", "tokens_per_round"] == 1).all() and (lines.loc["plain", "speedup"] == 1).all()
    per_domain = [lines.loc[("fixed:4", domain), "tokens_per_second"] for domain in ("code", "chat")]
    assert lines.loc[("fixed:4", "all"), "tokens_per_second"] == pytest.approx((per_domain[0] * per_domain[1]) ** 0.5)
    oracle = policies.against_windows(frame, policies.ORACLE)
    least = 1 - 1e-9  # windows may tie, and sums round
    assert oracle["hindsight"][0] >= least and oracle["single"][0] >= least * oracle["hindsight"][0]
    fixed = policies.against_windows(frame, oracle["best_single"])
    assert fixed["single"][0] == pytest.approx(1) and fixed["hindsight"][0] <= 1 + 1e-9
    with pytest.raises(ValueError, match="replay both"):
        policies.against_windows(frame, "mtp1")
    swept = policies.threshold_sweep(found, [0.0, 0.5, 1.0])
    for domain, rows in swept.groupby("domain"):
        part = frame[(frame["policy"] == "fixed:4") & (frame["domain"] == domain)]
        assert rows["checked"].iloc[0] == part["checked"].sum() / part["drafts"].sum() and rows["checked"].is_monotonic_decreasing
        assert rows["accepted"].iloc[0] == part["accepted"].sum() / part["drafts"].sum()


def test_a_policy_against_windows_is_the_same_comparison_made_by_hand_and_its_interval_resamples_prompts() -> None:
    """Each draw once more: the prompts of a domain resampled, the same for every policy, and the best windows of just these."""
    rng, names, domains = np.random.default_rng(0), ["fixed:1", "fixed:2", "fixed:3", "mine"], ("code", "chat")
    seconds = {domain: rng.uniform(1, 2, (len(names), 5)) for domain in domains}  # 10 tokens each
    rows = [
        {"domain": domain, "prompt_id": f"{domain}/{i}", "policy": name, "tokens": 10, "seconds": seconds[domain][k, i]}
        for domain in domains
        for i in range(5)
        for k, name in enumerate(names)
    ]

    def by_hand(chosen: dict[str, np.ndarray]) -> tuple[float, float]:
        speeds = np.array([10 * len(chosen[domain]) / seconds[domain][:, chosen[domain]].sum(1) for domain in domains])
        means = np.sqrt(speeds.prod(0))
        return np.sqrt((speeds[:, 3] / speeds[:, :3].max(1)).prod()), means[3] / means[:3].max()

    drawn = {domain: np.random.default_rng([0, zlib.crc32(domain.encode())]).integers(5, size=(40, 5)) for domain in domains}
    draws = [by_hand({domain: drawn[domain][k] for domain in domains}) for k in range(40)]
    found = policies.against_windows(pd.DataFrame(rows), "mine", resamples=40)
    whole = by_hand(dict.fromkeys(domains, np.arange(5)))
    for i, of in enumerate(("hindsight", "single")):
        assert found[of] == pytest.approx((whole[i], *np.quantile([draw[i] for draw in draws], [0.025, 0.975])))


def test_the_judging_half_alone_can_have_more_draws_and_the_fit_does_not_notice(
    models: Models, rolled: pd.DataFrame, tmp_path: Path
) -> None:
    many = rollouts.measure_rollouts(replace(PLAN, repeats=3), models, tmp_path / "many.parquet", fit_repeats=2)
    runs = many.groupby(["half", "temperature"])["repeat"].nunique()
    assert runs.to_dict() == {(rollouts.FIT, 0.0): 1, (rollouts.FIT, 1.0): 2, (rollouts.JUDGE, 0.0): 1, (rollouts.JUDGE, 1.0): 3}
    fits = [calibrate(rollouts.rollouts_of(frame, half=rollouts.FIT, temperature=1.0)) for frame in (rolled, many)]
    assert fits[0] == fits[1]


@pytest.mark.parametrize("few", ["0", "4"])
def test_repeats_of_the_fitted_half_beyond_those_that_judge_are_refused(few: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rollouts.main(["--repeats", "3", "--fit-repeats", few]) == 2
    assert f"fit-repeats must be 1 to 3, as many as repeats, got {few}" in capsys.readouterr().err


def test_the_noise_is_the_error_that_a_perfect_head_shows() -> None:
    generator = torch.Generator().manual_seed(1)
    few, many = torch.rand(200, generator=generator), torch.rand(20_000, generator=generator)
    assert 0.03 < calibration_noise(few) < 0.12
    assert calibration_noise(many, draws=20) < 0.2 * calibration_noise(few)


def test_reliability_bins_hold_every_case_once() -> None:
    confidence, outcome = torch.tensor([0.05, 0.06, 0.95, 1.0]), torch.tensor([False, True, True, True])
    rows = reliability(confidence, outcome, bins=10)
    assert rows[0] == pytest.approx({"n": 2, "confidence": 0.055, "frequency": 0.5})
    assert rows[1] == pytest.approx({"n": 2, "confidence": 0.975, "frequency": 1.0})


def test_the_report_has_a_row_for_every_position_that_was_checked(rolled: pd.DataFrame) -> None:
    data = rollouts.rollouts_of(rolled)
    data.checked[:, 3] = False
    rows = calibration_report(data, calibrate(data))
    assert [row["position"] for row in rows] == [1, 2, 3]
    assert all(0 <= row["ece_after"] <= row["ece_before"] + 1e-9 for row in rows[:1])


def test_ranking_is_judged_on_the_half_that_was_not_fitted(rolled: pd.DataFrame) -> None:
    found = rollouts.ranked(rolled, AS_TRAINED).set_index("temperature")
    checked = [int(rollouts.rollouts_of(rolled, half=rollouts.JUDGE, temperature=t).checked.sum()) for t in found.index]
    assert list(found.index) == [0.0, 1.0] and list(found["n"]) == checked


def test_step_times_without_a_width_are_refused() -> None:
    with pytest.raises(ValueError, match="no step times"):
        _ = StepTimes({}, {}).sps
