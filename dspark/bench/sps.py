"""``python -m dspark.bench.sps``: the step times that every schedule and every prediction rest on, for a quiet machine to measure.

One row per context length, kind (verify: a target pass; draft: a drafter's block) and tokens in it. A process keeps the memory that it
was given, and with it a few per cent more or less speed: so several processes measure, and their median counts.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import trange

from dspark.bench.arms import Models
from dspark.bench.place import place
from dspark.bench.plan import Plan, add_options, plan_of
from dspark.bench.provenance import drafter_columns, environment
from dspark.bench.results import read_rows, write_results
from dspark.bench.trace import draft_times
from dspark.tune.profile import WIDTHS, SPSCurve, median_steps

COMMAND = "python -m dspark.bench.sps"
CONTEXTS = (128, 512, 1536)  # tokens in the cache


def measure_here(plan: Plan, models: Models, repeats: int = 15) -> pd.DataFrame:
    """Medians of ``repeats`` steps of every width in this process, as measured (:func:`curve_of` makes the scheduler's curve of them).

    Raises ValueError if no context length fits the target.
    """
    target, rows = models.target, []
    contexts = [n for n in CONTEXTS if n <= target.max_context - WIDTHS[-1]]
    if not contexts:
        raise ValueError(f"{target.name} takes {target.max_context} tokens, less than the shortest context measured here ({CONTEXTS[0]})")
    for context in contexts:
        passes = median_steps(target, context=context, repeats=repeats)
        prompt = torch.randint(target.vocab_size, (context,), generator=torch.Generator().manual_seed(plan.seed)).tolist()
        drafts = draft_times(target, models.drafter, prompt, repeats)
        for kind, seconds in (("verify", passes), ("draft", drafts)):
            rows += [
                {"context": context, "kind": kind, "tokens": n, "seconds": took, "repeats": repeats} for n, took in seconds.items() if n
            ]
    constant = environment(target) | {"drafter": plan.drafter_name} | drafter_columns(models.drafter)
    frame = pd.DataFrame(rows).assign(**constant, utc=datetime.now(UTC).isoformat(timespec="seconds"))
    frame.attrs["configuration"] = plan.configuration("sps", target.digest, models.drafter)
    return frame


def measure_sps(plan: Plan, out: Path, repeats: int = 15, processes: int = 5) -> pd.DataFrame:
    """:func:`measure_here` in so many new processes, one after the other: :func:`joined`, in ``out`` and returned.

    Raises ValueError for fewer than one process or one that was killed, and what a process raises.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    frames = []
    try:
        for _ in trange(processes, desc="processes", unit="process"):
            # Ctrl-C ends the new process as well, without a word of its own once it measures.
            with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
                frames.append(pool.submit(_in_new_process, asdict(plan), repeats).result())
    except BrokenProcessPool:
        raise ValueError("a measuring process was ended from outside (out of memory?), so nothing was written: make room, repeat") from None
    frame = joined(frames)
    write_results(frame, out)
    return frame


def _in_new_process(options: dict[str, object], repeats: int) -> pd.DataFrame:
    plan = Plan(**options)
    torch.set_num_threads(plan.threads)
    return measure_here(plan, plan.load(), repeats)


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Frames of :func:`measure_here` as one: seconds is the median over processes, fastest and slowest are the ends."""
    by = pd.concat([frame["seconds"] for frame in frames], axis=1)
    told = {"seconds": by.median(axis=1), "fastest": by.min(axis=1), "slowest": by.max(axis=1), "processes": len(frames)}
    return frames[0].assign(**told)


def curve_of(frame: pd.DataFrame, context: int) -> SPSCurve:
    """The curve that the scheduler reads, of a measured context length: no time falls. Raises ValueError for one not measured."""
    rows = frame[(frame["kind"] == "verify") & (frame["context"] == context)].sort_values("tokens")
    if rows.empty:
        raise ValueError(f"context {context} was not measured: choose one of {', '.join(map(str, sorted(set(frame['context']))))}")
    return SPSCurve(tuple(rows["tokens"]), tuple(rows["seconds"]))


def read_sps(path: Path) -> pd.DataFrame:
    """The rows of a step-time file. Raises ValueError for one that is missing, foreign, empty, or of another schema version."""
    return read_rows(path, COMMAND)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    unused = ("arms", "baseline", "domains", "split", "prompts", "tokens", "temperature", "top_p", "top_k")
    add_options(parser, unused, repeats=15)
    parser.add_argument("--processes", type=int, default=5, help="new processes that measure, one after the other; default 5")
    parser.add_argument("--out", type=Path, help="Parquet file; default one in runs/bench that is named after the options")
    options = parser.parse_args(arguments)
    try:
        plan = plan_of(options, arms="fixed", baseline="fixed", prompts=1)
        out = options.out or place(f"sps-{plan.dtype}", plan)
        frame = measure_sps(plan, out, plan.repeats, options.processes)
        shown = frame.assign(ms=1e3 * frame["seconds"]).pivot_table(index=["context", "kind"], columns="tokens", values="ms")
        told = f"milliseconds, medians of {plan.repeats} in each of {options.processes} processes"
        print(f"{shown.round(2).to_string()}\n{told} · {len(frame)} rows in {out}")
    except (ValueError, OSError) as error:
        print(f"dspark.bench.sps: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dspark.bench.sps: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
