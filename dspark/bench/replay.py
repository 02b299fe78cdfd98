"""The rounds that a policy would have made, from a trace and without a model: milliseconds instead of minutes.

Exact over a complete trace (:func:`dspark.bench.trace.record`): greedy text does not depend on the policy, so a round's outcome depends
on its position alone. Sampled text does: see :func:`replay`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dspark.bench.trace import StepTimes, Trace
from dspark.round import Round
from dspark.schedule import Policy


@dataclass(frozen=True)
class Oracle(Policy):
    """Knows what will be accepted and takes the fastest way through the text under the trace's step times.

    An upper bound for every policy, for :func:`replay` alone: it reads the future, so it cannot decode and is never a result.
    """

    def lengths(self, confidence: object) -> list[int]:
        raise ValueError("the oracle knows only the future of a complete trace: pass it to dspark.bench.replay.replay")


def replay(trace: Trace, policy: Policy, *, limit: int | None = None) -> list[Round]:
    """The rounds of ``policy`` on this text, the prefill first; seconds are the trace's measured step times.

    limit: most new tokens; default and upper bound are the trace's own.
    Over a complete trace the rounds are those of :func:`dspark.decode.decode` in float32. Over a live run (``about["complete"]`` False)
    they are an estimate: each recorded round is cut as the policy would have cut it, so the rounds do not join to a text, and they are
    not reweighted to the positions that the policy would have reached. Use only sums over them.
    Raises ValueError for a policy that the drafter cannot serve and, over a live run, for one that reads past rounds or wants drafts
    that were not checked.
    """
    policy.check(int(trace.about["block_size"]), bool(trace.about["has_confidence"]))
    longest = int(trace.about["max_new_tokens"])
    limit = longest if limit is None else limit
    if not 1 <= limit <= longest:
        raise ValueError(f"limit must be in 1..{longest}, the length of the recorded trace, got {limit}")
    if not trace.complete:
        return _estimate(trace, policy)
    return _walk(trace, _best_lengths(trace, limit) if isinstance(policy, Oracle) else policy, limit)


def _walk(trace: Trace, policy: Policy | list[int], limit: int) -> list[Round]:
    """policy: or, for the oracle, how much to draft and check at each position."""
    block_size, text = int(trace.about["block_size"]), trace.token_ids[:limit]
    rounds, done, last = [trace.rounds[0]], 1, None
    while done < len(text):
        r = trace.rounds[done]
        window = policy[done] if isinstance(policy, list) else policy.window(last, block_size)
        drafts = max(min(window, limit - done - 1, len(r.draft_tokens)), 0)
        length = drafts if isinstance(policy, list) else _length(policy, r, drafts)
        last = _cut(r, len(rounds), window, drafts, length, trace.times)
        last = replace(last, committed=tuple(text[done : done + last.accepted + 1]))
        rounds.append(last)
        done += len(last.committed)
    return rounds


def _length(policy: Policy, r: Round, drafts: int) -> int:
    """How many of the round's first ``drafts`` drafts the policy checks."""
    return policy.lengths([torch.tensor(r.confidence[:drafts])])[0] if drafts else 0


def _cut(r: Round, index: int, window: int, drafts: int, length: int, times: StepTimes) -> Round:
    """The round with ``drafts`` drafted tokens, of which ``length`` are checked."""
    source = r.source if drafts else ""
    accepted = min(r.accepted, length)
    drafted, verified = times.draft_seconds(drafts, source), times.sps.step_seconds(1 + length)
    return replace(
        r,
        index=index,
        window=window,
        draft_tokens=r.draft_tokens[:drafts],
        confidence=r.confidence[:drafts],
        draft_probs_of_drafts=r.draft_probs_of_drafts[:drafts],
        verify_length=length,
        target_probs_of_drafts=r.target_probs_of_drafts[:length],
        accepted=accepted,
        committed=r.committed[: accepted + 1],
        source=source,
        draft_seconds=drafted,
        verify_seconds=verified,
        seconds=drafted + verified + times.other,
    )


def _best_lengths(trace: Trace, limit: int) -> list[int]:
    """For each position the number of drafts on the fastest way to the end; dynamic programming from the end."""
    times, end = trace.times, len(trace.token_ids[:limit])
    seconds, best = [0.0] * (end + 1), [0] * (end + 1)
    for done in range(end - 1, 0, -1):
        r = trace.rounds[done]
        ways = []
        for n in range(min(r.accepted, limit - done - 1) + 1):
            step = times.draft_seconds(n, r.source if n else "") + times.sps.step_seconds(1 + n) + times.other
            ways.append((step + seconds[min(done + n + 1, end)], n))
        seconds[done], best[done] = min(ways)
    return best


class _NoPast:
    """The last round, where it is unknown."""

    def __getattr__(self, name: str) -> object:
        raise ValueError("a policy that reads past rounds cannot be replayed over a live run: record a complete trace with trace.record")


def _estimate(trace: Trace, policy: Policy) -> list[Round]:
    if isinstance(policy, Oracle):
        raise ValueError("the oracle needs a complete trace: record one with dspark.bench.trace.record")
    past = _NoPast()
    rounds = [trace.rounds[0]]
    for r in trace.rounds[1:]:
        window = policy.window(past, int(trace.about["block_size"]))
        drafts = min(window, len(r.draft_tokens))
        length = _length(policy, r, drafts)
        for kind, wanted, known in (("drafted", window, max(drafts, r.window)), ("checked", length, r.verify_length)):
            if wanted > known:
                raise ValueError(f"round {r.index} {kind} {known} tokens, but the policy wants {wanted}: record the run with FixedWindow()")
        rounds.append(_cut(r, len(rounds), window, drafts, length, trace.times))
    return rounds
