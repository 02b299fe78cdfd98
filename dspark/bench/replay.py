"""The rounds that a policy would have made, from a trace and without a model, and policies against each other over complete traces.

Exact, as greedy text does not depend on the policy; in milliseconds, and without noise: the same text, the same step times.
"""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dspark.bench.stats import ALL, RESAMPLES, interval
from dspark.bench.trace import StepTimes, Trace
from dspark.bench.traces import Traces
from dspark.round import Round
from dspark.schedule import POLICIES, Policy, parse_policy

ORACLE = "oracle"
UNMEASURED = StepTimes({1: 1.0}, {1: 1.0})


@dataclass(frozen=True)
class Oracle(Policy):
    """The fastest way through the text under the trace's step times: an upper bound for every policy. It reads the future, so it is for
    :func:`replay` alone, cannot decode and is never a result."""

    def lengths(self, confidence: object, histories: object = ()) -> list[int]:
        raise ValueError("the oracle knows only the future of a trace: pass it to dspark.bench.replay.replay")


def replay(trace: Trace, policy: Policy) -> list[Round]:
    """The rounds of :func:`dspark.decode.decode` in float32 with the trace's own limit, the prefill first; seconds are its step times.
    Raises ValueError for a policy that the drafter cannot serve."""
    block_size = int(trace.about["block_size"])
    policy.check(block_size, bool(trace.about["has_confidence"]))
    limit, text = int(trace.about["max_new_tokens"]), trace.token_ids
    best = _best_lengths(trace, limit) if isinstance(policy, Oracle) else None
    rounds, done = [trace.rounds[0]], 1
    while done < len(text):
        r = trace.rounds[done]
        window = best[done] if best else policy.windows([rounds], block_size)[0]
        drafts = length = max(min(window, limit - done - 1, len(r.draft_tokens)), 0)
        if drafts and not best:
            (length,) = policy.lengths([torch.tensor(r.confidence[:drafts])], [rounds])
        made = cut(r, len(rounds), window, drafts, length, trace.times)
        rounds.append(replace(made, committed=tuple(text[done : done + made.accepted + 1])))
        done += len(rounds[-1].committed)
    return rounds


def cut(r: Round, index: int, window: int, drafts: int, length: int, times: StepTimes) -> Round:
    """The round with ``drafts`` drafted tokens, of which ``length`` are checked."""
    source, accepted = r.source if drafts else "", min(r.accepted, length)
    drafted, verified = times.draft_seconds(drafts, source), times.sps.step_seconds(1 + length)
    kept = {name: getattr(r, name)[:drafts] for name in ("draft_tokens", "confidence", "draft_probs_of_drafts")}
    kept |= {"target_probs_of_drafts": r.target_probs_of_drafts[:length], "committed": r.committed[: accepted + 1], "source": source}
    took = {"draft_seconds": drafted, "verify_seconds": verified, "seconds": drafted + verified + times.other}
    context = r.context and r.context + accepted  # a recorded round accepts nothing
    return replace(r, index=index, window=window, verify_length=length, accepted=accepted, context=context, **kept, **took)


def _best_lengths(trace: Trace, limit: int) -> list[int]:
    """For each position the number of drafts on the fastest way to the end; dynamic programming from the end."""
    times, end = trace.times, len(trace.token_ids)
    seconds, best = [0.0] * (end + 1), [0] * (end + 1)
    for done in range(end - 1, 0, -1):
        r = trace.rounds[done]
        ways = []
        for n in range(min(r.accepted, limit - done - 1) + 1):
            step = times.draft_seconds(n, r.source if n else "") + times.sps.step_seconds(1 + n) + times.other
            ways.append((step + seconds[min(done + n + 1, end)], n))
        seconds[done], best[done] = min(ways)
    return best


def policy_of(name: str, times: StepTimes = UNMEASURED) -> Policy:
    """The policy of this name (:func:`dspark.schedule.parse_policy`, or "oracle"), given the step times of a trace.
    Raises ValueError for a misspelled name, and for +copy: copying is decided when the trace is recorded."""
    try:
        return Oracle() if name == ORACLE else parse_policy(name, lambda: times.sps)
    except ValueError as error:
        choices = ", ".join([*POLICIES, ORACLE])
        raise ValueError(f"policy {name!r} cannot be replayed ({error}): choose from {choices}, without +copy") from error


