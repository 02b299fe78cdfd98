"""The paper says what data/results say: nothing is typed, and each value shows whether it was measured, simulated or quoted."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dspark.bench import published
from dspark.bench.results import read_results, write_results
from dspark.bench.stats import summarise
from dspark.paper import __main__ as command
from dspark.paper import build, drafters, figures, latency, macros, numbers, quoted, shapes, steps, tables, text

ROOT = Path(__file__).resolve().parents[1]
PAPER, DATA = ROOT / "paper", ROOT / "data"
MAIN = (PAPER / "main.tex").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generated():
    """What the committed results generate."""
    return build.generated(DATA)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of what the command reads, and nothing generated yet."""
    shutil.copytree(DATA / "results", tmp_path / "data" / "results")
    for config in DATA.glob("drafters/*/config.json"):
        (tmp_path / "data" / config.parent.relative_to(DATA)).mkdir(parents=True)
        shutil.copy(config, tmp_path / "data" / config.relative_to(DATA))
    (tmp_path / "paper").mkdir()
    for name in build.HAND_WRITTEN:
        shutil.copy(PAPER / name, tmp_path / "paper")
    monkeypatch.setenv("DSPARK_DATA", str(tmp_path / "data"))
    return tmp_path


def keep_only(folder: Path, *names: str) -> None:
    for path in (folder / "data" / "results").glob("*.parquet"):
        if path.stem not in names:
            path.unlink()


def compare(folder: Path, *what: str) -> None:
    """Results of drafters: "trained", "time", "times" (of two block sizes), or one that decodes as a real run did, but for its rounds."""
    results = folder / "data" / "results"
    speed = read_results(DATA / "results" / "speed-bfloat16-t1.parquet").query("arm == 'fixed:5'")
    for name in what:
        if name in ("trained", "sizes"):
            shapes = [("dflash", 2, 5), ("dspark", 2, 5), ("eagle", 1, 5)]
            if name == "sizes":
                shapes += [("dflash-layers4", 4, 5), ("dspark-layers1", 1, 5), ("dspark-layers4", 4, 5), ("dflash-layers1", 1, 5)]
                shapes += [("gated", 2, 5), ("rnn", 2, 5), ("dspark-block8", 2, 8), ("dflash-block8", 2, 8)]
            rows = [(*shape, 500, 9, 1.25 + i / 8, [0.3, 0.1 * i], '{"sequences": 4}') for i, shape in enumerate(shapes)]
            columns = ["drafter", "layers", "block_size", "steps", "corpus_rows", "held_out_tau", "held_out_acceptance", "recipe"]
            write_results(pd.DataFrame(rows, columns=columns).assign(schema_version=1), results / "drafters-trained.parquet")
        elif name in ("time", "times"):
            rows = [("eagle", 5, 9.0, 0.0), ("dspark", 5, 4.0, 0.5), ("dflash", 5, 3.5, 0.0)]
            rows += [("dspark-block8", 8, 8.0, 1.2)] if name == "times" else []
            columns = ["drafter", "drafter_block_size", "draft_ms", "head_ms"]
            frame = pd.DataFrame(rows, columns=columns).assign(
                verify_ms=32.0, context=256, threads=2, machine="a machine", schema_version=1
            )
            write_results(pd.concat([frame.assign(repeat=i) for i in range(3)]), results / "drafters-time.parquet")
        else:
            rounds = (speed["rounds"] * {"dflash": 1.1, "eagle": 0.9}.get(name, 1)).round().astype(int)
            write_results(speed.assign(drafter=name, rounds=rounds), results / f"drafters-t1-{name}.parquet")


def speed_frame(rows: list[tuple[str, str, float, float, float]]) -> pd.DataFrame:
    """(arm, domain, τ, T_draft, T_verify), times in ms; latency is exactly L = (T_draft + T_verify) / τ."""
    return pd.DataFrame(
        {
            "arm": arm,
            "domain": domain,
            "prompt_id": f"{domain}/{i}",
            "latency_ms": (draft + verify) / tau,
            "decoded_tokens": 100 * tau,
            "rounds": 100,
            "seconds": (draft + verify) / 10,
            "model_seconds": (draft + verify) / 10,
            "draft_ms": draft if arm != "plain" else np.nan,
            "verify_ms": verify,
            "round_ms": draft + verify,
            "equals_baseline": True,
        }
        for arm, domain, tau, draft, verify in rows
        for i in range(3)
    )


