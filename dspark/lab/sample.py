"""``python -m dspark.lab.sample``: record the trace that is shipped for the replay panel and draw the README's picture of the panel.

The trace's seconds are this machine's: run it where nothing else runs. ``--picture`` only draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark.bench.prompts import data_dir
from dspark.bench.trace import record
from dspark.bench.trace_file import load_trace, save_trace
from dspark.draft.lookup import ContextLookup
from dspark.lab.live_widgets import EXAMPLES
from dspark.lab.replaying import sample_traces
from dspark.lab.still import still
from dspark.load import load_drafter, load_target


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 1 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.sample", description=__doc__)
    parser.add_argument("--prompt", default=EXAMPLES[0], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens; default %(default)s")
    parser.add_argument("--drafter", default="default", help="a drafter folder made for the default target")
    parser.add_argument("--out", type=Path, help="the trace; default data/results/traces/sample.parquet")
    parser.add_argument("--figure", type=Path, help="the picture; default data/figures/live.svg")
    parser.add_argument("--picture", action="store_true", help="only draw, from a trace that is there")
    options = parser.parse_args(arguments)
    out = options.out or sample_traces() / "sample.parquet"
    figure = options.figure or data_dir() / "figures" / "live.svg"
    try:
        if not options.picture:
            target = load_target("default")
            source = ContextLookup(load_drafter(options.drafter, target))
            save_trace(record(target, source, options.prompt, max_new_tokens=options.tokens), out)
            print(out)
        drawn = still(load_trace(out))
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_text(drawn, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"dspark.lab.sample: {error}", file=sys.stderr)
        return 1
    print(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
