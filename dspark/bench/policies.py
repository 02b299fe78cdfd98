"""Policies against each other over complete traces: the same text, the same step times, no noise. Pure functions of traces."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from dspark.bench.replay import Oracle, replay
from dspark.bench.results import Row
from dspark.bench.rollouts import rollouts_of
from dspark.bench.stats import ALL, RESAMPLES, interval, summarise
from dspark.bench.trace import StepTimes, Trace
from dspark.schedule import POLICIES, Policy, PrefixScheduler, parse_policy
from dspark.tune.calibrate import AS_TRAINED, Calibration

Traces = Sequence[tuple[Row, Trace]]  # as dspark.bench.trace_file.load_traces returns them
ORACLE, PREFIX, PRICED = "oracle", "prefix", "prefix, draft priced"
WINDOW = r"fixed:\d+"


def policy_of(name: str) -> Callable[[StepTimes, int], Policy]:
    """A policy's name → the policy, given the step times and the block size of a trace.

    name: a spec for :func:`dspark.schedule.parse_policy`, "oracle", or "prefix, draft priced" (Algorithm 1 with the draft's time in Θ).
    Raises ValueError for a misspelled name, and for +copy: copying is decided when the trace is recorded.
    """
    if name == ORACLE:
        return lambda times, block_size: Oracle()
    if name == PRICED:
        return lambda times, block_size: PrefixScheduler(times.sps, times.draft_seconds(min(block_size, max(times.draft))))
    try:
        parse_policy(name, lambda: lambda tokens: 1.0)
    except ValueError as error:
        choices = ", ".join([*POLICIES, repr(PRICED), ORACLE])
        raise ValueError(f"policy {name!r} cannot be replayed ({error}): choose from {choices}, without +copy") from error
    return lambda times, block_size: parse_policy(name, lambda: times.sps)


def replayed(traces: Traces, names: Iterable[str]) -> pd.DataFrame:
    """Every policy on every trace: domain, prompt_id, policy and the numbers of :func:`_counts`."""
    policies = {name: policy_of(name) for name in names}
    return pd.DataFrame(
        [
            {"domain": about["domain"], "prompt_id": about["prompt_id"], "policy": name}
            | _counts(trace, made(trace.times, int(trace.about["block_size"])))
            for about, trace in traces
            for name, made in policies.items()
        ]
    )


def _counts(trace: Trace, policy: Policy) -> Row:
    """Without the prefill: tokens, rounds, seconds, draft_seconds (of them), drafts (rounds that drafted), and drafted, checked and
    accepted tokens."""
    rounds = replay(trace, policy)[1:]
    return {
        "tokens": sum(len(r.committed) for r in rounds),
        "rounds": len(rounds),
        "seconds": math.fsum(r.seconds for r in rounds),
        "draft_seconds": math.fsum(r.draft_seconds for r in rounds),
        "drafts": sum(bool(r.source) for r in rounds),
        "drafted": sum(len(r.draft_tokens) for r in rounds),
        "checked": sum(r.verify_length for r in rounds),
        "accepted": sum(r.accepted for r in rounds),
    }


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and domain, and one with domain "all" per policy, from a frame of :func:`replayed`.

    n: prompts.
    tokens_per_round: τ.
    tokens_per_second: in a domain all tokens over all seconds; for "all" the geometric mean of the domains.
    speedup: over "plain"; NaN where that was not replayed.
    acceptance: accepted over checked drafts.
    checked, accepted: per round.
    draft_share: of the seconds.
    """
    rows = []
    for policy, part in frame.groupby("policy", sort=False):
        lines = [_line(policy, domain, rows_of) for domain, rows_of in part.groupby("domain", sort=False)]
        whole = _line(policy, ALL, part)
        whole["tokens_per_second"] = math.exp(sum(math.log(line["tokens_per_second"]) for line in lines) / len(lines))
        rows += [*lines, whole]
    found = pd.DataFrame(rows)
    plain = found[found["policy"] == "plain"].set_index("domain")["tokens_per_second"]
    return found.assign(speedup=found["tokens_per_second"] / found["domain"].map(plain).astype(float))


def _line(policy: str, domain: str, part: pd.DataFrame) -> Row:
    total = part[["tokens", "rounds", "seconds", "draft_seconds", "checked", "accepted"]].sum()
    ratios = {
        "tokens_per_round": ("tokens", "rounds"),
        "tokens_per_second": ("tokens", "seconds"),
        "acceptance": ("accepted", "checked"),
        "checked": ("checked", "rounds"),
        "accepted": ("accepted", "rounds"),
        "draft_share": ("draft_seconds", "seconds"),
    }
    about = {"policy": policy, "domain": domain, "n": part["prompt_id"].nunique(), "rounds": int(total["rounds"])}
    return about | {name: total[a] / total[b] if total[b] else math.nan for name, (a, b) in ratios.items()}


def windows(block_size: int) -> list[str]:
    """Names of all fixed windows."""
    return [f"fixed:{n}" for n in range(1, block_size + 1)]


def against_windows(lines: pd.DataFrame, policy: str) -> dict[str, float | str]:
    """A policy against fixed windows, from a frame of :func:`pooled`.

    hindsight: its tokens/s over those of the window that is the best IN EACH DOMAIN in hindsight (geometric mean of the domains).
    worst, worst_domain: the smallest of the domains' ratios, and its domain.
    single, best_single: its tokens/s over those of the best single window over all domains, and that window.
    Raises ValueError if no fixed window or not this policy was replayed.
    """
    fixed = lines[lines["policy"].str.startswith("fixed:")]
    mine = lines[lines["policy"] == policy].set_index("domain")["tokens_per_second"]
    if fixed.empty or mine.empty:
        have = ", ".join(dict.fromkeys(lines["policy"]))
        raise ValueError(f"{policy!r} is compared with fixed windows, but replayed were {have}: replay both")
    best = fixed.groupby("domain")["tokens_per_second"].max()
    ratios = (mine / best).drop(ALL)
    single = fixed[fixed["domain"] == ALL].set_index("policy")["tokens_per_second"]
    return {
        "hindsight": math.exp(sum(map(math.log, ratios)) / len(ratios)),
        "worst": float(ratios.min()),
        "worst_domain": str(ratios.idxmin()),
        "single": float(mine[ALL] / single.max()),
        "best_single": str(single.idxmax()),
    }


def against_windows_interval(
    frame: pd.DataFrame, policy: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals over prompts of ``hindsight`` and ``single`` (:func:`against_windows`), from a frame of :func:`replayed`.

    Prompts are resampled in each domain, the same ones for every policy, and the best windows are found again in each resample.
    """
    names = [name for name in dict.fromkeys(frame["policy"]) if name.startswith("fixed:")]
    known = frame[frame["policy"].isin([*names, policy])]
    rates = []  # of each domain: log tokens/s, [policies, resamples]
    for domain, part in known.groupby("domain", sort=False):
        tokens, seconds = (part.pivot(index="policy", columns="prompt_id", values=name) for name in ("tokens", "seconds"))
        rng = np.random.default_rng([seed, zlib.crc32(str(domain).encode())])
        drawn = rng.integers(tokens.shape[1], size=(resamples, tokens.shape[1]))
        tokens, seconds = (values.loc[[*names, policy]].to_numpy()[:, drawn].sum(-1) for values in (tokens, seconds))
        rates.append(np.log(tokens / seconds))
    fixed, mine = np.stack(rates)[:, :-1], np.stack(rates)[:, -1]
    hindsight = (mine - fixed.max(1)).mean(0)
    single = mine.mean(0) - fixed.mean(0).max(0)
    return {"hindsight": interval(np.exp(hindsight)), "single": interval(np.exp(single))}


def has_windows(run: pd.DataFrame, policy: str = PREFIX) -> bool:
    """Whether a policy and fixed windows were timed side by side."""
    return policy in set(run["arm"]) and run["arm"].str.fullmatch(WINDOW).any()


def timed_against_windows(run: pd.DataFrame, policy: str = PREFIX) -> dict[str, float | str | int]:
    """A policy against fixed windows by the clock, from a frame of :func:`dspark.bench.speed.read_speed`.

    best_single: the window that was the fastest over all domains.
    single, low, high: the speed-up over it, with the 95 % bootstrap interval over prompts.
    speedup: over plain decoding.
    n: prompts a domain.
    Raises ValueError if this policy or no fixed window was timed.
    """
    if not has_windows(run, policy):
        timed = ", ".join(dict.fromkeys(run["arm"]))
        raise ValueError(f"{policy!r} is compared with fixed windows, but timed were {timed}: measure both")
    lines = summarise(run, "plain").query("domain == @ALL").set_index("arm")["speedup"]
    fixed = lines[lines.index.str.fullmatch(WINDOW)]
    against = summarise(run, fixed.idxmax()).set_index(["arm", "domain"]).loc[(policy, ALL)]
    single = {"best_single": fixed.idxmax(), "single": against["speedup"], "low": against["low"], "high": against["high"]}
    return single | {"speedup": lines[policy], "n": int(run.iloc[0]["n"])}


def threshold_sweep(traces: Traces, thresholds: Iterable[float], on: str = "survival") -> pd.DataFrame:
    """Static thresholds over complete traces, exactly: the columns of :func:`_rates`. 0 checks every draft."""
    kind = "confidence" if on == "survival" else "conditional"
    frame = replayed(traces, {f"{kind}:{threshold}": threshold for threshold in thresholds})
    return _rates(frame.assign(threshold=frame["policy"].str.partition(":")[2].astype(float), rounds=frame["drafts"]))


def threshold_estimate(frame: pd.DataFrame, thresholds: Iterable[float], calibration: Calibration = AS_TRAINED) -> pd.DataFrame:
    """The same from rollouts of whole blocks (:func:`dspark.bench.rollouts.read_rollouts`, one sampling temperature).

    An estimate when text is sampled: each recorded block is cut where the threshold would have cut it, but later blocks are not moved
    to where they would have started after the cut, and nothing is reweighted.
    """
    rows, thresholds = [], list(thresholds)
    for (domain, prompt), part in frame[frame["blocks"] > 0].groupby(["domain", "prompt_id"], sort=False):
        data = rollouts_of(part)
        survival, survived = data.survival(calibration), (data.survived & data.checked).sum(-1)
        for threshold in thresholds:
            lengths = ((survival >= threshold) & data.checked).int().cumprod(-1).sum(-1)
            counts = {"rounds": len(lengths), "checked": int(lengths.sum()), "accepted": int(survived.minimum(lengths).sum())}
            rows.append({"domain": domain, "threshold": threshold, "prompt_id": prompt} | counts)
    return _rates(pd.DataFrame(rows))


def _rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Per domain and threshold: drafting rounds, checked and accepted drafts per round, n (prompts) and the acceptance rate."""
    by = frame.groupby(["domain", "threshold"], sort=False)
    total = by[["rounds", "checked", "accepted"]].sum()
    total = total.assign(n=by["prompt_id"].nunique(), acceptance=total["accepted"] / total["checked"].where(total["checked"] > 0))
    return total.assign(accepted=total["accepted"] / total["rounds"], checked=total["checked"] / total["rounds"]).reset_index()
