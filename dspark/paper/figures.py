"""Result frames → vector figures for print, in the project's colours; the same frames give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark.bench.identity import beyond_rounding
from dspark.bench.stats import ALL, acceptance_by_position
from dspark.lab.figures import GREY
from dspark.lab.static import INKS, MARKS, headline
from dspark.paper.latency import with_prediction
from dspark.proof.sampled import ALL_PROMPTS

WIDTH = 6.3  # inches: the text's width, so that no letter is scaled
# Uncompressed: another zlib packs the same figure into other bytes.
STYLE = {"font.size": 8, "pdf.compression": 0, "pdf.fonttype": 42, "axes.titlesize": 8, "legend.fontsize": 7}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


def printed() -> AbstractContextManager[None]:
    """For print, and the same wherever it is drawn: the reader's own matplotlib settings do not count."""
    return matplotlib.style.context(["default", STYLE])


def pdf(figure: Figure) -> bytes:
    """The figure as a file without date and without the name of the program that wrote it."""
    out = io.BytesIO()
    with printed():
        figure.savefig(out, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return out.getvalue()


def speedup(frame: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """The README's picture, of these arms, at the paper's width; what was measured stands in the paper's own words."""
    with printed():
        figure = headline(frame[frame["arm"].isin(["plain", *arms])])
    figure.set_size_inches(WIDTH, 2.4)
    figure.supxlabel("")
    for axes in figure.axes:
        axes.tick_params(labelsize=6.5, labelcolor="black")
        axes.yaxis.label.set(color="black", fontsize=7)
        for line in axes.lines:
            line.set_markersize(4)
    for text in figure.legends[0].get_texts():
        text.set(color="black", fontsize=6.5)
    return figure


def acceptance(runs: Mapping[str, pd.DataFrame], arms: Mapping[str, str]) -> Figure:
    """Conditional acceptance by position, a panel for each run and a line for each domain, with 95 % intervals. arms: of each run."""
    with printed():
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for axes, (run, frame) in zip(panels, runs.items(), strict=True):
            rows = acceptance_by_position(frame[frame["arm"] == arms[run]])
            for i, (domain, part) in enumerate(rows.groupby("domain", sort=False)):
                low, high = wilson(part["accepted"].to_numpy(float), part["reached"].to_numpy(float))
                spread = [part["acceptance"] - low, high - part["acceptance"]]
                places = part["position"] + 0.08 * (i - 1.5)
                axes.errorbar(
                    places, part["acceptance"], yerr=spread, color=INKS[i % 4], marker=MARKS[i % 4], ms=4, capsize=2, label=domain
                )
            dress(
                axes, f"{run.lower()}, {arms[run]}", "position in the block", "conditional acceptance (share)" if axes is panels[0] else ""
            )
            axes.set_xticks(range(1, int(rows["position"].max()) + 1))
            axes.set_ylim(0, 1)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def wilson(hits: np.ndarray, n: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share (Wilson, 1927): inside 0..1 whatever was counted. hits, n: arrays of the same shape, n ≥ 1."""
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(hits * (n - hits) / n + z * z / 4)
    share = hits / n  # rounding must not push an end past the share itself
    return np.minimum(centre - half, share), np.maximum(centre + half, share)


def prediction(runs: Mapping[str, pd.DataFrame]) -> Figure:
    """Speed-up as computed from step times and τ against speed-up as timed: a point for each arm and domain."""
    with printed():
        figure = Figure(figsize=(0.55 * WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        spread = [1.0]
        for i, (run, frame) in enumerate(runs.items()):
            lines = with_prediction(frame)
            lines = lines[lines["domain"] != ALL]
            spread += [*lines["predicted"], *lines["speedup"]]
            label = f"{run.lower()}, n = {len(lines)}"
            axes.plot(lines["predicted"], lines["speedup"], MARKS[i], color=INKS[i], ms=4, linestyle="none", label=label)
        ends = [0.95 * min(spread), 1.05 * max(spread)]
        axes.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="computed = timed")
        dress(axes, "", "computed speed-up (×)", "timed speed-up (×)")
        axes.legend(frameon=False, loc="upper left")
        axes.set_xlim(ends)
        axes.set_ylim(ends)
    return figure


def exactness(draws: pd.DataFrame, texts: pd.DataFrame) -> Figure:
    """Left: the p-values of the independent tests by draws in order, against the even spread of a true law. Right: margin and noise
    where texts part."""
    with printed():
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        p = np.sort(draws.loc[draws["prompt"] != ALL_PROMPTS, "p_value"].to_numpy())
        left.plot((np.arange(len(p)) + 0.5) / len(p), p, ".", color=INKS[0], ms=4)
        left.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        dress(left, f"{len(p)} tests against the target's law", "expected p-value, evenly spread", "p-value")
        apart = texts[~texts["equal"] & np.isfinite(texts["margin"])]
        right.plot(apart["noise"], apart["margin"], ".", color=INKS[1], ms=5, alpha=0.6)
        top = max([1e-3, *apart["noise"], *apart["margin"]]) * 1.05
        right.plot([0, top], [0, top], color=GREY, linestyle="--", linewidth=1)
        title = f"{(~texts['equal']).sum()} of {len(texts)} texts part, {beyond_rounding(texts).sum()} beyond rounding"
        dress(right, title, "rounding noise (logits)", "top-2 margin (logits)")
    return figure


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GREY, alpha=0.25)
