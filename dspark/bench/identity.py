"""Is the greedy text of every arm ``model.generate``'s, token for token? In float32 it must be; below it every divergence is weighed.

One row and a block of rows run through different kernels, which round differently: in bfloat16 two nearly tied tokens may swap.
Whether that happened is measured at the very position where a text diverges (:func:`weigh`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from dspark.bench.arms import Models
from dspark.bench.measure import Trial, first_divergence
from dspark.bench.plan import Plan, Unit
from dspark.bench.provenance import utc
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns
from dspark.bench.stock import by_transformers
from dspark.target.target import Target


def check_identity(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """Decode every prompt greedily with every arm and by ``model.generate`` of the stock target. One row per prompt and arm. Resumes.

    tokens: of the reference.
    equal: whether all tokens are the reference's.
    first_divergence: index of the first new token that differs, −1 for none.
    margin, noise: see :func:`weigh`; NaN for none.
    """
    decoders = {arm.name: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    reference, constant = by_transformers(models.stock, plan.settings), constant_columns(plan, models)

    def measure(unit: Unit) -> list[Row]:
        prompt, rows = models.target.encode(unit.item.messages), []
        expected = reference(prompt, 0).token_ids
        for name, decoder in decoders.items():
            trial = decoder(prompt, 0)
            i = first_divergence(trial.token_ids, expected)
            margin, noise = weigh(models, prompt, expected, trial, i) if i >= 0 else (math.nan, math.nan)
            row = {"arm": name, "tokens": len(expected), "equal": i < 0, "first_divergence": i, "margin": margin, "noise": noise}
            rows.append(unit.columns() | row | {"utc": utc()} | constant[name])
        return rows

    ledger = Ledger(out, plan.configuration("identity", models.target.digest, models.drafter))
    return ledger.run({unit.key: unit for unit in plan.units}, measure)


def weigh(models: Models, prompt: list[int], expected: list[int], trial: Trial, i: int) -> tuple[float, float]:
    """How far apart two tokens are where the texts diverge, and how much of that rounding removes; both in logits, ≥ 0.

    The common prefix runs twice up to new token i: on the stock target token by token, as the reference ran, and on the arm's target in
    the passes of its rounds. Both use transformers' own cache, so a fault of ours cannot pass for rounding.
    margin: the first run's lead of the reference's token over the arm's.
    noise: by how much that lead is smaller in the second run. Rounding swapped the tokens if and only if margin ≤ noise.
    A text that is only longer or shorter has an infinite margin: rounding does not end a text.
    """
    if i >= min(len(expected), len(trial.token_ids)):
        return math.inf, 0.0
    alone = logits_of(models.stock, prompt, (([token], 1) for token in expected), i)
    passes = (([r.anchor, *r.draft_tokens[: r.verify_length]], 1 + r.accepted) for r in trial.rounds)
    together = logits_of(models.target, prompt, passes, i)
    lead, left = (float(row[expected[i]] - row[trial.token_ids[i]]) for row in (alone, together))
    return abs(lead), max(0.0, lead - left)


def logits_of(target: Target, prompt: list[int], passes: Iterable[tuple[Sequence[int], int]], i: int) -> Tensor:
    """The logits [vocab] float32 that choose new token ``i`` after ``prompt``.

    passes: the text as it runs: tokens of a pass, and how many of them stay in the cache.
    """
    cache, passes = DynamicCache(), iter(passes)
    logits, _ = target.forward(torch.tensor([prompt], device=target.device), cache, logits_to_keep=1)
    first, rows = 0, logits[0]  # rows[k] chooses new token first + k
    while i >= first + len(rows):
        tokens, kept = next(passes)
        logits, _ = target.forward(torch.tensor([tokens], device=target.device), cache)
        if kept < len(tokens):
            cache.crop(kept - len(tokens))
        first, rows = first + len(rows), logits[0, :kept]
    return rows[i - first].float()


def beyond_rounding(frame: pd.DataFrame) -> pd.Series:
    """Which rows diverge by more than rounding explains: each of them is a bug."""
    return ~frame["equal"] & ~(frame["margin"] <= frame["noise"])
