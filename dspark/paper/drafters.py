"""Drafters that were trained alike → τ by domain, acceptance by position, and what drafting costs; each where it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dspark.bench import published
from dspark.lab.drafters import head_shares, joined, pooled_positions, tau_gains
from dspark.lab.static import INKS, MARKS
from dspark.paper.figures import WIDTH, dress, printed, wilson
from dspark.paper.macros import MEASURED, QUOTED, SETTING, SIMULATED, Macro, code, escaped, integer, listed, number, percent, styled
from dspark.paper.part import Part
from dspark.paper.tables import floated, tabular

DECODED = "drafters-t1-"  # and the drafter's name
HELD_OUT, TIMES = "drafters-trained", "drafters-time"
REFERENCE = "dspark"
NAMES = {REFERENCE: "DSpark", "dflash": "DFlash", "eagle": "autoregressive"}


def flags(frames: Mapping[str, pd.DataFrame]) -> dict[str, bool]:
    """Switch → on; HeldOut and DraftTimes are files of their own, HeadShares needs drafters of several block sizes in the latter."""
    decoded = {name.removeprefix(DECODED) for name in frames if name.startswith(DECODED)}
    measured = REFERENCE in decoded
    result = {"Decoded": measured, "OverDflash": measured and "dflash" in decoded, "OverEagle": measured and "eagle" in decoded}
    result["DraftCosts"] = TIMES in frames and measured
    result["HeadShares"] = TIMES in frames and len(head_shares(frames[TIMES])) > 1
    return result | {"Compared": measured or bool({HELD_OUT, TIMES} & frames.keys())}


def part(frames: Mapping[str, pd.DataFrame]) -> Part:
    """Raises ValueError for drafters that were not decoded on the same prompts."""
    on = flags(frames)
    held_out, spent = _ordered(frames.get(HELD_OUT)), _ordered(frames.get(TIMES))
    gains = None
    macros: list[Macro] = []
    tables, panels = {}, {}
    if held_out is not None:
        macros += _held_out(held_out)
        panels["computed on held-out text"] = _positions(held_out)
    if on["Decoded"]:
        frame = joined([rows for name, rows in frames.items() if name.startswith(DECODED)], "data/results")
        gains = _ordered(tau_gains(frame, REFERENCE))
        macros += _decoded(frame, gains)
        tables["table-drafters"] = by_domain(gains, "tab:drafters")
        positions = pooled_positions(frame, [name for name in NAMES if name in set(frame["arm"])])
        macros += _ends(positions)
        panels[f"counted while decoding, {frame['prompt_id'].nunique()} prompts"] = positions
    if spent is not None:
        medians = spent.groupby("drafter", sort=False)[["draft_ms", "head_ms", "verify_ms"]].median()
        medians["pass_ms"] = _passes(spent)
        macros += _times(spent, medians)
        tables["table-draft-times"] = costs(medians, gains, "tab:draft-times")
        if gains is not None:
            macros += _latencies(medians, gains)
    figures = {"figure-drafters": by_position(panels)} if panels else {}
    return Part(tuple(macros), tables, figures)


def _ordered(frame: pd.DataFrame | None) -> pd.DataFrame | None:
    """The three drafters that the text speaks of first, and the others by block size."""
    if frame is None:
        return None
    if "drafter_block_size" in frame:
        frame = frame.sort_values("drafter_block_size", kind="stable")
    return frame.sort_values("drafter", key=lambda names: names.map(_place), kind="stable").reset_index(drop=True)


def _place(drafter: str) -> int:
    return list(NAMES).index(drafter) if drafter in NAMES else len(NAMES)


def _name(drafter: str) -> str:
    return escaped(NAMES[drafter]) if drafter in NAMES else code(drafter)


def _each(kind: str, values: Mapping[str, str]) -> str:
    """Words: "DSpark 1.37, DFlash 1.32 and autoregressive 1.41"."""
    return listed(f"{_name(drafter)} {styled(kind, text)}" for drafter, text in values.items() if drafter in NAMES)


def _held_out(frame: pd.DataFrame) -> Iterator[Macro]:
    taus = dict(zip(frame["drafter"], frame["held_out_tau"].map(number), strict=True))
    yield Macro(SETTING, "ComparedSteps", listed(dict.fromkeys(integer(n) for n in frame["steps"])))
    sequences = dict.fromkeys(integer(json.loads(recipe)["sequences"]) for recipe in frame["recipe"])
    yield Macro(SETTING, "ComparedSequences", listed(sequences))
    yield Macro(SETTING, "ComparedRows", listed(dict.fromkeys(integer(n) for n in frame["corpus_rows"])))
    yield Macro(MEASURED, "ComparedHeldOut", _each(MEASURED, taus), dressed=True)


def _positions(frame: pd.DataFrame) -> pd.DataFrame:
    """Held-out acceptance, the columns of :func:`dspark.lab.drafters.pooled_positions` but the counts."""
    rows = frame[frame["drafter"].isin(list(NAMES))]
    return pd.DataFrame(
        [
            {"drafter": row["drafter"], "position": k, "acceptance": float(share)}
            for _, row in rows.iterrows()
            for k, share in enumerate(row["held_out_acceptance"], 1)
        ]
    )


def _decoded(frame: pd.DataFrame, gains: pd.DataFrame) -> Iterator[Macro]:
    first, lines = frame.iloc[0], gains.set_index("drafter")
    yield Macro(SETTING, "ComparedTemperature", f"{first['temperature']:g}")
    yield Macro(SETTING, "ComparedPrompts", integer(first["n"]))
    yield Macro(SETTING, "ComparedTokens", integer(first["max_new_tokens"]))
    yield Macro(MEASURED, "ComparedTau", _each(MEASURED, dict(lines["mean"].map(number))), dressed=True)
    for drafter, name in (("dflash", "Dflash"), ("eagle", "Eagle")):
        if drafter in lines.index:
            line = lines.loc[drafter]
            yield Macro(MEASURED, f"ComparedOver{name}", signed(line["gain"]))
            yield Macro(MEASURED, f"ComparedOver{name}Low", signed(line["low"]))
            yield Macro(MEASURED, f"ComparedOver{name}High", signed(line["high"]))
            yield Macro(MEASURED, f"ComparedOver{name}Verdict", verdict(line["low"], line["high"]))


def _ends(positions: pd.DataFrame) -> Iterator[Macro]:
    """Whether acceptance falls along the block, once all before it was right: its first and last position."""
    lines = {drafter: line.sort_values("position")["acceptance"] for drafter, line in positions.groupby("drafter")}
    told = {drafter: f"{number(line.iloc[0])} to {number(line.iloc[-1])}" for drafter in NAMES if (line := lines.get(drafter)) is not None}
    yield Macro(SETTING, "ComparedPositions", integer(positions["position"].max()))
    yield Macro(MEASURED, "ComparedEnds", _each(MEASURED, told), dressed=True)


def signed(gain: float) -> str:
    """+4.1 %, also where it is a loss: −4.1 %."""
    return ("$+$" if gain >= 0 else "") + percent(gain, 1)


def verdict(low: float, high: float) -> str:
    """How DSpark's τ stands to another's by the interval of its gain; follows "DSpark commits … tokens per round than"."""
    return "more" if low > 0 else "fewer" if high < 0 else "neither clearly more nor clearly fewer"


def _times(spent: pd.DataFrame, medians: pd.DataFrame) -> Iterator[Macro]:
    yield Macro(SETTING, "DraftTimesContext", integer(spent["context"].iloc[0]))
    yield Macro(SETTING, "DraftTimesPlace", escaped(f"{spent['threads'].iloc[0]} threads of {spent['machine'].iloc[0]}"))
    yield Macro(SETTING, "DraftTimesRepeats", integer(spent.groupby("drafter").size().min()))
    told = {drafter: number(ms, 1) + r"\,ms" for drafter, ms in medians["draft_ms"].items()}
    yield Macro(MEASURED, "DraftTimesBlock", _each(MEASURED, told), dressed=True)
    if len(shares := head_shares(spent)) > 1:
        yield Macro(SETTING, "HeadShareBlocks", listed(map(integer, shares.index)))
        yield Macro(MEASURED, "HeadShareLow", percent(shares.min(), 1))
        yield Macro(MEASURED, "HeadShareHigh", percent(shares.max(), 1))


def _passes(spent: pd.DataFrame) -> pd.Series:
    """One T_verify in ms for all drafters of a block size: it is the same pass of the target, timed beside each of them."""
    sizes = spent.groupby("drafter", sort=False)["drafter_block_size"].first()
    return sizes.map(spent.groupby("drafter_block_size")["verify_ms"].median())


def _latency(medians: pd.DataFrame, gains: pd.DataFrame) -> pd.Series:
    """L = (T_draft + T_verify) / τ in ms, by drafter; NaN where τ was not measured."""
    return (medians["draft_ms"] + medians["pass_ms"]) / gains.set_index("drafter")["mean"].reindex(medians.index)


def _latencies(medians: pd.DataFrame, gains: pd.DataFrame) -> Iterator[Macro]:
    told = {drafter: number(ms, 1) + r"\,ms" for drafter, ms in _latency(medians, gains).dropna().items()}
    yield Macro(SIMULATED, "ComparedLatency", _each(SIMULATED, told), dressed=True)


def by_domain(gains: pd.DataFrame, label: str) -> str:
    """Table 1's twin. gains: of :func:`dspark.lab.drafters.tau_gains`."""
    domains = [name for name in gains.columns if name not in ("drafter", "mean", "gain", "low", "high")]
    rows = []
    for _, line in gains.iterrows():
        taus = [styled(MEASURED, number(line[name])) for name in (*domains, "mean")]
        told, theirs = "--", "--"
        if line["drafter"] != REFERENCE:
            told = styled(MEASURED, f"{signed(line['gain'])} [{signed(line['low'])}, {signed(line['high'])}]")
        if line["drafter"] in published.DRAFTERS and line["drafter"] != REFERENCE:
            theirs = styled(QUOTED, "$+$" + percent(published.gain(line["drafter"])))
        rows.append([_name(line["drafter"]), *taus, told, theirs])
    about = (
        r"Tokens per round of drafters trained alike, at temperature \SettingComparedTemperature, and by how much DSpark's mean exceeds "
        rf"each, with the \SettingLevel bootstrap interval over prompts; beside it the gain published for {escaped(published.COMPARED)}."
    )
    heads = ["drafter", *map(escaped, domains), "mean", "DSpark's gain", "published"]
    return floated(tabular("l" + "r" * (len(heads) - 1), heads, rows), about, label)