def test_committed_files_are_what_the_results_generate_byte_for_byte_and_no_latex_is_needed(copied, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert command.main([]) == 0
    made = {path.name: path.read_bytes() for path in (copied / "paper" / "generated").iterdir()}
    committed = {path.name: path.read_bytes() for path in (PAPER / "generated").iterdir()}
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == [], "run make paper and commit paper/generated"
    last = capsys.readouterr().out.splitlines()[-1]
    assert "LaTeX" in last and "apt-get install" in last


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
@pytest.mark.parametrize("measured", ["everything", "hardly anything", "drafters"])
def test_the_paper_is_typeset_whatever_was_measured(copied, measured, generated):
    if measured != "everything":
        keep_only(copied, "proof-killed")
    if measured == "drafters":
        compare(copied, "sizes", "time", "dspark", "dflash", "eagle", "dspark-block8")
    build.write(generated if measured == "everything" else build.generated(copied / "data"), copied / "paper" / "generated")
    pdf = command.typeset(copied / "paper")
    log = pdf.with_suffix(".log").read_text(errors="replace")
    assert pdf.read_bytes().startswith(b"%PDF")
    assert not re.findall(r"undefined|multiply defined|Missing character", log)


def test_no_result_is_typed_in_the_text(generated):
    assert build.complaints(PAPER, generated) == []


def test_a_typed_result_or_a_lost_value_stops_the_build(generated, tmp_path):
    for name in build.HAND_WRITTEN:
        shutil.copy(PAPER / name, tmp_path)
    (tmp_path / "main.tex").write_text(MAIN.replace(r"\maketitle", r"\maketitle It is 1.57 times as fast."), encoding="utf-8")
    without = generated | {"numbers.tex": generated["numbers.tex"].replace(rb"\newcommand{\MeasuredPlantedBugs}", b"%")}
    del without["figure-exactness.pdf"]
    wrong = "\n".join(build.complaints(tmp_path, without))
    assert len(wrong.splitlines()) == 3
    assert "'1.57' is a literal" in wrong and "MeasuredPlantedBugs is defined nowhere" in wrong and "figure-exactness.pdf" in wrong


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("runs at 1.57 of", ["1.57"]),
        ("runs at .57 of", [".57"]),
        ("in $p=0.05$ of", ["0.05"]),
        (r"gains 57\,\% here", [r"57\,\%"]),
        (r"gains 57\% here", [r"57\%"]),
        ("gains 57 percent", ["57 percent"]),
        ("gains 57 per cent", ["57 per cent"]),
        (r"is 2$\times$ as fast", [r"2$\times"]),
        (r"is $2\times$ as fast", [r"2\times"]),
        ("is 2× as fast", ["2×"]),
        ("34,085 branches", ["34,085"]),
        (r"34{,}085 branches", [r"34{,}085"]),
        ("takes 29 ms", ["29"]),
        ("takes 29ms", ["29"]),
    ],
)
def test_a_typed_result_is_found_with_its_line(planted, found):
    assert text.literals(f"\\documentclass[10.5pt]{{x}}\n\\begin{{document}}\n{planted}\n\\end{{document}}\n7.5") == [(3, f) for f in found]


@pytest.mark.parametrize(
    "innocent",
    [
        r"\SettingLevel of $x_0,\dots,x_\gamma$ with $\ell=0$, $1-\tfrac12p$",
        r"\label{sec:1.5} Section~\ref{sec:1.5}, \cite{dspark2.1}, \includegraphics[width=0.5\textwidth]{a1.5}",
        "% 57 % in a comment, 1.5\nMTP-1 and Eagle-3",
        r"\begin{equation} a = 1 - 2x \end{equation}",
    ],
)
def test_notation_names_and_comments_are_no_results(innocent):
    assert text.literals(innocent) == []


