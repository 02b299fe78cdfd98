"""``python -m dspark.bench.traces``: complete greedy traces of the benchmark prompts, over which every policy can be replayed.

A results file holds one trace per row, in float32, which keeps confidences and probabilities exactly.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, Unit, add_options, plan_of
from dspark.bench.provenance import utc
from dspark.bench.results import Ledger, Row, read_rows, typed, write_results
from dspark.bench.trace import Trace, record
from dspark.cli import run_main
from dspark.files import one_line
from dspark.round import Round

SCHEMA_VERSION = 1  # of the trace in a row
COMMAND = "python -m dspark.bench.traces"
Traces = list[tuple[Row, Trace]]

# Fields of a Round: one value a round, or a list a round (concatenated). The value is the column's type.
NUMBERS = dict.fromkeys(("anchor", "window", "verify_length", "accepted"), "int32") | {"source": "object"}
NUMBERS |= dict.fromkeys(("draft_seconds", "verify_seconds", "seconds"), "float32")
LISTS = dict.fromkeys(("draft_tokens", "committed"), "int32")
LISTS |= dict.fromkeys(("confidence", "target_probs_of_drafts", "draft_probs_of_drafts"), "float32")
LENGTHS = {"draft_tokens_lengths": "int32", "committed_lengths": "int32"}
TYPES = NUMBERS | LISTS | LENGTHS


def trace_row(trace: Trace) -> Row:
    """A trace as one row of a results file."""
    row: Row = {"schema_version": SCHEMA_VERSION, "about": json.dumps(trace.about)}
    row |= {name: [getattr(r, name) for r in trace.rounds] for name in NUMBERS}
    row["anchor"] = [-1 if anchor is None else anchor for anchor in row["anchor"]]  # the prefill has none
    row |= {name: [value for r in trace.rounds for value in getattr(r, name)] for name in LISTS}
    return row | {name: [len(getattr(r, name.removesuffix("_lengths"))) for r in trace.rounds] for name in LENGTHS}


def row_trace(row: Row) -> Trace:
    """The trace in a row."""
    drafted = row["draft_tokens_lengths"]
    lengths = dict.fromkeys(LISTS, drafted) | {"committed": row["committed_lengths"], "target_probs_of_drafts": row["verify_length"]}
    columns = {name: np.asarray(row[name]).tolist() for name in NUMBERS}
    columns["anchor"] = [None if anchor < 0 else anchor for anchor in columns["anchor"]]
    for name in LISTS:
        columns[name] = [tuple(part.tolist()) for part in np.split(np.asarray(row[name]), np.cumsum(lengths[name])[:-1])]
    about = json.loads(row["about"])
    for name in ("draft_seconds", "verify_seconds", "pieces"):  # JSON has only string keys
        about[name] = {int(key): value for key, value in about[name].items()}
    tokens = about.get("prompt_tokens", 0)  # a recorded round adds its anchor to them
    columns["context"] = [tokens and tokens + i for i in range(len(drafted))]
    rows = zip(*columns.values(), strict=True)
    return Trace(tuple(Round(index=i, **dict(zip(columns, values, strict=True))) for i, values in enumerate(rows)), about)


def save_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Traces in a Parquet file, whole or not at all."""
    write_results(typed(map(trace_row, traces), TYPES), Path(path))


def load_traces(path: str | Path) -> Traces:
    """Every trace of a file. Raises ValueError for a file that is missing, foreign, empty or of another schema version."""
    frame = read_rows(Path(path), COMMAND, SCHEMA_VERSION)
    if missing := {"about", *TYPES} - set(frame.columns):
        raise ValueError(f"{path} holds no traces, it lacks {min(missing)}: pass a file of {COMMAND}")
    try:
        return traces_of(frame)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds a trace that cannot be read ({one_line(error)}): pass a file of {COMMAND}") from error


def traces_of(frame: pd.DataFrame) -> Traces:
    """Every trace in the rows of a file, with the row's other columns (domain, prompt_id, …)."""
    kept = [name for name in frame.columns if name not in {*NUMBERS, *LISTS, "about"}]
    return [({name: row[name] for name in kept}, row_trace(row)) for row in frame.to_dict("records")]


def record_traces(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt, with the trace's columns and its provenance, in ``out`` and returned. Resumes.
    The step times are measured once, on the warm-up prompt, and shared by all traces: policies are compared without noise."""
    target, (arm,) = models.target, plan.parsed_arms
    constant = plan.provenance(models) | {"arm": arm.name, "split": plan.split, "schema_version": SCHEMA_VERSION}
    about = plan.configuration("traces", target.digest, models.drafter) | {"trace_schema_version": SCHEMA_VERSION}
    ledger, recorded = Ledger(out, about), partial(record, target, arm.source(models.drafter), pieces=False)
    times = next((row_trace(row).times for (row,) in ledger.done.values()), None)
    if times is None and not ledger.complete:
        times = recorded(plan.warm_up_prompt().messages, max_new_tokens=min(plan.tokens, 32), repeats=9).times

    def measure(unit: Unit) -> list[Row]:
        trace = recorded(unit.item.messages, max_new_tokens=plan.tokens, times=times)
        return [unit.columns() | trace_row(trace) | {"utc": utc()} | constant]

    return ledger.run({unit.key: unit for unit in plan.units}, measure, TYPES)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    add_options(parser, ("arms", "baseline", "temperature", "top_p", "top_k", "repeats", "seed"), prompts=10, tokens=96)
    parser.add_argument("--copy", action="store_true", help="also draft by copying where the text repeats itself")
    return run_main(parser, _record, arguments, kept="finished prompts")


def _record(options: argparse.Namespace) -> None:
    arm = "fixed" + "+copy" * options.copy
    plan = plan_of(options, arms=arm, baseline=arm)
    torch.set_num_threads(plan.threads)
    out = options.out or plan.default_out(f"traces-{plan.split}{'-copy' * options.copy}")
    frame = record_traces(plan, plan.load(), out)
    print(f"{len(frame)} traces, {sum(map(len, frame['accepted'])) - len(frame)} rounds in {out}")


if __name__ == "__main__":
    sys.exit(main())
