"""Results as tables for a terminal."""

from __future__ import annotations

import pandas as pd

from dspark.bench.identity import beyond_rounding
from dspark.bench.stats import busy, summarise


def place(frame: pd.DataFrame) -> str:
    """Where the rows were measured: threads and processor, or the device."""
    first = frame.iloc[0]
    return f"{first['threads']} threads of {first['machine']}" if first["device"] == "cpu" else str(first["device"])


def caption(frame: pd.DataFrame) -> str:
    """What a speed file measured, in one line."""
    first = frame.iloc[0]
    sampling = "greedy" if first["temperature"] == 0 else f"temperature {first['temperature']:g}"
    return (
        f"{first['target']}, {sampling}, {first['dtype']}, {first['max_new_tokens']} new tokens, "
        f"n = {first['n']} {first['split']} prompts per domain, {place(frame)}"
    )


def speed_table(frame: pd.DataFrame, baseline: str) -> str:
    """Arm × domain: speed-up over the baseline with its interval, τ, and where the time goes."""
    lines = summarise(frame, baseline)
    lines["speed-up"] = [f"{s:.2f} {between(lo, hi)}" for s, lo, hi in lines[["speedup", "low", "high"]].to_numpy()]
    names = {"tokens_per_round": "τ", "tokens_per_second": "tok/s", "draft_ms": "T_draft", "verify_ms": "T_verify"}
    names |= {"round_ms": "T_round", "plain_ms": "T_plain", "equal": "same text"}
    shown = lines.rename(columns=names)[["arm", "domain", "n", "speed-up", *names.values()]]
    note = "T in ms, medians. Speed-up: median over prompts of the paired ratio [95 % bootstrap]; all: geometric mean of the domains."
    return "\n".join(filter(None, [f"{caption(frame)} · speed-up over {baseline}", _text(shown.round(2)), note, busy(frame)]))


def between(low: float, high: float) -> str:
    """An interval for the reader; says so where there is none."""
    return f"[{low:.2f}, {high:.2f}]" if low == low else "[n too small]"


def identity_table(frame: pd.DataFrame, _baseline: str = "") -> str:
    """Per arm: how many texts are ``model.generate``'s, and, where they diverge, margins and rounding noise."""
    by_arm = frame.assign(beyond=beyond_rounding(frame)).groupby("arm", sort=False)
    shown = by_arm[["margin", "noise"]].max().round(4).add_prefix("largest ")
    shown.insert(0, "equal", by_arm["equal"].sum().astype(str) + " of " + by_arm.size().astype(str))
    shown = shown.assign(**{"beyond rounding": by_arm["beyond"].sum()}).reset_index()
    return f"{caption(frame)} · against model.generate(do_sample=False)\n{_text(shown)}"


def memory_table(frame: pd.DataFrame, baseline: str) -> str:
    """Per arm: peak memory (median over repeats) and its ratio to the baseline's. Raises ValueError for a baseline without a row."""
    peaks = frame.groupby("arm", sort=False)[["peak_rss_mib", "device_peak_mib"]].median()
    if baseline not in peaks.index:
        raise ValueError(f"the baseline {baseline!r} was not measured: choose one of {', '.join(peaks.index)}")
    ratios = (peaks / peaks.loc[baseline]).round(3).add_suffix(f" / {baseline}'s")
    return f"{caption(frame)} · peak memory\n{_text(peaks.round().join(ratios).reset_index())}"


def _text(shown: pd.DataFrame) -> str:
    return shown.to_string(index=False, na_rep="–")


TABLES = {"speed": speed_table, "identity": identity_table, "memory": memory_table}  # by the mode that measured the rows
