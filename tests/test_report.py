"""RESULTS.md and README's table are what ``python data/report.py`` makes of data/results, and say what the rows say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dspark.bench.results import SCHEMA_VERSION, read_rows, write_results
from dspark.bench.rollouts import FIT, FITTED, judged, rollouts_of
from dspark.bench.stats import caption
from dspark.tune.calibrate import calibrate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
report = __import__("report")  # data/ is no package
over, same_texts, speed_table = report.over, report.same_texts, report.speed_table
PLACE = {"schema_version": SCHEMA_VERSION, "threads": 2, "machine": "a machine", "device": "cpu", "dtype": "bfloat16"}


def speed_rows(gains: dict[str, float], n: int = 8) -> pd.DataFrame:
    """A speed file of two domains; gains: arm → exact speed-up over plain. Arms above 1 commit two tokens per round."""
    rows, rng = [], np.random.default_rng(0)
    for domain in ("code", "chat"):
        for i in range(n):
            plain_ms = rng.uniform(15, 25)
            for arm, gain in {"plain": 1.0, **gains}.items():
                seconds = 32 * plain_ms / gain / 1e3
                rows.append(
                    {"arm": arm, "domain": domain, "prompt_id": f"{domain}/{i}", "equals_baseline": True, "latency_ms": plain_ms / gain}
                    | {"decoded_tokens": 32, "rounds": 16 if gain > 1 else 32, "seconds": seconds, "model_seconds": seconds}
                    | {"draft_ms": 1.0, "verify_ms": 16.0, "round_ms": 18.0}
                )
    about = {"baseline": "plain", "target": "tiny", "temperature": 0.0, "max_new_tokens": 33, "n": n, "split": "test"}
    return pd.DataFrame(rows).assign(**about, **PLACE)


def test_readme_and_results_are_exactly_what_the_generator_makes_of_the_committed_files():
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "README.md"))
    assert page == report.results_page(ROOT / "data"), "run make results"
    assert readme == report.filled(readme, report.headline_table(ROOT / "data")), "run make results"


def test_the_calibration_on_the_page_is_the_one_that_the_shipped_drafter_carries():
    rows = read_rows(ROOT / "data" / "results" / "rollouts-dev.parquet")
    fitted = calibrate(rollouts_of(rows, half=FIT, temperature=FITTED))
    config = ROOT / "data" / "drafters" / "smollm2-135m-instruct" / "config.json"
    assert list(fitted.temperatures) == pytest.approx(json.loads(config.read_text(encoding="utf-8"))["sts_temperatures"], rel=1e-6)
    line = judged(rows, fitted).query("temperature == 1 and position == 1").iloc[0]
    assert f"{line['ece_before']:.1%} → {line['ece_after']:.1%} ({line['noise']:.1%})" in report._calibration(rows)


def test_table_has_every_arm_and_domain_with_interval_and_tau():
    frame = speed_rows({"generate": 0.9, "fixed:5": 1.7})
    words, table = speed_table(frame).split("\n\n")
    head, rule, *rows = table.split("\n")
    assert head == "|  | code | chat | geometric mean | tokens/s |" and rule == "| --- | --- | --- | --- | --- |"
    assert [row.split(" | ")[0] for row in rows] == ["| `generate`", "| `fixed:5`"]
    assert rows[1].strip("| ").split(" | ")[1:-1] == ["1.70× [1.70, 1.70], τ 2.00"] * 3
    plain = frame.query("arm == 'plain'").sum(numeric_only=True)
    speed = plain["decoded_tokens"] / plain["seconds"]
    assert [row.strip("| ").split(" | ")[-1] for row in rows] == [f"{gain * speed:.0f}" for gain in (0.9, 1.7)]
    assert f"which writes {speed:.0f} tokens/s" in words
    assert "τ" not in rows[0] and caption(frame) in words
    assert caption(frame) == "tiny, greedy, bfloat16, 33 new tokens, n = 8 test prompts per domain, 2 threads of a machine"


def test_remarks_hold_the_ratios_to_mtp1_and_generate_and_the_number_of_equal_texts():
    frame = speed_rows({"generate": 0.9, "mtp1": 1.2, "fixed:5": 1.8})
    frame["equals_baseline"] = (frame["arm"] != "fixed:5") | (frame["domain"] != "code")
    assert over(frame, "mtp1") == "Over `mtp1`, geometric mean: `fixed:5` 1.50× [1.50, 1.50]."
    assert over(frame, "generate") == "Over `generate`, geometric mean: `fixed:5` 2.00× [2.00, 2.00]."
    assert same_texts(frame).endswith("token for token: `generate` 16 of 16, `mtp1` 16 of 16, `fixed:5` 8 of 16.")
    assert same_texts(frame.assign(temperature=1.0)) == "" and over(speed_rows({"fixed:5": 1.8}), "mtp1") == ""
    assert over(frame, "mtp1") in speed_table(frame) and same_texts(frame) in speed_table(frame)
    assert over(frame, "generate") in speed_table(frame, texts=False) and same_texts(frame) not in speed_table(frame, texts=False)


def test_sections_without_a_file_are_left_out_and_a_missing_gpu_is_said(tmp_path):
    page = report.results_page(tmp_path)
    rest = page.removeprefix(report.INTRODUCTION).strip()
    assert page.startswith(report.INTRODUCTION) and rest.startswith("## On a GPU\n\nNot measured on a GPU.") and rest.count("##") == 1


def test_readme_table_has_four_rows_and_a_missing_arm_is_named(tmp_path):
    path = tmp_path / "results" / report.HEADLINE
    gains = {"generate": 0.9, "mtp1": 1.4, "fixed:5": 1.7, "auto+copy": 2.0}
    write_results(speed_rows(gains | {"prefix": 1.8}), path)
    assert re.findall(r"^\| `(.+?)`", report.headline_table(tmp_path), flags=re.MULTILINE) == list(gains)
    write_results(speed_rows({"mtp1": 1.4}), path)
    with pytest.raises(ValueError, match=r"no arm generate, fixed:5, auto\+copy: measure it again"):
        report.headline_table(tmp_path)


def test_peak_memory_is_a_ratio_to_the_baselines(tmp_path):
    rows = [{"arm": arm, "baseline": "plain", "n": 3, "peak_rss_mib": mib} for arm, mib in (("plain", 400.0), ("fixed:5", 480.0))]
    write_results(pd.DataFrame(rows).assign(**PLACE), tmp_path / "results" / "memory-x.parquet")
    line = "Peak memory over `plain` (400 MiB; n = 3 prompts per domain; 2 threads of a machine): `fixed:5` 1.20×."
    assert line in report.results_page(tmp_path)


def test_step_times_are_a_table_in_milliseconds(tmp_path):
    rows = [("verify", context, tokens, context / 1e4 + tokens / 1e3) for context in (100, 2000) for tokens in (1, 2, 6)]
    rows += [("draft", context, tokens, tokens / 1e3) for context in (100, 2000) for tokens in (1, 5)]
    frame = pd.DataFrame(rows, columns=["kind", "context", "tokens", "seconds"]).assign(**PLACE)
    write_results(frame, tmp_path / "results" / "sps-x.parquet")
    page = report.results_page(tmp_path)
    assert "| tokens of context | 1 token | 2 tokens | 6 tokens | a drafted block |" in page
    assert "| 100 | 11.0 | 12.0 | 16.0 | 5.0 |" in page and "| 2,000 | 201.0 | 202.0 | 206.0 | 5.0 |" in page


def test_parts_of_the_proof_that_were_run_are_one_line_each(tmp_path):
    greedy, planted = {"equal": 12_480, "texts": 12_481, "ways": {}}, {"caught": 58, "of": 59, "bugs": []}
    parts = {name: part | {"commit": "abc1234"} for name, part in {"greedy": greedy, "planted": planted}.items()}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "proof.json").write_text(json.dumps(parts), encoding="utf-8")
    lines = [line for line in report.results_page(tmp_path).split("## Exactness")[1].splitlines() if line.startswith("- ")]
    assert lines == [
        "- Greedy float32 texts of tiny random models: 12,480 of 12,481 equal those of `model.generate`. (Commit abc1234.)",
        "- Planted bugs: 58 of 59 caught by the test that each names. (Commit abc1234.)",
    ]


@pytest.mark.parametrize(("change", "words"), [({"schema_version": 99}, "schema version 99"), (None, "no rows")])
def test_a_file_of_another_version_or_without_rows_is_refused_in_one_line(tmp_path, change, words):
    frame = speed_rows({"fixed:5": 1.7})
    write_results(frame.assign(**change) if change else frame[:0], tmp_path / "results" / "speed-x.parquet")
    with pytest.raises(ValueError, match=rf"speed-x\.parquet has {words}.*dspark\.bench"):
        report.results_page(tmp_path)


def test_only_what_is_between_the_markers_changes():
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.filled(page, "new")
    assert once == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n" and report.filled(once, "new") == once
    for broken in ("nothing", report.BEGIN, f"{report.END}{report.BEGIN}"):
        with pytest.raises(ValueError, match="once each"):
            report.filled(broken, "new")


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "data/README.md", "data/LOG.md"])
def test_every_file_that_a_page_links_to_is_there(name):
    path = ROOT / name
    links = re.findall(r"\]\(([^):]+)\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_readme_lists_every_notebook():
    listed = set(re.findall(r"\((notebooks/[^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} == listed


def test_llamacpps_counts_stand_beside_ours_with_their_difference(tmp_path):
    assert report._llamacpp(tmp_path / "llamacpp.json") == ""
    about = {"xllamacpp": "xllamacpp 1", "split": "dev", "dtype": "bfloat16", "max_new_tokens": 33, "block_size": 5}
    prompts = [
        {"prompt_id": f"code/{i}", "llamacpp_tokens": 32, "llamacpp_rounds": 16, "dspark_tokens": 32, "dspark_rounds": n}
        | {"compared_rounds": 15, "equal_rounds": 14, "llamacpp_accepted": 16, "dspark_accepted": 15}
        for i, n in enumerate((16, 20))
    ]
    (tmp_path / "llamacpp.json").write_text(json.dumps({"about": about, "prompts": prompts}), encoding="utf-8")
    words, table = report._llamacpp(tmp_path / "llamacpp.json").split("\n\n")
    assert "+0.200 ± 0.392 (95 %)" in words and "in 28 of 30 (30 and 32 drafts" in words
    assert table.splitlines()[2:] == ["| xllamacpp 1 | 64 | 32 | 2.000 |", "| this repository | 64 | 36 | 1.778 |"]


def test_llamacpps_speed_with_drafts_stands_beside_what_its_own_times_predict():
    windows = [{"window": 0, "tokens": 100, "rounds": 100, "seconds": 1.0, "draft_ms": 0.0}]
    windows += [{"window": n, "tokens": 100, "rounds": 50, "seconds": 2.0, "draft_ms": 2.0 * n} for n in (1, 2)]
    times = {"about": {"threads": 2, "machine": "m", "split": "dev", "dtype": "bfloat16"}, "prompts": 4, "max_new_tokens": 64}
    table = report._llamacpp_times(times | {"step_ms": [10.0, 18.0, 26.0], "acceptance": [0.5, 0.5], "windows": windows})
    assert "100 tokens/s plainly" in table
    assert table.splitlines()[-2:] == ["| 1 | 18.0 | 2.0 | 2.00 | 0.75× | 0.50× |", "| 2 | 26.0 | 4.0 | 2.00 | 0.58× | 0.50× |"]
