"""The tests would notice: every bug of exact/planted.py makes the test that it names fail; without a bug that test passes elsewhere."""

from __future__ import annotations

import pytest
from exact.planted import BUGS, exit_codes

pytestmark = pytest.mark.timeout(900)  # the first test waits for all bugs, each in a process of its own


@pytest.fixture(scope="module")
def codes() -> dict[str, int]:
    return exit_codes(list(BUGS))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_makes_the_test_that_it_names_fail(bug: str, codes: dict[str, int]) -> None:
    assert codes[bug] == 1, BUGS[bug]
