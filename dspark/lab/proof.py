"""Figures and tables of exactness: pure functions of distributions and of the file that ``make proof`` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from pandas.io.formats.style import Styler

from dspark.lab.figures import FATES, GREY, distributions, dressed
from dspark.schedule import policy_colour, policy_label

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


def acceptance_rule(p_target: Sequence[float], p_draft: Sequence[float], tokens: Sequence[str]) -> go.Figure:
    """The rule as bars: of the drafts, min(p_target, p_draft) is accepted; the residual max(p_target − p_draft, 0) is added.

    p_target, p_draft: probabilities of the same few ``tokens``. The hollow bars are p_draft; what sticks out is rejected.
    """
    kept = [min(t, d) for t, d in zip(p_target, p_draft, strict=True)]
    residual = [max(t - d, 0) for t, d in zip(p_target, p_draft, strict=True)]
    bar = {"x": list(tokens), "texttemplate": "%{y:.2f}", "textposition": "inside"}
    outline = {"color": "rgba(0,0,0,0)", "line": {"color": GREY, "width": 2}}
    figure = go.Figure(
        [
            go.Bar(name="drafted: p_draft", y=list(p_draft), offsetgroup=0, marker=outline, **bar),
            go.Bar(name="accepted: min(p_target, p_draft)", y=kept, offsetgroup=1, marker_color=FATES["draft"].colour(0.85), **bar),
            go.Bar(name="residual: p_target − p_draft", y=residual, base=kept, offsetgroup=1, **bar)
            .update(marker_color=FATES["correction"].colour(0.85))
            .update(texttemplate=[f"{r:.2f}" if r else "" for r in residual]),
        ]
    )
    figure.update_xaxes(title="token")
    figure.update_yaxes(title="probability", range=[0, 1])
    return dressed(figure, f"Accepted and residual add up to p_target ({sum(kept):.0%} of the drafts are accepted)", 380)


def enumeration_table(result: Result) -> pd.DataFrame:
    """Cases and branches of every policy."""
    return pd.DataFrame(result["by_policy"]).T.rename_axis("policy")


def counterexample(result: Result) -> go.Figure:
    """The first token's distribution in Appendix A, under the target and two schedules."""
    named = {name: [float(Fraction(p)) for p in probabilities] for name, probabilities in result["first_token"].items()}
    return distributions(named, ["A", "B"], "Reading later confidences biases the text; stopping at the first fall does not")


def greedy_table(result: Result) -> pd.DataFrame:
    """Every way to decode: texts, how many are equal, drafts accepted and rejected."""
    frame = pd.DataFrame(result["ways"]).T.fillna(0).astype(int)
    frame.index = [policy_label(name) for name in frame.index]
    return frame[["texts", "equal", "accepted", "rejected"]]


def p_values(result: Result) -> go.Figure:
    """One dot per χ² test. Under the exact distribution the dots spread evenly over 0 … 1."""
    frame, figure = pd.DataFrame(result["tests"]), go.Figure()
    for policy, tests in frame.groupby("policy", sort=False):
        figure.add_scatter(
            x=tests["p_value"],
            y=tests["policy"].map(policy_label),
            mode="markers",
            marker={"size": 9, "color": policy_colour(policy)},
            customdata=tests[["prompt", "temperature", "top_p", "n", "tv"]],
            hovertemplate="%{customdata[0]}, temperature %{customdata[1]}, top-p %{customdata[2]}<br>"
            "p %{x:.3g}, %{customdata[3]} draws, total variation %{customdata[4]:.3f}<extra></extra>",
        )
    figure.add_vline(x=result["significance"] / len(frame), line={"color": GREY, "dash": "dash"}, annotation_text="alarm")
    figure.update_xaxes(title="p-value of χ² against the target's distribution (no unit)", range=[-0.02, 1.02])
    figure.update_yaxes(title="policy", automargin=True)
    title = f"{len(frame)} tests, smallest p {frame['p_value'].min():.2g}, corrected for their number {frame['p_adjusted'].min():.2g}"
    return dressed(figure, title, 160 + 26 * frame["policy"].nunique()).update_layout(showlegend=False)


def planted_table(result: Result) -> Styler:
    """Bug → the test that fails because of it."""
    frame = pd.DataFrame(result["bugs"])[["bug", "breaks", "caught_by"]]
    cells = {"text-align": "left", "white-space": "normal", "overflow-wrap": "anywhere", "min-width": "7em"}
    return frame.rename(columns={"caught_by": "caught by"}).style.hide(axis="index").set_properties(**cells)
