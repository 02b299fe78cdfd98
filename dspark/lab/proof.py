"""Figures and tables of exactness: pure functions of distributions and of the file that ``make proof`` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from pandas.io.formats.style import Styler

from dspark.bench.arms import arm_label
from dspark.lab.figures import GREY, arm_colours, dressed

PARTS = ("enumeration", "appendix_a", "greedy", "draws", "planted")
Result = dict[str, object]


def read_proof(path: Path) -> dict[str, Result]:
    """Part → its result; a line is printed for each part that was not run. Raises ValueError if the file is missing or damaged."""
    try:
        parts = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {path} ({type(error).__name__}): make proof writes it") from None
    for part in (part for part in PARTS if part not in parts):
        print(f"{part} was not run, so its section shows nothing: make proof ARGS={part} adds it")
    return parts


def origin(result: Result) -> str:
    """Where a part was run: commit, machine and versions."""
    return f"commit {result['commit']}, {result['machine']}, torch {result['torch']}, transformers {result['transformers']}"


def greedy_table(result: Result) -> pd.DataFrame:
    """Every way to decode: texts, how many are equal, drafts accepted and rejected."""
    frame = pd.DataFrame(result["ways"]).T.fillna(0).astype(int)
    frame.index = [arm_label(name) for name in frame.index]
    return frame[["texts", "equal", "accepted", "rejected"]]


def p_values(result: Result) -> go.Figure:
    """One dot per χ² test. Under the exact distribution the dots spread evenly over 0 … 1."""
    frame = pd.DataFrame(result["tests"])
    hover = ["prompt", "temperature", "top_p", "n"]
    figure = px.scatter(frame, x="p_value", y=frame["policy"].map(arm_label), hover_data=hover, **arm_colours(frame["policy"]))
    figure.update_traces(marker_size=9)
    figure.add_vline(x=result["significance"] / len(frame), line={"color": GREY, "dash": "dash"}, annotation_text="alarm")
    figure.update_xaxes(title="p-value of χ² against the target's distribution (no unit)", range=[-0.02, 1.02])
    figure.update_yaxes(title="policy", automargin=True)
    title = f"{len(frame)} tests, smallest p {frame['p_value'].min():.2g}, corrected for their number {frame['p_adjusted'].min():.2g}"
    return dressed(figure, title, 160 + 26 * frame["policy"].nunique()).update_layout(showlegend=False)


def planted_table(result: Result) -> Styler:
    """Bug → the test that fails because of it."""
    frame = pd.DataFrame(result["bugs"])[["breaks", "caught_by"]]
    cells = {"text-align": "left", "white-space": "normal", "overflow-wrap": "anywhere", "min-width": "7em"}
    return frame.rename(columns={"breaks": "bug", "caught_by": "caught by"}).style.hide(axis="index").set_properties(**cells)
