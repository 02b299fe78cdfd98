"""The paired measurement: all arms run on every prompt, one after the other, and a different one starts each time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from dspark.bench.arms import Models
from dspark.bench.measure import Decoder, Trial, first_divergence, summary
from dspark.bench.plan import Plan, Unit, rotated
from dspark.bench.provenance import drafter_columns, environment, peak_rss_mib
from dspark.bench.results import COMMAND, Ledger, Row, read_rows
from dspark.target.target import Target


def measure_speed(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt, arm and repeat, in ``out`` and returned. Resumes a killed run of the same plan."""
    plan.check("speed")
    ledger = Ledger(out, plan.configuration("speed", models.target.digest, models.drafter))
    if ledger.complete:
        return ledger.finish()
    return ledger.run({unit.key: unit for unit in plan.units}, paired(plan, models))


def speed_frame(plan: Plan, models: Models) -> pd.DataFrame:
    """The same measurement in memory: for a notebook, where it is small."""
    plan.check("speed")
    measure = paired(plan, models)
    return pd.DataFrame([row for unit in tqdm(plan.units, desc="prompts") for row in measure(unit)])


def paired(plan: Plan, models: Models) -> Callable[[Unit], list[Row]]:
    """A function that decodes a unit with every arm, a row per arm. Each arm is warmed up before it is returned."""
    decoders = {arm.name: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    constant = constant_columns(plan, models)
    warm_up(plan, models.target, decoders)

    def measure(unit: Unit) -> list[Row]:
        ids = models.target.encode(unit.item.messages)
        trials = {name: decoders[name](ids, unit.seed) for name in rotated(list(decoders), unit.turn)}
        return rows(unit.columns() | {"prompt_tokens": len(ids)}, trials, plan.baseline, models.target, constant)

    return measure


def warm_up(plan: Plan, target: Target, decoders: dict[str, Decoder]) -> None:
    """Each arm once on a prompt that is not measured: the first pass pays for memory and caches."""
    ids = target.encode(plan.warm_up_prompt().messages)
    for decoder in tqdm(decoders.values(), desc="warm-up", unit="arm", leave=False):
        decoder(ids, plan.seed)


def rows(about: Row, trials: dict[str, Trial], baseline: str, target: Target, constant: dict[str, Row]) -> list[Row]:
    """One row per arm, in running order. about: columns of the prompt."""
    reference = trials[baseline].token_ids
    result = []
    for place, (name, trial) in enumerate(trials.items()):
        divergence = first_divergence(trial.token_ids, reference)
        result.append(
            about
            | {"arm": name, "place": place}
            | summary(trial)
            | {
                "text_sha256": hashlib.sha256(target.decode(trial.token_ids).encode()).hexdigest()[:16],
                "equals_baseline": divergence < 0,
                "first_divergence": divergence,
                "peak_rss_mib": peak_rss_mib(),
                "load_average": os.getloadavg()[0],
                "utc": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            | constant[name]
        )
    return result


def constant_columns(plan: Plan, models: Models) -> dict[str, Row]:
    """Name of an arm → columns that all its rows share."""
    chosen = {
        "baseline": plan.baseline,
        "prompt_set": plan.domains,
        "split": plan.split,
        "n": plan.prompts,
        "max_new_tokens": plan.tokens,
        "temperature": plan.temperature,
        "top_p": plan.top_p,
        "top_k": plan.top_k,
        "seed": plan.seed,
        "repeats": plan.repeats,
    }
    ours = environment(models.target)
    stock = {"pass": "transformers"}  # transformers' own loops run on the stock target
    without = {"drafter": ""} | drafter_columns(None)
    with_drafter = {"drafter": plan.drafter_name} | drafter_columns(models.drafter)
    return {arm.name: (with_drafter if arm.trained else without) | chosen | ours | (stock if arm.peer else {}) for arm in plan.parsed_arms}


def read_speed(path: Path, remedy: str = COMMAND) -> pd.DataFrame:
    """Rows of a speed or memory run; see :func:`dspark.bench.results.read_rows`."""
    return read_rows(path, remedy)
