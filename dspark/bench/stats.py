"""Statistics of a speed run: paired speed-ups with their intervals, τ, acceptance by position. Pure functions of a frame.

The speed-up of an arm on a prompt is latency per token of the baseline over that of the arm (medians over the repeats); in a
domain the median over its prompts; overall the geometric mean of the domains.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import pandas as pd

RESAMPLES = 10_000
ALL = "all"


def speedups(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Columns arm, domain, prompt_id, speedup. Prompts whose text ended with its first token have no latency and are left out.

    Raises ValueError if the baseline was not measured.
    """
    if baseline not in set(frame["arm"]):
        raise ValueError(f"the baseline {baseline!r} was not measured: choose one of {', '.join(sorted(set(frame['arm'])))}")
    latency = frame.groupby(["arm", "domain", "prompt_id"], sort=False)["latency_ms"].median().rename("arm_ms").reset_index()
    reference = latency[latency["arm"] == baseline].drop(columns="arm").rename(columns={"arm_ms": "baseline_ms"})
    paired = latency.merge(reference, on=["domain", "prompt_id"])
    paired["speedup"] = paired["baseline_ms"] / paired["arm_ms"]
    return paired.dropna(subset="speedup")[["arm", "domain", "prompt_id", "speedup"]].reset_index(drop=True)


def resampled_medians(values: np.ndarray, domain: str, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Medians of ``values`` [n] resampled with replacement → [resamples]. The draw depends on seed, domain and n alone."""
    rng = np.random.default_rng([seed, zlib.crc32(domain.encode())])
    return np.median(values[rng.integers(len(values), size=(resamples, len(values)))], axis=1)


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central ``level`` of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summarise(frame: pd.DataFrame, baseline: str, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """One row per arm and domain, and one with domain "all" per arm.

    n: prompts.
    speedup, low, high: with the 95 % bootstrap interval over prompts.
    tokens_per_round: τ, all tokens after the first over all rounds.
    draft_ms, verify_ms, round_ms: medians over prompts.
    plain_ms: T_plain, the plain arm's verify_ms; NaN if it was not measured.
    other_share: share of the time outside the models.
    equal: share of texts that equal the baseline's.
    """
    paired = speedups(frame, baseline)
    domains = list(dict.fromkeys(frame["domain"]))
    plain = frame[frame["arm"] == "plain"]
    result = []
    for arm in dict.fromkeys(frame["arm"]):
        points, draws = [], []
        for domain in domains:
            values = paired.loc[(paired["arm"] == arm) & (paired["domain"] == domain), "speedup"].to_numpy()
            if len(values):
                points.append(float(np.median(values)))
                draws.append(resampled_medians(values, domain, resamples, seed))
            low_high = interval(draws[-1]) if len(values) else (math.nan, math.nan)
            part = frame[(frame["arm"] == arm) & (frame["domain"] == domain)]
            speed = (len(values), points[-1] if len(values) else math.nan, *low_high)
            result.append(_line(arm, domain, speed, part, plain[plain["domain"] == domain]))
        whole = (0, math.nan, math.nan, math.nan)
        if len(points) == len(domains):  # a mean over only some domains would be another quantity
            overall = np.exp(np.log(np.stack(draws)).mean(axis=0))
            whole = (int((paired["arm"] == arm).sum()), math.exp(np.log(points).mean()), *interval(overall))
        result.append(_line(arm, ALL, whole, frame[frame["arm"] == arm], plain))
    return pd.DataFrame(result)


def _line(arm: str, domain: str, speed: tuple[int, float, float, float], part: pd.DataFrame, plain: pd.DataFrame) -> dict[str, object]:
    n, speedup, low, high = speed
    tokens, seconds, rounds = (float(part[name].sum()) for name in ("decoded_tokens", "seconds", "rounds"))
    return {
        "arm": arm,
        "domain": domain,
        "n": n,
        "speedup": speedup,
        "low": low,
        "high": high,
        "tokens_per_round": tokens / rounds if rounds else math.nan,
        "tokens_per_second": tokens / seconds if rounds else math.nan,
        "draft_ms": part["draft_ms"].median(),
        "verify_ms": part["verify_ms"].median(),
        "round_ms": part["round_ms"].median(),
        "plain_ms": plain["verify_ms"].median(),
        "other_share": 1 - part["model_seconds"].sum(skipna=False) / seconds if rounds else math.nan,
        "equal": part["equals_baseline"].mean(),
    }


def acceptance_by_position(frame: pd.DataFrame) -> pd.DataFrame:
    """Conditional acceptance: columns arm, domain, position (1, 2, …), reached, accepted, acceptance; counts pooled over prompts."""
    result = []
    for (arm, domain), part in frame.groupby(["arm", "domain"], sort=False):
        reached, accepted = (_pooled(part[name]) for name in ("reached_at", "accepted_at"))
        for k, (r, a) in enumerate(zip(reached, accepted, strict=True), 1):
            result.append({"arm": arm, "domain": domain, "position": k, "reached": int(r), "accepted": int(a), "acceptance": a / r})
    return pd.DataFrame(result, columns=["arm", "domain", "position", "reached", "accepted", "acceptance"])


def _pooled(lists: pd.Series) -> np.ndarray:
    total = np.zeros(max((len(counts) for counts in lists), default=0))
    for counts in lists:
        total[: len(counts)] += counts
    return total
