"""Traces in a results file: one row per trace."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from dspark.bench.results import Row, read_results, write_results
from dspark.bench.trace import Trace
from dspark.round import Round

SCHEMA_VERSION = 1
COMMAND = "python -m dspark.bench.traces"

# Fields of a Round: one number a round, or a list a round (concatenated). The value is the column's type.
NUMBERS = dict.fromkeys(("anchor", "window", "verify_length", "accepted"), "int32") | {"source": "str"}
NUMBERS |= dict.fromkeys(("draft_seconds", "verify_seconds", "seconds"), "float32")
LISTS = dict.fromkeys(("draft_tokens", "committed"), "int32")
LISTS |= dict.fromkeys(("confidence", "target_probs_of_drafts", "draft_probs_of_drafts"), "float32")
LENGTHS = {"draft_tokens_lengths": "int32", "committed_lengths": "int32"}


def trace_row(trace: Trace) -> Row:
    """A trace as one row of a results file. Floats are kept in float32, which holds confidences and probabilities exactly."""
    row: Row = {"schema_version": SCHEMA_VERSION, "about": json.dumps(trace.about)}
    for name in NUMBERS:
        values = [getattr(r, name) for r in trace.rounds]
        row[name] = [-1 if value is None else value for value in values]  # the prefill has no anchor
    for name in LISTS:
        row[name] = [value for r in trace.rounds for value in getattr(r, name)]
    for name in LENGTHS:
        row[name] = [len(getattr(r, name.removesuffix("_lengths"))) for r in trace.rounds]
    return row


def row_trace(row: Row) -> Trace:
    """The trace in a row. Raises ValueError for a row of another schema version or one that is no trace."""
    version = row.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"the trace has schema version {version}, but this code reads {SCHEMA_VERSION}: record it again with {COMMAND}")
    try:
        drafted = row["draft_tokens_lengths"]
        # Files of versions that could stop within a block hold the confidence at which they stopped as well.
        lengths = dict.fromkeys(LISTS, drafted) | {"confidence": row.get("confidence_lengths", drafted)}
        lengths |= {"committed": row["committed_lengths"], "target_probs_of_drafts": row["verify_length"]}
        columns = {name: _cut(row[name], lengths[name]) for name in LISTS} | {name: map(_plain, row[name]) for name in NUMBERS}
        about = json.loads(row["about"])
    except KeyError as error:
        raise ValueError(f"the row is no trace, it lacks {error}: pass a file of {COMMAND}") from None
    columns["anchor"] = (None if anchor < 0 else anchor for anchor in columns["anchor"])
    columns["confidence"] = [c[:n] for c, n in zip(columns["confidence"], drafted, strict=True)]
    stream = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for name in ("draft_seconds", "verify_seconds", "pieces"):  # JSON has only string keys
        about[name] = {int(key): value for key, value in about[name].items()}
    return Trace(tuple(Round(index=i, **values) for i, values in enumerate(stream)), about)


def _cut(values: Sequence[float], lengths: Sequence[int]) -> list[tuple[float, ...]]:
    ends = [0, *accumulate(int(n) for n in lengths)]
    return [tuple(map(_plain, values[a:b])) for a, b in pairwise(ends)]


def _plain(value: object) -> object:
    """numpy's scalars as Python's own."""
    return value.item() if hasattr(value, "item") else value


def traces_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows of traces with the narrow column types of the file."""
    frame = pd.DataFrame(rows)
    for name, kind in (NUMBERS | LISTS | LENGTHS).items():
        if kind != "str":
            frame[name] = [np.array(values, dtype=kind) for values in frame[name]]
    return frame


def save_trace(trace: Trace, path: str | Path) -> None:
    """One trace in a Parquet file, whole or not at all."""
    write_results(traces_frame([trace_row(trace)]), Path(path))


def load_traces(path: str | Path) -> list[tuple[Row, Trace]]:
    """Every trace of a file with the other columns of its row (domain, prompt_id, …). Raises ValueError for a file without any."""
    frame = read_results(Path(path), COMMAND)
    if frame.empty:
        raise ValueError(f"{path} has no rows: record traces again with {COMMAND}")
    try:
        return traces_of(frame)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def traces_of(frame: pd.DataFrame) -> list[tuple[Row, Trace]]:
    """Every trace in the rows of a file, with the row's other columns. Raises ValueError for rows that are none."""
    kept = [name for name in frame.columns if name not in {*NUMBERS, *LISTS, "about"}]
    return [({name: row[name] for name in kept}, row_trace(row)) for row in frame.to_dict("records")]


def load_trace(path: str | Path) -> Trace:
    """The one trace of a file. Raises ValueError for a missing or foreign file, another schema version, or several traces."""
    found = load_traces(path)
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} traces: use load_traces")
    return found[0][1]
