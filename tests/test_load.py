"""Loads: all policies serve the same requests, a killed run resumes, bad loads are refused, the simulation makes the engine's rounds."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from soak import soak
from test_bench import LetterTokenizer
from tiny import random_prompt, tiny_drafter, tiny_target

from dspark.bench import __main__ as command
from dspark.bench import load
from dspark.bench.arms import Models
from dspark.bench.costs import Costs
from dspark.bench.load import COSTS, LoadPlan, closed, measure_load, read_load, server
from dspark.bench.provenance import drafter_digest
from dspark.bench.results import Ledger, write_results
from dspark.bench.simulate import Shared, Simulated, simulate, simulated_grid
from dspark.bench.trace import StepTimes, record
from dspark.bench.turns import Stopwatch, in_turns
from dspark.engine import Engine
from dspark.lab import speed as figures
from dspark.schedule import FixedWindow, PrefixScheduler
from dspark.target.target import Target
from dspark.tune.curve import Extra, SPSCurve

ARMS = "plain,fixed:2,prefix,async,auto"
TIMES = SPSCurve((1, 8, 64), (0.010, 0.012, 0.060), draft=SPSCurve((1, 8), (0.002, 0.005)), extra=Extra(16, 0.001, 1e-6, 1e-6))


@pytest.fixture(scope="module")
def models() -> Models:
    target = tiny_target()
    target.tokenizer = LetterTokenizer()
    target.encode = lambda prompt: prompt if isinstance(prompt[0], int) else Target.encode(target, prompt)
    return Models(target, tiny_drafter(target))


@pytest.fixture(autouse=True)
def times_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is profiled on a busy machine."""
    monkeypatch.setattr("dspark.bench.costs.LEAST", 1)
    for module in ("arms.step_times", "costs.measured_times"):
        monkeypatch.setattr(f"dspark.bench.{module}", lambda target, drafter: TIMES)


def small(**changed: object) -> LoadPlan:
    options = {"arms": ARMS, "users": "1,3", "rates": "500", "requests": 4, "domains": "code,chat", "prompts": 3, "tokens": 8, "threads": 1}
    return LoadPlan(**(options | changed))


# ---- loads


def test_every_policy_serves_the_same_requests():
    plan = small()
    for level in plan.loads:
        jobs = plan.jobs(*level)
        assert jobs == small().jobs(*level) and {4 <= job.limit <= 12 for job in jobs} == {True} and len({job.limit for job in jobs}) > 1
    assert list(small(repeats=2).cells().values()) == 2 * plan.loads


def test_each_turn_is_taken_by_the_one_that_has_worked_least_and_no_clock_counts_the_turns_of_others(monkeypatch):
    time, order = [0.0], []
    monkeypatch.setattr("dspark.bench.turns.time", SimpleNamespace(perf_counter=lambda: time[0]))

    def steps(name: str, seconds: float, number: int, clock: Stopwatch) -> Generator[None, None, float]:
        for _ in range(number):
            time[0] += seconds
            order.append(name)
            yield
        clock.skip(10.0)
        return clock.now()

    clocks = {name: Stopwatch() for name in "AB"}
    work = {name: (clock, steps(name, *what, clock)) for (name, clock), what in zip(clocks.items(), ((1.0, 6), (3.0, 2)), strict=True)}
    assert in_turns(work) == {"A": 16.0, "B": 16.0} and "".join(order) == "ABAAABAA"


def served(*arguments: object) -> dict[str, object]:
    return in_turns({"": (Stopwatch(), load.serve(*arguments))})[""]


def test_a_load_has_a_row_for_every_policy_and_one_of_the_step_times(models, tmp_path):
    frame = measure_load(small(), models, tmp_path / "load.parquet")
    found = read_load(tmp_path / "load.parquet")
    assert len(found) == len(frame) == 2 + 5 * 3 and set(closed(found).columns) == {1, 3}
    rows = found[found["kind"] != COSTS]
    assert (rows["tokens_per_second"] > 0).all() and (rows["token_ms_p50"] <= rows["token_ms_p99"]).all() and (rows["kv_mib"] > 0).all()
    plain = rows[rows["arm"] == "plain"].set_index(["kind", "level"])
    assert (plain["tokens_per_round"] == 1).all() and (plain["checked"] == 0).all()
    assert plain.loc[("closed", 3.0), "budget"] == plain.loc[("closed", 3.0), "active"] > 2
    assert (rows[rows["arm"] == "fixed:2"]["checked"] > 1).all()
    costs = Costs.of(found)
    assert costs.times == TIMES and costs.prompts.keys() == {unit.item.id for unit in small().units} and costs.bytes_per_token > 0