def replayed(traces: Traces, names: Iterable[str]) -> pd.DataFrame:
    """Every policy on every trace, without the prefill.
    Columns: domain, prompt_id, policy, tokens, rounds, seconds, drafts (rounds that drafted), checked and accepted (drafts)."""
    names, rows = list(names), []
    for about, trace in tqdm(traces, "replaying", leave=False, delay=2):
        for name in names:
            rounds = replay(trace, policy_of(name, trace.times))[1:]
            row = {"domain": about["domain"], "prompt_id": about["prompt_id"], "policy": name, "rounds": len(rounds)}
            row |= {"tokens": sum(len(r.committed) for r in rounds), "seconds": math.fsum(r.seconds for r in rounds)}
            row |= {"drafts": sum(bool(r.source) for r in rounds), "checked": sum(r.verify_length for r in rounds)}
            rows.append(row | {"accepted": sum(r.accepted for r in rounds)})
    return pd.DataFrame(rows)


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per policy and domain, and one with domain "all" per policy, from a frame of :func:`replayed`.

    n: prompts. tokens_per_round: τ. checked, accepted: drafts per round. acceptance: accepted over checked ones.
    tokens_per_second: in a domain all tokens over all seconds; for "all" the geometric mean of the domains.
    speedup: over "plain"; NaN where that was not replayed.
    """
    by = pd.concat([frame, frame.assign(domain=ALL)]).groupby(["policy", "domain"], sort=False)
    total = by[["tokens", "rounds", "seconds", "checked", "accepted"]].sum()
    lines = pd.DataFrame({"n": by["prompt_id"].nunique(), "tokens_per_round": total["tokens"] / total["rounds"]})
    lines = lines.assign(tokens_per_second=total["tokens"] / total["seconds"], acceptance=total["accepted"] / total["checked"])
    lines = lines.join(total[["checked", "accepted"]].div(total["rounds"], axis=0)).reset_index()
    whole = lines["domain"] == ALL
    means = np.exp(np.log(lines[~whole].set_index("policy")["tokens_per_second"]).groupby("policy").mean())
    lines.loc[whole, "tokens_per_second"] = lines.loc[whole, "policy"].map(means)
    plain = lines[lines["policy"] == "plain"].set_index("domain")["tokens_per_second"]
    return lines.assign(speedup=lines["tokens_per_second"] / lines["domain"].map(plain).astype(float))


def windows(block_size: int) -> list[str]:
    """Names of all fixed windows."""
    return [f"fixed:{n}" for n in range(1, block_size + 1)]


def against_windows(frame: pd.DataFrame, policy: str, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, object]:
    """A policy against fixed windows, from a frame of :func:`replayed`.

    hindsight: its tokens/s over those of the window that is the best IN EACH DOMAIN in hindsight (geometric mean of the domains).
    single: its tokens/s over those of the best single window over all domains, ``best_single``.
    Each ratio is (value, low, high), with the 95 % bootstrap interval over the prompts of each domain: the same prompts for every
    policy, and the best windows found again in each resample. Raises ValueError if no fixed window or not this policy was replayed.
    """
    names = [name for name in dict.fromkeys(frame["policy"]) if name.startswith("fixed:")]
    if not names or policy not in set(frame["policy"]):
        have = ", ".join(dict.fromkeys(frame["policy"]))
        raise ValueError(f"{policy!r} is compared with fixed windows, but replayed were {have}: replay both")
    rates = []  # of each domain: log tokens/s, [policies, 1 + resamples], all prompts once and then the resamples
    for domain, part in frame.groupby("domain", sort=False):
        wide = part.pivot(index="policy", columns="prompt_id", values=["tokens", "seconds"]).loc[[*names, policy]]
        n = part["prompt_id"].nunique()
        rng = np.random.default_rng([seed, zlib.crc32(str(domain).encode())])
        drawn = np.vstack([np.arange(n), rng.integers(n, size=(resamples, n))])
        tokens, seconds = (wide[name].to_numpy()[:, drawn].sum(-1) for name in ("tokens", "seconds"))
        rates.append(np.log(tokens / seconds))
    fixed, mine = np.stack(rates)[:, :-1], np.stack(rates)[:, -1]
    hindsight, single = np.exp((mine - fixed.max(1)).mean(0)), np.exp(mine.mean(0) - fixed.mean(0).max(0))
    ratios = {name: (float(draws[0]), *interval(draws[1:])) for name, draws in (("hindsight", hindsight), ("single", single))}
    return ratios | {"best_single": names[fixed[:, :, 0].mean(0).argmax()]}


def threshold_sweep(traces: Traces, thresholds: Iterable[float]) -> pd.DataFrame:
    """Static thresholds on the survival over complete traces, exactly; 0 checks every draft.
    The columns of :func:`pooled` per domain and ``threshold``, with ``checked`` and ``accepted`` per round that drafted."""
    frame = replayed(traces, [f"confidence:{threshold}" for threshold in thresholds])
    lines = pooled(frame.assign(rounds=frame["drafts"]))
    return lines[lines["domain"] != ALL].assign(threshold=lambda rows: rows["policy"].str.partition(":")[2].astype(float))
