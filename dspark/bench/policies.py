"""Policies against each other over complete traces: the same text, the same step times, no noise. Pure functions of traces."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from dspark.bench.arms import parse_arm
from dspark.bench.replay import Oracle, replay
from dspark.bench.rollouts import rollouts_of
from dspark.bench.stats import RESAMPLES, interval, summarise
from dspark.bench.trace import StepTimes, Trace
from dspark.schedule import Autoregressive, ConfidenceThreshold, Policy, PrefixScheduler
from dspark.tune.calibrate import AS_TRAINED, Calibration

Row = dict[str, object]
Traces = Sequence[tuple[Row, Trace]]  # as dspark.bench.trace_file.load_traces gives them
ORACLE, PREFIX, PRICED = "oracle", "prefix", "prefix, draft priced"
ALL = "all"
WINDOW = r"fixed:\d+"
CHOICES = (
    "plain, fixed[:N], mtp1, adaptive[:WIDEN,NARROW,FALLBACK], confidence:T (survival), conditional:T, "
    f"{PREFIX}[:N], {PRICED!r} and {ORACLE}"
)


def policy_of(name: str) -> Callable[[StepTimes, int], Policy]:
    """An arm's name → its policy, given the step times and the block size of a trace.

    "plain", "oracle", "prefix, draft priced" (Algorithm 1 that counts the draft's time, too) and "prefix:N" (it drafts N tokens) are
    names as well. Raises ValueError for a misspelled name, and for a suffix: whether blocks were copied is decided when the trace is
    recorded.
    """
    if name == ORACLE:
        return lambda times, block_size: Oracle()
    if name == "plain":
        return lambda times, block_size: Autoregressive()
    if name == PRICED:
        return lambda times, block_size: PrefixScheduler(times.sps, times.draft_seconds(min(block_size, max(times.draft))))
    kind, _, n = name.partition(":")
    if kind == PREFIX and n.isdecimal():
        return lambda times, block_size: PrefixScheduler(times.sps, max_window=int(n))
    if name == PREFIX:
        return lambda times, block_size: PrefixScheduler(times.sps)
    try:
        arm = parse_arm(name)
    except ValueError as error:
        raise ValueError(f"policy {name!r} cannot be read: choose from {CHOICES}") from error
    if not arm.drafts or arm.wrap:
        raise ValueError(f"{name!r} cannot be replayed: name a policy alone, and choose traces that were recorded with or without --copy")
    return lambda times, block_size: arm.policy(None)


def replayed(traces: Traces, names: Iterable[str]) -> pd.DataFrame:
    """Every policy on every trace: domain, prompt_id, policy, tokens (behind the first), rounds, seconds, draft_seconds (of them),
    drafted, checked, accepted."""
    policies = {name: policy_of(name) for name in names}
    rows = []
    for about, trace in traces:
        for name, made in policies.items():
            rounds = replay(trace, made(trace.times, int(trace.about["block_size"])))[1:]
            counts = {
                "tokens": sum(len(r.committed) for r in rounds),
                "rounds": len(rounds),
                "seconds": math.fsum(r.seconds for r in rounds),
                "draft_seconds": math.fsum(r.draft_seconds for r in rounds),
                "drafted": sum(len(r.draft_tokens) for r in rounds),
                "checked": sum(r.verify_length for r in rounds),
                "accepted": sum(r.accepted for r in rounds),
            }
            rows.append({"domain": about["domain"], "prompt_id": about["prompt_id"], "policy": name} | counts)
    return pd.DataFrame(rows)


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and domain, and one with domain "all" per policy, from a frame of :func:`replayed`.

    n: prompts · tokens_per_round: τ · tokens_per_second: in a domain all tokens over all seconds; for "all" the geometric mean of the
    domains · speedup: over "plain", NaN where that was not replayed · acceptance: accepted over checked drafts · checked, accepted: a
    round · draft_share: of the seconds.
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
    total = part[["tokens", "rounds", "seconds", "draft_seconds", "drafted", "checked", "accepted"]].sum()
    return {
        "policy": policy,
        "domain": domain,
        "n": part["prompt_id"].nunique(),
        "rounds": int(total["rounds"]),
        "tokens_per_round": total["tokens"] / total["rounds"] if total["rounds"] else math.nan,
        "tokens_per_second": total["tokens"] / total["seconds"] if total["seconds"] else math.nan,
        "acceptance": total["accepted"] / total["checked"] if total["checked"] else math.nan,
        "checked": total["checked"] / total["rounds"] if total["rounds"] else math.nan,
        "accepted": total["accepted"] / total["rounds"] if total["rounds"] else math.nan,
        "draft_share": total["draft_seconds"] / total["seconds"] if total["seconds"] else math.nan,
    }


def windows(block_size: int) -> list[str]:
    """Names of all fixed windows."""
    return [f"fixed:{n}" for n in range(1, block_size + 1)]


def against_windows(lines: pd.DataFrame, policy: str) -> dict[str, float | str]:
    """How a policy does against fixed windows, from a frame of :func:`pooled`.

    hindsight: its tokens/s over those of the window that is the best IN EACH DOMAIN once all is known (geometric mean of the domains) ·
    worst: the smallest of the domains' ratios, worst_domain: where · single: its tokens/s over those of the best single window over all
    domains together, best_single: that window. Raises ValueError if no fixed window or not this policy was replayed.
    """
    fixed = lines[lines["policy"].str.startswith("fixed:")]
    mine = lines[lines["policy"] == policy].set_index("domain")["tokens_per_second"]
    if fixed.empty or mine.empty:
        have = ", ".join(dict.fromkeys(lines["policy"]))
        raise ValueError(f"{policy!r} is to be compared with fixed windows, but replayed were {have}: replay both")
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


def has_windows(run: pd.DataFrame, policy: str = PREFIX) -> bool:
    """Whether a policy and fixed windows were timed side by side."""
    return policy in set(run["arm"]) and run["arm"].str.fullmatch(WINDOW).any()


def timed_against_windows(run: pd.DataFrame, policy: str = PREFIX) -> dict[str, float | str | int]:
    """What the clock said: a policy's speed-up over the fixed window that was the fastest over all domains, in a frame of
    :func:`dspark.bench.speed.read_speed`.

    best_single: that window · single, low, high: with the 95 % bootstrap interval over prompts · speedup: over plain · n: prompts a
    domain. Raises ValueError if this policy or no fixed window was timed.
    """
    if not has_windows(run, policy):
        timed = ", ".join(dict.fromkeys(run["arm"]))
        raise ValueError(f"{policy!r} is to be compared with fixed windows, but timed were {timed}: measure both")
    lines = summarise(run, "plain").query("domain == @ALL").set_index("arm")["speedup"]
    fixed = lines[lines.index.str.fullmatch(WINDOW)]
    against = summarise(run, fixed.idxmax()).set_index(["arm", "domain"]).loc[(policy, ALL)]
    told = {"best_single": fixed.idxmax(), "single": against["speedup"], "low": against["low"], "high": against["high"]}
    return told | {"speedup": lines[policy], "n": int(run.iloc[0]["n"])}


def against_windows_interval(
    frame: pd.DataFrame, policy: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals over prompts of ``hindsight`` and ``single`` (:func:`against_windows`), from a frame of :func:`replayed`.

    Prompts are drawn anew in each domain, the same ones for every policy, and the best windows are found anew each time.
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


def threshold_sweep(traces: Traces, thresholds: Iterable[float], on: str = "survival") -> pd.DataFrame:
    """Static thresholds over complete traces, exactly: the columns of :func:`pooled` and threshold. 0 checks every draft."""
    rows = []
    for threshold in thresholds:
        policy = ConfidenceThreshold(threshold, on)
        for about, trace in traces:
            rounds = [r for r in replay(trace, policy)[1:] if r.source]
            rows.append(_counted(about, threshold, [(r.verify_length, r.accepted) for r in rounds]))
    return _swept(rows)


def _counted(about: Mapping[str, object], threshold: float, checked_accepted: Sequence[tuple[int, int]]) -> Row:
    checked, accepted = (sum(pair[i] for pair in checked_accepted) for i in (0, 1))
    counts = {"rounds": len(checked_accepted), "checked": checked, "accepted": accepted}
    return {"threshold": threshold, "domain": about["domain"], "prompt_id": about["prompt_id"]} | counts


def _swept(rows: Sequence[Row]) -> pd.DataFrame:
    """Pooled over prompts: accepted and rejected drafts a round, and the acceptance rate."""
    frame = pd.DataFrame(rows)
    by = frame.groupby(["domain", "threshold"], sort=False)
    total = by[["rounds", "checked", "accepted"]].sum()
    total = total.assign(n=by["prompt_id"].nunique(), acceptance=total["accepted"] / total["checked"].where(total["checked"] > 0))
    return total.assign(accepted=total["accepted"] / total["rounds"], checked=total["checked"] / total["rounds"]).reset_index()


def threshold_estimate(frame: pd.DataFrame, thresholds: Iterable[float], calibration: Calibration = AS_TRAINED) -> pd.DataFrame:
    """The same from rollouts of whole blocks (a frame of :func:`dspark.bench.rollouts.read_rollouts`, one sampling temperature).

    An estimate when text is sampled: how far a recorded block survived is cut where the threshold would have cut it, but where later
    blocks would have started after such a cut is not known, and nothing is reweighted for it.
    """
    rows = []
    for domain in dict.fromkeys(frame["domain"]):
        data = rollouts_of(frame, domain=domain)
        survival, survived = data.survival(calibration), (data.survived & data.checked).sum(-1)
        n = frame.loc[(frame["domain"] == domain) & (frame["blocks"] > 0), "prompt_id"].nunique()
        for threshold in thresholds:
            lengths = ((survival >= threshold) & data.checked).int().cumprod(-1).sum(-1)
            accepted, checked, rounds = int(survived.minimum(lengths).sum()), int(lengths.sum()), len(lengths)
            counts = {"rounds": rounds, "checked": checked / rounds, "accepted": accepted / rounds, "n": n}
            rows.append({"domain": domain, "threshold": threshold} | counts | {"acceptance": accepted / checked if checked else math.nan})
    return pd.DataFrame(rows)
