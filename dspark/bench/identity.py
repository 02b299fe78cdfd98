"""Is the greedy text of every arm ``model.generate``'s, token for token? In float32 it must be; in bfloat16 see the margin."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dspark.bench.arms import Models
from dspark.bench.measure import by_transformers, first_divergence
from dspark.bench.plan import Plan
from dspark.bench.results import Ledger
from dspark.bench.speed import constant_columns
from dspark.target import Target


def check_identity(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt and arm: equal, first_divergence (−1 for none), margin (NaN for none). Resumable."""
    plan.check("identity")
    ledger = Ledger(out, plan.configuration("identity", models.target.digest, models.drafter))
    if ledger.complete:
        return ledger.finish()
    decoders = {arm.name: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    constant = constant_columns(plan, models)
    reference = by_transformers(models.stock, plan.settings)
    todo = [unit for unit in plan.units if unit.key not in ledger.done]
    for unit in tqdm(todo, desc="prompts", unit="prompt", initial=len(ledger.done), total=len(plan.units)):
        prompt = models.target.encode(unit.item.messages)
        expected = reference(prompt, unit.seed).token_ids
        found = []
        for name, decoder in decoders.items():
            i = first_divergence(decoder(prompt, unit.seed).token_ids, expected)
            found.append(
                unit.columns()
                | {"arm": name, "tokens": len(expected), "equal": i < 0, "first_divergence": i}
                | {"margin": margin(models.stock, prompt + expected[:i]) if i >= 0 else math.nan}
                | {"utc": datetime.now(UTC).isoformat(timespec="seconds")}
                | constant[name]
            )
        ledger.add(unit.key, found)
    return ledger.finish()


def margin(target: Target, token_ids: list[int]) -> float:
    """By how much the target's best next token beats its second best, in logits. A tie to the dtype's precision explains itself."""
    logits, _ = target.forward(torch.tensor([token_ids], device=target.device), None, logits_to_keep=1)
    best, second = logits[0, -1].float().topk(2).values.tolist()
    return best - second