def test_a_value_that_nothing_defines_is_found_only_where_it_is_shown():
    tex = r"\ifHasA \MeasuredOne \else \QuotedTwo \fi \SimulatedThree \measured{x}"
    assert text.unknown(text.shown(tex, {"A": True}), ["SimulatedThree"]) == ["MeasuredOne"]
    assert text.unknown(text.shown(tex, {"A": False}), ["SimulatedThree"]) == ["QuotedTwo"]
    nested = r"a\ifHasA b\ifHasB c\else d\fi e\fi f"
    shown = [text.shown(nested, {"A": a, "B": b}) for a, b in ((True, True), (True, False), (False, True))]
    assert shown == ["a b c e f", "a b d e f", "a f"]


@pytest.mark.parametrize("wrong", [r"\ifHasB x\fi", r"\ifHasA x", r"x\fi"])
def test_a_broken_switch_is_named(wrong):
    with pytest.raises(ValueError, match="ifHas"):
        text.shown(wrong, {"A": True})


def test_the_prefix_of_every_value_tells_its_look_and_the_looks_differ(generated):
    tex = (generated["numbers.tex"] + generated["quoted.tex"]).decode()
    every = re.findall(r"\\newcommand\{\\(Measured|Simulated|Quoted|Setting)\w+\}\{(.*)", tex)
    assert {kind for kind, _ in every} == set(macros.KINDS) and len(every) == tex.count(r"\newcommand")
    for kind, definition in every:
        assert set(re.findall(r"\\(measured|simulated|quoted|setting)\{", definition)) == {kind.lower()}, definition
    looks = dict(re.findall(r"\\newcommand\{\\(measured|simulated|quoted|setting)\}\[1\]\{(.*)\}", MAIN))
    assert len(looks) == len(set(looks.values())) == 4
    # Readable in a grey print: not by colour alone.
    assert r"\textit" in looks["simulated"] and r"\textsf" in looks["quoted"] and "text" not in looks["setting"]


def test_quoted_values_stand_in_one_file_with_their_source(generated):
    assert [name for name, content in generated.items() if rb"\newcommand{\Quoted" in content] == ["quoted.tex"]
    lines = generated["quoted.tex"].decode().splitlines()[1:]
    assert len(lines) == len(quoted.MACROS) and all(" % DSpark" in line for line in lines)
    assert r"\newcommand{\Quoted" not in MAIN
    with pytest.raises(ValueError, match="source"):
        macros.Macro(macros.QUOTED, "Range", "57")
    with pytest.raises(ValueError, match="source"):
        macros.Macro(macros.MEASURED, "Range", "57", "a newspaper")


@pytest.mark.parametrize(
    "kept",
    [("speed-bfloat16-t1", "proof-texts"), ("proof-killed", "memory-bfloat16-t0"), ("rollouts-dev",), ("traces-test", "sps-bfloat16")],
)
def test_what_was_not_measured_is_left_out_and_nothing_else(copied, kept):
    keep_only(copied, *kept)
    made = build.generated(copied / "data")
    assert build.complaints(copied / "paper", made) == []
    flags = numbers.flags(numbers.read_frames(copied / "data" / "results"))
    assert text.included(text.shown(MAIN, flags)) == set(made)


@pytest.mark.parametrize(
    "measured",
    [
        ("trained",),
        ("time",),
        ("times",),
        ("dspark",),
        ("dflash", "eagle"),
        ("dspark", "eagle", "time"),
        ("dspark", "dflash", "eagle", "trained", "time"),
        ("sizes",),
    ],
)
def test_any_part_of_the_comparison_of_drafters_may_be_missing(copied, measured):
    keep_only(copied, "proof-killed")
    compare(copied, *measured)
    made = build.generated(copied / "data")
    assert build.complaints(copied / "paper", made) == []
    flags = numbers.flags(numbers.read_frames(copied / "data" / "results"))
    assert text.included(text.shown(MAIN, flags)) == set(made)


