"""One arm, one prompt: decode it, in our loop or in transformers', and report numbers. Every rate leaves out the prefill and its token."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, zip_longest
from statistics import median, quantiles

import torch
from torch import Tensor

from dspark.clock import Clock
from dspark.cpu import is_packed
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
    """One prompt decoded by one arm."""

    token_ids: list[int]  # the new ones
    rounds: list[Round]  # without the prefill
    prefill_seconds: float  # until the first token
    seconds: float  # after it


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


def by_transformers(target: Target, settings: Settings, **options: object) -> Decoder:
    """``model.generate`` as a user has it: its own cache and loop, the same distribution, length and end-of-text tokens.

    options: of ``generate``. Only whole steps can be seen from outside, so times inside a step are NaN and nothing counts as checked.
    The prefill's step may yield several tokens where it drafts; the rounds leave out all of them.
    Raises ValueError for a target whose weights were rearranged for speed.
    """
    if is_packed(target.model):
        raise ValueError(f"{target.name} is packed, but generate measures transformers alone: use load_target(…, pack=False)")
    eos = sorted(target.eos_token_ids)
    fixed = {"eos_token_id": eos or None, "pad_token_id": eos[0] if eos else 0, "repetition_penalty": 1.0, "use_cache": True}
    fixed |= {"do_sample": settings.temperature > 0}
    if settings.temperature:
        fixed |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}

    def decoder(prompt_ids: list[int], seed: int) -> Trial:
        ids = torch.tensor([prompt_ids], device=target.device)
        steps, limit = _Steps(), min(settings.max_new_tokens, target.max_context - len(prompt_ids))
        with torch.random.fork_rng(devices=[target.device] if target.device.type == "cuda" else []):
            torch.manual_seed(seed)
            start = time.perf_counter()
            target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=steps, **fixed, **options)
            end = time.perf_counter()
        rounds = [
            Round(index=i, anchor=before[-1], committed=tuple(tokens), verify_seconds=math.nan, seconds=b - a)
            for i, ((a, before), (b, tokens)) in enumerate(pairwise(steps.seen[1:]), 1)
        ]
        first = steps.seen[1][0]
        return Trial([token for _, step in steps.seen[1:] for token in step], rounds, first - start, end - first)

    return decoder


class _Steps:
    """A streamer that records when which tokens came; ``generate`` passes it the prompt first."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, list[int]]] = []

    def put(self, value: Tensor) -> None:
        self.seen.append((time.perf_counter(), value.flatten().tolist()))

    def end(self) -> None:
        pass


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
    Their ratio is the conditional acceptance. Drafts after an end-of-text token are not counted."""
    reached = [min(r.verify_length, r.accepted + 1, len(r.committed)) for r in rounds]
    accepted = [min(r.accepted, n) for r, n in zip(rounds, reached, strict=True)]
    last = max(reached, default=0)
    return tuple([sum(n >= k for n in counts) for k in range(1, last + 1)] for counts in (reached, accepted))


def first_divergence(a: Sequence[int], b: Sequence[int]) -> int:
    """Index of the first token that differs (or that only one has); −1 if the sequences are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), -1)
