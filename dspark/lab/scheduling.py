"""Pictures of scheduling on one stream: what a pass costs, how Algorithm 1 decides, how policies compare. Pure functions of records."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from dspark.bench.policies import ALL, ORACLE, against_windows, against_windows_interval, pooled
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, dressed
from dspark.schedule import Admission
from dspark.tune.profile import SPSCurve

MARKS = (("circle", "draft"), ("square", "correction"), ("diamond", "bonus"), ("cross", "copy"))


def step_times(curve: SPSCurve, about: str) -> go.Figure:
    """Milliseconds of a target pass over its tokens, and what they would be if every token cost as much as the first."""
    widths, ms = curve.widths, [1e3 * s for s in curve.seconds]
    linear = [ms[0] * width / widths[0] for width in widths]
    figure = go.Figure(
        [
            go.Scatter(x=widths, y=ms, mode="lines+markers", name="measured", line={"color": FATES["draft"].colour(), "width": 2.5}),
            go.Scatter(x=widths, y=linear, mode="lines", name="one token after the other", line={"color": GREY, "dash": "dash"}),
        ]
    )
    figure.update_xaxes(title="tokens checked in one pass (number)")
    figure.update_yaxes(title="time of the pass (ms)", rangemode="tozero", range=[0, 3 * max(ms)])
    title = f"What checking costs: {widths[-1]} tokens take {ms[-1] / ms[0]:.2f}× the time of one<br><sup>{about}</sup>"
    return dressed(figure, title, 400).update_layout(title={"y": 0.95, "yanchor": "top"}, margin={"t": 110})


def admission_path(path: Sequence[Admission], tokens: Sequence[str] | None = None) -> go.Figure:
    """Expected tokens per second along the path of Algorithm 1, for one request; the first fall ends it.

    path: of :meth:`dspark.schedule.PrefixScheduler.admissions` · tokens: texts of the drafts, for the labels; where the path goes on
    behind them, drafting ended there.
    """
    path = [step for step in path if step.request == 0]
    named = [f"{position}: “{token}”" for position, token in enumerate(tokens or (), 1)]
    nameless = "draft {}" if tokens is None else "{}: not drawn"
    labels = ["anchor alone", *named, *(nameless.format(k) for k in range(len(named) + 1, len(path)))][: len(path)]
    looks = [DRAFT_STATES["accepted" if step.admitted else "rejected"] for step in path]
    figure = go.Figure(
        go.Bar(
            x=labels,
            y=[step.throughput for step in path],
            marker_color=[look.colour(0.75) for look in looks],
            text=[f"a = {step.survival:.2f}<br>B = {step.budget}<br>Θ = {step.throughput:.1f}" for step in path],
            textposition="inside",
            insidetextanchor="middle",
        )
    )
    ended = "the first fall" if not path[-1].admitted else "the end of the block"
    figure.update_xaxes(title="admitted up to this draft", type="category")
    figure.update_yaxes(title="Θ, expected throughput (tokens/s)")
    checked = sum(step.admitted for step in path) - 1
    return dressed(figure, f"Algorithm 1 checks {checked} of the drafts and stops at {ended} (n = 1 round)", 400)


def policy_chart(lines: pd.DataFrame, about: str) -> go.Figure:
    """Speed-up over plain decoding of every policy, a mark per domain and a bar for their geometric mean; the best policy on top.

    lines: a frame of :func:`dspark.bench.policies.pooled` with "plain" among its policies. The oracle, a bound and no policy, is grey.
    """
    shown = lines[lines["policy"] != "plain"]
    whole = shown[shown["domain"] == ALL].sort_values("speedup")
    order = list(whole["policy"])
    ink = [FATES["plain" if policy == ORACLE else "draft"].colour(0.35) for policy in order]
    bars = go.Bar(
        x=whole["speedup"],
        y=order,
        orientation="h",
        name="geometric mean",
        marker_color=ink,
        text=[f"{s:.3f}×" for s in whole["speedup"]],
        textposition="inside",
        insidetextanchor="start",
        insidetextfont={"color": "#888888"},
    )
    figure = go.Figure(bars)
    domains = [domain for domain in dict.fromkeys(shown["domain"]) if domain != ALL]
    for (symbol, fate), domain in zip(MARKS, domains, strict=False):
        rows = shown[shown["domain"] == domain].set_index("policy").loc[order]
        marker = {"symbol": symbol, "size": 9, "color": FATES[fate].colour(0.9)}
        hint = "%{y}, " + domain + ": %{x:.3f}×<extra></extra>"
        figure.add_trace(go.Scatter(x=rows["speedup"], y=order, mode="markers", name=domain, marker=marker, hovertemplate=hint))
    figure.add_vline(x=1, line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title="speed-up over plain decoding by the trace's step times (×)")
    figure.update_yaxes(type="category")
    n = int(whole["n"].max())
    title = f"All policies on the same {n} texts, without timing noise<br><sup>{about}</sup>"
    return dressed(figure, title, 220 + 26 * len(order)).update_layout(
        title={"y": 0.97, "yanchor": "top"}, margin={"l": 170, "t": 120}, legend={"y": 1.01}
    )


def policy_table(lines: pd.DataFrame) -> pd.DataFrame:
    """τ, checked drafts a round, acceptance and speed-up of every policy over all domains, the fastest first."""
    columns = {"tokens_per_round": "τ", "checked": "checked a round", "acceptance": "acceptance", "speedup": "speed-up"}
    whole = lines[lines["domain"] == ALL].sort_values("speedup", ascending=False).set_index("policy")
    return whole[list(columns)].rename(columns=columns).round(3)


def verdicts(frame: pd.DataFrame, policies: Sequence[str]) -> pd.DataFrame:
    """Each policy against the best fixed window of each domain in hindsight and the best single one, in per cent of their tokens/s,
    with 95 % bootstrap intervals over prompts. frame: of :func:`dspark.bench.policies.replayed`."""
    rows, lines = [], pooled(frame)
    for policy in policies:
        found, spread = against_windows(lines, policy), against_windows_interval(frame, policy)
        hindsight, single = (f"{found[of]:.1%} [{spread[of][0]:.1%}, {spread[of][1]:.1%}]" for of in ("hindsight", "single"))
        rows.append(
            {
                "policy": policy,
                "of the best window of each domain": hindsight,
                "least": f"{found['worst']:.1%} ({found['worst_domain']})",
                "of the best single window": f"{single} ({found['best_single']})",
            }
        )
    return pd.DataFrame(rows).set_index("policy")
