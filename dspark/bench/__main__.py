"""``python -m dspark.bench [speed|identity|memory|load|gpu]``: measure ways to decode against each other on fixed prompts."""

import argparse
import sys
from collections.abc import Sequence

import torch

from dspark.bench import gpu, load
from dspark.bench.arms import CHOICES
from dspark.bench.plan import add_options, plan_of
from dspark.bench.speed import check_identity, measure_memory, measure_speed
from dspark.bench.stats import TABLES, beyond_rounding
from dspark.cli import run_main

MODES = {
    "speed": "paired, alternating speed of the arms; the default",
    "identity": "is every arm's greedy text model.generate's, token for token (exit status 1 if not, in float32)",
    "memory": "peak memory of each arm in a process of its own",
}
OWN = {  # have command lines of their own
    "load": (load.main, "many users of one engine: throughput and what each user sees"),
    "gpu": (gpu.main, "everything that needs a GPU, in one go"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`. Also returns 1 for texts that differ in float32 or by more than rounding explains."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in OWN:
        return OWN[arguments[0]][0](arguments[1:])
    modes = "\n".join(f"  {name:9} {text}" for name, text in MODES.items())
    modes += "".join(f"\n  {name:9} {text}; its options: {name} --help" for name, (_, text) in OWN.items())
    about = f"{__doc__}\n\nmodes:\n{modes}\n\narms: {CHOICES}"
    parser = argparse.ArgumentParser(prog="python -m dspark.bench", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=MODES, default="speed", metavar="mode", help="see above; default speed")
    add_options(parser)
    return run_main(parser, _run, arguments, kept="finished prompts")


def _run(options: argparse.Namespace) -> int:
    plan, mode = plan_of(options), options.mode
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
