"""Results as tables for a terminal."""

from __future__ import annotations

import math

import pandas as pd

from dspark.bench.identity import beyond_rounding
from dspark.bench.markdown import caption
from dspark.bench.stats import summarise


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
    shown["same text"] = _column(100 * lines["equal"], "{:.0f} %")
    if frame["temperature"].iloc[0] > 0:  # sampled texts may differ
        del shown["same text"]
    note = "T in ms, medians. Speed-up: median over prompts of the paired ratio [95 % bootstrap]; all: geometric mean of the domains."
    return f"{_heading(frame)} · speed-up over {baseline}\n{shown.to_string(index=False)}\n{note}"


def identity_table(frame: pd.DataFrame) -> str:
    """Per arm: how many texts are ``model.generate``'s, and, where they diverge, margins and rounding noise."""
    by_arm = frame.groupby("arm", sort=False)
    shown = pd.DataFrame(
        {
            "arm": list(by_arm.groups),
            "equal": [f"{part['equal'].sum()} of {len(part)}" for _, part in by_arm],
            "first divergence": _column([part.loc[~part["equal"], "first_divergence"].min() for _, part in by_arm], "{:.0f}"),
            "largest margin": _column([part["margin"].max() for _, part in by_arm], "{:.4f}"),
            "largest noise": _column([part["noise"].max() for _, part in by_arm], "{:.4f}"),
            "beyond rounding": [int(beyond_rounding(part).sum()) for _, part in by_arm],
        }
    )
    return f"{_heading(frame)} · against model.generate(do_sample=False)\n{shown.to_string(index=False)}"


def memory_table(frame: pd.DataFrame, baseline: str) -> str:
    """Per arm: peak memory (median over repeats) and its ratio to the baseline's."""
    kinds = {"process": "peak_rss_mib", "while decoding": "decode_peak_mib", "GPU": "device_peak_mib"}
    peaks = frame.groupby("arm", sort=False)[list(kinds.values())].median()
    if baseline not in peaks.index:
        raise ValueError(f"the baseline {baseline!r} was not measured: choose one of {', '.join(peaks.index)}")
    shown = pd.DataFrame({"arm": list(peaks.index)})
    for title, kind in kinds.items():
        ratios = _column(peaks[kind] / peaks[kind][baseline], "× {:.3f}")
        shown[title] = [f"{peak} {ratio}" for peak, ratio in zip(_column(peaks[kind], "{:.0f} MiB"), ratios, strict=True)]
    return f"{_heading(frame)} · peak memory, × {baseline}\n{shown.to_string(index=False)}"


def _heading(frame: pd.DataFrame) -> str:
    return " · ".join([caption(frame), *(f"drafter {name}" for name in dict.fromkeys(frame["drafter"]) if name)])


def _column(values: pd.Series | list[float], form: str) -> list[str]:
    return ["–" if math.isnan(value) else form.format(value) for value in values]
