"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

from dspark.bench.identity import beyond_rounding
from dspark.bench.stats import summarise


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
    shown = lines[["arm", "domain", "n"]].copy()
    shown["speed-up"] = [f"{s:.2f} [{lo:.2f}, {hi:.2f}]" for s, lo, hi in lines[["speedup", "low", "high"]].to_numpy()]
    shown["τ"] = _column(lines["tokens_per_round"], "{:.2f}")
    shown["tok/s"] = _column(lines["tokens_per_second"], "{:.1f}")
    for name in ("draft", "verify", "round", "plain"):
        shown[f"T_{name}"] = _column(lines[f"{name}_ms"], "{:.1f}")
    shown["other"] = _column(100 * lines["other_share"], "{:.1f} %")
    if frame["temperature"].iloc[0] == 0:  # sampled texts may differ
        shown["same text"] = _column(100 * lines["equal"], "{:.0f} %")
    note = "T in ms, medians. Speed-up: median over prompts of the paired ratio [95 % bootstrap]; all: geometric mean of the domains."
    return f"{caption(frame)} · speed-up over {baseline}\n{shown.to_string(index=False)}\n{note}"


def identity_table(frame: pd.DataFrame, _baseline: str = "") -> str:
    """Per arm: how many texts are ``model.generate``'s, and, where they diverge, margins and rounding noise."""
    by_arm = frame.assign(beyond=beyond_rounding(frame)).groupby("arm", sort=False)
    shown = pd.DataFrame(
        {
            "equal": by_arm["equal"].sum().astype(str) + " of " + by_arm.size().astype(str),
            "largest margin": _column(by_arm["margin"].max(), "{:.4f}"),
            "largest noise": _column(by_arm["noise"].max(), "{:.4f}"),
            "beyond rounding": by_arm["beyond"].sum(),
        }
    )
    return f"{caption(frame)} · against model.generate(do_sample=False)\n{shown.reset_index().to_string(index=False)}"


def memory_table(frame: pd.DataFrame, baseline: str) -> str:
    """Per arm: peak memory (median over repeats) and its ratio to the baseline's. Raises ValueError for a baseline without a row."""
    kinds = {"process": "peak_rss_mib", "GPU": "device_peak_mib"}
    peaks = frame.groupby("arm", sort=False)[list(kinds.values())].median()
    if baseline not in peaks.index:
        raise ValueError(f"the baseline {baseline!r} was not measured: choose one of {', '.join(peaks.index)}")
    shown = pd.DataFrame({"arm": list(peaks.index)})
    for title, kind in kinds.items():
        shown[f"{title}, MiB"] = _column(peaks[kind], "{:.0f}")
        shown[f"{title}, × {baseline}"] = _column(peaks[kind] / peaks.loc[baseline, kind], "{:.3f}")
    return f"{caption(frame)} · peak memory\n{shown.to_string(index=False)}"


TABLES = {"speed": speed_table, "identity": identity_table, "memory": memory_table}  # by the mode that measured the rows


def _column(values: Iterable[float], form: str) -> list[str]:
    return ["–" if math.isnan(value) else form.format(value) for value in values]
