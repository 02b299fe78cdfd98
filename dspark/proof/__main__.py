"""``python -m dspark.proof [PART ...]``: exactness, tier by tier. Writes data/results/proof-PART.parquet and prints what it shows."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dspark.bench.prompts import data_dir
from dspark.bench.results import configuration_of, discard, read_results

ROUNDING = 1e-3  # total variation that two rows of the same prefix may have, one from a block of rows and one alone; float32 makes 1e-5
SIGNIFICANCE = 0.01  # for all sampled laws together: Holm's correction makes this the chance of any false alarm


@dataclass(frozen=True)
class Part:
    """One tier. about: for the help text · holds: its frame → does every row agree with exactness?"""

    module: str
    about: str
    holds: Callable[[pd.DataFrame], bool]


PARTS = {
    "enumeration": Part("enumeration", "the law of small models, in fractions, over every branch", lambda f: (f["difference"] == 0).all()),
    "planted": Part("planted", "bugs planted in a copy: each must be caught by a named test", lambda f: (f["caught_by"] != "").all()),
    "killed": Part("killed", "training and benchmarking, killed and resumed", lambda f: f["equal"].all()),
    "crossed": Part("crossed", "greedy texts of tiny models: every prompt, policy and block size", lambda f: _crossed_holds(f)),
    "texts": Part("texts", "greedy texts against model.generate, token for token", lambda f: _texts_hold(f)),
    "sampled": Part("sampled", "the law of the shipped model, by draws", lambda f: _draws_hold(f)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 if everything holds, 1 if something does not, 2 for bad input, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    chosen = options.parts or list(PARTS)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        print(f"dspark.proof: no part {unknown[0]!r}: choose among {', '.join(PARTS)}", file=sys.stderr)
        return 2
    try:
        if options.smoke:
            with tempfile.TemporaryDirectory() as folder:
                held = [prove(name, Path(folder), smoke=True) for name in chosen]
        else:
            held = [prove(name, options.out) for name in chosen]
    except (ValueError, OSError) as error:
        print(f"dspark.proof: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dspark.proof: interrupted; finished parts are kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return int(not all(held))


def prove(name: str, folder: Path, *, smoke: bool = False) -> bool:
    """Run one part, unless ``folder`` already holds its result from the very same inputs; print its table. Does it hold?

    Inputs are what the part reads: its own code and all it imports of this package, prompts, drafter, versions
    (:mod:`dspark.proof.inputs`). What was proved with other inputs, finished or not, says nothing about these and is thrown away.
    """
    part = PARTS[name]
    module = importlib.import_module(f"dspark.proof.{part.module}")
    out = folder / f"proof-{name}.parquet"
    if configuration_of(out).get("inputs") != module.inputs():
        discard(out)
    kept, start = out.exists(), time.monotonic()
    frame = read_results(out) if kept else module.run(out, smoke=smoke)
    holds = bool(part.holds(frame))
    whence = f"kept from {frame.iloc[0]['revision']}, same inputs" if kept else f"{time.monotonic() - start:.0f} s"
    print(f"\n== {name}: {part.about}\n{module.table(frame)}\n{'holds' if holds else 'DOES NOT HOLD'} ({whence})", flush=True)
    return holds


def _texts_hold(frame: pd.DataFrame) -> bool:
    """float32: every text is equal. Lower precision: no divergence that rounding does not explain."""
    exact = frame["dtype"] == "float32"
    explained = frame["equal"] | (frame["margin"] <= frame["noise"])
    return bool(frame.loc[exact, "equal"].all() and explained[~exact].all())


def _crossed_holds(frame: pd.DataFrame) -> bool:
    """Every text is equal, and no policy had an easy time: each that drafts had drafts kept and drafts refused."""
    drafted = frame[frame["policy"] != "autoregressive"].groupby("policy")[["accepted", "rejected"]].sum()
    return bool((frame["equal"] == frame["prompts"]).all() and (drafted > 0).all(axis=None))


def _draws_hold(frame: pd.DataFrame) -> bool:
    """No law differs from the target's, and no block that ran has rows of its own."""
    return bool((frame["p_adjusted"] >= SIGNIFICANCE).all() and (frame["largest_row_difference"] <= ROUNDING).all())


def _parser() -> argparse.ArgumentParser:
    parts = "\n".join(f"  {name:12} {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m dspark.proof", description=f"{__doc__}\n\nparts:\n{parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="default all of them")
    parser.add_argument("--out", type=Path, default=data_dir() / "results", help="folder of the results; default %(default)s")
    parser.add_argument("--smoke", action="store_true", help="tiny versions, in seconds to two minutes; nothing is kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
