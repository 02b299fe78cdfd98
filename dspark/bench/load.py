"""``python -m dspark.bench load``: what policies are worth when requests share every pass. Needs a quiet machine.

Closed loop: R users, each of whom sends the next request when the last is answered. Open loop: requests arrive at random (a Poisson
process) or at the times of a file, however many are still being served. All policies serve the same requests of mixed lengths, each with
an engine of its own; the engines take their steps in turns, so a machine whose speed drifts is fair to all.
"""

import argparse
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dspark.bench.arms import Arm, Models
from dspark.bench.costs import beside, costs_row
from dspark.bench.plan import Plan
from dspark.bench.prompts import PromptItem
from dspark.bench.provenance import peaks, utc
from dspark.bench.results import Ledger, Row, read_rows
from dspark.bench.stats import BUSY, busy
from dspark.bench.turns import Stopwatch, in_turns
from dspark.cli import add_fields, from_fields, option, run_main
from dspark.engine import Engine
from dspark.request import Request

COMMAND = "python -m dspark.bench load"
ARMS = "plain,mtp1,fixed:3,fixed:5,adaptive,confidence:0.3,prefix,async,auto"
CLOSED, POISSON, TRACE, COSTS = "closed", "poisson", "trace", "costs"  # kinds of rows
FASTEST = 1000.0  # requests a second; more is a mistake
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    """One request to serve. limit: new tokens at most. at: seconds of its arrival in an open loop."""

    item: PromptItem
    limit: int
    seed: int
    at: float = 0.0