def test_the_lines_go_through_all_steps_that_were_timed_and_errors_count_relatively():
    row = {"times": asdict(TIMES), "bytes_per_token": 2, "prompts": {"x": 5}}
    steps = [[[r, n, 9.0, 1 + 2 * r + 3 * n] for n in (r, 2 * r)] for r in (1, 4)]
    prefills = [[[n, 0.5 + n] for n in (10, 20)], [[30, 30.5]]]
    rows = [json.dumps(row | {"steps": each, "prefills": prompts}) for each, prompts in zip(steps, prefills, strict=True)]
    found = Costs.of(pd.DataFrame({"costs": [rows[0], None, rows[1]]}))
    assert found.rest == pytest.approx([1, 2, 3]) and found.prefill == pytest.approx([0.5, 1])
    assert (found.times, found.bytes_per_token, found.prompts) == (TIMES, 2, {"x": 5})
    uneven = json.dumps(row | {"steps": steps[0], "prefills": [[1, 1.0], [1, 2.0]]})
    assert Costs.of(pd.DataFrame({"costs": [uneven]})).prompt(1) == pytest.approx(1.2)  # 20 % above and 40 % below, not 1.5
    with pytest.raises(ValueError, match="do not say what a step costs"):
        Costs.of(pd.DataFrame({"costs": [None, json.dumps(row | {"rest": [1, 2, 3]})]}))  # as an older version wrote it


def test_an_interrupted_load_keeps_its_cells_and_resumes_there(models, tmp_path, monkeypatch):
    add, out, measured = Ledger.add, tmp_path / "load.parquet", []

    def second_is_interrupted(self: Ledger, key: str, rows: list) -> None:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(key)
        add(self, key, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ledger, "add", second_is_interrupted)
        measure_load(small(), models, out)
    kept = [json.loads(line) for line in Path(f"{out}.partial.jsonl").read_text().splitlines()[1:]]
    frame = measure_load(small(), models, out)
    assert [line["unit"] for line in kept] == measured and len(frame) == 17
    rows = [row for line in kept for row in line["rows"]]
    assert frame["seconds"][: len(rows)].fillna(0).tolist() == [row.get("seconds", 0) for row in rows]  # rows of costs have none
    with pytest.raises(ValueError, match=r"tokens=8.*tokens=9"):
        measure_load(small(tokens=9), models, out)


def test_more_users_than_the_memory_holds_wait_and_the_row_says_so(models):
    plan = small(memory=60 * Engine(models.target, None).bytes_per_token / load.MIB)  # a request needs 28 to 36 tokens
    engine, send = server(plan, models, plan.parsed_arms[0], 3)
    found = served(engine, plan.jobs("closed", 3), send, 3)
    assert found["waited"] > 0 and found["active"] < 3
    engine, send = server(small(), models, plan.parsed_arms[0], 3)
    assert served(engine, plan.jobs("closed", 3), send, 3)["waited"] == 0


def test_the_time_to_the_first_token_counts_from_the_arrival(models):
    """On a made-up clock: a step takes a second, four requests arrive in the first, one is served at a time."""
    engine, clock = Engine(models.target, None, max_requests=1), [0.0]
    jobs = [load.Job(unit.item, 2, 0, at=i / 4) for i, unit in enumerate(small().units[:4])]
    step = engine.step
    engine.step = lambda: (step(), clock.__setitem__(0, clock[0] + 1.0))[0]
    found = served(engine, jobs, lambda job: engine.submit(job.item.messages, max_new_tokens=2), None, lambda: clock[0])
    assert found["first_ms_p99"] > 5000 and found["first_ms_p50"] > 2000 and found["token_ms_p50"] == found["token_ms_p99"] == 1000


def test_a_closed_loop_is_measured_while_all_users_are_served(models):
    """On a made-up clock: the step that starts all of them is not counted, nor what happens after a user has no request left."""
    engine, clock = Engine(models.target, None, max_requests=2), [0.0]
    items = [unit.item for unit in small().units[:4]]
    step = engine.step
    engine.step = lambda: (step(), clock.__setitem__(0, clock[0] + 1.0))[0]
    send = lambda job: engine.submit(job.item.messages, max_new_tokens=job.limit)  # noqa: E731
    jobs = [load.Job(item, limit, 0) for item, limit in zip(items, (3, 5, 4, 9), strict=True)]
    found = served(engine, jobs, send, 2, lambda: clock[0])
    lengths = [len(request.token_ids) for request in engine.active]
    assert found["seconds"] == clock[0] - 1 and len(lengths) == 1 and found["requests"] == 2
    assert found["tokens_per_second"] == pytest.approx(2, abs=0.5) and found["active"] <= 2


