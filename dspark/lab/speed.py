"""The headline in pictures: pure functions of the frames that :mod:`dspark.bench` writes, and the words that name its arms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go

from dspark.bench import published
from dspark.bench.arms import parse_arm, separated
from dspark.bench.explained import PLAIN, WITHIN, explained
from dspark.bench.stats import ALL, summarise
from dspark.lab.figures import FATES, GREY, dressed
from dspark.tune.predict import BreakEven

MTP1 = "mtp1"
# Quoted, never measured here: per-user speed at matched throughput over MTP-1, in production on many GPUs.
PUBLISHED = {
    name: (round(1 + low, 2), round(1 + high, 2))
    for name, (low, high) in {"the published range": published.RANGE, **published.GAINS}.items()
}
COLOURS = [FATES[name].colour() for name in ("draft", "correction", "bonus", "copy", "phrase", "plain", "sibling")]
MARKS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


def arms_of(policy: str, block_size: int, confidence: float, adaptive: Sequence[float]) -> list[str]:
    """Words of a notebook's parameters → names of arms. ``fixed``, ``confidence``, ``conditional`` and ``adaptive`` without numbers
    take those of the parameters.

    policy: arms separated by commas · block_size: tokens drafted a round at most, 0 for the drafter's own · adaptive: widen, narrow,
    fall back. Raises ValueError for an arm that cannot be read.
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


