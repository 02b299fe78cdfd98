"""``python -m dspark.bench.traces``: complete greedy traces of the benchmark prompts, over which every policy can be replayed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, Unit, add_options, plan_of
from dspark.bench.provenance import drafter_columns, environment
from dspark.bench.results import Ledger, Row, read_rows
from dspark.bench.trace import StepTimes, Trace, measured_times, record
from dspark.bench.trace_file import COMMAND, SCHEMA_VERSION, row_trace, trace_row, traces_frame, traces_of
from dspark.cli import run_main
from dspark.draft.source import DraftSource

Traces = list[tuple[Row, Trace]]


def record_traces(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt, with the trace's columns and its provenance, in ``out`` and returned. Resumes.

    The step times are measured once, on the first prompt, and shared by all traces: policies are compared without noise.
    """
    target, (arm,) = models.target, plan.parsed_arms
    source = arm.source(models.drafter)
    constant = environment(target) | {"drafter": plan.drafter_name} | drafter_columns(models.drafter) | {"arm": arm.name}
    constant |= {"schema_version": SCHEMA_VERSION}  # of the trace, which is what these rows are
    ledger = Ledger(out, plan.configuration("traces", target.digest, models.drafter) | {"trace_schema_version": SCHEMA_VERSION})
    if ledger.complete:
        return ledger.finish()
    times = _times(ledger, plan, models, source)

    def measure(unit: Unit) -> list[Row]:
        trace = record(target, source, unit.item.messages, max_new_tokens=plan.tokens, times=times, pieces=False)
        when = {"utc": datetime.now(UTC).isoformat(timespec="seconds")}
        return [unit.columns() | {"split": plan.split} | trace_row(trace) | when | constant]

    return ledger.run({unit.key: unit for unit in plan.units}, measure, traces_frame)


def read_traces(path: Path) -> Traces:
    """Every trace of a file with the columns of its prompt. Raises ValueError for a file that is missing, foreign, empty or too old."""
    return traces_of(read_rows(path, COMMAND, SCHEMA_VERSION))


def record_here(prompts: int, tokens: int) -> Traces:
    """Traces of a few dev prompts of each domain on the default models, in memory: for a notebook."""
    plan = Plan(arms="fixed", baseline="fixed", split="dev", prompts=prompts, tokens=tokens)
    with TemporaryDirectory() as folder:
        return traces_of(record_traces(plan, plan.load(), Path(folder) / "traces.parquet"))


def _times(ledger: Ledger, plan: Plan, models: Models, source: DraftSource) -> StepTimes:
    """Those of the finished rows, else measured on the warm-up prompt."""
    for (row,) in ledger.done.values():
        return row_trace(row).times
    prompt = models.target.encode(plan.warm_up_prompt().messages)
    placeholder = StepTimes({1: 1.0}, {1: 1.0})
    warm_up = record(models.target, source, prompt, max_new_tokens=min(plan.tokens, 32), times=placeholder, pieces=False)
    return measured_times(models.target, source, prompt, warm_up.rounds[1:], repeats=9)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    add_options(parser, ("arms", "baseline", "temperature", "top_p", "top_k", "repeats", "seed"), prompts=10, tokens=96)
    parser.add_argument("--copy", action="store_true", help="also draft by copying where the text repeats itself")
    return run_main(parser, _record, arguments, kept="finished prompts")


def _record(options: argparse.Namespace) -> None:
    arm = "fixed" + "+copy" * options.copy
    plan = plan_of(options, arms=arm, baseline=arm)
    torch.set_num_threads(plan.threads)
    out = options.out or plan.default_out(f"traces-{plan.split}{'-copy' * options.copy}")
    frame = record_traces(plan, plan.load(), out)
    print(f"{len(frame)} traces, {sum(map(len, frame['accepted'])) - len(frame)} rounds in {out}, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
