"""Traces: what happened at every position of a text, so that panels and policies can run without a model.

A trace holds the whole block, drafted and checked by the target, at EVERY position of the greedy text. Any policy's run visits some of
these positions, so :mod:`dspark.bench.replay` gives exactly the rounds that the policy would have made.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import and_
from statistics import median

import torch
from torch import Tensor, nn

from dspark.bench.provenance import drafter_digest
from dspark.decode import rounds
from dspark.draft.source import COPY, DraftSource
from dspark.engine import Engine
from dspark.request import Request
from dspark.round import Round
from dspark.schedule import FixedWindow
from dspark.target.stream import BROKEN
from dspark.target.target import Prompt, Target
from dspark.tune.profile import SPSCurve, draft_times, median_steps
from dspark.verify.sampling import Rng, Sampling

LONGEST_CHARACTER = 4  # tokens, one byte each


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the two models' steps on one machine."""

    draft: dict[int, float]  # by tokens in a drafted block
    verify: dict[int, float]  # by tokens in a target pass, anchor included
    copy: float = 0.0  # of a copied draft
    other: float = 0.0  # of a round outside both models

    def draft_seconds(self, tokens: int, source: str = "drafter") -> float:
        """Seconds of drafting so many tokens; 0.0 without a source."""
        if source == COPY:
            return self.copy
        return self._drafts.step_seconds(tokens) if source else 0.0

    @cached_property
    def _drafts(self) -> SPSCurve:
        return _curve(self.draft)

    @cached_property
    def sps(self) -> SPSCurve:
        """Target steps per second by tokens in the pass, as a scheduler reads it, with the time of a whole block."""
        return replace(_curve(self.verify), draft=SPSCurve((1,), (max(self.draft.values()),)) if any(self.draft.values()) else None)


def _curve(seconds: dict[int, float]) -> SPSCurve:
    if not seconds:
        raise ValueError("the trace has no step times: record it with dspark.bench.trace.record, or give it times=StepTimes(…)")
    widths = tuple(sorted(width for width in seconds if width))  # older files have empty blocks as well
    return SPSCurve(widths, tuple(max(seconds[width], 1e-9) for width in widths))


@dataclass(frozen=True)
class Trace:
    """The rounds of one prompt and their provenance.

    rounds: round 0 is the prefill. The anchor of round i is the i-th new token, all γ drafts are checked, and ``accepted`` counts those
        that agree with the greedy text.
    about: what :func:`record` knows; pieces: token id → its text; characters: [token ids, text] of those that several tokens write
        together. Older files lack characters and prompt_tokens.
    """

    rounds: tuple[Round, ...]
    about: dict[str, object]

    @property
    def token_ids(self) -> list[int]:
        """The text's new tokens."""
        *before, last = self.rounds
        # Round i starts at the i-th token; after the last round's anchor only its greedy successor belongs to the text.
        return [*(r.anchor for r in self.rounds[1:]), *last.committed[:1]] if before else list(last.committed)

    @cached_property
    def times(self) -> StepTimes:
        return StepTimes(**{name: self.about[f"{name}_seconds"] for name in ("draft", "verify", "copy", "other")})


class _RejectAll(Rng):
    """In greedy decoding the correction is the target's choice, so the same text grows token by token."""

    def accepts(self, p_target: Tensor, p_draft: Tensor) -> bool:
        return False


