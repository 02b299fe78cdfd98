"""Pictures and tables of the proof of exactness: pure functions of distributions and of the frames of :mod:`dspark.proof`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from pandas.io.formats.style import Styler

from dspark.bench.results import read_rows
from dspark.lab.figures import FATES, GREY, dressed
from dspark.proof.crossed import summed
from dspark.proof.sampled import ALL_PROMPTS
from dspark.proof.statistics import chi2_tail

PARTS = ("enumeration", "sampled", "texts", "crossed", "planted")  # those that are drawn


def read_parts(folder: Path) -> dict[str, pd.DataFrame]:
    """Part of the proof → its frame, for those whose results lie in ``folder``; a line is printed for each that does not.

    Raises ValueError if there is no such folder or a file is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: leave results empty for the committed ones")
    paths = {part: folder / f"proof-{part}.parquet" for part in PARTS}
    for part in (part for part, path in paths.items() if not path.is_file()):
        print(f"{part}: no proof-{part}.parquet in this folder, so its section shows nothing; make proof ARGS={part} makes it")
    return {part: read_rows(path, f"make proof ARGS={part}") for part, path in paths.items() if path.is_file()}


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


def independent(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a ``proof-sampled`` frame with draws of their own."""
    return frame[frame["prompt"] != ALL_PROMPTS]


def as_one(frame: pd.DataFrame) -> float:
    """p of the independent tests taken as one: their χ² added up."""
    rows = independent(frame)
    return chi2_tail(rows["chi2"].sum(), int(rows["dof"].sum()))


def pooled_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The other rows, for the eye: each adds up the draws of a policy over the prompts, so it is no further evidence, but it would
    show a bias that is too small for one prompt."""
    pooled = frame[frame["prompt"] == ALL_PROMPTS]
    shown = {"n": "draws", "p_value": "p", "p_adjusted": "p, corrected", "tv": "total variation", "tv_expected": "by chance alone"}
    columns = ["temperature", "top_p", "policy", *shown, "detectable_tv"]
    rounded = pooled[columns].round({"p_value": 3, "p_adjusted": 3, "tv": 4, "tv_expected": 4, "detectable_tv": 4})
    return rounded.rename(columns=shown | {"detectable_tv": "detectable", "top_p": "top-p"}).set_index(["temperature", "top-p", "policy"])


def p_values(frame: pd.DataFrame, significance: float) -> go.Figure:
    """One dot per independent test of a ``proof-sampled`` frame. Under the exact law the dots spread evenly over 0 … 1.

    The alarm is corrected for all tests of the frame, those that are not drawn included.
    """
    dots, figure = independent(frame), go.Figure()
    marks = zip(("circle", "diamond", "square", "cross"), ("draft", "correction", "bonus", "copy"), strict=True)
    for (setting, rows), (symbol, fate) in zip(dots.groupby(["temperature", "top_p"], sort=False), marks, strict=False):
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
    figure.add_vline(
        x=line, line={"color": GREY, "dash": "dash"}, annotation_text=f"alarm below {line:.1g}", annotation_position="bottom right"
    )
    figure.update_xaxes(title="p-value of χ² against the target's own law (no unit)", range=[-0.02, 1.02])
    figure.update_yaxes(title="policy", type="category", automargin=True)
    draws = f"{dots['n'].min():,} to {dots['n'].max():,}" if dots["n"].nunique() > 1 else f"{dots['n'].iloc[0]:,}"
    smallest = f"smallest p {dots['p_value'].min():.2g}, corrected {dots['p_adjusted'].min():.2g}"
    return dressed(figure, f"{len(dots)} independent tests of {draws} draws each: {smallest}", 160 + 22 * dots["policy"].nunique())


def crossed_chart(frame: pd.DataFrame) -> go.Figure:
    """A cell per policy and block size of a ``proof-crossed`` frame: the share of checked drafts that were kept. Neither 0 nor 1 means
    that the texts had to come out equal by keeping and by refusing."""
    cells = summed(frame, ["policy", "block_size"]).reset_index()
    cells["kept"] = cells["accepted"] / (cells["accepted"] + cells["rejected"]).clip(lower=1)
    policies, sizes = list(dict.fromkeys(cells["policy"])), sorted(set(cells["block_size"]))
    wide = {name: cells.pivot(index="policy", columns="block_size", values=name).loc[policies, sizes] for name in cells.columns[2:]}
    figure = go.Figure(
        go.Heatmap(
            x=[str(size) for size in sizes],
            y=policies,
            z=wide["kept"],
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            colorscale=[[0, "rgb(224,236,244)"], [1, FATES["draft"].colour()]],  # no page shines through, so the text in it is read
            colorbar={"title": "kept", "tickformat": ".0%", "outlinewidth": 0},
            text=wide["equal"].astype(str) + " of " + wide["texts"].astype(str),
            texttemplate="%{text}",
            customdata=np.dstack([wide["accepted"], wide["rejected"], wide["tokens"]]),
            hovertemplate="%{y}, block size %{x}: %{text} texts equal, %{customdata[2]} tokens<br>"
            "%{customdata[0]} drafts kept, %{customdata[1]} refused<extra></extra>",
        )
    )
    figure.update_xaxes(title="block size (tokens)", type="category", showgrid=False)
    figure.update_yaxes(title="policy", type="category", autorange="reversed", automargin=True, showgrid=False)
    title = f"{frame['equal'].sum():,} of {frame['prompts'].sum():,} texts equal (in each cell: how many); the darker, the more drafts kept"
    return dressed(figure, title, 150 + 28 * len(policies))


def enumeration_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The policies of a ``proof-enumeration`` frame, for the eye."""
    sums = {"cases": ("case", "size"), "heads and copying": ("source", "nunique"), "branches": ("branches", "sum")}
    return frame.groupby("policy", sort=False).agg(**sums, **{"largest difference": ("difference", "max")})


def crossed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The situations of a ``proof-crossed`` frame, for the eye."""
    names = {"accepted": "drafts kept", "rejected": "drafts refused", "ended_inside": "ended inside a block", "context": "longest context"}
    return summed(frame, "situation").rename(columns=names)


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
                cliponaxis=False,
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


def readable(table: pd.DataFrame) -> Styler:
    """A table of long texts as a page shows it: nothing cut, long names broken, to the left."""
    cells = {"text-align": "left", "vertical-align": "top", "white-space": "normal", "overflow-wrap": "anywhere", "min-width": "7em"}
    heads = [{"selector": "th", "props": [("text-align", "left")]}]
    return table.style.hide(axis="index").set_properties(**cells).set_table_styles(heads)