def costs(medians: pd.DataFrame, gains: pd.DataFrame | None, label: str) -> str:
    """What a block costs with each drafter; latency per token where τ was measured, too."""
    latency = _latency(medians, gains) if gains is not None else pd.Series(np.nan, medians.index)
    rows = []
    for drafter, line in medians.iterrows():
        measured = [styled(MEASURED, number(line[name], 2)) for name in ("draft_ms", "head_ms", "verify_ms")]
        share = line["head_ms"] / (line["draft_ms"] + line["verify_ms"])
        rows.append([_name(drafter), *measured, styled(MEASURED, percent(share, 1)), styled(SIMULATED, number(latency[drafter], 1))])
    about = (
        r"Milliseconds, medians of \SettingDraftTimesRepeats on \SettingDraftTimesPlace, to draft a block behind \SettingDraftTimesContext "
        r"tokens, the sequential head's part of it, the target's pass over the block, the head's share of the round, and the latency per "
        r"token $L=(T_{\mathrm{draft}}+T_{\mathrm{verify}})/\tau$ with the mean $\tau$ and one $T_{\mathrm{verify}}$ for all drafters of a "
        r"block size, the median of theirs."
    )
    heads = ["drafter", r"$T_{\mathrm{draft}}$", "head", r"$T_{\mathrm{verify}}$", "head's share", "$L$"]
    return floated(tabular("l" + "r" * 5, heads, rows), about, label)


