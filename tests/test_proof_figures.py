"""Pictures of the proof say what the frames say."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from dspark.lab.proof import acceptance_rule, laws, margins, p_values, planted_table


def test_kept_and_owed_mass_stack_up_to_the_targets_law() -> None:
    proposed, kept, owed = acceptance_rule([0.6, 0.3, 0.1], [0.2, 0.5, 0.3], "ABC").data
    assert proposed.y == (0.2, 0.5, 0.3)
    assert kept.y == (0.2, 0.3, 0.1) and owed.base == kept.y
    assert [a + b for a, b in zip(kept.y, owed.y, strict=True)] == pytest.approx([0.6, 0.3, 0.1])


def test_laws_stand_side_by_side_under_their_names() -> None:
    figure = laws({"target": [0.7, 0.3], "other": [0.85, 0.15]}, ["A", "B"], "title")
    assert [(bar.name, bar.y) for bar in figure.data] == [("target", (0.7, 0.3)), ("other", (0.85, 0.15))]


def test_every_test_is_a_dot_and_the_alarm_is_corrected_for_their_number() -> None:
    rows = {
        "policy": ["plain", "mtp1"] * 2,
        "temperature": [1.0, 1.0, 0.7, 0.7],
        "top_p": [1.0, 1.0, 0.9, 0.9],
        "p_value": [0.1, 0.4, 0.5, 0.9],
    }
    frame = pd.DataFrame(rows | {"prompt": "chat/1", "n": 100, "tv": 0.01, "tv_expected": 0.02, "p_adjusted": [0.4, 0.8, 1, 1]})
    figure = p_values(frame, 0.01)
    assert [trace.x.tolist() for trace in figure.data] == [[0.1, 0.4], [0.5, 0.9]]
    assert figure.layout.shapes[0].x0 == 0.01 / 4
    assert "smallest corrected p 0.4" in figure.layout.title.text


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
