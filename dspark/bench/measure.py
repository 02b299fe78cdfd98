"""One arm, one prompt: decode it and report numbers. Every rate leaves out the prefill and its token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from statistics import median, quantiles

from dspark.clock import Clock
from dspark.decode import decode
from dspark.draft.source import DraftSource
from dspark.round import Round
from dspark.schedule import Policy
from dspark.target.target import Target


@dataclass(frozen=True)
class Settings:
    """What is the same for every arm."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Trial:
    """One prompt decoded by one arm.

    token_ids: the new tokens.
    rounds: without the prefill.
    prefill_seconds: until the first token.
    seconds: after the first token.
    """

    token_ids: list[int]
    rounds: list[Round]
    prefill_seconds: float
    seconds: float


Decoder = Callable[[list[int], int], Trial]  # prompt ids, seed → trial


def by_dspark(target: Target, source: DraftSource | None, policy: Policy | None, settings: Settings) -> Decoder:
    """The loop of :mod:`dspark.decode`; without a source it is plain decoding."""

    def decoder(prompt_ids: list[int], seed: int) -> Trial:
        clock = Clock(target.device)
        stream = decode(target, source, prompt_ids, policy=policy, seed=seed, **asdict(settings))
        prefill, prefill_seconds = next(stream), clock.lap()
        rounds, seconds = list(stream), clock.lap()
        return Trial([token for r in (prefill, *rounds) for token in r.committed], rounds, prefill_seconds, seconds)

    return decoder


def summary(trial: Trial) -> dict[str, object]:
    """The columns that one trial fills. Times per round are medians in milliseconds; NaN where nothing was measured."""
    rounds = trial.rounds
    tokens = sum(len(r.committed) for r in rounds)
    reached, accepted = positions(rounds)
    return {
        "tokens": len(trial.token_ids),
        "decoded_tokens": tokens,
        "rounds": len(rounds),
        "tokens_per_round": tokens / len(rounds) if rounds else math.nan,
        "prefill_seconds": trial.prefill_seconds,
        "seconds": trial.seconds,
        "latency_ms": 1e3 * trial.seconds / tokens if rounds else math.nan,
        "draft_ms": 1e3 * median([r.draft_seconds for r in rounds if r.source] or [math.nan]),
        "verify_ms": 1e3 * median([r.verify_seconds for r in rounds] or [math.nan]),
        "round_ms": 1e3 * median([r.seconds for r in rounds] or [math.nan]),
        "round_ms_p90": 1e3 * quantiles([r.seconds for r in rounds], n=10)[-1] if len(rounds) > 1 else math.nan,
        "drafted": sum(len(r.draft_tokens) for r in rounds),
        "checked": sum(r.verify_length for r in rounds),
        "accepted": sum(accepted),
        "reached_at": reached,
        "accepted_at": accepted,
    }


def positions(rounds: Sequence[Round]) -> tuple[list[int], list[int]]:
    """For position k = 1, 2, …: rounds that reached it (everything before was accepted, k was checked), and that accepted it.

    Their ratio is the conditional acceptance. Drafts after an end-of-text token are not counted.
    """
    reached = [min(r.verify_length, r.accepted + 1, len(r.committed)) for r in rounds]
    accepted = [min(r.accepted, n) for r, n in zip(rounds, reached, strict=True)]
    last = max(reached, default=0)
    return tuple([sum(n >= k for n in counts) for k in range(1, last + 1)] for counts in (reached, accepted))


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first token that differs (or that only one has); −1 if the sequences are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), -1)
