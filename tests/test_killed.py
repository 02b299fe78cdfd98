"""Ended by SIGKILL, a job loses nothing that was finished, and its end is that of a run that nobody killed."""

from __future__ import annotations

import pandas as pd
import pytest

from dspark.proof import killed


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return killed.run(tmp_path_factory.mktemp("proof") / "proof-killed.parquet", smoke=True)


@pytest.mark.parametrize("job", ["training", "benchmark"])
def test_whatever_kills_it_a_job_ends_as_if_nobody_had(frame: pd.DataFrame, job: str) -> None:
    rows = frame[frame["job"] == job]
    assert sorted(rows["cause"]) == ["moment"] * 3 + ["write"]
    assert rows["equal"].all()
    assert (rows["finished_after"] >= rows["finished_before"]).all()
    assert (rows["finished_after"] <= rows["killed_at_step"]).all() or job == "training"


def test_some_kills_found_something_finished_and_something_not(frame: pd.DataFrame) -> None:
    assert (frame["finished_after"] > 0).any()
    assert (frame["moment"] > 0).all()


def test_the_table_names_both_jobs_and_every_row_its_origin(frame: pd.DataFrame) -> None:
    shown = killed.table(frame)
    assert "4 of 4" in shown.splitlines()[1] and shown.splitlines()[1].startswith("training") and "benchmark" in shown
    assert {"machine", "torch", "revision", "target_digest", "threads"} <= set(frame.columns)
