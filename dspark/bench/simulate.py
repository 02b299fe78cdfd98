"""``python -m dspark.bench.simulate``: the loads of a measured grid from recorded traces and measured step times, then far more users.

A simulated round takes its drafts, confidences and acceptances from a trace, its lengths from the policy itself and its seconds from the
step times. Every row is marked simulated. Where the grid was measured, both numbers stand side by side.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dspark.bench.costs import Costs
from dspark.bench.load import CLOSED, COSTS, Job, LoadPlan, closed, numbers, read_load, serve
from dspark.bench.replay import cut
from dspark.bench.results import Row, read_rows, write_results
from dspark.bench.sps import curve_of
from dspark.bench.trace import Trace
from dspark.bench.traces import load_traces
from dspark.bench.turns import Stopwatch, in_turns
from dspark.cli import run_main
from dspark.files import data_dir
from dspark.round import Round
from dspark.schedule import SPS, Autoregressive, Policy, parse_policy
from dspark.tune.curve import SPSCurve

SAMPLE = 64  # requests that are simulated one by one; with more users each stands for several
MANY = "64,256,1024,10000,100000"


@dataclass(eq=False)
class SimulatedRequest:
    """Stands for :class:`dspark.request.Request`. text: the trace's tokens. prompt: number of tokens."""

    trace: Trace
    text: list[int]
    limit: int
    prompt: int
    rounds: list[Round] = field(default_factory=list)
    written: int = 0
    done: bool = False
    error: None = None


class Simulated:
    """Stands for :class:`dspark.engine.Engine`: the same decisions, on a clock of its own.

    traces: prompt id → complete trace. costs: of a step. each: how many requests a simulated one stands for.
    """

    def __init__(self, traces: Mapping[str, Trace], costs: Costs, policy: Policy, max_requests: int, each: float = 1.0) -> None:
        self.traces, self.costs, self.policy, self.max_requests, self.each = traces, costs, policy, max_requests, each
        self.bytes_per_token, self.seconds = costs.bytes_per_token * each, 0.0
        self.active: list[SimulatedRequest] = []
        self.waiting: list[SimulatedRequest] = []
        self.block_size = 0 if isinstance(policy, Autoregressive) else int(next(iter(traces.values())).about["block_size"])

    def send(self, job: Job) -> SimulatedRequest:
        if job.item.id not in self.traces:
            raise ValueError(f"no trace of prompt {job.item.id}: record the prompts of this load with python -m dspark.bench.traces")
        trace = self.traces[job.item.id]
        if job.limit > int(trace.about["max_new_tokens"]):
            raise ValueError(f"a request for {job.limit} tokens is longer than its trace: record traces with --tokens {job.limit}")
        prompt = (self.costs.prompts or {}).get(job.item.id, 0)
        self.waiting.append(SimulatedRequest(trace, trace.token_ids[: job.limit], job.limit, prompt))
        return self.waiting[-1]

    def now(self) -> float:
        return self.seconds

    def idle(self, seconds: float) -> None:
        self.seconds += seconds

    def step(self) -> list[tuple[SimulatedRequest, Round]]:
        """One round of all, and the prefill of those that join."""
        going, finished = list(self.active), []
        while self.waiting and len(self.active) < self.max_requests:
            request = self.waiting.pop(0)
            self.active.append(request)
            seconds = self.each * self.costs.prompt(request.prompt)
            self.seconds += seconds
            finished.append((request, replace(request.trace.rounds[0], context=request.prompt, seconds=seconds)))
        if going:
            finished += zip(going, self._rounds(going), strict=True)
        for request, r in finished:
            request.rounds.append(r)
            request.written += len(r.committed)
            request.done = request.written >= len(request.text)
        self.active = [request for request in self.active if not request.done]
        return finished

    def _rounds(self, going: Sequence[SimulatedRequest]) -> list[Round]:
        histories = [request.rounds for request in going]
        windows = self.policy.windows(histories, self.block_size)
        recorded = [request.trace.rounds[request.written] for request in going]
        drafts = [
            max(min(window, request.limit - request.written - 1, len(r.draft_tokens)), 0)
            for request, window, r in zip(going, windows, recorded, strict=True)
        ]
        lengths = self.policy.lengths([torch.tensor(r.confidence[:n]) for r, n in zip(recorded, drafts, strict=True)], histories)
        tokens, drafting = sum(1 + n for n in lengths), sum(n > 0 for n in drafts)
        contexts = [max(rounds[-1].context for rounds in histories)] * round(self.each * len(going))
        self.seconds += self.costs.step(self.each * tokens, contexts, self.each * drafting)
        made = []
        for request, r, window, n, length in zip(going, recorded, windows, drafts, lengths, strict=True):
            outcome = cut(r, len(request.rounds), window, n, length, request.trace.times)
            text, context = request.text[request.written :][: outcome.accepted + 1], request.prompt + request.written + outcome.accepted
            made.append(replace(outcome, committed=tuple(text), context=context))
        return made


@dataclass(frozen=True)
class Shared:
    """Step times for a policy that sees a sample: each of its requests stands for ``each``."""

    times: SPSCurve
    each: float

    def __call__(self, tokens: int) -> float:
        return self.times(self.each * tokens)

    def draft_seconds(self, requests: int) -> float:
        return self.times.draft_seconds(self.each * requests)

    def at(self, contexts: Sequence[int]) -> Shared:
        return Shared(self.times.at([max(contexts)] * round(self.each * len(contexts))), self.each)


