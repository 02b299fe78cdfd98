"""Figures of the confidence head: what a threshold keeps, and how well it is calibrated. Pure functions of frames."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dspark.bench import published
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, dressed
from dspark.tune.calibrate import AS_TRAINED, Calibration, Rollouts, calibration_error, ranking_quality, reliability

LEAST = 0.05  # verified drafts a round; below it, an acceptance rate counts only a few drafts


def threshold_bars(sweep: pd.DataFrame, about: str) -> go.Figure:
    """One panel per domain: accepted and rejected drafts a round over the threshold, and the acceptance rate as a line.

    sweep: from :func:`dspark.bench.policies.threshold_sweep`. about: what was replayed, for the title.
    """
    domains = list(dict.fromkeys(sweep["domain"]))
    names = [f"{domain} (n = {sweep.loc[sweep['domain'] == domain, 'n'].max()})" for domain in domains]
    specs = [[{"secondary_y": True} for _ in domains]]
    figure = make_subplots(1, len(domains), specs=specs, subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.06)
    for column, domain in enumerate(domains, 1):
        rows = sweep[sweep["domain"] == domain]
        x, first = [f"{t:g}" for t in rows["threshold"]], column == 1
        for state, heights in (("accepted", rows["accepted"]), ("rejected", rows["checked"] - rows["accepted"])):
            look = DRAFT_STATES[state]
            named = {"name": look.label, "legendgroup": state, "showlegend": first}
            figure.add_bar(x=x, y=heights, marker_color=look.colour(0.75), row=1, col=column, secondary_y=False, **named)
        rate = 100 * rows["acceptance"].where(rows["checked"] >= LEAST)
        line, named = {"color": GREY, "width": 2.5}, {"name": "acceptance rate", "legendgroup": "rate", "showlegend": first}
        figure.add_scatter(x=x, y=rate, mode="lines+markers", line=line, row=1, col=column, secondary_y=True, **named)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title="threshold on a<sub>k</sub>", type="category")
    figure.update_yaxes(range=[0, 1.05 * sweep["checked"].max()], secondary_y=False)
    figure.update_yaxes(title="drafts a round (number)", secondary_y=False, col=1)
    figure.update_yaxes(range=[0, 105], tickvals=[0, 25, 50, 75, 100], showgrid=False, showticklabels=False, secondary_y=True)
    figure.update_yaxes(title="acceptance rate (%)", showticklabels=True, secondary_y=True, col=len(domains))
    return _spaced(dressed(figure, f"A higher threshold verifies fewer drafts and accepts more of them<br><sup>{about}</sup>", 480))


def _spaced(figure: go.Figure) -> go.Figure:
    """Make room for the title, the legend and the panels' titles."""
    title = {"y": 0.97, "yanchor": "top"}
    return figure.update_layout(title=title, margin={"t": 165, "r": 60}, legend={"y": 1.2})


def published_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """Acceptance rate without a threshold and at the highest threshold that still verifies something, beside the paper's."""
    rows = {}
    for domain, part in sweep[sweep["checked"] >= LEAST].sort_values("threshold").groupby("domain", sort=False):
        ends, paper = part.iloc[[0, -1]], published.ACCEPTANCE.get(domain, (None, None))
        ours = [f"{line.acceptance:.1%} at {line.threshold:g}" for line in ends.itertuples()]
        rows[domain] = [*ours, *("–" if rate is None else f"{rate:.1%}" for rate in paper)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["lowest threshold", "highest", "paper, none", "paper, highest"])


def reliability_diagrams(data: Rollouts, calibration: Calibration, about: str) -> go.Figure:
    """One panel per position: predicted survival a_k against the share that survived, as trained and calibrated.

    data: rollouts that were not used for the fit. Marks are bins, larger with more cases; on the diagonal the head is calibrated.
    """
    width = data.block_size
    reached = [k for k in range(width) if data.checked[:, k].any()]
    titles = [_errors(data, k, calibration) for k in reached]
    figure = make_subplots(1, len(reached), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    looks = {"as trained": (AS_TRAINED, "correction", "circle-open"), "calibrated": (calibration, "draft", "circle")}
    for column, k in enumerate(reached, 1):
        diagonal, named = {"color": GREY, "dash": "dash"}, {"hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=diagonal, row=1, col=column, **named)
        for name, (fit, fate, symbol) in looks.items():
            bins = pd.DataFrame(reliability(*data.at(k, fit)))
            marker = {"symbol": symbol, "size": 5 + 13 * (bins["n"] / bins["n"].max()) ** 0.5}
            look = {"mode": "lines+markers", "line": {"color": FATES[fate].colour(0.85)}, "marker": marker}
            hover = {"customdata": bins["n"], "hovertemplate": "predicted %{x:.2f}, observed %{y:.2f}, n = %{customdata}"}
            named = {"name": name, "legendgroup": name, "showlegend": column == 1}
            figure.add_scatter(x=bins["confidence"], y=bins["frequency"], row=1, col=column, **named, **look, **hover)
    figure.update_xaxes(range=[-0.03, 1.03], title="predicted a<sub>k</sub>", tickvals=[0, 0.5, 1])
    figure.update_yaxes(range=[-0.03, 1.03])
    figure.update_yaxes(title="share that survived", col=1)
    return _spaced(dressed(figure, f"Predicted and observed survival (n = {len(data.logits)} blocks)<br><sup>{about}</sup>", 480))


def _errors(data: Rollouts, k: int, calibration: Calibration) -> str:
    before, after = data.at(k), data.at(k, calibration)
    errors = f"ECE {calibration_error(*before):.1%} → {calibration_error(*after):.1%}"
    return f"position {k + 1}<br><sup>{errors}, AUC {ranking_quality(*after):.2f}</sup>"
