"""The paired measurement: all arms run on every prompt, one after the other, and a different one starts each time. And peak memory."""

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dspark.bench.arms import Models
from dspark.bench.measure import Decoder, summary
from dspark.bench.plan import Plan, Unit, rotated
from dspark.bench.provenance import peaks, utc
from dspark.bench.results import Ledger, Row
from dspark.target.target import Target


def measure_speed(plan: Plan, models: Models, out: Path) -> pd.DataFrame:
    """One row per prompt, arm and repeat, in ``out`` and returned. Resumes a killed run of the same plan."""
    plan.check("speed")
    ledger = Ledger(out, plan.configuration("speed", models.target.digest, models.drafter))
    if ledger.complete:
        return ledger.finish()
    target, constant = models.target, constant_columns(plan, models)
    decoders = {arm.name: models.decoder(arm, plan.settings) for arm in plan.parsed_arms}
    warm_up(plan, target, decoders)

    def measure(unit: Unit) -> list[Row]:
        ids = target.encode(unit.item.messages)
        trials = {name: decoders[name](ids, unit.seed) for name in rotated(list(decoders), unit.turn)}
        about, expected = unit.columns() | {"utc": utc()}, trials[plan.baseline].token_ids
        return [
            about | {"arm": name, "place": place, "equals_baseline": trial.token_ids == expected} | summary(trial) | constant[name]
            for place, (name, trial) in enumerate(trials.items())
        ]

    return ledger.run({unit.key: unit for unit in plan.units}, measure)


def warm_up(plan: Plan, target: Target, decoders: dict[str, Decoder]) -> None:
    """Each arm once on a prompt that is not measured: the first pass pays for memory and caches."""
    ids = target.encode(plan.warm_up_prompt().messages)
    for decoder in tqdm(decoders.values(), desc="warm-up", unit="arm", leave=False):
        decoder(ids, plan.seed)


def constant_columns(plan: Plan, models: Models) -> dict[str, Row]:
    """Name of an arm → columns that all its rows share."""
    chosen = {name: getattr(plan, name) for name in ("baseline", "split", "temperature", "top_p", "top_k", "seed", "repeats")}
    chosen |= {"prompt_set": plan.domains, "n": plan.prompts, "max_new_tokens": plan.tokens}
    trained, untrained = (plan.provenance(each) | chosen for each in (models, replace(models, drafter=None)))
    return {
        arm.name: (trained if arm.trained else untrained) | ({"pass": arm.pass_name} if arm.pass_name else {}) for arm in plan.parsed_arms
    }


# ---- peak memory: it never falls, so each arm has a process of its own


def in_new_process(function: Callable, *arguments: object) -> object:
    """``function(*arguments)``, run in a process of its own. Raises what it raises, or ValueError if the process was killed."""
    try:
        # Ctrl-C reaches the child as well, where Python's own handler would print a traceback.
        with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise ValueError("a measuring process was killed (out of memory?): free some memory and repeat") from None


def measure_memory(plan: Plan, out: Path) -> pd.DataFrame:
    """One row per arm and repeat. Resumes. The parent never loads a model, as a child's count starts at its parent's peak."""
    names = [arm.name for arm in plan.parsed_arms]
    runs = {f"{repeat}/{name}": (repeat, name) for repeat in range(plan.repeats) for name in rotated(names, repeat)}
    ledger = Ledger(out, plan.configuration("memory", "", None))
    return ledger.run(runs, lambda run: [{"repeat": run[0]} | in_new_process(peak_of, replace(plan, arms=run[1], repeats=1))])


def peak_of(plan: Plan) -> Row:
    """Load the plan's one arm and decode all prompts."""
    (arm,) = plan.parsed_arms
    torch.set_num_threads(plan.threads)
    models = plan.load()
    target, decoder = models.target, models.decoder(arm, plan.settings)
    tokens = sum(len(decoder(target.encode(unit.item.messages), unit.seed).token_ids) for unit in plan.units)
    return {"arm": arm.name, "tokens": tokens} | peaks(target.device) | {"utc": utc()} | constant_columns(plan, models)[arm.name]
