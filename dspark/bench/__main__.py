"""``python -m dspark.bench [speed|identity|memory|show FILE]``: measure ways to decode against each other on fixed prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dspark.bench.arms import CHOICES
from dspark.bench.identity import beyond_rounding, check_identity
from dspark.bench.memory import measure_memory
from dspark.bench.plan import add_options, plan_of
from dspark.bench.results import read_rows
from dspark.bench.speed import measure_speed
from dspark.bench.table import TABLES
from dspark.cli import run_main

MODES = {
    "speed": "paired, alternating speed of the arms; the default",
    "identity": "is every arm's greedy text model.generate's, token for token (exit status 1 if not, in float32)",
    "memory": "peak memory of each arm in a process of its own",
    "show": "print the table of a results file again, perhaps over another --baseline",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Also returns 1 for texts that differ in float32 or by more than rounding explains."""
    modes = "\n".join(f"  {name:9} {text}" for name, text in MODES.items())
    about = f"{__doc__}\n\nmodes:\n{modes}\n\narms: {CHOICES}"
    parser = argparse.ArgumentParser(prog="python -m dspark.bench", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=MODES, default="speed", metavar="mode", help="see above; default speed")
    parser.add_argument("file", nargs="?", type=Path, help="the results file to show")
    add_options(parser)
    return run_main(parser, _run, arguments, kept="finished prompts")


def _run(options: argparse.Namespace) -> int:
    mode = options.mode
    if (mode == "show") != (options.file is not None):
        raise ValueError("a results file belongs to show, and show needs one: python -m dspark.bench show FILE")
    if mode == "show":
        frame = read_rows(options.file)
        mode = frame.attrs.get("configuration", {}).get("mode")
        if mode not in TABLES:
            raise ValueError(f"{options.file} was not written by dspark.bench: choose a speed, memory or identity file of data/results")
        print(TABLES[mode](frame, options.baseline))
        return 0
    plan = plan_of(options)
    plan.check(mode)
    out = options.out or plan.default_out(f"{mode}-{plan.dtype}-t{plan.temperature:g}")
    if mode == "memory":
        frame = measure_memory(plan, out)
    else:
        torch.set_num_threads(plan.threads)
        models = plan.load(stock=mode == "identity")
        frame = (measure_speed if mode == "speed" else check_identity)(plan, models, out)
    print(f"{TABLES[mode](frame, plan.baseline)}\n{len(frame)} rows in {out}")
    return int(mode == "identity" and bool(beyond_rounding(frame).any() or (plan.dtype == "float32" and not frame["equal"].all())))


if __name__ == "__main__":
    sys.exit(main())
