"""data/gpu.sh: every option of its commands exists, and a stage that fails ends it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dspark.bench import gpu
from dspark.train.__main__ import parser

ROOT = Path(__file__).resolve().parents[1]
FAKE = """#!/bin/sh
echo "$@" >> commands
case "$*" in *"$FAIL"*) exit 3;; esac
"""


def script(folder: Path, *words: str, fail: str = "none", **settings: str) -> tuple[int, list[list[str]]]:
    """Run a copy of the script with a python that only notes what it is asked. Returns its status and these commands."""
    (folder / "data").mkdir()
    (folder / "data" / "gpu.sh").write_bytes((ROOT / "data" / "gpu.sh").read_bytes())
    (folder / "python").write_text(FAKE)
    (folder / "python").chmod(0o755)
    (folder / "runs" / "gpu" / "drafter.training").mkdir(parents=True)
    (folder / "runs" / "gpu" / "text.json").write_text("{}")
    environment = os.environ | {"PYTHON": "./python", "FAIL": fail} | settings
    done = subprocess.run(["bash", folder / "data" / "gpu.sh", *words], env=environment, capture_output=True, text=True)
    noted = folder / "commands"
    return done.returncode, [line.split() for line in noted.read_text().splitlines()] if noted.exists() else []


@pytest.mark.parametrize("rehearse", ["", "1"])
def test_every_command_of_the_script_parses(tmp_path: Path, rehearse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, commands = script(tmp_path, REHEARSE=rehearse, KEEP=str(tmp_path / "kept"))
    assert status == 0 and [words[1:3] for words in commands] == [
        ["dspark.train", "corpus"],
        ["dspark.train", "drafter"],
        ["dspark.train", "compare"],
        ["dspark.bench", "gpu"],
    ]
    text, drafter, trio = (parser().parse_args(words[2:]) for words in commands[:3])
    assert text.corpus == drafter.corpus == trio.corpus and text.rows % text.batch == 0 and text.rows // text.batch < 8
    assert text.batch * (text.tokens * 2 + text.tokens // 8 + 4) < 16e6, "bytes of a shard, with ids of 16 bits"
    seen = []
    monkeypatch.setattr(gpu, "_run", lambda options: seen.append(options) or 0)
    assert gpu.main(commands[3][3:]) == 0 and seen[0].rehearse == bool(rehearse)
    assert os.listdir(tmp_path / "kept") == ["text.json"], "checkpoints stay"


def test_a_stage_that_fails_ends_the_script_and_later_calls_may_name_the_rest(tmp_path: Path) -> None:
    status, commands = script(tmp_path, "drafter", "trio", fail="drafter")
    assert status == 3 and len(commands) == 1
    (other := tmp_path / "other").mkdir()
    assert script(other, "text", "everything") == (2, [])