def test_dsparks_gain_is_told_with_its_sign_and_in_words_that_follow_from_its_interval(copied):
    keep_only(copied, "proof-killed")
    compare(copied, "dspark", "dflash", "eagle", "time")
    made = build.generated(copied / "data")
    told = dict(re.findall(r"\\newcommand\{\\Measured(ComparedOver\w+)\}\{\\measured\{(.*)\}\\xspace\}", made["numbers.tex"].decode()))
    assert told["ComparedOverDflash"].startswith("$+$") and told["ComparedOverDflashVerdict"] == "more"
    assert told["ComparedOverEagle"].startswith("$-$") and told["ComparedOverEagleVerdict"] == "fewer"
    assert drafters.verdict(-0.1, 0.1) == "neither clearly more nor clearly fewer"
    order = [made["table-drafters.tex"].decode().index(name) for name in ("\nDSpark &", "\nDFlash &", "\nautoregressive &")]
    assert order == sorted(order)
    # L = (T_draft + T_verify) / τ, computed from what was measured.
    taus = drafters.tau_gains(drafters.joined([read_results(p) for p in (copied / "data" / "results").glob("drafters-t1-*")], "here"))
    tau = taus.set_index("drafter")["mean"]["dspark"]
    assert rf"DSpark \simulated{{{36 / tau:.1f}\,ms}}" in made["numbers.tex"].decode()


def test_depth_and_block_size_are_told_where_both_sides_were_trained(copied):
    keep_only(copied, "proof-killed")
    compare(copied, "sizes")
    told = dict(re.findall(r"Shape(\w+)\}\{\\\w+\{(.*)\}\\xspace\}", build.generated(copied / "data")["numbers.tex"].decode()))
    assert (told["FewestLayers"], told["MostLayers"], told["ShallowDspark"], told["DeepDflash"]) == ("1", "4", "1.75", "1.62")
    assert told["DepthVerdict"] == "more" and told["BlockVerdict"] == "does not grow throughout"
    assert (told["SmallestBlock"], told["SmallestGain"]) == ("5", r"10.0\,\%") and told["LargestGain"].startswith("$-$")


def test_the_heads_share_of_a_round_is_told_over_the_block_sizes_that_were_timed(copied):
    keep_only(copied, "proof-killed")
    compare(copied, "times")
    made = build.generated(copied / "data")["numbers.tex"].decode()
    told = dict(re.findall(r"\\(?:Measured|Setting)HeadShare(\w+)\}\{\\\w+\{(.*)\}\\xspace\}", made))
    assert told == {"Blocks": "5 and 8", "Low": r"1.4\,\%", "High": r"3.0\,\%"}


def test_drafters_that_decoded_other_prompts_are_refused(copied):
    compare(copied, "dspark", "dflash")
    path = copied / "data" / "results" / "drafters-t1-dflash.parquet"
    write_results(read_results(path).assign(n=3), path)
    with pytest.raises(ValueError, match="measured with n"):
        build.generated(copied / "data")


def test_replayed_speeds_look_computed_and_calibration_looks_measured(generated):
    assert rb"\simulated{" in generated["table-policies.tex"] and rb"\measured{" not in generated["table-policies.tex"]
    assert rb"\measured{" in generated["table-confidence.tex"] and rb"\simulated{" not in generated["table-confidence.tex"]


def test_a_published_number_stands_in_one_place():
    """Notebooks and paper quote the same table."""
    holders = [
        path.name for path in (ROOT / "dspark").rglob("*.py") if re.search(r"\b(6\.11|0\.769|1\.57|0\.013)\b", path.read_text("utf-8"))
    ]
    assert holders == ["published.py"]


def test_a_further_run_gets_its_table_and_one_with_mtp1_and_without_copying_is_described_as_such(copied):
    """One slice of a run is enough: two prompts of each domain."""
    results = copied / "data" / "results"
    keep_only(copied, "speed-bfloat16-t0")
    frame = read_results(results / "speed-bfloat16-t0.parquet").query("arm != 'fixed+copy'")
    frame = frame[frame["prompt_id"].isin(frame.groupby("domain").head(8)["prompt_id"])]
    for name in ("speed-bfloat16-t0", "speed-float32-t0"):
        write_results(frame, results / f"{name}.parquet")
    made = build.generated(copied / "data")
    assert build.complaints(copied / "paper", made) == []
    shown = text.shown(MAIN, numbers.flags(numbers.read_frames(results)))
    assert r"\MeasuredGreedyBlockOverMtp" in shown and "GreedyCopy" not in shown
    assert rb"\label{tab:speed-float32-t0}" in made["tables-more-runs.tex"]
    assert text.included(shown) == set(made)


