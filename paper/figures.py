"""The paper's figures: vector graphics for print, to be drawn and saved inside :func:`printed`. The same results give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark.lab.drafters import by_size
from dspark.tune.calibrate import AS_TRAINED, Calibration, Rollouts, reliability

WIDTH = 6.3  # inches: the width of the text, so that letters keep their size
# Uncompressed: another zlib would pack the same figure into other bytes.
STYLE = {"font.size": 8, "pdf.compression": 0, "pdf.fonttype": 42, "axes.titlesize": 8, "legend.fontsize": 7, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "lines.markersize": 4}
MARKS = "osD"
LEAST = 20  # cases in a bin of a reliability diagram


def printed() -> AbstractContextManager[None]:
    """The look of all figures, whatever the reader's own matplotlib settings are."""
    return matplotlib.style.context(["default", STYLE])


def pdf(figure: Figure) -> bytes:
    """The figure as a file without a date or the name of the program that wrote it."""
    out = io.BytesIO()
    figure.savefig(out, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return out.getvalue()


def panels(count: int, width: float = WIDTH, height: float = 2.3, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def steps(frame: pd.DataFrame) -> Figure:
    """Milliseconds of a target pass (solid) and of drafting a block (dotted) by tokens, a colour for each context length."""
    figure, (axes,) = panels(1, 0.7 * WIDTH)
    for i, (context, rows) in enumerate(frame.sort_values("tokens").groupby("context")):
        for kind, style in (("verify", "-"), ("draft", ":")):
            line = rows[rows["kind"] == kind]
            label = f"context of {context:,}" if kind == "verify" else None
            axes.plot(line["tokens"], 1e3 * line["seconds"], style, marker=MARKS[i], color=f"C{i}", linewidth=1.2, label=label)
    axes.plot([], [], ":", color="black", label="drafting a block")
    ticks = range(0, int(frame["tokens"].max()) + 1, 2)
    axes.set(xlabel="tokens in the pass or in the drafted block", ylabel="ms", ylim=(0, None), xticks=ticks)
    figure.legend(loc="outside right center")
    return figure


def reliability_diagrams(data: Rollouts, calibration: Calibration) -> Figure:
    """A panel for each position: share of blocks that survived to it over the stated a_k, before and after calibration."""
    figure, axes_of = panels(data.block_size, height=2.0, sharey=True)
    for k, axes in enumerate(axes_of):
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        for i, (label, fitted) in enumerate((("calibrated", calibration), ("as trained", AS_TRAINED))):
            # Rounded: the same picture although the last bit differs between machines.
            bins = pd.DataFrame([b for b in reliability(*data.at(k, fitted)) if b["n"] >= LEAST]).round(4)
            bars = None if i else spread(bins["frequency"], bins["n"])
            look = {"marker": MARKS[i], "color": f"C{i}", "markersize": 3, "linewidth": 0.8, "elinewidth": 0.6, "label": label}
            axes.errorbar(bins["confidence"], bins["frequency"], yerr=bars, **look)
        axes.set(title=f"position {k + 1}", xlabel="stated $a_k$", xticks=[0, 0.5, 1], ylabel="" if k else "survived (share)")
    figure.legend(*axes_of[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def drafters(positions: pd.DataFrame, trained: pd.DataFrame, names: Mapping[str, str]) -> Figure:
    """Drafters trained alike: acceptance by position while decoding, and held-out tokens per round by depth and by block size."""
    figure, (first, *others) = panels(3)
    for i, (drafter, name) in enumerate(names.items()):
        line, look = positions[positions["drafter"] == drafter], {"color": f"C{i}", "marker": MARKS[i], "label": name}
        first.errorbar(line["position"], line["acceptance"], yerr=spread(line["acceptance"], line["n"]), capsize=2, **look)
    first.set(xlabel="position in the block", ylabel="conditional acceptance", ylim=(0, None), xticks=sorted(set(positions["position"])))
    for axes, (field, label) in zip(others, (("layers", "layers of the drafter"), ("block_size", "block size")), strict=True):
        points = by_size(trained, field)
        for i, side in enumerate(("dspark", "dflash")):
            line = points[points["drafter"] == side]
            axes.plot(line["value"], line["tau"], color=f"C{i}", marker=MARKS[i], linewidth=1.2)
        axes.set(xlabel=label, ylabel=r"held-out $\tau$", xticks=sorted(set(points["value"])))
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def spread(share: pd.Series, n: pd.Series, z: float = 1.959964) -> np.ndarray:
    """[2, shares]: from each share, counted in ``n`` cases, down and up to the ends of its 95 % interval (Wilson, 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return np.stack([share - centre + half, centre + half - share]).clip(min=0).round(4)