def simulate(traces: Mapping[str, Trace], costs: Costs, arm: str, jobs: Sequence[Job], users: int) -> Row:
    """A closed loop as :func:`dspark.bench.load.serve` reports it. Raises ValueError for a policy that copies, or jobs without a trace."""
    sample = min(users, SAMPLE)
    each = users / sample
    sps: SPS = costs.times.convex() if each == 1 else Shared(costs.times.convex(), each)
    if "copy" in arm:
        raise ValueError(f"{arm!r} cannot be simulated: copying is decided when a trace is recorded")
    engine = Simulated(traces, costs, parse_policy(arm, lambda: sps), sample, each)
    found = in_turns({arm: (Stopwatch(), serve(engine, jobs, engine.send, sample, engine.now, engine.idle))})[arm]
    return found | {name: each * found[name] for name in ("tokens_per_second", "decode_tokens_per_second", "budget", "active", "requests")}


def simulated_grid(grid: pd.DataFrame, traces: Mapping[str, Trace], users: Sequence[int], costs: Costs | None = None) -> pd.DataFrame:
    """Every arm of a grid with so many users; ``measured`` holds the grid's tokens per second, NaN where it has none.

    costs: of a step on another machine. None: of the steps that were timed with the load or, beyond the grid, with all loads.
    Raises ValueError for traces of another target or drafter.
    """
    for name, column in (("target_digest", "target_digest"), ("drafter", "drafter_digest")):
        theirs, ours = {trace.about[name] for trace in traces.values()}, set(grid[column]) - {""}
        if theirs != ours:
            raise ValueError(f"the traces are of {name} {min(theirs)}, the grid is of {min(ours)}: record traces again")
    loops = grid[grid["kind"] == CLOSED]
    measured, rows = loops.groupby(["arm", "level"])["tokens_per_second"].median(), []
    options = grid.attrs["configuration"] | {"arrivals": "", "rates": "1"}
    plan = LoadPlan(**{each.name: options[each.name] for each in fields(LoadPlan)})
    constant = {name: grid[name].iloc[0] for name in ("target", "dtype", "machine", "threads", "split", "tokens", "schema_version")}
    timed = grid[grid["kind"] == COSTS]
    for n in tqdm(users, "simulating", unit="load"):
        known = costs or Costs.of(here if len(here := timed[timed["level"] == n]) else timed)
        jobs = plan.jobs(CLOSED, min(n, SAMPLE))
        for arm in [arm for arm in dict.fromkeys(loops["arm"]) if "copy" not in arm]:
            about = {"kind": CLOSED, "level": float(n), "arm": arm, "simulated": True, "measured": measured.get((arm, float(n)), math.nan)}
            rows.append(about | simulate(traces, known, arm, jobs, n) | constant)
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog="python -m dspark.bench.simulate", description=__doc__.splitlines()[0])
    folder = data_dir() / "results"
    parser.add_argument("--grid", type=Path, default=folder / "load-bfloat16.parquet", help="measured loads; default %(default)s")
    parser.add_argument("--traces", type=Path, default=folder / "traces-test.parquet", help="complete traces; default %(default)s")
    parser.add_argument("--curve", type=Path, help="step times of another machine, from python -m dspark.bench.sps")
    parser.add_argument("--users", default=MANY, help="numbers of users beyond the grid's; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs") / "bench" / "load-simulated.parquet", help="default %(default)s")
    return run_main(parser, _simulate, arguments)


def _simulate(options: argparse.Namespace) -> None:
    grid, traces = read_load(options.grid), {about["prompt_id"]: trace for about, trace in load_traces(options.traces)}
    costs = None
    here = sorted({int(n) for n in grid.loc[grid["kind"] == CLOSED, "level"]})
    if options.curve:
        grid, costs = _elsewhere(grid, Costs.of(grid), read_rows(options.curve, "python -m dspark.bench.sps"))
    frame = simulated_grid(grid, traces, sorted({*here, *numbers("users", options.users, int, 1e6)}), costs)
    write_results(frame, options.out)
    print(f"{closed(frame).round(0).to_string()}\ntokens/s in all, simulated, by number of users; {len(frame)} rows in {options.out}")
    if not options.curve:
        ratio = closed(frame.assign(ratio=frame["tokens_per_second"] / frame["measured"]), "ratio")
        print(f"{ratio.round(2).to_string()}\nsimulated over measured; the largest difference is {(ratio - 1).abs().max().max():.1%}")


def _elsewhere(grid: pd.DataFrame, costs: Costs, steps: pd.DataFrame) -> tuple[pd.DataFrame, Costs]:
    """The grid's loads on the machine of a file of step times: nothing was measured there, and only the models' own time is known."""
    context = min(steps["context"])
    drafts = steps[(steps["kind"] == "draft") & (steps["context"] == context)]
    times = replace(curve_of(steps, context), draft=SPSCurve((1,), (float(drafts["seconds"].max()),)))
    grid = grid.assign(machine=steps["machine"].iloc[0], tokens_per_second=math.nan)
    return grid, Costs(times, bytes_per_token=costs.bytes_per_token, prompts=costs.prompts)


if __name__ == "__main__":
    sys.exit(main())