def record(
    target: Target,
    drafter: DraftSource,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    times: StepTimes | None = None,
    repeats: int = 3,
    pieces: bool = True,
) -> Trace:
    """A greedy trace; costs one round per token. Raises ValueError for what :func:`dspark.decode.decode` refuses.

    times: None measures them here, ``repeats`` times each, which takes about a second. pieces: keep the text of every token.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt_ids = target.encode(prompt)
    longest = target.max_context - len(prompt_ids)
    limit = min(max_new_tokens, longest)
    # It runs a block beyond the end, so drafts that cross the end of the text are judged as decoding judges them.
    beyond = min(limit + drafter.block_size + 1, longest)
    engine = Engine(target, drafter, FixedWindow())
    endless = Request(prompt=prompt_ids, limit=beyond, sampling=Sampling(), rng=_RejectAll(torch.Generator()))
    stream = rounds(engine, engine.enqueue(endless))
    prefill = next(stream)
    text, found, end = [*prefill.committed], [], 1 if prefill.committed[0] in target.eos_token_ids else limit
    while len(text) < end + drafter.block_size and (r := next(stream, None)) is not None:
        found.append(r)
        text += r.committed
        if len(text) <= limit and end == limit and text[-1] in target.eos_token_ids:
            end = len(text)
    kept = tuple(_judged(r, text, target.eos_token_ids) for r in found[: end - 1])
    inner = getattr(drafter, "drafter", None) or drafter  # the one inside a lookup
    if times is None:  # medians after this prompt, and of copies and overhead in these rounds
        widths = range(1, drafter.block_size + 2)
        options = {"context": max(min(len(prompt_ids), target.max_context - widths[-1]), 1), "repeats": repeats}
        drafts, passes = draft_times(target, inner, **options), median_steps(target, widths=widths, **options)
        copied = median([r.draft_seconds for r in kept if r.source == COPY] or [0.0])
        times = StepTimes(drafts, passes, copied, median([r.seconds - r.draft_seconds - r.verify_seconds for r in kept] or [0.0]))
    name = drafter_digest(inner) if isinstance(inner, nn.Module) else type(inner).__name__
    prompt = prompt.flatten().tolist() if isinstance(prompt, Tensor) else prompt
    about = {
        "prompt": prompt if isinstance(prompt, str) else [part if isinstance(part, dict) else int(part) for part in prompt],
        "prompt_tokens": prefill.context,
        "target": target.name,
        "target_digest": target.digest,
        "drafter": name + ("+copy" if inner is not drafter else ""),
        "temperature": 0.0,
        "pieces": {},
        "block_size": drafter.block_size,
        "has_confidence": drafter.has_confidence,
        "max_new_tokens": limit,
    } | {f"{name}_seconds": value for name, value in asdict(times).items()}
    trace = Trace((prefill, *kept), about)
    return replace(trace, about=about | texts_of(target, trace)) if pieces else trace


def _judged(r: Round, text: Sequence[int], eos_token_ids: frozenset[int]) -> Round:
    """The round as a fixed window makes it: drafts are accepted while they agree with ``text``, which extends beyond its end."""
    coming = text[r.index :]
    accepted = sum(accumulate((a == b for a, b in zip(r.draft_tokens, coming, strict=False)), and_))
    committed = coming[: accepted + 1]
    end = next((i + 1 for i, token in enumerate(committed) if token in eos_token_ids), len(committed))
    return replace(r, accepted=accepted, committed=tuple(committed[:end]))


def texts_of(target: Target, trace: Trace) -> dict[str, object]:
    """The text of a trace's tokens, one by one and, where a character takes several of them, together."""
    sequences = [trace.token_ids, *(r.committed for r in trace.rounds), *(r.draft_tokens for r in trace.rounds)]
    pieces = {token: target.decode([token]) for token in sorted({token for ids in sequences for token in ids})}
    characters = {}
    for ids in map(tuple, sequences):
        for start in (i for i, token in enumerate(ids) if BROKEN in pieces[token]):
            groups = (ids[start : start + n] for n in range(2, LONGEST_CHARACTER + 1))
            whole = next(((group, text) for group in groups if BROKEN not in (text := target.decode(group))), None)
            if whole is not None:
                characters[whole[0]] = whole[1]
    return {"pieces": pieces, "characters": [[list(group), text] for group, text in sorted(characters.items())]}


def trace_decode(trace: Trace) -> Callable[[Sequence[int]], str]:
    """Token ids → text from the pieces that the trace keeps, so that no tokenizer is needed."""
    pieces = {(token,): text for token, text in trace.about["pieces"].items()}
    pieces |= {tuple(group): text for group, text in trace.about.get("characters", ())}

    def decode(token_ids: Sequence[int]) -> str:
        text, rest = "", tuple(token_ids)
        while rest:
            count = next((n for n in range(LONGEST_CHARACTER, 0, -1) if rest[:n] in pieces), 1)
            text, rest = text + pieces.get(rest[:count], f"⟨{rest[0]}⟩"), rest[count:]
        return text

    return decode


def prompt_of(trace: Trace) -> str:
    """The prompt that the trace holds (text, chat messages, or token ids) as text."""
    parts = [trace.about["prompt"]] if isinstance(trace.about["prompt"], str) else trace.about["prompt"]
    return " / ".join(part["content"] if isinstance(part, dict) else str(part) for part in parts)


def copies(trace: Trace) -> bool:
    """Whether drafts were also copied from the context."""
    return str(trace.about["drafter"]).endswith("+copy")


def shortened(trace: Trace, limit: int) -> Trace | None:
    """The trace of the same prompt with at most ``limit`` new tokens; None if it was recorded with a lower limit that ended its text."""
    length, recorded = len(trace.token_ids), int(trace.about["max_new_tokens"])
    if limit >= length:
        return trace if limit <= recorded or length < recorded else None
    return replace(trace, rounds=trace.rounds[:limit], about=trace.about | {"max_new_tokens": limit})
