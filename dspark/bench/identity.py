"""Is the greedy text of every arm ``model.generate``'s, token for token? In float32 it must be. In bfloat16 two nearly tied tokens may
swap, as one row and a block of rows run through kernels that round differently: every divergence is weighed where it begins."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from torch import Tensor
from transformers import DynamicCache

from dspark.bench.arms import Models
from dspark.bench.measure import Trial, by_transformers, first_divergence
from dspark.bench.plan import Plan, Unit
from dspark.bench.provenance import utc
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns
from dspark.verify.passes import Slot, TargetPass, TransformersPass, pass_of


def check_identity(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """Decode every prompt greedily with every arm and by ``model.generate`` of the stock target. One row per prompt and arm. Resumes.

    tokens, equal: of the reference; whether all are the reference's.
    first_divergence: index of the first new token that differs, −1 for none.
    margin, noise: see :func:`weigh`; NaN for none.
    """
    decoders = {arm: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    reference, constant = by_transformers(models.stock, plan.settings), constant_columns(plan, models)

    def measure(unit: Unit) -> list[Row]:
        prompt, rows = models.target.encode(unit.item.messages), []
        expected = reference(prompt, 0).token_ids
        for arm, decoder in decoders.items():
            trial = decoder(prompt, 0)
            i = first_divergence(trial.token_ids, expected)
            ran = replace(models, target=models.stock) if arm.peer else models
            margin, noise = weigh(ran, prompt, expected, trial, i) if i >= 0 else (math.nan, math.nan)
            row = {"arm": arm.name, "tokens": len(expected), "equal": i < 0, "first_divergence": i, "margin": margin, "noise": noise}
            rows.append(unit.columns() | row | {"utc": utc()} | constant[arm.name])
        return rows

    ledger = Ledger(out, plan.configuration("identity", models.target.digest, models.drafter))
    return ledger.run({unit.key: unit for unit in plan.units}, measure)


def weigh(models: Models, prompt: list[int], expected: list[int], trial: Trial, i: int) -> tuple[float, float]:
    """How far apart two tokens are where the texts diverge, and how much of that rounding removes; both in logits, ≥ 0.

    The text up to new token i runs again: on the stock target as the reference ran, and on the arm's through the pass and in the widths
    of its rounds. Rounding swapped the tokens if and only if margin ≤ noise.
    margin: the first run's lead of the reference's token over the arm's; infinite where a text only ends earlier: rounding ends none.
    noise: by how much that lead is smaller in the second run, at most twice what rounding moves any logit. That is measured on the stock
        target with its own cache, between one pass and token by token, so a fault of our pass or cache cannot pass for rounding.
    """
    if i >= min(len(expected), len(trial.token_ids)):
        return math.inf, 0.0
    modules, verifier, text = TransformersPass(models.stock), pass_of(models.target), [*prompt, *expected[:i]]
    alone = logits_of(modules, DynamicCache(), prompt, (([token], 1) for token in expected), i)
    # Peers show no drafts: what they committed ran in one pass.
    passes = (([r.anchor, *(r.draft_tokens[: r.verify_length] or r.committed[:-1])], len(r.committed)) for r in trial.rounds)
    together = logits_of(verifier, (cache := verifier.new_cache()).open(), prompt, passes, i, cache)
    singly = logits_of(modules, DynamicCache(), text[:1], (([token], 1) for token in text[1:]), len(text) - 1)
    at_once = logits_of(modules, DynamicCache(), text, (), 0)
    lead, left = (float(row[expected[i]] - row[trial.token_ids[i]]) for row in (alone, together))
    return abs(lead), min(max(0.0, lead - left), 2 * float((singly - at_once).abs().max()))


def logits_of(
    verifier: TargetPass, slot: Slot, prompt: list[int], passes: Iterable[tuple[Sequence[int], int]], i: int, cache: object = None
) -> Tensor:
    """The logits [vocab] float32 that choose new token ``i`` after ``prompt``.

    slot: empty; of ``cache`` if the pass needs one.
    passes: the text as it runs: tokens of a pass, and how many of them stay in the slot.
    """
    [rows], _ = verifier([prompt], [slot], cache, last_only=True)
    first, held, passes = 0, len(prompt), iter(passes)  # rows[k] chooses new token first + k
    while i >= first + len(rows):
        tokens, kept = next(passes)
        first, held = first + len(rows), held + kept
        [rows], _ = verifier([tokens], [slot], cache)
        if kept < len(tokens):
            slot.rewind(held)
        rows = rows[:kept]
    return rows[i - first].float()
