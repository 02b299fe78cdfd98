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
from dspark.bench.place import place
from dspark.bench.plan import add_options, plan_of
from dspark.bench.results import read_results
from dspark.bench.rewind import measure_rewind, rewind_table
from dspark.bench.speed import measure_speed, read_speed
from dspark.bench.table import identity_table, memory_table, speed_table

MODES = {
    "speed": "paired, alternating speed of the arms; the mode when none is named",
    "identity": "is every arm's greedy text model.generate's, token for token (exit status 1 if not, in float32)",
    "memory": "peak memory of each arm in a process of its own",
    "rewind": "what forgetting a rejected block costs at 100, 1 000 and 8 000 tokens of context",
    "show": "print the table of a results file again, perhaps over another --baseline",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 for texts that differ as they must not, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] == "show":
        options = _show_parser().parse_args(arguments[1:])
    else:
        options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"dspark.bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dspark.bench: interrupted; finished prompts are kept, and the same command goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    modes = "\n".join(f"  {name:9} {text}" for name, text in MODES.items())
    parser = argparse.ArgumentParser(
        prog="python -m dspark.bench",
        description=f"{__doc__}\n\nmodes:\n{modes}\n\narms: {CHOICES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mode", nargs="?", choices=MODES, default="speed", metavar="mode", help="see above; default speed")
    add_options(parser)
    parser.add_argument("--out", type=Path, help="Parquet file; default one in runs/bench that is named after the options")
    parser.set_defaults(run=_measure)
    return parser


def _show_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dspark.bench show", description=MODES["show"])
    parser.add_argument("file", type=Path, help="a results file")
    parser.add_argument("--baseline", help="an arm of the file; default the one it was measured with")
    parser.set_defaults(run=_show)
    return parser


def _measure(options: argparse.Namespace) -> int:
    plan = plan_of(options)
    mode = options.mode
    plan.check(mode)
    out = options.out or place(f"{mode}-{plan.dtype}-t{plan.temperature:g}", plan)
    if mode == "rewind":
        print(rewind_table(measure_rewind(plan, out)))
        return 0
    if mode == "memory":
        frame = measure_memory(plan, out)
    else:
        torch.set_num_threads(plan.threads)
        models = plan.load(stock=mode == "identity")
        frame = (measure_speed if mode == "speed" else check_identity)(plan, models, out)
    print(_table(mode, frame, plan.baseline))
    print(f"{len(frame)} rows in {out}")
    return int(mode == "identity" and bool(beyond_rounding(frame).any() or (plan.dtype == "float32" and not frame["equal"].all())))


def _show(options: argparse.Namespace) -> int:
    found = read_results(options.file)
    configuration, rewind = found.attrs.get("configuration", {}), "rewind_us" in found
    if not rewind and configuration.get("mode") not in ("speed", "memory", "identity"):
        raise ValueError(f"{options.file} was not written by dspark.bench: choose a speed, memory, identity or rewind file of data/results")
    frame = read_speed(options.file)
    if rewind:
        print(rewind_table(frame))
        return 0
    print(_table(configuration["mode"], frame, options.baseline or configuration["baseline"]))
    return 0


def _table(mode: str, frame: pd.DataFrame, baseline: str) -> str:
    if mode == "identity":
        return identity_table(frame)
    return (memory_table if mode == "memory" else speed_table)(frame, baseline)


if __name__ == "__main__":
    sys.exit(main())
