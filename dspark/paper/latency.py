"""The speed-up that follows from step times and τ alone: S = τ · T_plain / (T_draft + T_verify). Computed, not timed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from dspark.bench.stats import ALL, summarise


def with_prediction(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`dspark.bench.stats.summarise` against plain decoding, of the arms that drafted, with the column ``predicted``.

    τ is pooled over a domain's prompts, the times are medians over them. The line "all" holds the geometric mean of the domains.
    Raises ValueError if plain decoding was not measured.
    """
    lines = summarise(frame, "plain")
    lines["predicted"] = lines["tokens_per_round"] * lines["plain_ms"] / (lines["draft_ms"] + lines["verify_ms"])
    domains = lines[lines["domain"] != ALL]
    means = domains.groupby("arm", sort=False)["predicted"].agg(lambda s: float(np.exp(np.log(s).mean(skipna=False))))
    whole = lines["domain"] == ALL
    lines.loc[whole, "predicted"] = lines.loc[whole, "arm"].map(means)
    return lines.dropna(subset=["predicted", "draft_ms"]).reset_index(drop=True)


def largest_error(lines: pd.DataFrame) -> float:
    """Of lines with a prediction: the largest |predicted / measured − 1|, domain by domain."""
    lines = lines[lines["domain"] != ALL]
    return float((lines["predicted"] / lines["speedup"] - 1).abs().max())
