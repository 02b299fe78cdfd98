"""Figures of speed: pure functions of the frames that :mod:`dspark.bench` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from dspark.bench import published
from dspark.bench.arms import arm_label, parse_arm, separated
from dspark.bench.measure import Trial, summary
from dspark.bench.stats import ALL, summarise
from dspark.lab.figures import GREY, arm_colours, dressed

PLAIN, MTP1 = "plain", "mtp1"


def arms_of(policy: str, block_size: int, confidence: float, adaptive: Sequence[float]) -> list[str]:
    """The names of arms that a notebook's parameters ask for.

    policy: arms separated by commas; ``confidence``, ``conditional`` and ``adaptive`` without numbers take those given here.
    block_size: drafted tokens a round at most; 0 for the drafter's own block.
    adaptive: thresholds to widen, to narrow and to fall back.
    Raises ValueError for an unknown arm.
    """
    numbers = {"confidence": f":{confidence:g}", "conditional": f":{confidence:g}", "adaptive": ":" + ",".join(f"{x:g}" for x in adaptive)}
    names = []
    for word in separated(policy):
        kind, plus, suffixes = word.partition("+")
        name = kind + numbers.get(kind, "") + plus + suffixes
        limited = parse_arm(name).spec and block_size and "+block" not in name
        names.append(f"{name}+block:{block_size}" if limited else name)
    return list(dict.fromkeys(names))


def conditions(frame: pd.DataFrame) -> str:
    """What was measured, for a title: decoding, dtype and the number of prompts."""
    first = frame.iloc[0]
    decoding = "greedy" if first["temperature"] == 0 else f"T = {first['temperature']:g}"
    return f"{decoding}, {first['dtype']}, n = {frame['prompt_id'].nunique() // frame['domain'].nunique()} prompts a domain"


def over(frame: pd.DataFrame, baseline: str, quoted: bool = False) -> go.Figure:
    """Speed-up over ``baseline`` of every arm in every domain, with 95 % bootstrap intervals over prompts.

    quoted: shade the published range, measured against MTP-1 in production on many GPUs. Raises ValueError for another baseline.
    """
    if quoted and baseline != MTP1:
        raise ValueError(f"the published range is a speed-up over {MTP1}, not over {baseline!r}: leave it out")
    lines = summarise(frame, baseline).query("arm != @baseline")
    bars = {"error_y": lines["high"] - lines["speedup"], "error_y_minus": lines["speedup"] - lines["low"]}
    hover = {"tokens_per_round": ":.2f", "speedup": ":.2f"}
    figure = px.scatter(lines, x="domain", y="speedup", hover_data=hover, **bars, **arm_colours(lines["arm"]))
    figure.update_traces(marker_size=9).add_hline(1, line={"color": GREY, "dash": "dash"})
    if quoted:
        low, high = (1 + gain for gain in published.RANGE)
        note = f"quoted: {low:.2f}–{high:.2f}× over MTP-1"
        figure.add_hrect(low, high, fillcolor=GREY, opacity=0.18, line_width=0, annotation_text=note, annotation_position="top left")
    figure.update_xaxes(title="domain; all: their geometric mean")
    figure.update_yaxes(title=f"speed-up over {arm_label(baseline)} (×)", rangemode="tozero")
    figure.update_layout(scattermode="group", scattergap=0.3)
    return dressed(figure, f"Speed-up over {arm_label(baseline)} ({conditions(frame)})", 480)


def needed(points: pd.DataFrame, name: str) -> go.Figure:
    """τ that each window needs for each speed-up (solid; dotted if drafting were free), below the τ of a drafter that is always right.

    points: from :func:`dspark.tune.predict.break_even`.
    """
    lines = points.melt(["window", "speedup"], ["required", "free"], "drafting", "tau")
    speedup = lines["speedup"].map("{:g}×".format)
    look = {"line_dash": "drafting", "line_dash_map": {"required": "solid", "free": "dot"}, "markers": True}
    figure = px.line(lines, x="window", y="tau", color=speedup, **look)
    windows = lines["window"].unique()
    figure.add_scatter(x=windows, y=windows + 1, mode="lines", line={"color": GREY, "dash": "dash"}, name="always right: window + 1")
    figure.update_xaxes(title="window (drafted tokens a round)", dtick=1)
    figure.update_yaxes(title="τ needed (tokens a round)", rangemode="tozero")
    return dressed(figure, f"Break-even of {name} on this machine (n = {len(windows)} windows)", 440)


def flat_summary(frame: pd.DataFrame, arm: str) -> dict[str, float | str | int]:
    """One arm of a run as one flat row; NaN if every text ended with its first token.

    arm, n: its name, and the number of prompts.
    speedup, low, high: over plain decoding, all domains, with the 95 % bootstrap interval; speedup_code, …: by domain.
    speedup_over_mtp1, …: the same over MTP-1, if that was measured.
    tokens_per_round, tokens_per_second, plain_tokens_per_second: without the prefill.
    """
    result: dict[str, float | str | int] = {"arm": arm}
    for baseline in [b for b in (PLAIN, MTP1) if b in set(frame["arm"])]:
        lines = summarise(frame, baseline).set_index(["arm", "domain"])
        mine, whole, end = lines.loc[arm], lines.loc[(arm, ALL)], "" if baseline == PLAIN else "_over_mtp1"
        result |= {f"{name}{end}": float(whole[name]) for name in ("speedup", "low", "high")}
        result |= {f"speedup{end}_{domain}": float(mine.loc[domain, "speedup"]) for domain in mine.index if domain != ALL}
    result |= {name: float(whole[name]) for name in ("tokens_per_round", "tokens_per_second")}
    return result | {"n": int(whole["n"]), "plain_tokens_per_second": float(lines.loc[(PLAIN, ALL), "tokens_per_second"])}


def race_frame(heats: Sequence[Mapping[str, Trial]], prompts: Sequence[str]) -> pd.DataFrame:
    """One row per heat and arm, with the columns that :func:`dspark.bench.stats.summarise` reads.

    heats: arm → its trial on one prompt; :data:`PLAIN` is one of the arms. prompts: the prompt of each heat; the same prompt twice is
    another repeat.
    """
    rows = []
    for trials, prompt in zip(heats, prompts, strict=True):
        for arm, trial in trials.items():
            same = trial.token_ids == trials[PLAIN].token_ids
            rows.append({"prompt_id": prompt, "domain": "race", "arm": arm, "equals_baseline": same} | summary(trial))
    return pd.DataFrame(rows)


def race_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For the reader: a row per prompt; tokens/s (median over its heats) and τ of every arm, plain decoding first."""
    shown = frame.assign(**{"tokens/s": 1e3 / frame["latency_ms"], "τ": frame["tokens_per_round"]}).rename(columns={"prompt_id": "prompt"})
    shown = shown.sort_values("arm", key=lambda arms: arms != PLAIN, kind="stable")
    return shown.pivot_table(index="prompt", columns="arm", values=["tokens/s", "τ"], aggfunc="median", sort=False).round(2)