def test_bad_results_are_refused_by_name(tmp_path):
    (tmp_path / "traces-x.parquet").write_bytes(b"not the paper's")
    with pytest.raises(ValueError, match=r"no results in .*make bench"):
        numbers.read_frames(tmp_path)
    frame = read_results(DATA / "results" / "speed-bfloat16-t0.parquet")
    write_results(frame.assign(schema_version=99), tmp_path / "speed-x.parquet")
    with pytest.raises(ValueError, match=r"speed-x\.parquet has schema version 99"):
        numbers.read_frames(tmp_path)
    write_results(frame.drop(columns="schema_version"), tmp_path / "speed-x.parquet")
    with pytest.raises(ValueError, match=r"speed-x\.parquet has schema version none"):
        numbers.read_frames(tmp_path)
    write_results(frame.iloc[:0], tmp_path / "speed-x.parquet")
    with pytest.raises(ValueError, match=r"speed-x\.parquet has no rows"):
        numbers.read_frames(tmp_path)
    (tmp_path / "speed-x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="not a Parquet file"):
        numbers.read_frames(tmp_path)
    with pytest.raises(ValueError, match="no training record"):
        numbers.training_record(tmp_path)


def test_files_of_earlier_results_do_not_stay(tmp_path):
    build.write({"a.tex": b"1", "b.pdf": b"2"}, tmp_path)
    build.write({"a.tex": b"3"}, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.tex": b"3"}


PLACES = {
    (-0.5, 0.569): "below",
    (0.5, 0.57): "across the lower end of",
    (0.57, 0.85): "inside",
    (0.6, 0.86): "across the upper end of",
    (0.5, 0.9): "across all of",
    (0.851, 1.0): "above",
    (float("nan"), float("nan")): "unknown to",
}


@pytest.mark.parametrize("interval", PLACES)
def test_a_gain_is_placed_against_the_published_range_by_its_interval(interval):
    assert published.place(*interval) == PLACES[interval]


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.01, 0.02, 0.04], "grows"),
        ([0.01, 0.05, 0.04], "grows, but for one step,"),
        ([0.04, 0.01], "does not grow throughout"),
        ([0.01, 0.05, 0.02, 0.04, 0.03], "does not grow throughout"),
    ],
)
def test_a_gap_over_block_sizes_is_told_step_by_step(gains, verdict):
    both = pd.DataFrame({"dspark": 1 + np.array(gains), "dflash": 1.0}, index=range(2, 2 + len(gains)))
    assert [m.text for m in shapes._blocks(both) if m.name == "ShapeBlockVerdict"] == [verdict]


@pytest.mark.parametrize(("gain", "verdict"), [(0.006, "as much"), (-0.006, "as much"), (0.02, "more"), (-0.02, "less")])
def test_a_percent_between_two_drafters_is_no_verdict(gain, verdict):
    assert shapes._verdict(gain) == verdict


def test_the_gain_over_mtp1_on_a_second_machine_is_told_where_both_runs_are_there(copied):
    frames = numbers.read_frames(copied / "data" / "results")
    assert numbers.flags(frames)["Second"]
    told = {m.name: m.text for m in numbers._second(numbers.second_machine(frames))}
    of_sampled = summarise(frames["speed-bfloat16-t1-avx2"], "mtp1").set_index(["arm", "domain"]).loc[("fixed:5", "all")]
    assert told["SecondSampledOverMtp"] == macros.times(of_sampled["speedup"]) and "AVX2" in told["SecondPlace"]
    assert told["SecondGreedyOverMtp"] != told["SecondSampledOverMtp"]
    del frames["speed-bfloat16-t1-avx2"]
    assert not numbers.flags(frames)["Second"]


def test_where_nothing_but_the_models_takes_time_the_computed_speedup_is_the_timed_one():
    rows = [("plain", "code", 1, 0, 30), ("plain", "chat", 1, 0, 40), ("fixed", "code", 2.5, 5, 32), ("fixed", "chat", 1.2, 6, 45)]
    lines = latency.with_prediction(speed_frame(rows))
    assert list(lines["domain"]) == ["code", "chat", "all"]
    np.testing.assert_allclose(lines["predicted"], lines["speedup"], rtol=1e-12)
    np.testing.assert_allclose(lines["predicted"][:2], [2.5 * 30 / 37, 1.2 * 40 / 51], rtol=1e-12)
    assert latency.largest_error(lines) < 1e-12
    copying = speed_frame(rows).assign(
        draft_ms=lambda frame: frame["draft_ms"].clip(upper=0.1)
    )  # most rounds looked their drafts up: the median knows nothing of the others
    np.testing.assert_allclose(latency.with_prediction(copying)["predicted"], lines["predicted"], rtol=1e-12)
    slower = lines.assign(speedup=lines["speedup"] * [1, 0.8, 1])
    assert latency.largest_error(slower) == pytest.approx(0.25)


