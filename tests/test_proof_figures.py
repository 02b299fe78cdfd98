"""Pictures of the proof say what the frames say."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from dspark.bench.results import write_results
from dspark.lab.proof import (
    acceptance_rule,
    as_one,
    crossed_chart,
    crossed_table,
    laws,
    margins,
    p_values,
    planted_table,
    pooled_table,
    read_parts,
    readable,
)
from dspark.proof.statistics import chi2_tail


def test_kept_and_owed_mass_stack_up_to_the_targets_law() -> None:
    proposed, kept, owed = acceptance_rule([0.6, 0.3, 0.1], [0.2, 0.5, 0.3], "ABC").data
    assert proposed.y == (0.2, 0.5, 0.3)
    assert kept.y == (0.2, 0.3, 0.1) and owed.base == kept.y
    assert [a + b for a, b in zip(kept.y, owed.y, strict=True)] == pytest.approx([0.6, 0.3, 0.1])


def test_laws_stand_side_by_side_under_their_names() -> None:
    figure = laws({"target": [0.7, 0.3], "other": [0.85, 0.15]}, ["A", "B"], "title")
    assert [(bar.name, bar.y) for bar in figure.data] == [("target", (0.7, 0.3)), ("other", (0.85, 0.15))]


@pytest.fixture
def draws() -> pd.DataFrame:
    """Two policies in two settings on one prompt, and the row that pools a policy's draws over the prompts."""
    rows = {
        "policy": ["plain", "mtp1", "plain", "mtp1", "mtp1"],
        "prompt": ["chat/1"] * 4 + ["all"],
        "temperature": [1.0, 1.0, 0.7, 0.7, 0.7],
        "top_p": [1.0, 1.0, 0.9, 0.9, 0.9],
        "p_value": [0.1, 0.4, 0.5, 0.9, 0.02],
        "p_adjusted": [0.4, 0.8, 1, 1, 0.1],
        "chi2": [6.0, 4.0, 3.0, 1.0, 50.0],
        "dof": [3, 3, 3, 3, 30],
    }
    return pd.DataFrame(rows | {"n": [100] * 4 + [900], "tv": 0.01, "tv_expected": 0.02, "detectable_tv": 0.05})


def test_every_independent_test_is_a_dot_and_the_alarm_is_corrected_for_all_of_them(draws: pd.DataFrame) -> None:
    figure = p_values(draws, 0.01)
    assert [trace.x.tolist() for trace in figure.data] == [[0.1, 0.4], [0.5, 0.9]]
    assert figure.layout.shapes[0].x0 == 0.01 / 5
    assert figure.layout.title.text == "4 independent tests of 100 draws each: smallest p 0.1, corrected 0.4"


def test_pooled_draws_stand_apart_and_are_not_counted_twice(draws: pd.DataFrame) -> None:
    assert pooled_table(draws)["draws"].to_dict() == {(0.7, 0.9, "mtp1"): 900}
    assert as_one(draws) == pytest.approx(chi2_tail(14.0, 12))


def test_the_cross_is_a_cell_per_policy_and_block_size_and_a_line_per_situation() -> None:
    columns = {"prompts": 4, "equal": [4, 4, 3, 4], "tokens": 40, "accepted": [3, 0, 6, 0], "rejected": [1, 0, 2, 0], "ended_inside": 0}
    names = {"policy": ["fixed", "plain"] * 2, "block_size": [1, 1, 2, 2], "situation": ["limit", "limit", "turns", "turns"]}
    frame = pd.DataFrame(names | columns | {"context": [5, 6, 7, 8]})
    (cells,) = crossed_chart(frame).data
    assert list(cells.x) == ["1", "2"] and list(cells.y) == ["fixed", "plain"]
    assert cells.z[0].tolist() == [0.75, 0.75] and cells.z[1].tolist() == [0, 0]  # nothing drafted: nothing kept
    assert [list(row) for row in cells.text] == [["4 of 4", "3 of 4"], ["4 of 4", "4 of 4"]]
    assert crossed_chart(frame).layout.title.text.startswith("15 of 16 texts equal")
    table = crossed_table(frame)
    assert table.loc["turns"].to_dict() | {"texts": 8, "equal": 7, "drafts kept": 6, "longest context": 8} == table.loc["turns"].to_dict()


def test_a_part_that_was_not_run_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(pd.DataFrame({"bug": ["b"], "schema_version": [1]}), tmp_path / "proof-planted.parquet")
    assert list(read_parts(tmp_path)) == ["planted"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["enumeration", "sampled", "texts", "crossed"]
    assert "make proof ARGS=crossed" in printed[-1]
    with pytest.raises(ValueError, match="no folder"):
        read_parts(tmp_path / "elsewhere")


def test_divergences_are_dots_and_those_beyond_rounding_are_counted() -> None:
    columns = {"equal": [True, False, False, False], "margin": [math.nan, 0.1, 0.5, math.inf], "noise": [math.nan, 0.2, 0.3, 0.0]}
    frame = pd.DataFrame(columns | {"arm": "mtp1", "prompt": "chat/1", "first_divergence": [-1, 3, 4, 5]})
    figure = margins(frame)
    assert figure.data[1].y.tolist() == [0.1, 0.5]  # no axis can hold an infinite one
    assert figure.layout.title.text == "3 of 4 texts part, 2 of them by more than rounding explains"


def test_the_table_of_planted_bugs_names_the_test_that_caught_each() -> None:
    frame = pd.DataFrame({"bug": ["b"], "about": ["a"], "seen_in": [""], "caught_by": ["tests/test_x.py::test_y"], "failed_tests": [1]})
    assert planted_table(frame).iloc[0].to_dict() == {
        "planted bug": "b",
        "what it does": "a",
        "seen in": "",
        "caught by": "tests/test_x.py::test_y",
    }


def test_a_table_of_long_texts_is_shown_whole() -> None:
    assert "x" * 200 in readable(pd.DataFrame({"caught by": ["x" * 200]})).to_html()
