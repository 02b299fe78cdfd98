"""The rounds that a policy would have made, from a trace and without a model: milliseconds instead of minutes.

Exact, as greedy text does not depend on the policy: a round's outcome depends on its position alone.
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

    def lengths(self, confidence: object, histories: object = ()) -> list[int]:
        raise ValueError("the oracle knows only the future of a trace: pass it to dspark.bench.replay.replay")


def replay(trace: Trace, policy: Policy) -> list[Round]:
    """The rounds of ``policy`` on this text, the prefill first; seconds are the trace's measured step times.

    The rounds are those of :func:`dspark.decode.decode` in float32, with the trace's own limit of new tokens.
    Raises ValueError for a policy that the drafter cannot serve, or a live run of an older version.
    """
    if not trace.about["complete"]:
        raise ValueError("the trace is a live run of an older version: record it again with dspark.bench.trace.record")
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
        context=r.context and r.context + accepted,  # a recorded round accepts nothing
        source=source,
        draft_seconds=drafted,
        verify_seconds=verified,
        seconds=drafted + verified + times.other,
    )


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