def _about(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    law = "greedy" if first["temperature"] == 0 else f"T = {first['temperature']:g}"
    return f"{law}, {first['dtype']}, n = {frame['prompt_id'].nunique() // frame['domain'].nunique()} prompts a domain"


def _looks(arms: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and mark of each arm; where colours come again, marks are hollow."""
    again = ("", "-open")
    return {
        arm: {"color": COLOURS[i % len(COLOURS)], "symbol": MARKS[i % len(MARKS)] + again[i // len(COLOURS) % 2]}
        for i, arm in enumerate(arms)
    }


def over(frame: pd.DataFrame, baseline: str, quoted: bool = False) -> go.Figure:
    """Speed-up over ``baseline`` of every arm in every domain, with 95 % bootstrap intervals over prompts.

    quoted: shade the published range, which was measured against MTP-1 on other models and machines.
    """
    lines = summarise(frame, baseline)
    arms = [arm for arm in dict.fromkeys(lines["arm"]) if arm != baseline]
    domains, figure = list(dict.fromkeys(lines["domain"])), go.Figure()
    for i, (arm, look) in enumerate(_looks(arms).items()):
        rows = lines[lines["arm"] == arm].set_index("domain").loc[domains]
        spread = {"type": "data", "array": rows["high"] - rows["speedup"], "arrayminus": rows["speedup"] - rows["low"]}
        x = [at + 0.7 * ((i + 0.5) / len(arms) - 0.5) for at in range(len(domains))]
        hints = [f"{arm}, {d}: {s:.2f}× [{a:.2f}, {b:.2f}], τ {t:.2f}" for d, s, a, b, t in _numbers(rows)]
        marker = look | {"size": 9}
        figure.add_scatter(x=x, y=rows["speedup"], error_y=spread, mode="markers", name=arm, marker=marker, text=hints, hoverinfo="text")
    figure.add_hline(1, line={"color": GREY, "dash": "dash"})
    if quoted:
        low, high = PUBLISHED["the published range"]
        note = f"quoted: {low:.2f}–{high:.2f}× over MTP-1"
        figure.add_hrect(low, high, fillcolor=GREY, opacity=0.18, line_width=0, annotation_text=note, annotation_position="top left")
    names = ["all (geometric mean)" if d == ALL else d for d in domains]
    figure.update_xaxes(title="domain", tickvals=list(range(len(domains))), ticktext=names)
    figure.update_yaxes(title=f"speed-up over {baseline} (×)", rangemode="tozero")
    return dressed(figure, f"Speed-up over {baseline} ({_about(frame)})", 440)


def _numbers(rows: pd.DataFrame) -> list[tuple]:
    return list(rows[["speedup", "low", "high", "tokens_per_round"]].itertuples(name=None))


def law(frame: pd.DataFrame) -> go.Figure:
    """Predicted against measured speed-up, a dot per prompt: how much of it τ alone explains, given the run's mean step times."""
    points = explained(frame)
    error = (points["predicted"] / points["speedup"] - 1).abs()
    top = 1.05 * max(points[["predicted", "speedup"]].max().max(), 1.2)
    line = {"color": GREY, "dash": "dash"}
    figure = go.Figure(go.Scatter(x=[0, top], y=[0, top], mode="lines", line=line, name="predicted = measured", hoverinfo="skip"))
    for arm, look in _looks(dict.fromkeys(points["arm"])).items():
        part = points[points["arm"] == arm]
        hints = [
            f"{r.prompt_id} ({r.theme}), {arm}<br>τ {r.tokens_per_round:.2f}: {r.acceptance:.0%} of {r.draft_length:.1f} drafts a round"
            for r in part.itertuples()
        ]
        marker = look | {"size": 7, "opacity": 0.75}
        figure.add_scatter(x=part["predicted"], y=part["speedup"], mode="markers", name=arm, marker=marker, text=hints, hoverinfo="text")
    figure.update_xaxes(title="predicted: τ · T_plain / (T_draft + T_verify) (×)", range=[0, top])
    figure.update_yaxes(title="measured speed-up over plain (×)", range=[0, top])
    share = f"{(error <= WITHIN).mean():.0%} within {WITHIN:.0%}, median error {error.median():.1%}"
    title = f"Predicted from τ and mean step times: {share} (n = {len(points)})"
    return dressed(figure, title, 480)


def by_kind(frame: pd.DataFrame, arm: str) -> go.Figure:
    """One arm's prompts by domain, the fastest kind first; the creative ones of the chat set stand by themselves."""
    points = explained(frame[frame["arm"].isin([PLAIN, arm])])
    points["kind"] = points["domain"].where(points["theme"] != "creative", "creative")
    order = points.groupby("kind")["speedup"].median().sort_values(ascending=False).index
    figure = go.Figure()
    for kind in order:
        part = points[points["kind"] == kind]
        colour = FATES["correction" if kind == "creative" else "draft"].colour()
        hints = [f"{r.prompt_id} ({r.theme}): {r.speedup:.2f}×, τ {r.tokens_per_round:.2f}" for r in part.itertuples()]
        box = {"boxpoints": "all", "pointpos": 0, "jitter": 0.4, "marker_color": colour, "line_color": colour, "fillcolor": "rgba(0,0,0,0)"}
        figure.add_box(y=part["speedup"], name=f"{kind}<br>n = {len(part)}", text=hints, hoverinfo="text", showlegend=False, **box)
    figure.add_hline(1, line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title="kind of text")
    figure.update_yaxes(title="speed-up over plain (×)", rangemode="tozero")
    return dressed(figure, f"{arm}, by kind of text ({_about(frame)})", 420)


def cost(frame: pd.DataFrame, price: float) -> pd.DataFrame:
    """Arm × domain: what a million tokens cost, if ``price`` is what they cost with plain decoding on the same machine, and the saving.

    A machine's price is by the hour, so the cost is price / speed-up. Columns arm, domain, speedup, cost, saved, saved_low, saved_high.
    """
    if not price > 0:
        raise ValueError(f"price must be positive, got {price}: what a million tokens cost with plain decoding")
    lines = summarise(frame, PLAIN)
    lines = lines[lines["arm"] != PLAIN]
    saved = {name: price * (1 - 1 / lines[column]) for name, column in (("saved", "speedup"), ("saved_low", "low"), ("saved_high", "high"))}
    return lines[["arm", "domain", "speedup"]].assign(cost=price / lines["speedup"], **saved).reset_index(drop=True)


def savings(frame: pd.DataFrame, price: float) -> go.Figure:
    """:func:`cost` as bars: saved per million tokens, with intervals; under zero it costs more than plain decoding."""
    table, figure = cost(frame, price), go.Figure()
    for arm, look in _looks(dict.fromkeys(table["arm"])).items():
        rows = table[table["arm"] == arm]
        spread = {
            "type": "data",
            "color": GREY,
            "array": rows["saved_high"] - rows["saved"],
            "arrayminus": rows["saved"] - rows["saved_low"],
        }
        figure.add_bar(x=rows["domain"], y=rows["saved"], name=arm, error_y=spread, marker={"color": look["color"], "opacity": 0.85})
    figure.update_xaxes(title="domain")
    figure.update_yaxes(title=f"saved per million tokens (of {price:g})")
    return dressed(figure, f"Saved per million tokens that cost {price:g} with plain decoding ({_about(frame)})", 400)


def memory_beside_speed(speed: pd.DataFrame, memory: pd.DataFrame) -> go.Figure:
    """A dot per arm that both runs hold: peak memory while decoding over plain's, and speed-up over plain (geometric mean)."""
    column = next(c for c in ("device_peak_mib", "decode_peak_mib", "peak_rss_mib") if not memory[c].isna().any())
    peaks = memory.groupby("arm", sort=False)[column].median()
    lines = summarise(speed, PLAIN)
    lines = lines[lines["domain"] == ALL].set_index("arm")
    figure = go.Figure()
    arms = [arm for arm in peaks.index if arm in lines.index]
    for arm, look in _looks(arms).items():
        marker = {"color": GREY, "symbol": "circle"} if arm == PLAIN else look
        row = lines.loc[arm]
        spread = {"type": "data", "array": [row["high"] - row["speedup"]], "arrayminus": [row["speedup"] - row["low"]]}
        x, text = [peaks[arm] / peaks[PLAIN]], f"{arm}, {peaks[arm]:.0f} MiB"
        figure.add_scatter(x=x, y=[row["speedup"]], error_y=spread, mode="markers", name=text, marker=marker | {"size": 11})
    figure.add_hline(1, line={"color": GREY, "dash": "dash"})
    figure.update_xaxes(title="peak memory over plain (×)")
    figure.update_yaxes(title="speed-up over plain (×)", rangemode="tozero")
    return dressed(figure, f"Memory beside speed (n = {len(arms)} arms; {_about(speed)})", 400)


def published_beside_ours(frame: pd.DataFrame, baselines: Sequence[str] = (PLAIN, MTP1)) -> pd.DataFrame:
    """For the eye: the quoted ranges first, then every arm and domain against each baseline that was measured.

    ``lies`` says where the interval is: below, inside or above the published range, or across its ends.
    """
    rows = [{"source": "quoted", "what": name, "against": "mtp1", "low": low, "high": high} for name, (low, high) in PUBLISHED.items()]
    for baseline in [b for b in baselines if b in set(frame["arm"])]:
        lines = summarise(frame, baseline)
        for r in lines[~lines["arm"].isin([PLAIN, MTP1])].itertuples():
            row = {"source": "measured", "what": f"{r.arm}, {r.domain}", "against": baseline, "speedup": r.speedup}
            rows.append(row | {"low": r.low, "high": r.high, "lies": published.place(r.low - 1, r.high - 1)})
    return pd.DataFrame(rows, columns=["source", "what", "against", "speedup", "low", "high", "lies"]).round(2)


def needed(points: Sequence[BreakEven], name: str) -> go.Figure:
    """τ that each window needs for each speed-up (solid; dotted if drafting were free), under the τ of a drafter that is always right."""
    figure = go.Figure()
    windows = sorted({p.window for p in points})
    ceiling = [window + 1 for window in windows]
    style = {"color": GREY, "dash": "dash"}
    figure.add_scatter(x=windows, y=ceiling, mode="lines", line=style, name="always right: window + 1")
    for i, speedup in enumerate(dict.fromkeys(p.speedup for p in points)):
        part = [p for p in points if p.speedup == speedup]
        for dash, label, kind in (("solid", f"{speedup:g}×", "required"), ("dot", f"{speedup:g}×, free drafting", "free")):
            line = {"color": COLOURS[i % len(COLOURS)], "dash": dash}
            y = [getattr(p, kind) for p in part]
            figure.add_scatter(x=[p.window for p in part], y=y, mode="lines+markers", line=line, name=label)
    figure.update_xaxes(title="window (drafted tokens a round)", dtick=1)
    figure.update_yaxes(title="τ needed (tokens a round)", rangemode="tozero")
    dressed(figure, f"Break-even of {name} on this machine (n = {len(windows)} windows)", 440)
    return figure.update_layout(legend={"orientation": "v", "y": 1, "yanchor": "top"})


def flat_summary(frame: pd.DataFrame, arm: str) -> dict[str, float | str | int]:
    """One arm of a run as one row: speed-up over plain and over MTP-1 with intervals, τ, and both by domain. Keys without nesting."""
    result: dict[str, float | str | int] = {"arm": arm}
    for baseline in [b for b in (PLAIN, MTP1) if b in set(frame["arm"])]:
        lines = summarise(frame, baseline)
        lines = lines[lines["arm"] == arm].set_index("domain")
        whole, end = lines.loc[ALL], "" if baseline == PLAIN else "_over_mtp1"
        result |= {f"{name}{end}": float(whole[name]) for name in ("speedup", "low", "high")}
        result |= {f"speedup{end}_{domain}": float(lines.loc[domain, "speedup"]) for domain in lines.index if domain != ALL}
    return result | {"n": int(whole["n"]), "tokens_per_round": float(whole["tokens_per_round"])}
