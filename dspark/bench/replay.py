"""The rounds that a policy would have made, from a trace and without a model: milliseconds instead of minutes.

Exact over a complete trace (:func:`dspark.bench.trace.record`): greedy text is the same whatever the policy, so a round's outcome depends on
its position alone. Sampled text is not: see :func:`replay`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dspark.bench.trace import StepTimes, Trace
from dspark.decode import Round
from dspark.draft.lookup import COPIED
from dspark.schedule import Past, Policy


@dataclass(frozen=True)
class Oracle(Policy):
    """Knows what will be accepted and takes the fastest way through the text under the trace's step times.

    An upper bound for every policy, for :func:`replay` alone: it reads the future, so it cannot decode and is never a result.
    """

    def lengths(self, confidence: object) -> list[int]:
        raise ValueError("the oracle knows the future of a complete trace only: pass it to dspark.bench.replay.replay")


def replay(trace: Trace, policy: Policy, *, limit: int | None = None) -> list[Round]:
    """The rounds of ``policy`` on this text, the prefill first; seconds are the trace's measured step times.

    limit: new tokens at most, default and upper bound the trace's own. Over a complete trace the rounds are those that
    :func:`dspark.decode.decode` gives in float32. Over a live run (``about["complete"]`` False) only an estimate is possible: each
    recorded round is asked anew, by itself, how much the policy would have checked and kept of it. Its rounds stand where the
    recorded policy stood, do not join to a text, and are not reweighted to where this policy would have stood; use sums over them
    only. Raises ValueError for a policy that the drafter cannot serve or that checks siblings and, over a live run, for one that reads
    past rounds or wants drafts that were not checked: their outcome is unknown.
    """
    policy.check(int(trace.about["block_size"]), bool(trace.about["has_confidence"]))
    if policy.chain is not policy:
        raise ValueError("a trace knows nothing of siblings: replay the policy without sibling_rates")
    longest = int(trace.about["max_new_tokens"])
    limit = longest if limit is None else limit
    if not 1 <= limit <= longest:
        raise ValueError(f"limit must lie in 1..{longest}, the length that the trace was recorded for, got {limit}")
    if not trace.complete:
        return _estimate(trace, policy)
    return _walk(trace, _best_lengths(trace, limit) if isinstance(policy, Oracle) else policy, limit)


def _walk(trace: Trace, policy: Policy | list[int], limit: int) -> list[Round]:
    """policy: or, for the oracle, how much to draft and check at each position."""
    times, block_size, text = trace.times, int(trace.about["block_size"]), trace.token_ids[:limit]
    rounds, done, last = [trace.rounds[0]], 1, None
    while done < len(text):
        r = trace.rounds[done]
        window = policy[done] if isinstance(policy, list) else policy.window(last, block_size)
        drafts = min(window, limit - done - 1, len(r.draft_tokens))
        confidence = torch.tensor(r.confidence[:drafts])
        length = drafts if isinstance(policy, list) else policy.lengths([confidence])[0] if drafts > 0 else 0
        last = _cut(r, len(rounds), window, max(drafts, 0), length, times)
        last = replace(last, committed=tuple(text[done : done + last.accepted + 1]))
        rounds.append(last)
        done += len(last.committed)
    return rounds


def _cut(r: Round, index: int, window: int, drafts: int, length: int, times: StepTimes) -> Round:
    """The round with a room of ``drafts`` tokens and ``length`` of them checked."""
    source = r.source if drafts else ""
    drawn = drafts if source in COPIED else length  # a drafter stops where the policy does, looking up does not
    confidence = torch.tensor(r.confidence[: min(drawn + 1, drafts)])  # of the token that was not worth drawing as well
    drafted, verified = times.draft_seconds(drawn, source), times.sps.step_seconds(1 + length)
    accepted = min(r.accepted, length)
    return Round(
        index,
        r.anchor,
        window,
        r.draft_tokens[:drawn],
        tuple(confidence.tolist()),
        tuple(confidence.cumprod(-1).tolist()),
        length,
        accepted,
        r.committed[: accepted + 1],
        r.target_probs_of_drafts[:length],
        r.draft_probs_of_drafts[:drawn],
        source,
        drafted,
        verified,
        drafted + verified + times.other,
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
    """Stands for the last round where there is none."""

    def __getattr__(self, name: str) -> object:
        raise ValueError(
            "a policy that reads past rounds cannot be replayed over a live run, where its rounds would have stood elsewhere: "
            "record a complete trace with dspark.bench.trace.record"
        )


def _estimate(trace: Trace, policy: Policy) -> list[Round]:
    if isinstance(policy, Oracle):
        raise ValueError("the oracle needs a complete trace: record one with dspark.bench.trace.record")
    past: Past = _NoPast()
    rounds = [trace.rounds[0]]
    for r in trace.rounds[1:]:
        window = policy.window(past, int(trace.about["block_size"]))
        if window > max(len(r.draft_tokens), r.window):
            raise ValueError(
                f"round {r.index} drafted {len(r.draft_tokens)} tokens, but the policy wants {window}: record the run with FixedWindow()"
            )
        drafts = min(window, len(r.confidence))
        length = policy.lengths([torch.tensor(r.confidence[:drafts])])[0] if drafts else 0
        if length > r.verify_length:
            raise ValueError(
                f"round {r.index} checked {r.verify_length} drafts, but the policy wants {length}: record the run with FixedWindow()"
            )
        rounds.append(_cut(r, len(rounds), window, drafts, length, trace.times))
    return rounds
