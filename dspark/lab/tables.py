"""Races → frames and their few summary numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd

from dspark.bench.measure import Trial, first_divergence, summary
from dspark.bench.stats import ALL, summarise

PLAIN = "plain"


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


def race_numbers(frame: pd.DataFrame, arm: str) -> dict[str, float]:
    """The race in numbers; NaN if every text ended with its first token.

    n: prompts.
    speedup, low, high: latency per token, plain over ``arm``, the median over the prompts with its 95 % bootstrap interval.
    tokens_per_round: τ of ``arm``.
    tokens_per_second, plain_tokens_per_second: without the prefill.
    """
    lines = summarise(frame, PLAIN).set_index(["arm", "domain"])
    mine, plain = lines.loc[(arm, ALL)], lines.loc[(PLAIN, ALL)]
    chosen = {name: float(mine[name]) for name in ("speedup", "low", "high", "tokens_per_round", "tokens_per_second")}
    return {"n": int(mine["n"]), **chosen, "plain_tokens_per_second": float(plain["tokens_per_second"])}


def race_table(frame: pd.DataFrame) -> pd.DataFrame:
    """For the reader: a row per prompt; tokens/s (median over its heats) and τ of every arm."""
    shown = frame.assign(tokens_per_second=1e3 / frame["latency_ms"])
    columns = {"tokens_per_second": "tokens/s", "tokens_per_round": "τ"}
    wide = shown.pivot_table(index="prompt_id", columns="arm", values=list(columns), aggfunc="median", sort=False)
    wide = wide.reindex(columns=product(columns, sorted(dict.fromkeys(frame["arm"]), key=PLAIN.__ne__)))  # plain first
    return wide.rename(columns=columns).rename_axis(index="prompt", columns=[None, None]).round(2)
