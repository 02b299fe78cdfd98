"""The tests would notice: every bug of tests/planted, planted in a copy, makes a test fail that the bug names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dspark.proof import planted
from dspark.proof.planted import Bug, Edit, Trial, bugs, clean, run, table, try_out

pytestmark = pytest.mark.timeout(900)  # the first test waits for the trials of all

BUGS = bugs()
SAID = ("assert", "AssertionError", "Failed: DID NOT RAISE", "Failed: Timeout", "ValueError")  # a test's own words, or a check of ours
RULE, RESIDUAL = "dspark/verify/accept.py", "mass = owed.sum()"
SHOWN = "tests/test_verify.py::test_the_residual_is_a_distribution_over_what_the_target_still_owes"
CONTROLS = [
    Bug("harmless", "a change that changes nothing", "", (SHOWN,), (Edit(RULE, RESIDUAL, "mass = owed.sum(-1)"),)),
    Bug("broken", "a package that cannot be imported", "", (SHOWN,), (Edit(RULE, RESIDUAL, "mass ="),)),
    Bug("nameless", "a test that does not exist", "", (f"{SHOWN}_at_all",), (Edit(RULE, RESIDUAL, "mass = 1"),)),
]


@pytest.fixture(scope="module")
def trials() -> dict[str, Trial]:
    return {bug.name: trial for bug, trial in try_out([clean(BUGS), *BUGS, *CONTROLS])}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught_by_every_test_that_it_names(bug: Bug, trials: dict[str, Trial]) -> None:
    for name, case in trials[bug.name].caught(bug).items():
        assert case, f"{bug.name} survives {name}"
        assert trials[bug.name].failed[case].startswith(SAID)  # not because the planted line itself crashes


def test_without_a_bug_every_named_test_passes(trials: dict[str, Trial]) -> None:
    trial = trials["clean"]
    assert not trial.error and not trial.failed
    assert trial.passed >= len(clean(BUGS).tests)


def test_a_change_that_is_no_bug_is_caught_by_nothing(trials: dict[str, Trial]) -> None:
    harmless = CONTROLS[0]
    assert trials["harmless"].caught(harmless) == {SHOWN: ""}
    assert trials["harmless"].passed > 0


@pytest.mark.parametrize("control", CONTROLS[1:], ids=lambda bug: bug.name)
def test_a_copy_whose_tests_cannot_run_proves_nothing(control: Bug, trials: dict[str, Trial]) -> None:
    assert not trials[control.name].failed
    with pytest.raises(ValueError, match=control.name):
        trials[control.name].caught(control)


def test_a_killed_run_goes_on_where_it_stopped(trials: dict[str, Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, tried = tmp_path / "planted.parquet", []

    def measured(chosen: Sequence[Bug]) -> Iterator[tuple[Bug, Trial]]:
        for bug in chosen:
            tried.append(bug.name)
            if len(tried) == 3:
                raise KeyboardInterrupt
            yield bug, trials[bug.name]

    monkeypatch.setattr(planted, "try_out", measured)
    with pytest.raises(KeyboardInterrupt):
        run(out, smoke=True)
    frame = run(out, smoke=True)
    first, second, third = (bug.name for bug in BUGS[:3])
    assert tried == ["clean", first, second, second, third]
    assert frame["bug"].tolist() == [first, second, third]
    assert all(test in trials[name].failed for name, test in zip(frame["bug"], frame["caught_by"], strict=True))
    assert all(name in table(frame) for name in (first, second, third))
    assert run(out, smoke=True).equals(frame) and len(tried) == 5


def test_tests_that_fail_without_a_bug_prove_nothing(trials: dict[str, Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = replace(trials["clean"], failed={SHOWN: "assert False"})
    monkeypatch.setattr(planted, "try_out", lambda chosen: iter([(chosen[0], failing)]))
    with pytest.raises(ValueError, match="without any bug"):
        run(tmp_path / "planted.parquet", smoke=True)


@pytest.mark.parametrize(("text", "times"), [("a line that was rewritten", 0), ("owed", 3)])
def test_an_edit_that_does_not_fit_is_refused(text: str, times: int, tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("owed = a - b\nreturn owed / owed.sum()\n")
    with pytest.raises(ValueError, match=f"stale: rule.py holds its text {times} times"):
        Bug("stale", "", "", (), (Edit("rule.py", text, ""),)).plant(tmp_path)


@pytest.mark.parametrize(
    "content", ["about = ", 'about = "a"\nseen_in = ""\ntests = []', 'about = "a"\nseen_in = ""\ntests = []\nedits = []\nby = "b"']
)
def test_a_description_that_is_incomplete_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "bug.toml").write_text(content)
    with pytest.raises(ValueError, match=r"bug\.toml"):
        Bug.read(tmp_path / "bug.toml")


def test_bugs_are_distinct_and_say_what_goes_wrong() -> None:
    assert len(BUGS) >= 20
    assert len({bug.edits for bug in BUGS}) == len({bug.about for bug in BUGS}) == len(BUGS)
    assert all(bug.about.endswith(".") and bug.tests and bug.edits for bug in BUGS)
