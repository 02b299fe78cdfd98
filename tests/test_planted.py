"""The tests would notice: every bug of exact/planted.py makes the test that it names fail; without a bug that test passes elsewhere."""

from __future__ import annotations

import pytest
from exact.planted import BUGS, exit_code


@pytest.mark.parametrize("breaks", BUGS)
def test_a_planted_bug_makes_the_test_that_it_names_fail(breaks: str) -> None:
    assert exit_code(breaks) == 1, BUGS[breaks]
