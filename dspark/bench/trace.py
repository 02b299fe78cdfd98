"""Traces: what happened at every position of a text, so that panels and policies can be tried without a model.

A complete trace holds the whole block, drafted and checked by the target, at EVERY position of the greedy text. Any policy's run is
a walk over some of these positions, so :mod:`dspark.bench.replay` gives the very rounds that the policy would have made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from dspark.bench.provenance import drafter_digest
from dspark.decode import DraftSource, Round, _Clock, rounds
from dspark.draft.lookup import COPIED
from dspark.schedule import FixedWindow
from dspark.target.target import Prompt, Target
from dspark.tune.profile import SPSCurve, profile_sps
from dspark.verify.sampling import Chance, Sampling

BROKEN = "\ufffd"  # what decoding shows where bytes of a character are missing
LONGEST_CHARACTER = 4  # tokens: a byte each


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the two models' steps on one machine.

    draft: tokens in a draft → seconds, 0 for one that was asked for and ended at once; the confidence of the token that it ended in
    front of is not counted · verify: tokens in a target pass, anchor included → seconds · copy: seconds of a draft that was copied ·
    other: seconds of a round outside both models.
    """

    draft: dict[int, float]
    verify: dict[int, float]
    copy: float = 0.0
    other: float = 0.0

    def draft_seconds(self, tokens: int, source: str = "drafter") -> float:
        """Seconds until so many tokens are drawn; 0.0 where nobody drafts (no source)."""
        if not source:
            return 0.0
        return self.copy if source in COPIED else self._drafts.step_seconds(1 + tokens)

    @cached_property
    def _drafts(self) -> SPSCurve:
        return _curve({1 + tokens: seconds for tokens, seconds in self.draft.items()})  # its widths start at 1

    @cached_property
    def sps(self) -> SPSCurve:
        """Target steps per second by tokens in the pass: what a scheduler reads."""
        return _curve(self.verify)


def _curve(seconds: dict[int, float]) -> SPSCurve:
    if not seconds:
        raise ValueError("the trace has no step times: record it with dspark.bench.trace.record, or give it times=StepTimes(…)")
    return SPSCurve(tuple(sorted(seconds)), tuple(max(seconds[width], 1e-9) for width in sorted(seconds)))


@dataclass(frozen=True)
class Trace:
    """The rounds of one prompt and where they come from.

    rounds: round 0 is the prefill. In a complete trace round i stands at the i-th new token: anchor is that token, all γ drafts are
    checked, accepted says how many agree with the greedy text. Otherwise they are the rounds of a live run.
    about: prompt, target, drafter, temperature, block_size, max_new_tokens (of the run, the context's end considered), complete,
    draft_seconds and verify_seconds (tokens → seconds), copy_seconds, other_seconds, pieces (token id → its text),
    characters ([token ids, text] of those that several tokens write together; older files have none).
    """

    rounds: tuple[Round, ...]
    about: dict[str, object]

    @property
    def complete(self) -> bool:
        return bool(self.about["complete"])

    @property
    def token_ids(self) -> list[int]:
        """The text's new tokens."""
        if not self.complete:
            return [token for r in self.rounds for token in r.committed]
        *before, last = self.rounds
        # Round i starts at the i-th token; behind the last round's anchor only its greedy successor belongs to the text.
        return [*(r.anchor for r in self.rounds[1:]), *last.committed[:1]] if before else list(last.committed)

    @cached_property
    def times(self) -> StepTimes:
        a = self.about
        return StepTimes(a["draft_seconds"], a["verify_seconds"], a["copy_seconds"], a["other_seconds"])


class _OneByOne(Chance):
    """Rejects every draft. In greedy decoding the correction is the target's choice, so the text stays and grows token by token."""

    def accepts(self, p_target: torch.Tensor, p_draft: torch.Tensor) -> bool:
        return False


