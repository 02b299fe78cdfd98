"""Result files: written whole or not at all, resumed where a killed run stopped, checked when they are read."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from dspark.files import one_line, write_atomically

T = TypeVar("T")
Row = dict[str, object]
COMMAND = "python -m dspark.bench"
SCHEMA_VERSION = 1  # of rows of results (traces have their own); readers refuse another


class Ledger:
    """Rows of one run. Each finished unit is one line of ``<out>.partial.jsonl``; :meth:`finish` turns the lines into a Parquet file.
    Raises ValueError if the output or the partial file holds another configuration."""

    def __init__(self, out: Path, configuration: Row) -> None:
        self.out, self.configuration, self.partial = out, configuration, _partial(out)
        self.done: dict[str, list[Row]] = {}  # key of a unit → its rows, those of earlier processes included
        self.complete = out.exists()
        if self.complete:
            _check_same(out, read_results(out).attrs.get("configuration", {}), configuration)
            self.partial.unlink(missing_ok=True)
        elif lines := _whole_lines(self.partial):
            _check_same(self.partial, lines[0]["configuration"], configuration)
            self.done = {line["unit"]: line["rows"] for line in lines[1:]}
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.partial.unlink(missing_ok=True)
            self._append({"configuration": configuration})

    def run(self, units: Mapping[str, T], measure: Callable[[T], list[Row]], types: Mapping[str, str] | None = None) -> pd.DataFrame:
        """Measure every unit that is not done; all rows, in the file and returned. types: see :func:`typed`."""
        todo = {} if self.complete else {key: unit for key, unit in units.items() if key not in self.done}
        for key, unit in tqdm(todo.items(), desc=self.out.stem, initial=len(units) - len(todo), total=len(units)):
            self.add(key, measure(unit))
        return self.finish(types)

    def add(self, key: str, rows: Sequence[Row]) -> None:
        """Keep the rows of a finished unit."""
        self._append({"unit": key, "rows": list(rows)})
        self.done[key] = list(rows)

    def finish(self, types: Mapping[str, str] | None = None) -> pd.DataFrame:
        """All rows, in the file and returned."""
        if not self.complete:
            frame = typed((row for rows in self.done.values() for row in rows), types or {})
            frame.attrs["configuration"] = self.configuration
            write_results(frame, self.out)
            self.partial.unlink(missing_ok=True)
            self.complete = True
        return read_results(self.out)

    def _append(self, entry: Row) -> None:
        with self.partial.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def typed(rows: Iterable[Row], types: Mapping[str, str]) -> pd.DataFrame:
    """A frame of rows. types: column of lists → the numpy type of their numbers, where it is narrower than JSON's."""
    frame = pd.DataFrame(rows)
    return frame.assign(**{name: [np.array(values, dtype=kind) for values in frame[name]] for name, kind in types.items()})


def rows_so_far(out: Path) -> pd.DataFrame:
    """The rows of a run that may not be finished; none if it has not begun."""
    if out.exists():
        return read_results(out)
    return pd.DataFrame([row for line in _whole_lines(_partial(out))[1:] for row in line["rows"]])


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial.jsonl")


def _whole_lines(path: Path) -> list[Row]:
    """All complete lines; one that a kill cut short is removed from the file. Raises ValueError for a damaged one."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    entries = []
    for line in whole.splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path} is damaged in line {len(entries) + 1}: delete it and measure again") from None
    if entries:
        os.truncate(path, len(whole) + 1)
    return entries


def _check_same(path: Path, theirs: Row, ours: Row) -> None:
    ours = json.loads(json.dumps(ours))
    if differing := [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]:
        held, asked = (", ".join(f"{name}={side.get(name)}" for name in differing) for side in (theirs, ours))
        raise ValueError(f"{path} holds a run with {held}, but this one has {asked}: choose another --out, or delete that file")


def write_results(frame: pd.DataFrame, path: Path) -> None:
    """Parquet, whole or not at all. Keeps ``frame.attrs``. Raises ValueError if the file cannot be written; the old one stays then."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    numbers, others = [], []  # measured numbers hardly repeat, so a dictionary of them would only add to the size
    for i, column in enumerate(table.schema):
        is_list = pa.types.is_list(column.type)
        kind = column.type.value_type if is_list else column.type
        (numbers if pa.types.is_floating(kind) else others).append(column.name + ".list.element" * is_list)
        if is_list and pa.types.is_null(kind):  # lists that are empty in every row have no type of their own
            table = table.set_column(i, column.name, table[column.name].cast(pa.list_(pa.float64())))
    options = {"compression": "zstd", "compression_level": 19, "use_byte_stream_split": numbers, "use_dictionary": others}
    write_atomically(path, lambda part: pq.write_table(table, part, **options))


def read_results(path: Path, remedy: str = COMMAND) -> pd.DataFrame:
    """The rows of a file. Raises ValueError, naming ``remedy``, if it is missing or not Parquet."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass a file in it that {remedy} has made")
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise ValueError(f"no results at {path}: make them with {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({one_line(error)}): pass one that {remedy} has made") from error


def read_rows(path: Path, remedy: str = COMMAND, schema_version: int = SCHEMA_VERSION) -> pd.DataFrame:
    """:func:`read_results` for a table or figure. Raises ValueError also if there are no rows, or of another schema version."""
    frame = read_results(path, remedy)
    if frame.empty:
        raise ValueError(f"{path} has no rows: make it again with {remedy}")
    versions = sorted(set(frame["schema_version"])) if "schema_version" in frame else ["none"]
    if versions != [schema_version]:
        found = ", ".join(map(str, versions))
        raise ValueError(f"{path} has schema version {found}, but this code reads {schema_version}: make it again with {remedy}")
    return frame
