"""The tests would notice: every bug of exact/planted.py makes the test that it names fail; without a bug that test passes elsewhere."""

from __future__ import annotations

import pytest
from exact.planted import BUGS, exit_codes


@pytest.mark.timeout(900)  # all bugs, each in a process of its own
def test_every_planted_bug_makes_the_test_that_it_names_fail() -> None:
    codes = exit_codes(list(BUGS))
    assert not {name: (code, BUGS[name].caught_by) for name, code in codes.items() if code != 1}
