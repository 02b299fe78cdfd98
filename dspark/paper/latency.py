"""The speed-up that follows from step times and τ alone: S = τ · T_plain / (T_draft + T_verify). Computed, not timed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dspark.bench.stats import ALL, summarise


def with_prediction(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`dspark.bench.stats.summarise` against plain decoding, of the arms that drafted, with the columns model_ms and predicted.

    τ and model_ms, behind ``predicted``, are pooled over a domain's prompts: where some rounds draft and others look drafts up, no
    median stands for both. The line "all" holds the geometric mean of the domains.
    Raises ValueError if plain decoding was not measured.
    """
    lines = summarise(frame, "plain")
    lines["model_ms"] = [model_ms(frame, arm, domain) for arm, domain in zip(lines["arm"], lines["domain"], strict=True)]
    plain = lines[lines["arm"] == "plain"].set_index("domain")["model_ms"]
    lines["predicted"] = lines["tokens_per_round"] * lines["domain"].map(plain) / lines["model_ms"]
    domains = lines[lines["domain"] != ALL]
    means = domains.groupby("arm", sort=False)["predicted"].agg(lambda s: float(np.exp(np.log(s).mean(skipna=False))))
    whole = lines["domain"] == ALL
    lines.loc[whole, "predicted"] = lines.loc[whole, "arm"].map(means)
    return lines.dropna(subset=["predicted", "draft_ms"]).reset_index(drop=True)


def model_ms(frame: pd.DataFrame, arm: str, domain: str) -> float:
    """T_draft + T_verify in milliseconds, the mean of a round; NaN where nothing was timed."""
    part = frame[(frame["arm"] == arm) & frame["domain"].isin([domain] if domain != ALL else frame["domain"])]
    return 1e3 * part["model_seconds"].sum(min_count=1) / part["rounds"].sum()


def largest_error(lines: pd.DataFrame) -> float:
    """Of lines with a prediction: the largest |predicted / measured − 1|, domain by domain."""
    lines = lines[lines["domain"] != ALL]
    return float((lines["predicted"] / lines["speedup"] - 1).abs().max())
