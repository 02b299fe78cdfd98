"""What a step of the engine costs on one machine: measured in turns with a load, kept with its rows, read by the simulation."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle

import numpy as np
import pandas as pd

from dspark.bench.arms import Models
from dspark.bench.plan import Plan
from dspark.bench.prompts import load_prompts
from dspark.bench.results import Row
from dspark.bench.turns import Stopwatch
from dspark.engine import Engine
from dspark.schedule import FixedWindow
from dspark.tune.curve import Extra, SPSCurve
from dspark.tune.profile import measured_times

LEAST = 6  # requests whose steps are timed


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
        """From the rows of measured loads: lines through all of their steps. Raises ValueError for loads without costs.

        They have the least squares of relative errors, so that one request counts as much as 32, whose step takes twenty times as long.
        """
        rows = [row for row in map(json.loads, loads["costs"].dropna()) if "steps" in row]  # files of older versions have none
        if not rows:
            raise ValueError("these loads do not say what a step costs: measure them with python -m dspark.bench load --users …")
        times = dict(rows[0]["times"])
        times["draft"], times["extra"] = times["draft"] and SPSCurve(**times["draft"]), times["extra"] and Extra(**times["extra"])
        requests, tokens, seconds, rest = np.array([step for row in rows for step in row["steps"]]).T
        prompts, prefill = np.array([each for row in rows for each in row["prefills"]]).T
        about = {name: rows[0][name] for name in ("bytes_per_token", "prompts")}
        return cls(SPSCurve(**times), _line(rest, seconds, requests, tokens), _line(prefill, prefill, prompts), **about)

    def step(self, tokens: float, contexts: Sequence[int], drafting: float) -> float:
        """Seconds of a round over so many tokens for these requests, so many of which draft."""
        models = self.times.at(contexts).step_seconds(tokens) + (self.times.draft_seconds(drafting) if drafting else 0.0)
        return max(models + float(np.dot(self.rest, (1.0, len(contexts), tokens))), models / 2)

    def prompt(self, tokens: int) -> float:
        """Seconds of a prefill."""
        return max(float(np.dot(self.prefill, (1.0, tokens))), 0.0) or self.times.step_seconds(tokens)


def _line(seconds: np.ndarray, measured: np.ndarray, *terms: np.ndarray) -> list[float]:
    """A constant and a factor per term that give ``seconds``; errors count relative to what was measured."""
    terms = np.stack([np.ones_like(seconds), *terms], 1)
    return np.linalg.lstsq(terms / measured[:, None], seconds / measured)[0].tolist()


def beside(models: Models, plan: Plan, users: int) -> dict[str, tuple[Stopwatch, Generator[None, None, Row]]]:
    """What a load is measured in turns with, to know what its steps cost: prompts of the other split, plainly and with whole blocks."""
    domains, other = dict.fromkeys(unit.item.domain for unit in plan.units), "test" if plan.split == "dev" else "dev"
    items = [item for each in zip(*(load_prompts(name, other, 2) for name in domains), strict=True) for item in each]  # of all lengths
    times, work = measured_times(models.target, models.drafter), {}
    for name, drafter, policy in (("plain steps", None, None), ("drafted steps", models.drafter, FixedWindow())):
        engine = Engine(models.target, drafter, policy, max_requests=users)
        for _, item in zip(range(max(LEAST, 2 * users)), cycle(items), strict=False):
            engine.submit(item.messages, max_new_tokens=plan.tokens)
        work[name] = Stopwatch(), _timed(engine, Costs(times))
    return work


def _timed(engine: Engine, models: Costs) -> Generator[None, None, Row]:
    """Serve what was submitted, a step at a time. models: what they alone take. Returns two columns of :func:`costs_row`."""
    steps, prefills = [], []
    while engine.active or engine.waiting:
        start = time.perf_counter()
        rounds, seconds = [r for _, r in engine.step()], time.perf_counter() - start
        prefills += [(r.context, r.seconds) for r in rounds if r.index == 0]
        if all(r.index for r in rounds):
            tokens, drafting = sum(1 + r.verify_length for r in rounds), sum(bool(r.draft_tokens) for r in rounds)
            rest = seconds - models.step(tokens, [r.context for r in rounds], drafting)
            steps.append((len(rounds), tokens, seconds, rest))
        yield
    return {"steps": steps, "prefills": prefills}


def costs_row(models: Models, plan: Plan, found: Sequence[Row]) -> Row:
    """What :meth:`Costs.of` reads. found: what :func:`beside` returned.

    steps: requests, tokens in the pass, seconds, and how many of these beyond the models. prefills: tokens and seconds of a prompt.
    """
    target, times = models.target, measured_times(models.target, models.drafter)
    prompts = {unit.item.id: len(target.encode(unit.item.messages)) for unit in plan.units}
    points = {name: [point for each in found for point in each[name]] for name in ("steps", "prefills")}
    size = Engine(target, models.drafter, FixedWindow()).bytes_per_token
    return {"times": asdict(times), **points, "bytes_per_token": size, "prompts": prompts}
