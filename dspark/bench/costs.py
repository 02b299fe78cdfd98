"""What a step of the engine costs on one machine: measured with a load, kept with its rows, read by the simulation."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

import numpy as np
import pandas as pd

from dspark.bench.arms import Models
from dspark.bench.plan import Plan
from dspark.bench.prompts import load_prompts
from dspark.bench.results import Row
from dspark.engine import Engine
from dspark.schedule import FixedWindow
from dspark.tune.curve import Extra, SPSCurve
from dspark.tune.profile import measured_times

TOKENS = 16  # of each text that is written to measure
USERS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Costs:
    """Seconds of the engine's steps.

    times: of the models, as measured, staircases included.
    rest: what a step takes beyond them: per step, per request in it, per token in its pass.
    prefill: per prompt, and per token of it; (0, 0) takes them from ``times``.
    bytes_per_token: of keys and values.
    prompts: id of a prompt → its tokens.
    """

    times: SPSCurve
    rest: Sequence[float] = (0.0, 0.0, 0.0)
    prefill: Sequence[float] = (0.0, 0.0)
    bytes_per_token: int = 0
    prompts: dict[str, int] | None = None

    @classmethod
    def of(cls, loads: pd.DataFrame) -> Costs:
        """From the rows of measured loads. The lines are the means of those that were fitted, one per repeat."""
        rows = [json.loads(text) for text in loads["costs"].dropna()]
        times = dict(rows[0]["times"])
        times["draft"], times["extra"] = times["draft"] and SPSCurve(**times["draft"]), times["extra"] and Extra(**times["extra"])
        lines = {name: np.mean([row[name] for row in rows], 0).tolist() for name in ("rest", "prefill")}
        return cls(**rows[0] | {"times": SPSCurve(**times)} | lines)

    def step(self, tokens: float, contexts: Sequence[int], drafting: float) -> float:
        """Seconds of a round over so many tokens for these requests, so many of which draft."""
        models = self.times.at(contexts).step_seconds(tokens) + (self.times.draft_seconds(drafting) if drafting else 0.0)
        return max(models + float(np.dot(self.rest, (1.0, len(contexts), tokens))), models / 2)

    def prompt(self, tokens: int) -> float:
        """Seconds of a prefill."""
        return max(float(np.dot(self.prefill, (1.0, tokens))), 0.0) or self.times.step_seconds(tokens)


def measure_costs(models: Models, plan: Plan) -> Row:
    """The fields of :class:`Costs`: step times of this machine, and lines fitted to short runs on prompts that are not measured.

    The lines have the least squares of relative errors: one request counts as much as 32, whose step takes twenty times as long.
    """
    target, times = models.target, measured_times(models.target, models.drafter)
    domains, other = dict.fromkeys(unit.item.domain for unit in plan.units), "test" if plan.split == "dev" else "dev"
    items = [item for each in zip(*(load_prompts(name, other, 2) for name in domains), strict=True) for item in each]  # of all lengths
    points = {"rest": [], "prefill": []}  # (terms of the line, seconds), both over the seconds that were measured
    for drafter in (None, models.drafter):
        for users in USERS:
            engine = Engine(target, drafter, FixedWindow() if drafter else None, max_requests=users)
            for _, item in zip(range(users), cycle(items), strict=False):
                engine.submit(item.messages, max_new_tokens=TOKENS)
            while engine.active or engine.waiting:
                start = time.perf_counter()
                rounds, seconds = [r for _, r in engine.step()], time.perf_counter() - start
                points["prefill"] += [(np.array((1.0, r.context)) / r.seconds, 1.0) for r in rounds if r.index == 0]
                if all(r.index for r in rounds):
                    tokens, drafting = sum(1 + r.verify_length for r in rounds), sum(bool(r.draft_tokens) for r in rounds)
                    models_only = Costs(times).step(tokens, [r.context for r in rounds], drafting)
                    points["rest"].append((np.array((1.0, len(rounds), tokens)) / seconds, 1 - models_only / seconds))
    prompts = {unit.item.id: len(target.encode(unit.item.messages)) for unit in plan.units}
    lines = {name: np.linalg.lstsq(*map(np.array, zip(*found, strict=True)))[0].tolist() for name, found in points.items()}
    return {"times": asdict(times), **lines, "bytes_per_token": engine.bytes_per_token, "prompts": prompts}