def by_position(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Fig. 2's twin: conditional acceptance, a panel for each way to find it; 95 % intervals where it was counted."""
    with printed():
        figure = Figure(figsize=(WIDTH if len(panels) > 1 else 0.7 * WIDTH, 2.4), layout="constrained")
        axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, rows) in zip(axes_of, panels.items(), strict=True):
            for drafter, line in rows.groupby("drafter", sort=False):
                i = _place(drafter)
                look = {"color": INKS[i], "marker": MARKS[i], "ms": 4, "linewidth": 1.2, "label": NAMES[drafter]}
                axes.errorbar(line["position"] + 0.08 * (i - 1), line["acceptance"], yerr=_spread(line), capsize=2, **look)
            dress(axes, title, "position in the block", "conditional acceptance (share)" if axes is axes_of[0] else "")
            axes.set_xticks(range(1, int(rows["position"].max()) + 1))
        axes_of[0].set_ylim(bottom=0)
        named = {label: line for axes in axes_of for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside right center", frameon=False)
    return figure


def _spread(line: pd.DataFrame) -> Sequence[np.ndarray] | None:
    if "n" not in line:
        return None
    share, n = line["acceptance"].to_numpy(float), line["n"].to_numpy(float)
    low, high = wilson(share * n, n)
    return [share - low, high - share]
