"""Shared by all tests: helpers in this folder are importable, one thread is enough for tiny models, and no test depends on timing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from dspark.tune.profile import SPSCurve

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

LONGEST = ("notebooks", "processes", "sweep", "killed", "live", "gemma", "selfplay", "planted")  # test_*.py, the longest first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no worker is left alone with one of them at the end."""
    rank = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def step_times_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding without a policy would measure this busy machine; further tokens are free here, so it drafts. test_auto.py measures."""
    monkeypatch.setattr("dspark.tune.auto.step_times", lambda target, drafter: SPSCurve((1, 64), (1.0, 1.0)))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
