"""Pictures and tables of the proof of exactness: pure functions of distributions and of the frames of :mod:`dspark.proof`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dspark.lab.figures import FATES, GREY, dressed


def acceptance_rule(p_target: Sequence[float], p_draft: Sequence[float], tokens: Sequence[str]) -> go.Figure:
    """The rule as bars: of what the drafter proposes, min(p_t, p_d) is kept; the residual max(p_t − p_d, 0) fills up to p_t.

    p_target, p_draft: probabilities of the same few ``tokens``. The hollow bars are p_d: what sticks out above is rejected.
    """
    kept = [min(t, d) for t, d in zip(p_target, p_draft, strict=True)]
    owed = [max(t - d, 0) for t, d in zip(p_target, p_draft, strict=True)]
    bar = {"x": list(tokens), "texttemplate": "%{y:.2f}", "textposition": "inside"}
    outline = {"color": "rgba(0,0,0,0)", "line": {"color": GREY, "width": 2}}
    figure = go.Figure(
        [
            go.Bar(name="proposed: p_draft", y=list(p_draft), offsetgroup=0, marker=outline, **bar),
            go.Bar(name="kept: min(p_target, p_draft)", y=kept, offsetgroup=1, marker_color=FATES["draft"].colour(0.85), **bar),
            go.Bar(name="after a rejection: p_target − p_draft", y=owed, base=kept, offsetgroup=1, **bar)
            .update(marker_color=FATES["correction"].colour(0.85))
            .update(texttemplate=[f"{o:.2f}" if o else "" for o in owed]),
        ]
    )
    figure.update_xaxes(title="token")
    figure.update_yaxes(title="probability", range=[0, 1])
    return dressed(figure, f"Kept and corrected mass add up to the target's law ({sum(kept):.0%} of the drafts are kept)", 380)


def laws(named: Mapping[str, Sequence[float]], tokens: Sequence[str], title: str) -> go.Figure:
    """Distributions over the same tokens side by side; the first is the reference."""
    colours = [GREY, *(FATES[name].colour(0.85) for name in ("draft", "correction", "bonus"))]
    bars = [
        go.Bar(name=name, x=list(tokens), y=list(probs), marker_color=colour, texttemplate="%{y:.3g}", textposition="auto")
        for (name, probs), colour in zip(named.items(), colours, strict=False)
    ]
    figure = go.Figure(bars)
    figure.update_xaxes(title="first token")
    figure.update_yaxes(title="probability", range=[0, 1])
    return dressed(figure, title, 360)


def p_values(frame: pd.DataFrame, significance: float) -> go.Figure:
    """One dot per policy and setting of a ``proof-sampled`` frame. Under the exact law the dots spread evenly over 0 … 1."""
    figure = go.Figure()
    marks = zip(("circle", "diamond", "square", "cross"), ("draft", "correction", "bonus", "copy"), strict=True)
    for (setting, rows), (symbol, fate) in zip(frame.groupby(["temperature", "top_p"], sort=False), marks, strict=False):
        figure.add_trace(
            go.Scatter(
                x=rows["p_value"],
                y=rows["policy"],
                mode="markers",
                name=f"temperature {setting[0]:g}, top-p {setting[1]:g}",
                marker={"symbol": symbol, "size": 9, "color": FATES[fate].colour(0.8)},
                customdata=rows[["prompt", "n", "tv", "tv_expected"]],
                hovertemplate="%{customdata[0]}<br>p %{x:.3g}, n %{customdata[1]}<br>"
                "total variation %{customdata[2]:.4f} (chance alone: %{customdata[3]:.4f})<extra></extra>",
            )
        )
    line = significance / len(frame)
    figure.add_vline(x=line, line={"color": GREY, "dash": "dash"}, annotation_text=f"alarm below {line:.1g}")
    figure.update_xaxes(title="p-value of χ² against the target's own law (no unit)", range=[-0.02, 1.02])
    figure.update_yaxes(title="policy")
    draws = f"{frame['n'].min()} to {frame['n'].max()}" if frame["n"].nunique() > 1 else f"{frame['n'].iloc[0]}"
    return dressed(figure, f"{len(frame)} tests of {draws} draws each: smallest corrected p {frame['p_adjusted'].min():.2g}", 460)


def margins(frame: pd.DataFrame) -> go.Figure:
    """First divergences of a ``proof-texts`` frame: the target's lead of its best over its second token, against rounding noise."""
    apart = frame[~frame["equal"]]
    finite = apart[np.isfinite(apart["margin"])]  # an infinite one is counted in the title; no axis can hold it
    top = max([1e-3, *finite["margin"], *finite["noise"]]) * 1.05
    figure = go.Figure(
        [
            go.Scatter(x=[0, top], y=[0, top], mode="lines", name="margin = noise", line={"color": GREY, "dash": "dash"}, hoverinfo="skip"),
            go.Scatter(
                x=finite["noise"],
                y=finite["margin"],
                mode="markers",
                name="first divergence of one text",
                marker={"color": FATES["draft"].colour(0.6), "size": 8},
                customdata=finite[["arm", "prompt", "first_divergence"]],
                hovertemplate="%{customdata[0]}, %{customdata[1]}, token %{customdata[2]}<br>"
                "margin %{y:.3f}, noise %{x:.3f}<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title="rounding noise between one-token and block passes (logits)", rangemode="tozero")
    figure.update_yaxes(title="top-2 margin of the target (logits)", rangemode="tozero")
    above = int((apart["margin"] > apart["noise"]).sum())
    return dressed(figure, f"{len(apart)} of {len(frame)} texts part, {above} of them by more than rounding explains", 420)


def planted_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Bug → the test that catches it, for the eye."""
    columns = {"bug": "planted bug", "about": "what it does", "seen_in": "seen in", "caught_by": "caught by"}
    return frame[list(columns)].rename(columns=columns)
