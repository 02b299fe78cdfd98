"""Everything for a GPU but the capture itself runs here: the rehearsal, part by part, and what a failure costs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from dspark.bench import gpu, gpu_parts
from dspark.bench.gpu import SHARES, measure, run_part, tokens_per_second
from dspark.bench.gpu_parts import PARTS, TOY, GpuPlan

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
report = __import__("report")  # data/ is no package
REHEARSAL = GpuPlan(rehearse=True, minutes=1.0)


def read(folder: Path, part: str) -> dict:
    return json.loads((folder / f"gpu-{part}.json").read_text(encoding="utf-8"))


def test_the_rehearsal_runs_every_part_and_what_it_wrote_becomes_a_page(tmp_path: Path) -> None:
    assert list(PARTS) == list(SHARES) and sum(SHARES.values()) == pytest.approx(1)
    for part in PARTS:
        run_part(REHEARSAL, part, tmp_path, 120.0)
        found = read(tmp_path, part)
        assert found["complete"] and not found["error"] and found["environment"]["pass"] == "static"
    assert all(row["equal"] == row["texts"] == 4 for row in read(tmp_path, "equality")["rows"])
    speed = read(tmp_path, "speed")["rows"]
    graphed = [row for row in speed if row["arm"] != "plain eager"]
    assert len(speed) == 4 * 6 and all(0.9 <= row["waits_per_round"] <= 2 for row in graphed)
    assert {(row["tokens"], row["pass"]) for row in read(tmp_path, "sps")["rows"]} == {
        (b, p) for b in TOY.budgets for p in ("graphed", "eager")
    }
    assert [row["requests"] for row in read(tmp_path, "requests")["rows"]] == [1] * 3 + [3] * 3
    assert "Not measured on a GPU" in report._gpu(tmp_path)  # a rehearsal is no measurement
    for part in PARTS:
        content = read(tmp_path, part)
        (tmp_path / f"gpu-{part}.json").write_text(json.dumps(content | {"plan": content["plan"] | {"rehearse": False}}))
    page = report._gpu(tmp_path)
    assert "24 of 24 greedy float32 texts" in page and f"`fixed` {tokens_per_second(speed)['fixed']:.0f}" in page and "| 3 |" in page


def dying(plan: GpuPlan, part: str, folder: Path, seconds: float) -> None:
    """Writes a row, and then one part is killed and one never ends."""
    sheet = gpu_parts.Sheet(folder / f"gpu-{part}.json", {"part": part, "plan": {}})
    sheet.add(arm="plain")
    if part == "speed":
        os._exit(9)
    if part == "sps":
        time.sleep(3600)
    sheet.write(complete=True)


def test_a_part_that_dies_or_hangs_costs_itself_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "GRACE", 30.0)  # the import of PyTorch on a busy machine
    monkeypatch.setattr(gpu, "SHARES", {"speed": 0.3, "sps": 0.3, "memory": 0.4})
    (tmp_path / "gpu-memory.json").write_text("{}")  # an earlier run's
    found = measure(GpuPlan(rehearse=True, minutes=0.01), tmp_path, dying)
    assert [len(content["rows"]) for content in found.values()] == [1, 1, 1]
    assert [content["complete"] for content in found.values()] == [False, False, True]
    assert found["speed"]["error"] == "its process ended with status 9" and "status -9" in found["sps"]["error"]
    assert read(tmp_path, "sps") == found["sps"]


def test_an_error_and_the_end_of_the_time_stand_in_the_parts_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_part(REHEARSAL, "sps", tmp_path, -1.0)
    assert read(tmp_path, "sps")["error"].startswith("TimeoutError") and not read(tmp_path, "sps")["complete"]

    def small(self: object, run: str, requests: int, *_: object) -> float:
        if requests > 1:
            raise RuntimeError("CUDA out of memory.\nmore")
        return 0.001

    monkeypatch.setattr(gpu_parts.Bench, "step_seconds", small)
    run_part(REHEARSAL, "sps", tmp_path, 60.0)
    rows = read(tmp_path, "sps")["rows"]
    assert [row.get("error") for row in rows] == [None] * 4 + ["CUDA out of memory."] * 2


def test_the_command_names_a_missing_gpu(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark.bench.__main__ import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--minutes", "1"]) == 2 and "--rehearse" in capsys.readouterr().err
    assert main(["gpu", "--minutes", "0", "--rehearse"]) == 2 and "minutes" in capsys.readouterr().err