@dataclass(frozen=True)
class LoadPlan(Plan):
    """What to measure; every field is an option. Raises ValueError for a load that cannot be."""

    arms: str = option(ARMS, "policies, separated by commas")
    users: str = option("1,2,4,8,16,32", "closed loop: numbers of users; empty for none")
    rates: str = option("1,4", "open loop: requests per second; empty for none")
    arrivals: str = option("", "open loop: CSV with the columns seconds,tokens (arrival, new tokens at most); empty for none")
    requests: int = option(24, "open loop: requests at each rate")
    per_user: int = option(3, "closed loop: requests per user, and 8 in all at least")
    memory: float = option(0.0, "MiB of keys and values; 0 for no limit")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("requests", 1), ("per_user", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.memory < math.inf:
            raise ValueError(f"memory must be at least 0 MiB, got {self.memory}: 0 sets no limit")
        for arm in self.parsed_arms:
            if arm.peer:
                raise ValueError(f"arm {arm.name!r} serves one request at a time: choose policies")
        if not self.loads:
            raise ValueError("there is no load: give users, rates or arrivals")

    @cached_property
    def loads(self) -> list[tuple[str, float]]:
        """(kind, users or requests per second), as given."""
        found = [(CLOSED, n) for n in numbers("users", self.users, int, 1 << 20)] + [
            (POISSON, rate) for rate in numbers("rates", self.rates, float, FASTEST)
        ]
        return found + [(TRACE, len(times) / max(times[-1][0], 1e-9)) for times in [read_arrivals(self.arrivals)] if times]

    def jobs(self, kind: str, level: float) -> list[Job]:
        """The requests of a load, the same for every policy. Lengths are spread evenly over half to one and a half times ``tokens``."""
        rng = np.random.default_rng([self.seed, round(1000 * level)])
        n = max(8, self.per_user * int(level)) if kind == CLOSED else self.requests
        times, limits = np.zeros(n), rng.integers(max(self.tokens // 2, 1), 3 * self.tokens // 2 + 1, n)
        if kind == POISSON:
            times = rng.exponential(1 / level, n).cumsum()
        elif kind == TRACE:
            times, limits = zip(*read_arrivals(self.arrivals), strict=True)
        items = cycle(unit.item for unit in self.units)
        return [Job(item, int(n), i, float(at)) for i, (item, n, at) in enumerate(zip(items, limits, times, strict=False))]

    def cells(self) -> dict[str, tuple[str, float]]:
        """Key → kind and level, once per repeat."""
        return {f"{repeat}/{kind}/{level:g}": (kind, level) for repeat in range(self.repeats) for kind, level in self.loads}


def numbers(name: str, text: str, kind: type, most: float) -> list[float]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name} must be numbers separated by commas, got {text!r}") from None
    if wrong := [n for n in found if not 0 < n <= most]:
        raise ValueError(f"{name} must lie above 0 and be at most {most:g}, got {wrong[0]:g}")
    return found


def read_arrivals(path: str) -> list[tuple[float, int]]:
    """(seconds, new tokens at most) of each request in a CSV file, in order; none for "". Raises ValueError for what cannot be served."""
    if not path:
        return []
    try:
        frame = pd.read_csv(path, usecols=["seconds", "tokens"]).astype({"seconds": float, "tokens": int})
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read arrivals from {path} ({error}): it needs a CSV file with the columns seconds,tokens") from None
    seconds, tokens = frame["seconds"], frame["tokens"]
    if frame.empty:
        raise ValueError(f"{path} holds no arrivals: add at least one line")
    if not (seconds.is_monotonic_increasing and 0 <= seconds.iloc[0] and seconds.iloc[-1] < math.inf and (tokens >= 1).all()):
        raise ValueError(f"{path}: arrivals must be rising seconds from 0 with at least 1 token each")
    return list(zip(seconds.tolist(), tokens.tolist(), strict=True))


# ---- serving one load


def serve(
    engine: Engine,
    jobs: Sequence[Job],
    send: Callable[[Job], Request],
    users: int | None = None,
    now: Callable[[], float] = time.perf_counter,
    idle: Callable[[float], object] = time.sleep,
) -> Generator[None, None, Row]:
    """Serve the jobs, a step of the engine at a time, and report in the end what their users saw.

    send: submits a job to the engine. users: of a closed loop, which is measured from the first token of the last of them until no
    request is left for one of them; None for an open loop, measured to its end. now, idle: the clock; a simulation has its own.
    Yields after every step of the engine. Returns:

    tokens_per_second: of all together; decode_tokens_per_second: without prefills, their tokens and their time;
    user_tokens_per_second: of one, between its first and last token.
    token_ms_*, first_ms_*: percentiles of the time per token, and from arrival to the first token.
    tokens_per_round, checked, drafted: per request and round; budget: tokens in a pass; active: requests in it.
    waited: share of steps in which a request waited for its turn. kv_mib: peak of keys and values.
    spread: 90th percentile of step times over the median of like ones (requests, drafts), without prefills; busy: it is too large.
    Raises the error of a request that failed.
    """
    pending, sent, last = deque(jobs), {}, {}
    per_token, first, rounds, steps, start, full = [], [], [], [], now(), not users
    while True:
        while pending and (len(sent) < users if users else pending[0].at <= now() - start):
            job = pending.popleft()
            sent[send(job)] = now() if users else start + job.at
        if (users and len(sent) < users) or not (sent or pending):
            break
        if not sent:
            idle(start + pending[0].at - now())
            continue
        before, done, after = now(), engine.step(), now()
        for request, r in done:
            if r.index == 0:
                first.append(after - sent[request])
            else:
                rounds.append(r)
                per_token += [(after - last[request]) / len(r.committed)] * len(r.committed)
            last[request] = after
        held = sum(request.rounds[-1].context for request in engine.active if request.rounds)
        prefill, going = sum(r.seconds for _, r in done if r.index == 0), [r for _, r in done if r.index > 0]
        work = len(going), sum(r.verify_length for r in going), sum(bool(r.draft_tokens) for r in going)
        steps.append((sum(len(r.committed) for _, r in done), *work, held, bool(engine.waiting), prefill, after - before))
        if not full and len(last) >= users:
            per_token, first, rounds, steps, start, full = [], [], [], [], after, True
        for request in [request for request in sent if request.done]:
            if request.error:
                raise request.error
            del sent[request]
        yield
    tokens, active, checked, drafting, held, waiting, prefills, times = np.array(steps, dtype=float).T
    alike = pd.Series(times[prefills == 0]).groupby([each[prefills == 0] for each in (active, checked, drafting)])
    uneven = float(alike.transform(lambda part: part / part.median()).quantile(0.9))
    seconds, passes = now() - start, max(int((active > 0).sum()), 1)
    milliseconds = {"token_ms": per_token, "first_ms": first}
    return {
        "requests": len(first),
        "seconds": seconds,
        "tokens_per_second": tokens.sum() / seconds,
        "decode_tokens_per_second": len(per_token) / (seconds - prefills.sum()),
        "user_tokens_per_second": len(per_token) / math.fsum(per_token) if per_token else math.nan,
        **{f"{name}_p{p}": 1e3 * float(np.percentile(values or [math.nan], p)) for name, values in milliseconds.items() for p in (50, 99)},
        "tokens_per_round": sum(len(r.committed) for r in rounds) / max(len(rounds), 1),
        "checked": sum(r.verify_length for r in rounds) / max(len(rounds), 1),
        "drafted": sum(bool(r.draft_tokens) for r in rounds) / max(len(rounds), 1),
        "budget": sum(1 + r.verify_length for r in rounds) / passes,
        "active": active.sum() / passes,
        "waited": waiting.mean(),
        "spread": uneven,
        "busy": uneven > BUSY,
        "kv_mib": held.max() * engine.bytes_per_token / MIB,
    }


def server(plan: LoadPlan, models: Models, arm: Arm, requests: int) -> tuple[Engine, Callable[[Job], Request]]:
    """An engine under this policy, and what submits a job to it."""
    source = arm.source(models.drafter, models.target)
    policy, memory = arm.policy(models.target, source) if arm.spec else None, round(plan.memory * MIB) or None
    engine = Engine(models.target, source if arm.spec else None, policy, max_requests=requests, memory=memory)
    sampling = {name: getattr(plan, name) for name in ("temperature", "top_p", "top_k")}
    return engine, lambda job: engine.submit(job.item.messages, max_new_tokens=job.limit, seed=job.seed, **sampling)


def measure_load(plan: LoadPlan, models: Models, out: Path, *, costs: bool = True) -> pd.DataFrame:
    """One row per load, repeat and arm, and per closed loop one of what its steps cost (for simulations), in ``out`` and returned. Resumes.

    Peaks of memory are those of the process, in which all arms of a load are served."""
    jobs = {load: plan.jobs(*load) for load in plan.loads}
    about = plan.configuration("load in turns", models.target.digest, models.drafter)
    ledger = Ledger(out, about | {"arrivals": [list(each) for each in read_arrivals(plan.arrivals)]})
    constant = plan.provenance(models) | {name: getattr(plan, name) for name in ("split", "temperature", "tokens", "prompts", "domains")}

    def measure(cell: tuple[str, float]) -> list[Row]:
        users = int(cell[1]) if cell[0] == CLOSED else None
        others = beside(models, plan, users) if costs and users else {}
        work = dict(others)
        for arm in plan.parsed_arms:
            (engine, send), clock = server(plan, models, arm, users or 1 << 20), Stopwatch()
            work[arm.name] = clock, serve(engine, jobs[cell], send, users, clock.now, clock.skip)
        found = in_turns(work)
        timed = [found.pop(name) for name in others]
        about = {"level": cell[1]} | peaks(models.target.device) | {"utc": utc()} | constant
        rows = [{"kind": COSTS, "arm": "", "costs": json.dumps(costs_row(models, plan, timed))} | about] if timed else []
        return rows + [{"kind": cell[0], "arm": name} | about | row for name, row in found.items()]

    return ledger.run(plan.cells(), measure)


def read_load(path: Path) -> pd.DataFrame:
    """The rows of a file of this command. Raises ValueError for one that is missing, foreign or of another schema version."""
    frame = read_rows(path, COMMAND)
    if missing := {"kind", "level", "arm", "costs", "tokens_per_second"} - set(frame.columns):
        raise ValueError(f"{path} holds no load, it lacks {min(missing)}: pass a file of {COMMAND}")
    return frame


def closed(frame: pd.DataFrame, column: str = "tokens_per_second") -> pd.DataFrame:
    """Medians over the repeats: one row per arm, one column per number of users."""
    rows = frame[frame["kind"] == CLOSED]
    return rows.pivot_table(column, "arm", "level", "median", sort=False).rename(columns=int)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    add_fields(parser, LoadPlan, ("baseline",), tokens=64, prompts=10)
    parser.add_argument("--out", type=Path, help="Parquet file; default one in runs/bench that is named after the options")
    return run_main(parser, _measure, arguments, kept="finished cells")


def _measure(options: argparse.Namespace) -> None:
    plan = from_fields(LoadPlan, options)
    torch.set_num_threads(plan.threads)
    out = options.out or plan.default_out("load")
    frame = measure_load(plan, plan.load(), out)
    print(f"{closed(frame).round(0).to_string()}\ntokens per second in all, by number of users; {len(frame)} rows in {out}")
    if said := "busy" in frame and busy(frame):  # files of older versions do not say
        print(said, "So it was during", ", ".join(f"{r.arm} ({r.kind}, {r.level:g})" for r in frame.query("busy == True").itertuples()))
    for _, row in frame[(frame["kind"] == CLOSED) & (frame["waited"] > 0)].iterrows():
        print(f"{row['arm']} with {row['level']:g} users: memory was full, {row['active']:.1f} requests were served at once, others waited")


if __name__ == "__main__":
    sys.exit(main())