@pytest.mark.parametrize("changed", [{}, {"machine": "another"}, {"dtype": "float32"}, {"threads": 1}])
def test_step_times_foretell_only_runs_in_the_same_place(changed):
    measured, run = (read_results(DATA / "results" / f"{name}.parquet") for name in (steps.FILE, "speed-bfloat16-t0"))
    frames = {steps.FILE: measured} | {name: run.assign(**changed) for name in ("speed-x", "peers-x")}
    cases = steps.foreseen(frames)
    assert cases.empty if changed else cases["arm"].value_counts()["fixed:5"] == 2 * run["domain"].nunique()
    own = steps.foreseen(frames, own=True)
    assert len(own) == len(cases) and (changed or (own["predicted"] != cases["predicted"]).any())
    assert steps.flags(frames) == {"Foreseen": not changed, "ForeseenMany": not changed}
    assert any("Foreseen" in macro.name for macro in steps.part(frames).macros) == (not changed)


def test_step_times_that_an_older_version_adjusted_are_refused():
    measured = read_results(DATA / "results" / f"{steps.FILE}.parquet").drop(columns="processes")
    with pytest.raises(ValueError, match=r"older version, not as measured.*python -m dspark\.bench\.sps"):
        steps.part({steps.FILE: measured})


def test_runs_of_few_prompts_are_counted_but_not_among_those_of_many():
    measured, run = (read_results(DATA / "results" / f"{name}.parquet") for name in (steps.FILE, "speed-bfloat16-t0"))
    few = run[run["prompt_id"].isin(run.groupby("domain").head(1)["prompt_id"])].assign(n=1)
    told = {m.name: m.text for m in steps.part({steps.FILE: measured, "speed-x": run, "peers-x": few}).macros if "Foreseen" in m.name}
    assert int(told["ForeseenCases"]) == 2 * int(told["ForeseenManyCases"])
    assert int(told["ForeseenManyWithin"]) <= int(told["ForeseenWithin"])
    alone = {steps.FILE: measured, "peers-x": few}
    assert steps.flags(alone) == {"Foreseen": True, "ForeseenMany": False}
    assert not any("ForeseenMany" in m.name for m in steps.part(alone).macros)


def test_tables_give_measured_and_computed_speedups_their_own_look():
    rows = [("plain", "code", 1, 0, 30), ("fixed", "code", 2.0, 5, 35)]
    table = tables.latency({"Greedy": speed_frame(rows)}, {"Greedy": ["fixed"]}, "tab:x")
    assert table.count(r"\measured{1.50$\times$} & \simulated{1.50$\times$}") == 2
    assert r"\measured{" not in tables.published("tab:y")


def test_shares_have_wilsons_interval():
    low, high = figures.wilson(np.array([0.0, 5.0, 10.0]), np.array([10.0, 10.0, 10.0]))
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225], atol=1e-4)  # Newcombe, 1998
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("value", "tex"),
    [
        (macros.integer(34085), "34{,}085"),
        (macros.times(1.405), r"1.41$\times$"),
        (macros.percent(-0.31), r"$-$31\,\%"),
        (macros.number(float("nan")), "--"),
        (macros.significant(0.98), "0.98"),
        (macros.significant(1.5e-7), r"$1.5\cdot10^{-7}$"),
        (macros.listed(["a"]), "a"),
        (macros.listed(["a", "b", "c"]), "a, b and c"),
        (macros.escaped("50 % of {a_b} & τ"), r"50 \% of \{a\_b\} \& $\tau$"),
        (macros.code("tests/a_b.py"), r"\texttt{tests/\allowbreak{}a\_\allowbreak{}b.py}"),
    ],
)
def test_values_are_written_as_tex_reads_them(value, tex):
    assert value == tex


def test_a_character_that_the_fonts_lack_is_refused():
    with pytest.raises(ValueError, match="no TeX is known for '猫'"):
        macros.escaped("猫")
