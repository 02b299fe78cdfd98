"""``python -m dspark.lab.static``: the headline figure as a file, from a committed results file (GitHub shows no interactive figures)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark.bench.speed import read_speed
from dspark.bench.stats import ALL, summarise
from dspark.bench.table import caption
from dspark.cli import run_main
from dspark.files import data_dir
from dspark.lab.figures import GREY
from dspark.schedule import policy_colour, policy_label

HEADLINE = "speed-bfloat16-t0.parquet"
TEXT = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)


def headline(frame: pd.DataFrame) -> Figure:
    """Two panels over the domains: speed-up over the run's baseline with 95 % intervals, and τ of the arms that draft."""
    baseline = frame.iloc[0]["baseline"]
    lines = summarise(frame, baseline)
    arms = [arm for arm in dict.fromkeys(lines["arm"]) if arm != baseline]
    domains = list(dict.fromkeys(lines["domain"]))
    with matplotlib.rc_context(TEXT):  # grey on a transparent background: readable on light and dark pages
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        speed, tau = figure.subplots(1, 2, width_ratios=(3, 2))
        for i, arm in enumerate(arms):
            rows = lines[lines["arm"] == arm].set_index("domain").loc[domains]
            x = [at + 0.7 * ((i + 0.5) / len(arms) - 0.5) for at in range(len(domains))]
            look = {"color": policy_colour(arm), "marker": "D" if "copy" in arm else "o", "linestyle": "none", "label": policy_label(arm)}
            speed.errorbar(x, rows["speedup"], yerr=[rows["speedup"] - rows["low"], rows["high"] - rows["speedup"]], capsize=3, **look)
            if (rows["tokens_per_round"] > 1).any():
                tau.plot(x, rows["tokens_per_round"], **look)
        _dress(speed, ["all (geom.\nmean)" if d == ALL else d for d in domains], f"speed-up over {policy_label(baseline)} (×)")
        _dress(tau, domains, "τ (tokens per round)")
        figure.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1.5)
        figure.supxlabel(caption(frame), fontsize=8, color=GREY)
    return figure


def _dress(axes: Axes, domains: Sequence[str], label: str) -> None:
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(domains)), domains, fontsize=9)
    axes.set(ylabel=label, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.25)


def draw(options: argparse.Namespace) -> None:
    """Draw the results file into ``options.out`` and print its path. The same results give the same bytes."""
    out = options.out or data_dir() / "figures" / "headline.svg"
    figure = headline(read_speed(options.results or data_dir() / "results" / HEADLINE))
    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "dspark"}):
        figure.savefig(out, transparent=True, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
    print(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.static", description=__doc__)
    parser.add_argument("--results", type=Path, help=f"a speed file of dspark.bench; default data/results/{HEADLINE}")
    parser.add_argument("--out", type=Path, help="an .svg or .png file; default data/figures/headline.svg")
    return run_main(parser, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
