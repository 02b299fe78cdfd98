"""``python -m dspark.lab.sweep NOTEBOOK -p NAME VALUE,VALUE``: one notebook over a grid of parameters, by papermill, in processes.

Every cell of the grid is named by the hash of the notebook's code and its parameters: one that is finished is not run again, so a
killed sweep goes on where it stopped, and a wider grid runs only what is new. A notebook takes part if it has a parameter ``out``
and saves a flat JSON object there: that object is the cell's row in the combined table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import nbformat
import pandas as pd
from tqdm.auto import tqdm

from dspark.bench.results import write_results
from dspark.lab.demo import ROOT, checked_parameters, notebook_parameters, run, shown

Row = dict[str, object]


@dataclass(frozen=True)
class Cell:
    """One point of the grid. parameters: checked and typed · folder: where the executed notebook and its row go."""

    notebook: Path
    parameters: tuple[tuple[str, object], ...]
    folder: Path

    @property
    def key(self) -> str:
        """16 hex digits that change with the notebook's code and with any parameter."""
        code = [cell.source for cell in nbformat.read(self.notebook, as_version=4).cells if cell.cell_type == "code"]
        return hashlib.sha256(json.dumps([code, sorted(self.parameters)]).encode()).hexdigest()[:16]

    @property
    def row_path(self) -> Path:
        return self.folder / f"{self.key}.row.json"

    def row(self) -> Row | None:
        """The finished cell's row, None if it is not finished."""
        return json.loads(self.row_path.read_text(encoding="utf-8")) if self.row_path.is_file() else None


def grid(notebook: Path, pairs: Sequence[tuple[str, str]], folder: Path) -> list[Cell]:
    """Every combination of the values once, the last name turning fastest.

    pairs: (name, values), values separated by commas or one JSON list of values (for values that hold commas or are lists
    themselves). Raises ValueError for a notebook without ``out``, a name that it lacks or that is given twice, and a value of
    another type.
    """
    if "out" not in notebook_parameters(notebook):
        raise ValueError(f"{notebook.name} has no parameter 'out' to save its summary to, so it cannot be swept")
    names = [name for name, _ in pairs]
    for name in names:
        if name == "out" or names.count(name) > 1:
            raise ValueError(f"parameter {name!r} " + ("belongs to the sweep" if name == "out" else "is given twice") + ": leave it out")
    axes = [[(name, value) for value in _values(name, text)] for name, text in pairs]
    cells = (Cell(notebook, tuple(checked_parameters(point, notebook).items()), folder) for point in product(*axes))
    return list(dict.fromkeys(cells))  # 0.4 and 0.40 are one value


def _values(name: str, text: str) -> list[str]:
    if not text.startswith("["):
        return text.split(",")
    try:
        values = json.loads(text)
    except ValueError:
        raise ValueError(f"the values of {name} start with '[' but are no JSON list: {text!r}") from None
    if not values:
        raise ValueError(f"parameter {name} has no values: {text!r}")
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def run_cell(cell: Cell) -> str:
    """Execute the notebook at one point and keep its row; returns "" or, for a cell that failed, what went wrong in one line."""
    start = time.perf_counter()
    try:
        summary = run(
            cell.notebook, cell.folder / f"{cell.key}.ipynb", dict(cell.parameters), progress=False
        )  # the grid has a bar of its own
    except (ValueError, OSError, RuntimeError) as error:  # a kernel that does not start is a RuntimeError
        return str(error)
    row = dict(cell.parameters) | {"cell": cell.key, "cell_seconds": time.perf_counter() - start} | summary
    scratch = cell.row_path.with_suffix(".tmp")
    scratch.write_text(json.dumps(row), encoding="utf-8")
    scratch.replace(cell.row_path)  # whole or not at all: this file is what makes the cell finished
    return ""


def run_locally(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, str]]:
    """Each cell in a process of its own pool, ``jobs`` at a time, as they finish. No cell waits in the pool: Ctrl-C would not reach it."""
    todo = iter(cells)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run_cell, cell): cell for cell in islice(todo, jobs)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                running |= {pool.submit(run_cell, cell): cell for cell in islice(todo, 1)}


def run_on_ray(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, str]]:
    """The same on a Ray cluster: the one that is running, else a local one of ``jobs`` workers. The folder must be shared."""
    try:
        import ray
    except ImportError:
        raise ValueError("engine 'ray' needs the package ray: pip install 'dspark[ray]', or use --engine local") from None
    if not ray.is_initialized():
        ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False)
    remote = ray.remote(num_cpus=1)(run_cell)
    waiting = {remote.remote(cell): cell for cell in cells}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        yield waiting.pop(done), ray.get(done)


ENGINES = {"local": run_locally, "ray": run_on_ray}


def sweep(cells: Sequence[Cell], *, jobs: int = 1, engine: str = "local") -> dict[Cell, str]:
    """Run what is not finished; returns the cells that failed with their one-line reasons. A failed cell stops no other."""
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    todo = [cell for cell in cells if cell.row() is None]
    failed = {}
    with tqdm(desc="grid", unit="cell", total=len(cells), initial=len(cells) - len(todo)) as bar:
        for cell, problem in ENGINES[engine](todo, jobs) if todo else ():
            if problem:
                failed[cell] = problem
            bar.update()
    return failed


def combined(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per finished cell, in the grid's order: its parameters, what the notebook saved, and the seconds it took."""
    return pd.DataFrame([row for cell in cells if (row := cell.row()) is not None])


def _described(parameters: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items()) or "defaults"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 if a cell failed, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("-p", dest="pairs", nargs=2, action="append", default=[], metavar=("NAME", "VALUES"), help="an axis of the grid")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="folder; the results go to a folder in it named after the notebook")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; 1 where speed is measured, as cells share the cores")
    parser.add_argument("--engine", default="local", help=", ".join(ENGINES))
    options = parser.parse_args(arguments)
    folder = options.out.resolve() / options.notebook.stem
    try:
        cells = grid(options.notebook.resolve(), options.pairs, folder)
        failed = sweep(cells, jobs=options.jobs, engine=options.engine)
        table = combined(cells)
        if len(table):
            write_results(table, folder / "table.parquet")
            print(table.to_string(index=False, max_colwidth=40))
            print(f"{len(table)} of {len(cells)} cells in {shown(folder / 'table.parquet')}")
    except (ValueError, OSError) as error:
        print(f"dspark.lab.sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dspark.lab.sweep: interrupted; finished cells are kept, and the same command goes on from there", file=sys.stderr)
        return 130
    for cell, problem in failed.items():
        print(f"dspark.lab.sweep: {_described(dict(cell.parameters))}: {problem}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
