"""Figures of scheduling: the cost of a pass, and one decision of Algorithm 1. Pure functions of records."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dspark.bench.arms import arm_label
from dspark.bench.stats import ALL
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, dressed
from dspark.schedule import Admission
from dspark.tune.profile import SPSCurve


def step_times(curve: SPSCurve, about: str) -> go.Figure:
    """Milliseconds of a target pass over its number of tokens, beside the time of as many passes over one token."""
    widths, ms = curve.widths, [1e3 * s for s in curve.seconds]
    linear = [ms[0] * width / widths[0] for width in widths]
    figure = go.Figure()
    figure.add_scatter(x=widths, y=ms, mode="lines+markers", name="measured", line={"color": FATES["draft"].colour(), "width": 2.5})
    figure.add_scatter(x=widths, y=linear, mode="lines", name="one pass per token", line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title="tokens verified in one pass (number)")
    figure.update_yaxes(title="time of the pass (ms)", range=[0, 3 * max(ms)])
    return dressed(figure, f"{widths[-1]} tokens take {ms[-1] / ms[0]:.2f}× the time of one<br><sup>{about}</sup>", 400)


def admission_path(path: Sequence[Admission], tokens: Sequence[str]) -> go.Figure:
    """Expected tokens per second along the path of Algorithm 1, for one request; the first fall ends it.

    path: from :meth:`dspark.schedule.PrefixScheduler.admissions`. tokens: texts of the drafts, for the labels.
    """
    labels = ["anchor alone", *(f"{k}: “{token}”" for k, token in enumerate(tokens, 1))][: len(path)]
    colours = [DRAFT_STATES["accepted" if step.admitted else "rejected"].colour(0.75) for step in path]
    text = [f"a = {step.survival:.2f}<br>B = {step.budget}<br>Θ = {step.throughput:.1f}" for step in path]
    look = {"marker_color": colours, "text": text, "textposition": "inside", "insidetextanchor": "middle"}
    figure = go.Figure(go.Bar(x=labels, y=[step.throughput for step in path], **look))
    figure.update_xaxes(title="verified up to this draft", type="category")
    figure.update_yaxes(title="Θ, expected throughput (tokens/s)")
    end = "at the end of the block" if path[-1].admitted else "at the first fall"
    verified = sum(step.admitted for step in path) - 1
    return dressed(figure, f"Algorithm 1 verifies {verified} of the drafts: it stops {end} (n = 1 round)", 400)


def policy_chart(lines: pd.DataFrame, about: str) -> go.Figure:
    """Speed-up over plain decoding of every policy in every domain, the fastest on top.

    lines: a frame of :func:`dspark.bench.policies.pooled` with "plain" among its policies. about: for the title.
    """
    shown = lines[lines["policy"] != "plain"].assign(policy=lambda rows: rows["policy"].map(arm_label))
    order = shown[shown["domain"] == ALL].sort_values("speedup", ascending=False)["policy"]
    figure = px.scatter(shown, x="speedup", y="policy", color="domain", symbol="domain", category_orders={"policy": list(order)})
    figure.update_traces(marker_size=9).update_xaxes(title="speed-up over plain decoding, with the trace's step times (×)")
    title = f"All policies on the same {shown['n'].max()} texts, without timing noise<br><sup>{about}; all: geometric mean</sup>"
    return dressed(figure, title, 260 + 34 * len(order)).update_yaxes(title="", automargin=True)


def policy_table(lines: pd.DataFrame) -> pd.DataFrame:
    """τ, verified drafts a round, acceptance and speed-up of every policy over all domains, the fastest first."""
    columns = {"tokens_per_round": "τ", "checked": "verified a round", "acceptance": "acceptance", "speedup": "speed-up"}
    whole = lines[lines["domain"] == ALL].sort_values("speedup", ascending=False).set_index("policy")
    return whole[list(columns)].rename(columns=columns, index=arm_label).round(3)
