"""Everything for a GPU but the capture itself runs here: the rehearsal, part by part, and what a failure costs."""

from __future__ import annotations

import os
import shutil
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from test_bench import kill_before

from dspark.bench import gpu, speed
from dspark.bench.gpu import BUDGETS, PARTS, TOY_BUDGETS, Part, ToyPlan, measure, run_part
from dspark.bench.plan import Plan
from dspark.bench.results import Ledger, read_results, rows_so_far, write_results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
report = __import__("report")  # data/ is no package
REHEARSAL = ToyPlan(arms="plain,fixed,prefix")


@pytest.fixture(autouse=True)
def one_process_and_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "in_new_process", lambda function, plan: function(plan))


def test_the_rehearsal_runs_every_part_and_what_it_wrote_becomes_a_page(tmp_path: Path) -> None:
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1)
    for part in PARTS:
        run_part(REHEARSAL, part, tmp_path)
    found = {part: read_results(tmp_path / f"gpu-{part}.parquet") for part in PARTS}
    assert len(found["equality"]) == 4 * 3 and found["equality"]["equal"].all()
    assert set(found["equality"]["dtype"]) == {"float32"} and set(found["equality"]["pass"]) == {"static"}
    assert found["speed"].groupby("arm")["pass"].first().to_dict() == dict.fromkeys(gpu.ARMS.split(","), "static") | {"eager": "lean"}
    assert set(zip(found["sps"]["tokens"], found["sps"]["pass"], strict=True)) == {
        (b, p) for b in TOY_BUDGETS for p in ("graphed", "eager")
    }
    assert len(found["requests"]) == 2 * (1 + 3) and list(found["memory"]["arm"]) == ["plain", "fixed", "prefix"]
    assert "Not measured on a GPU" in report._gpu(tmp_path)  # a rehearsal is no measurement
    for part, frame in found.items():
        write_results(frame.assign(device="H200"), tmp_path / f"gpu-{part}.parquet")
    page = report._gpu(tmp_path)
    assert "12 of 12 greedy float32 texts" in page and "H200" in page and "| `eager` |" in page and "| 3 |" in page


def dying(plan: Plan, part: str, folder: Path) -> None:
    """Measures a row, and then one part is killed and one never ends."""
    ledger = Ledger(folder / f"gpu-{part}.parquet", {})
    ledger.add("0", [{"arm": "plain"}])
    if part == "speed":
        os._exit(9)
    if part == "sps":
        time.sleep(3600)
    shutil.copy(folder / "whole.parquet", ledger.out)


def test_a_part_that_dies_or_hangs_costs_itself_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {name: Part(share, print, {}) for name, share in (("speed", 0.3), ("sps", 0.3), ("memory", 0.4))})
    monkeypatch.setattr(gpu, "get_context", lambda _: get_context("fork"))  # starts at once
    monkeypatch.setattr(gpu, "GRACE", 2.0)  # a forked process sometimes ignores the interrupt
    write_results(pd.DataFrame({"arm": ["plain"]}), tmp_path / "whole.parquet")
    found = measure(REHEARSAL, 0.1, tmp_path, dying)
    assert [len(frame) for frame in found.values()] == [1, 1, 1]
    assert [(tmp_path / f"gpu-{part}.parquet").exists() for part in found] == [False, False, True]


def test_a_part_that_was_stopped_resumes_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        kill_before(2, patched)
        with pytest.raises(SystemExit, match=r"sps stopped \(KeyboardInterrupt\); what it has measured is kept"):
            run_part(REHEARSAL, "sps", tmp_path)
    kept = rows_so_far(tmp_path / "gpu-sps.parquet")
    run_part(REHEARSAL, "sps", tmp_path)
    whole = rows_so_far(tmp_path / "gpu-sps.parquet")
    assert len(kept) == 2 and len(whole) == 2 * len(TOY_BUDGETS) and whole["seconds"][:2].tolist() == kept["seconds"].tolist()


def test_memory_that_runs_out_ends_the_part_with_a_line_and_keeps_the_smaller_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(_: object, shapes: list[tuple[int, int, int]], **__: object) -> dict[tuple[int, int, int], float]:
        if shapes[0][0] > 1:
            raise RuntimeError("CUDA out of memory.\nmore")
        return dict.fromkeys(shapes, 0.001)

    monkeypatch.setattr(gpu, "pass_times", small)
    with pytest.raises(SystemExit, match=r"sps stopped \(CUDA out of memory\.\)"):
        run_part(REHEARSAL, "sps", tmp_path)
    assert list(rows_so_far(tmp_path / "gpu-sps.parquet")["tokens"]) == [1, 1, 4, 4] and max(BUDGETS) == 4096


def test_the_command_names_a_missing_gpu(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark.bench.__main__ import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--minutes", "1"]) == 2 and "--rehearse" in capsys.readouterr().err
    assert main(["gpu", "--minutes", "0", "--rehearse"]) == 2 and "minutes" in capsys.readouterr().err
