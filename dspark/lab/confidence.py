"""Figures of the confidence head: what a threshold keeps, and how well it is calibrated. Pure functions of frames."""

from __future__ import annotations

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dspark.lab.figures import FATES, GREY, dressed
from dspark.tune.calibrate import AS_TRAINED, Calibration, Rollouts, calibration_error, ranking_quality, reliability

LEAST = 0.05  # verified drafts a round; below it, an acceptance rate counts only a few drafts


def threshold_curves(sweep: pd.DataFrame, about: str) -> go.Figure:
    """Share of the verified drafts that were accepted, over their number a round: a line per domain, a mark per threshold.

    sweep: from :func:`dspark.bench.policies.threshold_sweep`. about: what was replayed, for the title.
    """
    shown = sweep[sweep["checked"] >= LEAST]
    domain = shown["domain"] + shown["n"].map(" (n = {})".format)
    figure = px.line(shown, x="checked", y="acceptance", color=domain, text="threshold", markers=True)
    figure.update_traces(textposition="top center")
    figure.update_xaxes(title="verified drafts a round (number)", rangemode="tozero")
    figure.update_yaxes(title="accepted (share of the verified)", range=[0, 1.05])
    return dressed(figure, f"A higher threshold verifies fewer drafts and accepts more of them<br><sup>{about}</sup>", 480)


def reliability_diagrams(data: Rollouts, calibration: Calibration, about: str) -> go.Figure:
    """One panel per position: predicted survival a_k against the share that survived, as trained and calibrated.

    data: rollouts that were not used for the fit. Marks are bins, larger with more cases; on the diagonal the head is calibrated.
    """
    fits = {"as trained": (AS_TRAINED, FATES["correction"].colour()), "calibrated": (calibration, FATES["draft"].colour())}
    bins = [
        pd.DataFrame(reliability(*data.at(k, fit))).assign(panel=_errors(data, k, calibration), fit=name)
        for k in range(data.block_size)
        if data.checked[:, k].any()
        for name, (fit, _) in fits.items()
    ]
    colours = {name: colour for name, (_, colour) in fits.items()}
    look = {"color": "fit", "color_discrete_map": colours, "size": "n", "size_max": 14, "facet_col": "panel"}
    figure = px.scatter(pd.concat(bins), x="confidence", y="frequency", **look)
    figure.update_traces(mode="lines+markers")
    figure.for_each_annotation(lambda note: note.update(text=note.text.removeprefix("panel=")))
    figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"color": GREY, "dash": "dash"}, row="all", col="all")
    figure.update_xaxes(range=[-0.03, 1.03], title="predicted a<sub>k</sub>", tickvals=[0, 0.5, 1])
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(title="share that survived", col=1)
    title = f"Predicted and observed survival (n = {len(data.logits)} blocks)<br><sup>{about}</sup>"
    return dressed(figure, title, 480).update_layout(margin={"t": 130})


def _errors(data: Rollouts, k: int, calibration: Calibration) -> str:
    before, after = data.at(k), data.at(k, calibration)
    errors = f"ECE {calibration_error(*before):.1%} → {calibration_error(*after):.1%}"
    return f"position {k + 1}<br><sup>{errors}, AUC {ranking_quality(*after):.2f}</sup>"
