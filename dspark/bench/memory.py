"""Peak memory of each arm, each in a process of its own: a peak never falls, so arms cannot share one."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from dspark.bench.plan import Plan, rotated
from dspark.bench.provenance import peaks, utc
from dspark.bench.results import Ledger, Row
from dspark.bench.speed import constant_columns


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
