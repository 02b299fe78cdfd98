"""Statistics of a run, and its tables for a terminal: paired speed-ups with intervals, τ, acceptance. Pure functions of a frame.

The speed-up of an arm on a prompt is latency per token of the baseline over that of the arm (medians over the repeats); in a
domain the median over its prompts; overall the geometric mean of the domains.
"""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

RESAMPLES = 10_000
FEWEST = 3  # prompts of a domain: with fewer there is no interval
BUSY = 1.5  # a spread beyond which speeds are not to be trusted; idle machines had 1.1, shared ones up to 1.4
ALL = "all"


def speedups(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Columns arm, domain, prompt_id, speedup. Prompts whose text ended with its first token have no latency and are left out.
    Raises ValueError if the baseline was not measured."""
    if baseline not in set(frame["arm"]):
        raise ValueError(f"the baseline {baseline!r} was not measured: choose one of {', '.join(sorted(set(frame['arm'])))}")
    latency = frame.groupby(["arm", "domain", "prompt_id"], sort=False)["latency_ms"].median().rename("arm_ms").reset_index()
    reference = latency[latency["arm"] == baseline].drop(columns="arm").rename(columns={"arm_ms": "baseline_ms"})
    paired = latency.merge(reference, on=["domain", "prompt_id"])
    paired["speedup"] = paired["baseline_ms"] / paired["arm_ms"]
    return paired.dropna(subset="speedup")[["arm", "domain", "prompt_id", "speedup"]].reset_index(drop=True)


def resampled_medians(values: np.ndarray, domain: str, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Medians of ``values`` [n] resampled with replacement → [resamples], NaN for too few. Draws depend on seed, domain and n alone."""
    if len(values) < FEWEST:
        return np.full(resamples, np.nan)
    rng = np.random.default_rng([seed, zlib.crc32(domain.encode())])
    return np.median(values[rng.integers(len(values), size=(resamples, len(values)))], axis=1)


def spread(frame: pd.DataFrame) -> float:
    """How unevenly plain decoding (else the first arm) ran, from 1; NaN if unknown. The larger of two ratios: 90th to 10th percentile of
    the latency of texts, and 90th percentile to median of the steps of a text. Of loads, the largest one that their rows report."""
    if "spread" in frame:
        return float(frame["spread"].max())
    rows = frame[frame["arm"] == ("plain" if "plain" in set(frame["arm"]) else frame["arm"].iloc[0])].dropna(subset="latency_ms")
    ratios = [(rows["round_ms_p90"] / rows["round_ms"]).median()] if "round_ms_p90" in rows else []
    ratios += [rows["latency_ms"].quantile(0.9) / rows["latency_ms"].quantile(0.1)] if len(rows) >= FEWEST else []
    return float(pd.Series(ratios, dtype=float).max())


def busy(frame: pd.DataFrame) -> str:
    """What to say if this machine was busy with something else while these rows were measured; "" if not."""
    found = f"This machine was busy (steps took up to {spread(frame):.1f}× their usual time): these speeds are not reliable."
    return f"{found} Close other programs and measure again." if spread(frame) > BUSY else ""


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central ``level`` of bootstrap draws."""
    return tuple(np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist())


def summarise(frame: pd.DataFrame, baseline: str, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per arm and domain, and one with domain "all" per arm.

    n: prompts. tokens_per_round: τ, all tokens after the first over all rounds. equal: share of texts that equal the baseline's.
    speedup, low, high: with the 95 % bootstrap interval over prompts; NaN where a domain has fewer than three.
    draft_ms, verify_ms, round_ms: medians over prompts. plain_ms: T_plain, the plain arm's verify_ms; NaN if it was not measured.
    """
    arms, domains = list(dict.fromkeys(frame["arm"])), list(dict.fromkeys(frame["domain"]))
    by = pd.concat([frame, frame.assign(domain=ALL)]).groupby(["arm", "domain"], sort=False)
    total = by[["decoded_tokens", "seconds", "rounds"]].sum().query("rounds > 0")
    lines = pd.DataFrame(
        {
            **dict.fromkeys(("n", "speedup", "low", "high"), math.nan),
            "tokens_per_round": total["decoded_tokens"] / total["rounds"],
            "tokens_per_second": total["decoded_tokens"] / total["seconds"],
            **{name: by[name].median() for name in ("draft_ms", "verify_ms", "round_ms")},
            "equal": by["equals_baseline"].mean(),
        }
    ).reindex(pd.MultiIndex.from_product([arms, [*domains, ALL]], names=["arm", "domain"]))
    paired = speedups(frame, baseline).groupby(["arm", "domain"], sort=False)["speedup"]
    points = {key: values.to_numpy() for key, values in paired}
    draws = {(arm, domain): resampled_medians(values, domain, resamples, seed) for (arm, domain), values in points.items()}
    for key, values in points.items():
        lines.loc[key, "n":"high"] = len(values), np.median(values), *interval(draws[key])
    for arm in arms:
        keys = [(arm, domain) for domain in domains]
        if points.keys() >= set(keys):  # a mean over only some domains would be another quantity
            overall = np.exp(np.log([draws[key] for key in keys]).mean(axis=0))
            speedup = np.exp(np.log([np.median(points[key]) for key in keys]).mean())
            lines.loc[(arm, ALL), "n":"high"] = sum(len(points[key]) for key in keys), speedup, *interval(overall)
    plain = lines.xs("plain")["verify_ms"] if "plain" in arms else pd.Series(dtype=float)
    lines["plain_ms"] = lines.index.get_level_values("domain").map(plain)
    return lines.fillna({"n": 0}).astype({"n": int}).reset_index()


def beside(frame: pd.DataFrame, arm: str, quoted: Mapping[str, float]) -> pd.DataFrame:
    """Of one arm, by prompt set: n, τ, the quoted τ (NaN where there is none), tokens/s, and the speed-up over plain with its interval.
    quoted: from :func:`dspark.bench.published.tau_of`."""
    lines = summarise(frame, "plain").query("arm == @arm and domain != @ALL").set_index("domain").rename_axis("prompt set")
    lines = lines.rename(columns={"tokens_per_round": "τ", "tokens_per_second": "tokens/s", "speedup": "speed-up"})
    lines["τ (paper)"] = [quoted.get(name.lower().replace("-500", "500"), math.nan) for name in lines.index]
    return lines[["n", "τ", "τ (paper)", "tokens/s", "speed-up", "low", "high"]]


def acceptance_by_position(frame: pd.DataFrame) -> pd.DataFrame:
    """Conditional acceptance: columns arm, domain, position (1, 2, …), reached, accepted, acceptance; counts pooled over prompts."""
    result = []
    for (arm, domain), part in frame.groupby(["arm", "domain"], sort=False):
        reached, accepted = (pd.DataFrame(map(dict, map(enumerate, part[name]))).sum() for name in ("reached_at", "accepted_at"))
        for k, (r, a) in enumerate(zip(reached, accepted, strict=True), 1):
            result.append({"arm": arm, "domain": domain, "position": k, "reached": int(r), "accepted": int(a), "acceptance": a / r})
    return pd.DataFrame(result, columns=["arm", "domain", "position", "reached", "accepted", "acceptance"])


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


def beyond_rounding(frame: pd.DataFrame) -> pd.Series:
    """Which rows diverge by more than rounding explains (:func:`dspark.bench.speed.weigh`): each of them is a bug."""
    return ~frame["equal"] & ~(frame["margin"] <= frame["noise"])


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
