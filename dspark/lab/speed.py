"""Figures of speed: pure functions of the frames that :mod:`dspark.bench` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

from dspark.bench import published
from dspark.bench.arms import parse_arm, separated
from dspark.bench.measure import Trial, first_divergence, summary
from dspark.bench.stats import ALL, summarise
from dspark.lab.figures import GREY, dressed
from dspark.schedule import policy_colour, policy_label
from dspark.tune.predict import BreakEven

PLAIN, MTP1 = "plain", "mtp1"
PUBLISHED = tuple(round(1 + gain, 2) for gain in published.RANGE)  # quoted, never measured here: lowest and highest speed-up over MTP-1


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
        kind, *suffixes = word.split("+")
        name = "+".join([kind + numbers.get(kind, ""), *suffixes])
        arm = parse_arm(name)
        if block_size and arm.drafts and "+block" not in name:
            name += f"+block:{block_size}"
        names.append(name)
    return list(dict.fromkeys(names))


def conditions(frame: pd.DataFrame) -> str:
    """What was measured, for a title: decoding, dtype and the number of prompts."""
    first = frame.iloc[0]
    decoding = "greedy" if first["temperature"] == 0 else f"T = {first['temperature']:g}"
    return f"{decoding}, {first['dtype']}, n = {frame['prompt_id'].nunique() // frame['domain'].nunique()} prompts a domain"


def _marker(arm: str, **style: object) -> dict[str, object]:
    """An arm's colour; arms that also copy from the context are diamonds."""
    return {"color": policy_colour(arm), "symbol": "diamond" if "copy" in arm else "circle", **style}


def _interval(rows: pd.DataFrame) -> dict[str, object]:
    """Error bars from ``low`` to ``high`` around ``speedup``."""
    return {"type": "data", "array": rows["high"] - rows["speedup"], "arrayminus": rows["speedup"] - rows["low"]}


def over(frame: pd.DataFrame, baseline: str, quoted: bool = False) -> go.Figure:
    """Speed-up over ``baseline`` of every arm in every domain, with 95 % bootstrap intervals over prompts.

    quoted: shade the published range, measured against MTP-1 in production on many GPUs. Raises ValueError for another baseline.
    """
    if quoted and baseline != MTP1:
        raise ValueError(f"the published range is a speed-up over {MTP1}, not over {baseline!r}: leave it out")
    lines = summarise(frame, baseline)
    arms = [arm for arm in dict.fromkeys(lines["arm"]) if arm != baseline]
    domains, figure = list(dict.fromkeys(lines["domain"])), go.Figure()
    for i, arm in enumerate(arms):
        rows, name = lines[lines["arm"] == arm].set_index("domain").loc[domains], policy_label(arm)
        x = [at + 0.7 * ((i + 0.5) / len(arms) - 0.5) for at in range(len(domains))]
        hints = [f"{name}, {r.Index}: {r.speedup:.2f}× [{r.low:.2f}, {r.high:.2f}], τ {r.tokens_per_round:.2f}" for r in rows.itertuples()]
        look = {"mode": "markers", "name": name, "marker": _marker(arm, size=9), "text": hints, "hoverinfo": "text"}
        figure.add_scatter(x=x, y=rows["speedup"], error_y=_interval(rows), **look)
    figure.add_hline(1, line={"color": GREY, "dash": "dash"})
    if quoted:
        low, high = PUBLISHED
        note = f"quoted: {low:.2f}–{high:.2f}× over MTP-1"
        figure.add_hrect(low, high, fillcolor=GREY, opacity=0.18, line_width=0, annotation_text=note, annotation_position="top left")
    names = ["all (geometric mean)" if d == ALL else d for d in domains]
    figure.update_xaxes(title="domain", tickvals=list(range(len(domains))), ticktext=names)
    figure.update_yaxes(title=f"speed-up over {policy_label(baseline)} (×)", rangemode="tozero")
    return dressed(figure, f"Speed-up over {policy_label(baseline)} ({conditions(frame)})", 440)


def needed(points: Sequence[BreakEven], name: str) -> go.Figure:
    """τ that each window needs for each speed-up (solid; dotted if drafting were free), below the τ of a drafter that is always right."""
    figure = go.Figure()
    windows = sorted({p.window for p in points})
    style = {"color": GREY, "dash": "dash"}
    figure.add_scatter(x=windows, y=[w + 1 for w in windows], mode="lines", line=style, name="always right: window + 1")
    for speedup, colour in zip(dict.fromkeys(p.speedup for p in points), qualitative.Safe * len(points), strict=False):
        part = [p for p in points if p.speedup == speedup]
        for dash, label, kind in (("solid", f"{speedup:g}×", "required"), ("dot", f"{speedup:g}×, free drafting", "free")):
            look = {"mode": "lines+markers", "line": {"color": colour, "dash": dash}, "name": label}
            figure.add_scatter(x=[p.window for p in part], y=[getattr(p, kind) for p in part], **look)
    figure.update_xaxes(title="window (drafted tokens a round)", dtick=1)
    figure.update_yaxes(title="τ needed (tokens a round)", rangemode="tozero")
    dressed(figure, f"Break-even of {name} on this machine (n = {len(windows)} windows)", 440)
    return figure.update_layout(legend={"orientation": "v", "y": 1, "yanchor": "top"})


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
    for heat, (trials, prompt) in enumerate(zip(heats, prompts, strict=True)):
        reference = trials[PLAIN].token_ids
        for arm, trial in trials.items():
            same = first_divergence(trial.token_ids, reference) < 0
            rows.append({"heat": heat, "prompt_id": prompt, "domain": "race", "arm": arm, "equals_baseline": same} | summary(trial))
    return pd.DataFrame(rows)


def race_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For the reader: a row per prompt; tokens/s (median over its heats) and τ of every arm, plain decoding first."""
    shown = frame.assign(tokens_per_second=1e3 / frame["latency_ms"])
    columns = {"tokens_per_second": "tokens/s", "tokens_per_round": "τ"}
    wide = shown.pivot_table(index="prompt_id", columns="arm", values=list(columns), aggfunc="median", sort=False)
    wide = wide.reindex(columns=product(columns, sorted(dict.fromkeys(frame["arm"]), key=PLAIN.__ne__)))
    return wide.rename(columns=columns).rename_axis(index="prompt", columns=[None, None]).round(2)
