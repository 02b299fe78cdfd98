"""Is the greedy text of every arm ``model.generate``'s, token for token? In float32 it must be; below it every divergence is weighed.

One row and a block of rows run through different kernels, which round differently: in bfloat16 two nearly tied tokens may swap.
Whether that happened is measured at the very position where a text diverges (:func:`weigh`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from dspark.bench.arms import Models
from dspark.bench.measure import Decoder, Settings, Trial, first_divergence
from dspark.bench.plan import Plan, Unit
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns
from dspark.bench.stock import by_transformers
from dspark.round import Round
from dspark.target.target import Target

Pass = tuple[Sequence[int], int]  # tokens that run together, and how many of them stay in the cache


def check_identity(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt and arm, with the columns of :func:`compare`. Resumes."""
    plan.check("identity")
    decoders = {arm.name: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    constant = constant_columns(plan, models)

    def measure(unit: Unit) -> list[Row]:
        rows = compare(models, decoders, models.target.encode(unit.item.messages), plan.settings)
        return [unit.columns() | row | constant[row["arm"]] for row in rows]

    ledger = Ledger(out, plan.configuration("identity", models.target.digest, models.drafter))
    return ledger.run({unit.key: unit for unit in plan.units}, measure)


def compare(models: Models, decoders: dict[str, Decoder], prompt: list[int], settings: Settings) -> list[Row]:
    """Decode one prompt in every way and by ``model.generate`` of the stock target, greedily. One row per decoder.

    tokens: of the reference.
    equal: whether all tokens are the reference's.
    first_divergence: index of the first new token that differs, −1 for none.
    margin, noise: see :func:`weigh`; NaN for none.
    """
    expected = by_transformers(models.stock, settings)(prompt, 0).token_ids
    rows = []
    for name, decoder in decoders.items():
        trial = decoder(prompt, 0)
        i = first_divergence(trial.token_ids, expected)
        margin, noise = weigh(models, prompt, expected, trial, i) if i >= 0 else (math.nan, math.nan)
        rows.append(
            {"arm": name, "tokens": len(expected), "equal": i < 0, "first_divergence": i, "margin": margin, "noise": noise}
            | {"utc": datetime.now(UTC).isoformat(timespec="seconds")}
        )
    return rows


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
    together = logits_of(models.target, prompt, map(pass_of, trial.rounds), i)
    lead, left = (float(row[expected[i]] - row[trial.token_ids[i]]) for row in (alone, together))
    return abs(lead), max(0.0, lead - left)


def pass_of(r: Round) -> Pass:
    """The pass that checked the round's drafts."""
    return [r.anchor, *r.draft_tokens[: r.verify_length]], 1 + r.accepted


def logits_of(target: Target, prompt: list[int], passes: Iterable[Pass], i: int) -> Tensor:
    """The logits [vocab] float32 that choose new token ``i`` after ``prompt``, when the text runs in these passes."""
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
