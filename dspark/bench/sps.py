"""``python -m dspark.bench.sps``: step times of target and drafter, which schedules and predictions rest on. Needs a quiet machine.

One row per context length, kind (verify: a target pass; draft: a drafter's block) and tokens in it. Speed differs by a few per cent
between processes with their memory layout, so several processes measure and the median counts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import trange

from dspark.bench.arms import Models
from dspark.bench.plan import Plan, add_options, plan_of
from dspark.bench.provenance import utc
from dspark.bench.results import write_results
from dspark.bench.speed import in_new_process
from dspark.cli import run_main
from dspark.tune.profile import WIDTHS, SPSCurve, draft_times, median_steps

CONTEXTS = (128, 512, 1536)  # tokens in the cache


def measure_here(plan: Plan, models: Models | None = None, repeats: int = 15) -> pd.DataFrame:
    """Medians of ``repeats`` steps of every width in this process, as measured; :func:`curve_of` makes a curve of them.
    models: None loads those of the plan. Raises ValueError if no context length fits the target."""
    torch.set_num_threads(plan.threads)
    models = models or plan.load()
    target, rows = models.target, []
    contexts = [n for n in CONTEXTS if n <= target.max_context - WIDTHS[-1]]
    if not contexts:
        found = f"{target.name} takes {target.max_context} tokens, less than the shortest context measured here ({CONTEXTS[0]})"
        raise ValueError(f"{found}: choose another target")
    for context in contexts:
        passes = median_steps(target, context=context, repeats=repeats)
        for kind, times in (("verify", passes), ("draft", draft_times(target, models.drafter, context=context, repeats=repeats))):
            rows += [{"context": context, "kind": kind, "tokens": n, "seconds": times[n], "repeats": repeats} for n in times]
    frame = pd.DataFrame(rows).assign(**plan.provenance(models), utc=utc())
    frame.attrs["configuration"] = plan.configuration("sps", target.digest, models.drafter)
    return frame


def measure_sps(plan: Plan, out: Path, repeats: int = 15, processes: int = 5) -> pd.DataFrame:
    """:func:`measure_here` in several new processes, one after another; the medians over them, in ``out`` and returned.
    Raises ValueError for fewer than one process, for one that was killed, and what a process raises."""
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    frames = [in_new_process(measure_here, plan, None, repeats) for _ in trange(processes, desc="processes", unit="process")]
    seconds = pd.concat([frame["seconds"] for frame in frames], axis=1).median(axis=1)
    frame = frames[0].assign(seconds=seconds, processes=processes)
    write_results(frame, out)
    return frame


def curve_of(frame: pd.DataFrame, context: int) -> SPSCurve:
    """The scheduler's curve after ``context`` tokens. Raises ValueError for a context that was not measured."""
    rows = frame[(frame["kind"] == "verify") & (frame["context"] == context)].sort_values("tokens")
    if rows.empty:
        raise ValueError(f"context {context} was not measured: choose one of {', '.join(map(str, sorted(set(frame['context']))))}")
    return SPSCurve(tuple(rows["tokens"]), tuple(rows["seconds"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog="python -m dspark.bench.sps", description=__doc__.splitlines()[0])
    unused = ("arms", "baseline", "domains", "split", "prompts", "tokens", "temperature", "top_p", "top_k")
    add_options(parser, unused, repeats=15)
    parser.add_argument("--processes", type=int, default=5, help="new processes that measure, one after another; default 5")
    return run_main(parser, _measure, arguments)


def _measure(options: argparse.Namespace) -> None:
    plan = plan_of(options, arms="fixed", baseline="fixed", prompts=1)
    out = options.out or plan.default_out(f"sps-{plan.dtype}")
    frame = measure_sps(plan, out, plan.repeats, options.processes)
    shown = 1e3 * frame.pivot(index=["context", "kind"], columns="tokens", values="seconds")
    print(f"{shown.round(2).to_string()}\nmilliseconds, medians of {plan.repeats} in each of {options.processes} processes, in {out}")


if __name__ == "__main__":
    sys.exit(main())