@pytest.mark.parametrize(("pause", "is_busy"), [(0.3, False), (1.0, True)])
def test_a_busy_machine_is_noticed_by_steps_that_take_longer_than_others_with_as_many_drafts(models, pause, is_busy):
    """On a made-up clock: a token takes a second, every third step takes ``pause`` seconds more for each."""
    engine, clock, steps = Engine(models.target, None, max_requests=2), [0.0], count()
    step = engine.step

    def timed() -> list:
        done = step()
        clock[0] += sum(r.index > 0 for _, r in done) * (1 + pause * (next(steps) % 3 == 0))
        return done

    engine.step = timed
    jobs = [load.Job(unit.item, 16, 0) for unit in small().units[:4]]
    found = served(engine, jobs, lambda job: engine.submit(job.item.messages, max_new_tokens=job.limit), None, lambda: clock[0])
    assert found["busy"] == is_busy and found["spread"] == pytest.approx(1 + pause)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rates": "-1"}, "rates must lie above 0 and be at most 1000, got -1"),
        ({"rates": "1e9"}, "rates must lie above 0 and be at most 1000, got 1e"),
        ({"rates": "nan"}, "rates must lie above 0"),
        ({"rates": "fast"}, "rates must be numbers separated by commas, got 'fast'"),
        ({"users": "0"}, "users must lie above 0"),
        ({"users": "2.5"}, "users must be numbers"),
        ({"users": "", "rates": ""}, "there is no load"),
        ({"memory": -1.0}, "memory must be at least 0 MiB"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"per_user": 1}, "per_user must be at least 2"),
        ({"arms": "plain,generate"}, "'generate' serves one request at a time"),
        ({"arrivals": "nowhere.csv"}, "cannot read arrivals from nowhere.csv"),
    ],
    ids=str,
)
def test_an_impossible_load_is_refused_before_anything_runs(changed, words):
    with pytest.raises(ValueError, match=words):
        small(**changed)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seconds,tokens\n", "holds no arrivals"),
        ("", "cannot read arrivals"),
        ("seconds,words\n1,2\n", "columns seconds,tokens"),
        ("seconds,tokens\n2,5\n1,5\n", "rising seconds"),
        ("seconds,tokens\n-1,5\n", "rising seconds"),
        ("seconds,tokens\n1,0\n", "at least 1 token"),
        ("seconds,tokens\nsoon,5\n", "cannot read arrivals"),
    ],
)
def test_arrivals_that_cannot_be_served_are_refused_with_the_file(tmp_path, text, words):
    (tmp_path / "arrivals.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        small(arrivals=str(tmp_path / "arrivals.csv"))
    assert "arrivals.csv" in str(error.value)


def test_arrivals_of_a_file_come_at_its_times_with_its_lengths(tmp_path):
    (tmp_path / "arrivals.csv").write_text("seconds,tokens\n0.5,3\n0.5,9\n4,1\n")
    plan = small(arrivals=str(tmp_path / "arrivals.csv"), users="", rates="")
    assert [(job.at, job.limit) for job in plan.jobs(*plan.loads[0])] == [(0.5, 3), (0.5, 9), (4.0, 1)]


def test_a_grid_of_another_schema_or_kind_is_refused(tmp_path):
    frame = pd.DataFrame({"arm": ["plain"], "schema_version": [99]})
    for version, words in ((99, "schema version 99"), (1, "holds no load, it lacks")):
        write_results(frame.assign(schema_version=version), tmp_path / "other.parquet")
        with pytest.raises(ValueError, match=words):
            read_load(tmp_path / "other.parquet")


def test_the_command_measures_prints_and_is_a_mode_of_bench(models, tmp_path, monkeypatch, capsys):
    spread = {"plain": {"spread": 1.1, "busy": False}, "fixed:2": {"spread": 1.9, "busy": True}}
    monkeypatch.setattr(load, "in_turns", lambda work: {name: row | spread.get(name, {}) for name, row in in_turns(work).items()})
    monkeypatch.setattr(LoadPlan, "load", lambda self: models)
    options = "load --arms plain,fixed:2 --users 1,2 --rates= --domains code --prompts 2 --tokens 6 --threads 1 --memory 0.03 --out".split()
    assert command.main([*options, str(tmp_path / "load.parquet")]) == 0
    printed = capsys.readouterr().out
    assert "tokens per second in all" in printed and "fixed:2" in printed and "memory was full" in printed
    assert (
        "This machine was busy (steps took up to 1.9×" in printed
        and "So it was during fixed:2 (closed, 1), fixed:2 (closed, 2)\n" in printed
    )
    assert command.main(["load", "--rates", "-3"]) == 2 and "rates must lie above 0" in capsys.readouterr().err


# ---- the simulation


@pytest.fixture(scope="module")
def traces(models) -> dict[str, object]:
    times = StepTimes(dict.fromkeys(range(1, 5), 0.002), {1: 0.01, 8: 0.012})
    return {u.item.id: record(models.target, models.drafter, u.item.messages, max_new_tokens=12, times=times) for u in small().units}


@pytest.mark.parametrize("spec", ["plain", "fixed:2", "confidence:0.2", "prefix", "async", "auto"])
def test_a_simulated_engine_makes_the_rounds_of_the_real_one(models, traces, spec):
    """The same requests join and leave, and every round drafts, checks and commits the same."""
    plan = small(arms=spec)
    engine, send = server(plan, models, plan.parsed_arms[0], 3)
    policy = engine.policy
    known = Costs(TIMES, prompts={name: trace.about["prompt_tokens"] for name, trace in traces.items()})
    simulated = Simulated(traces, known, policy, 3)
    jobs = plan.jobs("closed", 3)
    real, made = [send(job) for job in jobs], [simulated.send(job) for job in jobs]
    while engine.active or engine.waiting:
        engine.step(), simulated.step()
    assert not simulated.active and not simulated.waiting and simulated.now() > 0
    for one, other in zip(real, made, strict=True):
        of = [
            [(r.committed, r.window, r.draft_tokens, r.verify_length, r.accepted, r.context) for r in each.rounds] for each in (one, other)
        ]
        assert of[0] == of[1]


def test_simulated_seconds_are_those_of_the_step_times(models, traces):
    name, trace = next(iter(traces.items()))
    known = Costs(TIMES, (0.1, 0.2, 0.3), (1.0, 0.5), prompts={name: 10})
    simulated = Simulated({name: trace}, known, FixedWindow(2), 2)
    item = next(unit.item for unit in small().units if unit.item.id == name)
    simulated.send(load.Job(item, 12, 0)), simulated.send(load.Job(item, 12, 0))
    simulated.step()
    assert simulated.now() == pytest.approx(2 * (1.0 + 0.5 * 10))
    before = simulated.now()
    simulated.step()
    expected = TIMES.at([10, 10]).step_seconds(6) + TIMES.draft_seconds(2) + 0.1 + 0.2 * 2 + 0.3 * 6
    assert simulated.now() - before == pytest.approx(expected)


def test_a_sample_stands_for_many_users(models, traces, monkeypatch):
    """Twice as many users as are simulated: the same rounds, with the step times of twice as many."""
    known = Costs(TIMES, prompts={name: trace.about["prompt_tokens"] for name, trace in traces.items()})
    jobs = small().jobs("closed", 3)
    few = simulate(traces, known, "auto", jobs, 3)
    monkeypatch.setattr("dspark.bench.simulate.SAMPLE", 3)
    many = simulate(traces, known, "auto", jobs, 3000)
    assert many["active"] == pytest.approx(1000 * few["active"], rel=0.5) and many["user_tokens_per_second"] < few["user_tokens_per_second"]
    assert many["checked"] < few["checked"] / 2, "so many users leave no room for drafts"
    assert Shared(TIMES, 2.0)(4) == TIMES(8) and Shared(TIMES, 2.0).at([9, 5])(4) == TIMES.at([9] * 4)(8)
    assert PrefixScheduler(Shared(TIMES, 2.0)).lengths([]) == []


def test_a_simulated_grid_stands_beside_the_measured_one(models, traces, tmp_path):
    frame = measure_load(small(arms="plain,auto"), models, tmp_path / "load.parquet")
    found = simulated_grid(frame, traces, [1, 3, 100_000])
    assert found["simulated"].all() and len(found) == 6 and found["measured"].notna().sum() == 4
    assert (found["tokens_per_second"] > 0).all()
    trace = next(iter(traces.values()))
    other = {"x": type(trace)(trace.rounds, trace.about | {"drafter": "0" * 16})}
    with pytest.raises(ValueError, match=f"drafter {'0' * 16}, the grid is of {drafter_digest(models.drafter)}"):
        simulated_grid(frame, other, [1])


def test_what_cannot_be_simulated_is_refused(models, traces):
    known, item = Costs(TIMES), small().units[0].item
    with pytest.raises(ValueError, match="copying is decided"):
        simulate(traces, known, "fixed+copy", [], 1)
    engine = Simulated(traces, known, FixedWindow(), 1)
    with pytest.raises(ValueError, match="longer than its trace"):
        engine.send(load.Job(item, 99, 0))
    with pytest.raises(ValueError, match="no trace of prompt"):
        Simulated({"y": next(iter(traces.values()))}, known, FixedWindow(), 1).send(load.Job(item, 9, 0))


# ---- figures


def grid(speeds: dict[str, list[float]]) -> pd.DataFrame:
    """Tokens per second in all with 1, 2 and 4 users."""
    rows = [
        {"kind": "closed", "arm": arm, "level": 2.0**i, "tokens_per_second": total, "user_tokens_per_second": total / 2**i}
        for arm, totals in speeds.items()
        for i, total in enumerate(totals)
    ]
    return pd.DataFrame(rows).assign(token_ms_p99=1.0, first_ms_p99=1.0, checked=1.0, kv_mib=1.0)


def test_a_policy_is_compared_with_the_best_window_of_each_load_and_the_best_single_one():
    frame = grid({"plain": [10, 20, 40], "fixed:2": [20, 20, 20], "fixed:2+copy": [99, 99, 99], "auto": [22, 20, 36]})
    ratios, overall, single = figures.against_windows(frame, "auto")
    assert ratios.tolist() == pytest.approx([1.1, 1.0, 0.9]) and single == "plain"
    assert overall == pytest.approx((2.2 * 1.0 * 0.9) ** (1 / 3))
    with pytest.raises(ValueError, match="'prefix' cannot be compared: measured were plain"):
        figures.against_windows(frame, "prefix")


def test_the_gain_at_matched_throughput_is_read_from_the_line():
    frame = grid({"mtp1": [10, 16, 50], "auto": [12, 20, 40]})
    gains = figures.gain_at_matched_throughput(frame, "auto", "mtp1")
    assert gains[2] == pytest.approx(11 / 8 - 1), "between 12 tokens/s a user at 12 in all and 10 at 20 lies 11 at 16"
    assert gains[[1, 4]].isna().all()


def test_the_table_behind_the_slider_has_the_arms_with_so_many_users_the_fastest_first():
    frame = grid({"plain": [10, 20, 40], "auto": [22, 20, 36]})
    assert list(figures.at_level(frame, 1).index) == ["automatic", "plain decoding"]
    assert list(figures.at_level(frame, 4).index) == ["plain decoding", "automatic"]
    assert len(figures.pareto(frame, "").axes[0].lines) == len(figures.budgets(frame, "").axes[0].lines) == 2
    assert figures.pareto(frame, "").get_suptitle() == "Most tokens/s: automatic (users: 1), plain decoding (users: 4)"
    written = figures.budgets(frame, "").axes[0].get_xticklabels() + figures.pareto(frame, "").axes[0].get_yticklabels()
    assert not [label for label in written if "$" in label.get_text()], "formulas are not typeset in these figures"


# ---- soak


def test_random_arrivals_cancels_and_bad_requests_do_no_harm(models, monkeypatch):
    """100 steps, on a clock that counts them; DSPARK_SOAK gives real seconds (make soak: 60)."""
    prompts, seconds = [random_prompt(i, 3 + 4 * i) for i in range(6)], os.environ.get("DSPARK_SOAK")
    if seconds is None:
        monkeypatch.setattr("soak.time", SimpleNamespace(monotonic=count().__next__))
    found = soak(models.target, models.drafter, prompts, float(seconds or 100), users=4, tokens=12)
    assert found["requests"] > 20 and found["cancelled"] and found["refused"] and not math.isnan(found["growth"])


def test_a_soak_finds_a_text_that_is_not_its_own(models, monkeypatch):
    settle = Engine._commit

    def shifted(self: Engine, request: object, outcome: object) -> None:
        settle(self, request, replace(outcome, committed=tuple((t + 1) % 100 for t in outcome.committed)) if self.drafter else outcome)

    monkeypatch.setattr(Engine, "_commit", shifted)
    with pytest.raises(AssertionError, match="another text than alone"):
        soak(models.target, models.drafter, [random_prompt(0, 5)], 2, users=2, tokens=8)
