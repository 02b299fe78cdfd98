"""``python -m dspark.formats inspect``: what it prints of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_checkpoint import edit
from tiny import tiny_drafter, tiny_target

from dspark.formats.__main__ import main
from dspark.formats.deepspec import export_deepspec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tiny_target()
    export_deepspec(tiny_drafter(target), target, tmp_path)
    return tmp_path


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["inspect", str(folder)]) == 0
    return {line[:12].strip(): line[13:] for line in capsys.readouterr().out.splitlines()}


def test_what_would_be_refused_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "refused" not in printed(folder, capsys)
    edit(folder, hidden_act="gelu_new")
    assert "gelu_new" in printed(folder, capsys)["refused"]


def test_a_folder_without_a_drafter_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