def record(
    target: Target,
    drafter: DraftSource,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    times: StepTimes | None = None,
    pieces: bool = True,
) -> Trace:
    """A complete greedy trace: at every position of the text the whole block is drafted and checked.

    Costs one round a token. times: step times that were measured before, default measured here (about a second). pieces: keep the
    text of every token. Raises ValueError for what :func:`dspark.decode.decode` refuses.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt_ids = target.encode(prompt)
    room = target.max_context - len(prompt_ids)
    limit = min(max_new_tokens, room)
    # It runs a block beyond the end, so that drafts which cross the end of the text are judged as decoding judges them.
    endless = copy.copy(target)
    endless.eos_token_ids = frozenset()
    stream = rounds(
        endless, drafter, prompt_ids, min(limit + drafter.block_size + 1, room), FixedWindow(), Sampling(), _OneByOne(torch.Generator())
    )
    prefill = next(stream)
    text, found, end = [*prefill.committed], [], limit
    if text[0] in target.eos_token_ids:
        end = 1
    while len(text) < end + drafter.block_size and (r := next(stream, None)) is not None:
        found.append(r)
        text += r.committed
        if len(text) <= limit and end == limit and text[-1] in target.eos_token_ids:
            end = len(text)
    kept = tuple(_judged(r, text, target.eos_token_ids) for r in found[: end - 1])
    about = _about(target, drafter, prompt, limit, 0.0) | {"complete": True}
    trace = Trace((prefill, *kept), about)
    times = times or measured_times(target, drafter, prompt_ids, kept)
    return Trace(trace.rounds, about | _times_about(times) | (_texts(target, trace) if pieces else {"pieces": {}}))


def _judged(r: Round, text: Sequence[int], eos_token_ids: frozenset[int]) -> Round:
    """The round as a fixed window would have made it: drafts are accepted while they agree with the text, which goes on behind its end."""
    coming = text[r.index :]
    accepted = 0
    while accepted < min(len(r.draft_tokens), len(coming)) and r.draft_tokens[accepted] == coming[accepted]:
        accepted += 1
    committed = coming[: accepted + 1]
    ends = [i + 1 for i, token in enumerate(committed) if token in eos_token_ids]
    return replace(r, accepted=accepted, committed=tuple(committed[: ends[0]] if ends else committed))


def measured_times(
    target: Target, drafter: DraftSource, prompt_ids: Sequence[int], kept: Iterable[Round] = (), *, repeats: int = 3
) -> StepTimes:
    """Medians of drafts and target passes of every width behind this prompt. kept: rounds that say what copies and the rest cost."""
    kept = list(kept)
    inner = _inner(drafter)  # copying costs next to nothing; the drafter round which it is wrapped does not
    widths = range(1, drafter.block_size + 2)
    context = min(len(prompt_ids), target.max_context - widths[-1])
    curve = profile_sps(target, context=max(context, 1), widths=widths, repeats=repeats)
    return StepTimes(
        draft_times(target, inner, prompt_ids, repeats),
        dict(zip(curve.widths, curve.seconds, strict=True)),
        median([r.draft_seconds for r in kept if r.source in COPIED] or [0.0]),
        median([r.seconds - r.draft_seconds - r.verify_seconds for r in kept] or [0.0]),
    )


def draft_times(target: Target, drafter: DraftSource, prompt_ids: Sequence[int], repeats: int) -> dict[int, float]:
    """Median seconds of drafting 0, 1, … γ tokens behind these ones; 0: the block is asked for, and its first token refused."""
    _, taps = target.forward(torch.tensor([prompt_ids], device=target.device), target.new_cache(), drafter.target_layer_ids)
    last = None if taps is None else taps[:, -1:]  # lookups read none
    state = drafter.new_state(prompt_ids)
    drafter.extend(state, prompt_ids, taps)
    seconds: dict[int, list[float]] = {}
    for turn in range(repeats + 1):
        for width in range(drafter.block_size + 1):
            chance, admits = Chance(torch.Generator(target.device)), lambda confidence, width=width: len(confidence) <= width
            clock = _Clock(target.device)
            drafter.draft(state, prompt_ids[-1], max(width, 1), Sampling(), chance, admits)
            if turn:  # the first one of each width absorbs the prompt or pays for buffers
                seconds.setdefault(width, []).append(clock.lap())
            drafter.extend(state, prompt_ids[-1:], last)  # as after a round: the next draft has context to absorb
    return {width: median(took) for width, took in seconds.items()}


def from_rounds(
    stream: Iterable[Round], target: Target, drafter: DraftSource, prompt: Prompt, *, max_new_tokens: int = 128, temperature: float = 0.0
) -> Trace:
    """A live run as a trace (not complete): its rounds, with step times taken from the rounds themselves, as far as their widths go.

    Raises ValueError for a run with siblings: nobody knows what other policies would have made of them."""
    stream = tuple(stream)
    if any(r.siblings for r in stream):
        raise ValueError("a run with siblings cannot be kept as a trace: run it with a policy without sibling_rates")
    drafted = _by_width((len(r.draft_tokens), r.draft_seconds) for r in stream if r.source and r.source not in COPIED)
    verified = _by_width((1 + r.verify_length, r.verify_seconds) for r in stream[1:])
    copied = median([r.draft_seconds for r in stream if r.source in COPIED] or [0.0])
    other = median([r.seconds - r.draft_seconds - r.verify_seconds for r in stream[1:]] or [0.0])
    limit = min(max_new_tokens, target.max_context - len(target.encode(prompt)))
    about = _about(target, drafter, prompt, limit, temperature) | {"complete": False}
    times = _times_about(StepTimes(drafted, verified, copied, other))
    return Trace(stream, about | times | _texts(target, Trace(stream, about)))


def _by_width(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    seconds: dict[int, list[float]] = {}
    for width, took in pairs:
        seconds.setdefault(width, []).append(took)
    return {width: median(seconds[width]) for width in sorted(seconds)}


def _inner(source: DraftSource) -> DraftSource:
    """The drafter round which lookups are wrapped; lookups themselves where there is none."""
    return getattr(source, "drafter", None) or source


def _about(target: Target, drafter: DraftSource, prompt: Prompt, limit: int, temperature: float) -> dict[str, object]:
    inner = _inner(drafter)
    name = drafter_digest(inner) if isinstance(inner, nn.Module) else type(inner).__name__
    prompt = prompt.flatten().tolist() if isinstance(prompt, Tensor) else prompt
    return {
        "prompt": prompt if isinstance(prompt, str) else [part if isinstance(part, dict) else int(part) for part in prompt],
        "target": target.name,
        "target_digest": target.digest,
        "drafter": name + ("+copy" if inner is not drafter else ""),
        "temperature": temperature,
        "block_size": drafter.block_size,
        "has_confidence": drafter.has_confidence,
        "max_new_tokens": limit,
    }


def _times_about(times: StepTimes) -> dict[str, object]:
    return {"draft_seconds": times.draft, "verify_seconds": times.verify, "copy_seconds": times.copy, "other_seconds": times.other}


def _texts(target: Target, trace: Trace) -> dict[str, object]:
    """What the tokens of a trace write, one by one and, where a character needs several of them, together."""
    said = [trace.token_ids, *(r.committed for r in trace.rounds), *(r.draft_tokens for r in trace.rounds)]
    pieces = {token: target.decode([token]) for token in sorted({token for ids in said for token in ids})}
    characters = {}
    for ids in map(tuple, said):
        for start in (i for i, token in enumerate(ids) if BROKEN in pieces[token]):
            groups = (ids[start : start + n] for n in range(2, LONGEST_CHARACTER + 1))
            whole = next(((group, text) for group in groups if BROKEN not in (text := target.decode(group))), None)
            if whole is not None:
                characters[whole[0]] = whole[1]
    return {"pieces": pieces, "characters": [[list(group), text] for group, text in sorted(characters.items())]}
