"""``python -m dspark.lab.sweep NOTEBOOK -p NAME VALUE,VALUE``: one notebook over a grid of parameters, with papermill, in processes.

Every cell of the grid is named by the hash of the notebook's code, its parameters, and size and time of the files that it may read.
Finished cells are not run again, so a killed sweep resumes, and a wider grid runs only its new cells. The notebook must save a flat JSON
object at its parameter ``out``: the row of the cell in the table, its three results first.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
from tqdm.auto import tqdm

from dspark.bench.results import write_results
from dspark.cli import run_main
from dspark.files import data_dir, digest, write_atomically
from dspark.lab.demo import ROOT, checked_parameters, notebook_parameters, run, shown
from dspark.workers import ENGINES, check_engine

Row = dict[str, object]
READ = ("target", "drafter", "results", "trace")  # parameters that name files


@dataclass(frozen=True, eq=False)  # parameters may be lists, which have no hash
class Cell:
    """One point of the grid. parameters: checked and typed. folder: of the executed notebook and its row."""

    notebook: Path
    parameters: tuple[tuple[str, object], ...]
    folder: Path

    @cached_property  # found before the cell runs
    def key(self) -> str:
        """16 hex digits that change with the notebook's code, with any parameter and with the files that are read."""
        code = [cell.source for cell in nbformat.read(self.notebook, as_version=4).cells if cell.cell_type == "code"]
        return digest(json.dumps([code, sorted(self.parameters), self._files()]))

    def _files(self) -> list[str]:
        """Path, size and time of what the cell may read: the repository's data, and the files that its parameters name."""
        read = [data_dir(), *(Path(str(value)).expanduser() for name, value in self.parameters if name in READ)]
        files = (file for path in read for file in (path, *sorted(path.rglob("*"))) if file.is_file())
        return [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]

    def row(self) -> Row | None:
        """The finished cell's row, None if it is not finished."""
        path = self.folder / f"{self.key}.row.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def grid(notebook: Path, pairs: Sequence[tuple[str, str]], folder: Path) -> list[Cell]:
    """Every combination of the values once; the last name changes fastest.

    pairs: (name, values), with values separated by commas; quotes protect the commas in a value, as in a CSV file. Raises ValueError
    for a notebook without ``out``, an unknown or repeated name, and a value of another type.
    """
    if "out" not in notebook_parameters(notebook):
        raise ValueError(f"{notebook.name} has no parameter 'out' to save its summary to, so it cannot be swept")
    names = [name for name, _ in pairs]
    for name in names:
        if name == "out" or names.count(name) > 1:
            raise ValueError(f"parameter {name!r} " + ("is set by the sweep" if name == "out" else "is given twice") + ": leave it out")
    axes = [[(name, value) for value in next(csv.reader([text])) or [""]] for name, text in pairs]
    cells = (Cell(notebook, tuple(checked_parameters(point, notebook).items()), folder) for point in product(*axes))
    return list({cell.key: cell for cell in cells}.values())  # 0.4 and 0.40 are one value


def run_cell(cell: Cell) -> str:
    """Execute the notebook at one point and keep its row. Returns "" or, if it failed, the reason in one line."""
    start, executed = time.perf_counter(), cell.folder / f"{cell.key}.ipynb"
    try:
        summary = run(cell.notebook, executed, dict(cell.parameters), progress=False)
    except (ValueError, OSError, RuntimeError) as error:  # a kernel that does not start is a RuntimeError
        return str(error)
    row = summary | {k: v for k, v in cell.parameters if k not in summary} | {"cell": cell.key, "cell_seconds": time.perf_counter() - start}
    write_atomically(executed.with_suffix(".row.json"), json.dumps(row).encode())
    return ""


def sweep(cells: Sequence[Cell], *, jobs: int = 1, engine: str = "local") -> dict[Cell, str]:
    """Run the cells that are not finished. Returns the failed ones with their reasons; they do not stop the others."""
    check_engine(engine, jobs)
    todo = [cell for cell in cells if cell.row() is None]
    failed = {}
    with tqdm(desc="grid", unit="cell", total=len(cells), initial=len(cells) - len(todo)) as bar:
        for cell, problem in ENGINES[engine](run_cell, todo, jobs) if todo else ():
            if problem:
                failed[cell] = problem
            bar.update()
    return failed


def run_grid(options: argparse.Namespace) -> int:
    """Run the grid, write and print its table: a row per finished cell, in the grid's order. Returns 1 if a cell failed, else 0."""
    folder = options.out.resolve() / options.notebook.stem
    cells = grid(options.notebook.resolve(), options.pairs, folder)
    failed = sweep(cells, jobs=options.jobs, engine=options.engine)
    table = pd.DataFrame([row for cell in cells if (row := cell.row()) is not None])
    if len(table):
        axes = list(dict(options.pairs))
        results = [name for name in table if name not in axes][:3] + ["busy"] * ("busy" in table)
        table = table[list(dict.fromkeys([*axes, *results, *table]))]
        write_results(table, folder / "table.parquet")
        print(table[list(dict.fromkeys([*axes, *results]))].to_string(index=False, max_colwidth=40))
        print(f"{len(table)} of {len(cells)} cells in {shown(folder / 'table.parquet')}")
    for cell, problem in failed.items():
        parameters = ", ".join(f"{name}={value}" for name, value in cell.parameters) or "defaults"
        print(f"dspark.lab.sweep: {parameters}: {problem}", file=sys.stderr)
    return int(bool(failed))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUES"), help="an axis of the grid")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="folder; the results go to a folder in it named after the notebook")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; 1 where speed is measured, as cells share the cores")
    parser.add_argument("--engine", default="local", help=", ".join(ENGINES))
    return run_main(parser, run_grid, arguments, kept="finished cells")


if __name__ == "__main__":
    sys.exit(main())
