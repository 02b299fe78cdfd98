"""A sweep runs every cell of its grid once, whatever interrupts it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import inline
import nbformat
import pandas as pd
import pytest

from dspark import workers
from dspark.lab import demo, sweep
from dspark.schedule import POLICIES

CODE = """
import json
from pathlib import Path

if x == 13:
    raise ValueError(f"x is {x}")
with Path(log).open("a") as file:
    file.write(f"{x} {word} ")
Path(out).write_text(json.dumps({"square": x * x}))
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def notebook(tmp_path: Path, log: Path) -> Path:
    """Squares x, and writes into a log that it ran."""
    parameters = f'x: int = 1  # squared\nword: str = "a"  # noted\nout: str = ""  # file for the result\nlog: str = "{log}"  # of runs'
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(CODE)]
    path = tmp_path / "squares.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


KERNELS = sweep.ENGINES["local"]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process, one after the other; the last test starts processes and kernels."""
    monkeypatch.setattr(sweep, "run", inline.run)
    monkeypatch.setitem(sweep.ENGINES, "local", lambda work, cells, jobs: ((cell, work(cell)) for cell in cells))


def swept(notebook: Path, *words: str) -> int:
    return sweep.main([str(notebook), *words, "--out", str(notebook.parent / "runs")])


def table(notebook: Path) -> pd.DataFrame:
    return pd.read_parquet(notebook.parent / "runs" / "squares" / "table.parquet")


def test_the_grid_is_the_product_of_its_axes(notebook, tmp_path):
    cells = sweep.grid(notebook, [("x", "3,5"), ("word", '"a,b",c')], tmp_path)
    assert [dict(cell.parameters) for cell in cells] == [{"x": x, "word": word} for x in (3, 5) for word in ("a,b", "c")]
    assert len({cell.key for cell in cells}) == 4


def test_an_axis_may_be_of_lists(notebook, tmp_path):
    changed = nbformat.read(notebook, as_version=4)
    changed.cells[0].source += "\nsome: list[float] = [0.5]  # unused"
    nbformat.write(changed, notebook)
    cells = sweep.grid(notebook, [("some", '"[0.1, 0.2]",[0.3]')], tmp_path)
    assert [dict(cell.parameters)["some"] for cell in cells] == [[0.1, 0.2], [0.3]]
    assert sweep.sweep(cells[:0]) == {} and len(dict.fromkeys(cells, "")) == 2


TOY = """
from dspark.schedule import POLICIES, FixedWindow, Parameter, PolicyRow, parse_policy

class Doubled(FixedWindow):
    def window(self, last, block_size):
        return 2 * self.n

