"""``python -m dspark.bench [speed|identity|memory|rewind|show]``: measure ways to decode against each other on fixed prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from dspark.bench.arms import CHOICES
from dspark.bench.identity import beyond_rounding, check_identity
from dspark.bench.memory import measure_memory
from dspark.bench.plan import add_options, plan_of
from dspark.bench.results import read_results, read_rows
from dspark.bench.rewind import measure_rewind, rewind_table
from dspark.bench.speed import measure_speed
from dspark.bench.table import identity_table, memory_table, speed_table
from dspark.cli import run_main

COMMAND = "python -m dspark.bench"
MODES = {
    "speed": "paired, alternating speed of the arms; the default",
    "identity": "is every arm's greedy text model.generate's, token for token (exit status 1 if not, in float32)",
    "memory": "peak memory of each arm in a process of its own",
    "rewind": "the time to forget a rejected block after 100, 1 000 and 8 000 tokens of context",
    "show": "print the table of a results file again, perhaps over another --baseline",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Also returns 1 for texts that differ in float32 or by more than rounding explains."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["show"]:
        return run_main(_show_parser(), _show, arguments[1:])
    return run_main(_parser(), _measure, arguments, kept="finished prompts")


def _parser() -> argparse.ArgumentParser:
    modes = "\n".join(f"  {name:9} {text}" for name, text in MODES.items())
    about = f"{__doc__}\n\nmodes:\n{modes}\n\narms: {CHOICES}"
    parser = argparse.ArgumentParser(prog=COMMAND, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "mode",
        nargs="?",
        choices=[mode for mode in MODES if mode != "show"],
        default="speed",
        metavar="mode",
        help="see above; default speed",
    )
    add_options(parser)
    return parser


def _show_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{COMMAND} show", description=MODES["show"])
    parser.add_argument("file", type=Path, help="a results file")
    parser.add_argument("--baseline", help="an arm of the file; default the one it was measured with")
    return parser


def _measure(options: argparse.Namespace) -> int:
    plan, mode = plan_of(options), options.mode
    plan.check(mode)
    out = options.out or plan.default_out(f"{mode}-{plan.dtype}-t{plan.temperature:g}")
    if mode == "rewind":
        frame = measure_rewind(plan, out)
    elif mode == "memory":
        frame = measure_memory(plan, out)
    else:
        torch.set_num_threads(plan.threads)
        models = plan.load(stock=mode == "identity")
        frame = (measure_speed if mode == "speed" else check_identity)(plan, models, out)
    print(f"{_table(mode, frame, plan.baseline)}\n{len(frame)} rows in {out}")
    return int(mode == "identity" and bool(beyond_rounding(frame).any() or (plan.dtype == "float32" and not frame["equal"].all())))


def _show(options: argparse.Namespace) -> None:
    frame = read_results(options.file)
    configuration = frame.attrs.get("configuration", {})
    mode = "rewind" if "rewind_us" in frame else configuration.get("mode")
    if mode not in MODES:
        raise ValueError(f"{options.file} was not written by dspark.bench: choose a speed, memory, identity or rewind file of data/results")
    print(_table(mode, read_rows(options.file), options.baseline or configuration.get("baseline", "")))


def _table(mode: str, frame: pd.DataFrame, baseline: str) -> str:
    if mode in ("rewind", "identity"):
        return (rewind_table if mode == "rewind" else identity_table)(frame)
    return (memory_table if mode == "memory" else speed_table)(frame, baseline)


if __name__ == "__main__":
    sys.exit(main())