reach = Parameter("reach", "reach", "Half of the tokens drafted per round", 2, 1, 8, 1)
POLICIES["toy"] = PolicyRow("toy", "toy", "#123456", lambda values, sps: Doubled(values["reach"]), (reach,))
Path(out).write_text(json.dumps({"window": parse_policy(word).window(None, 5)}))
"""


def test_a_new_policy_is_swept_by_its_name_and_parameter(notebook):
    changed = nbformat.read(notebook, as_version=4)
    changed.cells.append(nbformat.v4.new_code_cell(TOY))
    nbformat.write(changed, notebook)
    with patch.dict(POLICIES):  # the cell runs in this process, and its row must not outlive the test
        assert swept(notebook, "-p", "word", "mtp1,toy,toy:3") == 0
    assert table(notebook)[["word", "window"]].to_numpy().tolist() == [["mtp1", 1], ["toy", 4], ["toy:3", 6]]


def test_a_repeated_value_is_one_cell(notebook, log):
    assert swept(notebook, "-p", "x", "3,03,3") == 0
    assert log.read_text() == "3 a " and table(notebook)["square"].tolist() == [9]


def test_an_interrupted_sweep_resumes_and_has_no_row_twice(notebook, log, monkeypatch, capsys):
    def interrupted(work, cells, jobs):
        for i, cell in enumerate(cells):
            if i == 2:
                raise KeyboardInterrupt
            yield cell, work(cell)

    monkeypatch.setitem(sweep.ENGINES, "local", interrupted)
    assert swept(notebook, "-p", "x", "2,3,4,5") == 130
    assert "finished cells are kept" in capsys.readouterr().err
    assert swept(notebook, "-p", "x", "2,3,4,5") == 0  # two cells are left
    assert log.read_text() == "2 a 3 a 4 a 5 a "
    assert table(notebook)["square"].tolist() == [4, 9, 16, 25]


def test_no_cell_waits_inside_the_pool_where_ctrl_c_cannot_stop_it(monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    taken = []
    stream = workers.run_locally(str, (taken.append(i) or i for i in range(9)), jobs=2)
    for finished in range(1, 10):
        next(stream)
        assert len(taken) <= finished + 1  # the finished cells and those that run
    assert list(stream) == [] and taken == list(range(9))


def test_a_kernel_that_does_not_start_is_a_failed_cell(notebook, monkeypatch, capsys):
    def silent(*_, **__):
        raise RuntimeError("Kernel didn't respond in 60 seconds")

    monkeypatch.setattr("papermill.execute_notebook", silent)
    monkeypatch.setattr(sweep, "run", demo.run)
    cell = sweep.grid(notebook, [("x", "2")], notebook.parent)[0]
    assert sweep.run_cell(cell) == "Kernel didn't respond in 60 seconds" and cell.row() is None


def test_finished_cells_are_kept_and_a_wider_grid_runs_only_what_is_new(notebook, log):
    assert swept(notebook, "-p", "x", "2") == 0
    assert swept(notebook, "-p", "x", "2,3") == 0
    assert log.read_text() == "2 a 3 a "
    assert table(notebook)[["x", "square"]].to_numpy().tolist() == [[2, 4], [3, 9]]


def test_a_changed_notebook_is_run_again(notebook, log, tmp_path):
    before = sweep.grid(notebook, [("x", "2")], tmp_path)[0].key
    changed = nbformat.read(notebook, as_version=4)
    changed.cells[1].source += "\n# another version"
    nbformat.write(changed, notebook)
    assert sweep.grid(notebook, [("x", "2")], tmp_path)[0].key != before


def test_a_changed_file_that_a_parameter_names_is_read_again(notebook, log, tmp_path):
    changed = nbformat.read(notebook, as_version=4)
    changed.cells[0].source += '\ndrafter: str = "default"  # a folder'
    nbformat.write(changed, notebook)
    (folder := tmp_path / "drafter").mkdir()
    (folder / "config.json").write_text("{}")
    words = ["-p", "drafter", str(folder), "-p", "x", "2"]
    assert swept(notebook, *words) == swept(notebook, *words) == 0 and log.read_text() == "2 a "
    (folder / "config.json").write_text('{"other": 1}')
    assert swept(notebook, *words) == 0 and log.read_text() == "2 a 2 a "


def test_the_table_shows_the_axes_then_three_results(notebook, capsys):
    changed = nbformat.read(notebook, as_version=4)
    changed.cells[1].source = changed.cells[1].source.replace(
        '"square": x * x', '"square": x * x, "cube": x**3, "b": 1, "c": 2, "busy": x > 2'
    )
    nbformat.write(changed, notebook)
    assert swept(notebook, "-p", "word", "a", "-p", "x", "2,3") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["word", "x", "square", "cube", "b", "busy"] and rows[1].split() == ["a", "3", "9", "27", "1", "True"]
    assert list(table(notebook))[:7] == ["word", "x", "square", "cube", "b", "busy", "c"] and "cell_seconds" in table(notebook)


def test_a_failing_cell_is_named_and_does_not_stop_the_others(notebook, capsys):
    assert swept(notebook, "-p", "x", "13,4") == 1
    assert table(notebook)["square"].tolist() == [16]
    error = capsys.readouterr().err
    assert "x=13: ValueError: x is 13" in error


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-p", "y", "1"], "'y'"),
        (["-p", "x", "1,two"], "'two'"),
        (["-p", "x", "1", "-p", "x", "2"], "'x' is given twice"),
        (["-p", "out", "here"], "'out' is set"),
        (["-p", "x", ""], "needs int, got None"),
        (["--jobs", "0"], "0"),
        (["--engine", "abacus"], "'abacus'"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(notebook, log, capsys, words, named):
    assert swept(notebook, *words) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not log.exists()


def test_a_notebook_that_saves_nothing_is_refused(notebook, tmp_path, capsys):
    bare = nbformat.read(notebook, as_version=4)
    bare.cells[0].source = "x: int = 1  # squared"
    nbformat.write(bare, tmp_path / "bare.ipynb")
    assert sweep.main([str(tmp_path / "bare.ipynb")]) == 2
    assert "'out'" in capsys.readouterr().err


def test_processes_and_kernels_run_the_same_cells(notebook, log, monkeypatch):
    monkeypatch.undo()
    assert sweep.ENGINES["local"] is KERNELS and swept(notebook, "-p", "x", "2,13,3", "--jobs", "2") == 1
    assert table(notebook)["square"].tolist() == [4, 9] and sorted(log.read_text().split()) == ["2", "3", "a", "a"]


def test_the_ray_engine_runs_the_same_cells(notebook, monkeypatch):
    monkeypatch.undo()
    ray = pytest.importorskip("ray")
    try:
        assert swept(notebook, "-p", "x", "2,3", "--engine", "ray", "--jobs", "2") == 0
    finally:
        ray.shutdown()
    assert table(notebook)["square"].tolist() == [4, 9]
