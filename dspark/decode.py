"""The round: draft → schedule → verify → rewind. One loop for every mode; everything else consumes its stream of Rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark.draft.drafter import NOTHING, Admits, Draft
from dspark.schedule import Autoregressive, FixedWindow, Policy
from dspark.target.target import Prompt, Target
from dspark.verify.accept import Sibling, accept
from dspark.verify.sampling import Chance, Rows, Sampling


class DraftSource(Protocol):
    """Whatever proposes blocks: the trained drafter, copying from the context, a baseline."""

    block_size: int
    target_layer_ids: tuple[int, ...]
    has_confidence: bool

    def new_state(self, prompt: Sequence[int]) -> object:
        """What this source remembers of one request."""

    def extend(self, state: object, token_ids: Sequence[int], taps: Tensor | None) -> None:
        """The target has processed these committed tokens; taps [1, tokens, m·hidden] stand for the same positions,
        None if it asked for none."""

    def draft(self, state: object, anchor: int, window: int, sampling: Sampling, chance: Chance, admits: Admits) -> Draft:
        """Propose at most ``window`` tokens behind the anchor. admits: c_1..c_k → is x_k worth drawing? A source need not
        ask: the schedule decides again behind it. But then its traces hold no more than was drawn, and a replay takes it to have asked."""


@dataclass(frozen=True)
class Round:
    """One trip round the loop. Round 0 is the prefill: it drafts nothing and commits the first token.

    anchor: x_0, the last committed token before this round (None in the prefill) · window: tokens the policy asked for ·
    draft_tokens: x_1..x_w · confidence, survival: c_k and a_k, w of them, or w + 1 where the policy ended the draft: the last one is
    of the token that was not drawn · verify_length: ℓ ≤ w, how many the target checked ·
    accepted ≤ ℓ · committed: the accepted drafts, an accepted sibling, and one correction or bonus, nothing behind an end-of-text token ·
    target_probs_of_drafts: ℓ numbers, what the target gave the checked drafts (at temperature 1 when decoding is greedy) ·
    draft_probs_of_drafts: w numbers, the probabilities they were drawn with · source: who drafted ("" if nobody) ·
    draft_seconds: drafting and scheduling; verify_seconds: the target's pass; seconds: the whole round. Host clock ·
    siblings: (k, token) of the further guesses that were checked beside the block; sibling: the one that was accepted. It stands behind
    the accepted drafts, and what is committed behind it is a bonus.
    """

    index: int
    anchor: int | None
    window: int
    draft_tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    survival: tuple[float, ...]
    verify_length: int
    accepted: int
    committed: tuple[int, ...]
    target_probs_of_drafts: tuple[float, ...]
    draft_probs_of_drafts: tuple[float, ...]
    source: str
    draft_seconds: float
    verify_seconds: float
    seconds: float
    siblings: tuple[tuple[int, int], ...] = ()
    sibling: int | None = None


@dataclass(frozen=True)
class Output:
    """A finished generation. token_ids: the new tokens, an end-of-text token included; seconds: prefill included."""

    text: str
    token_ids: list[int]
    rounds: list[Round]
    seconds: float

    @property
    def tokens_per_round(self) -> float:
        """τ: committed tokens per round; the prefill and its token are left out. NaN if the prefill ended the text."""
        rounds = self.rounds[1:]
        return sum(len(r.committed) for r in rounds) / len(rounds) if rounds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of decoding, the prefill left out."""
        seconds = sum(r.seconds for r in self.rounds[1:])
        return sum(len(r.committed) for r in self.rounds[1:]) / seconds if seconds else math.nan


def generate(target: Target, drafter: DraftSource | None, prompt: Prompt, **options: object) -> Output:
    """Decode to the end and return the text. Takes the options of :func:`decode`; ``drafter`` None is plain decoding."""
    start = time.perf_counter()
    stream = list(decode(target, drafter, prompt, **options))
    token_ids = [token for r in stream for token in r.committed]
    return Output(target.decode(token_ids), token_ids, stream, time.perf_counter() - start)


def decode(
    target: Target,
    drafter: DraftSource | None,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    policy: Policy | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[Round]:
    """Speculative decoding as a stream of rounds; the tokens follow the target's own law exactly.

    drafter: who proposes (:func:`~dspark.load_drafter`, :class:`~dspark.ContextLookup`), None for plain decoding. prompt: a string (one
    user turn), chat messages, or token ids. policy: how far to look ahead, default the drafter's whole block. temperature 0 is greedy;
    top_p in 0..1, top_k tokens, 0 for all. seed: of all draws. Ends behind an end-of-text token, after ``max_new_tokens``, or at the
    context's end.
    Raises ValueError, before anything runs, for an empty or too long prompt, a bad option, or a policy that the drafter or the target
    cannot serve.
    """
    policy = checked_policy(policy, drafter, target)
    sampling = Sampling(temperature, top_k, top_p)
    prompt_ids = target.encode(prompt)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    limit = min(max_new_tokens, target.max_context - len(prompt_ids))
    chance = Chance(torch.Generator(target.device).manual_seed(seed))
    return rounds(target, drafter, prompt_ids, limit, policy, sampling, chance)


def checked_policy(policy: Policy | None, drafter: DraftSource | None, target: Target) -> Policy:
    """The policy that will run; None stands for the whole block. Raises ValueError if the drafter or the target cannot serve it."""
    if drafter is None:
        if policy is not None and not isinstance(policy, Autoregressive):
            raise ValueError(f"{policy} needs a drafter: pass one, or leave the policy out for plain decoding")
        return Autoregressive()
    policy = FixedWindow() if policy is None else policy
    policy.check(drafter.block_size, drafter.has_confidence)
    if policy.chain is not policy and not target.can_branch:
        raise ValueError(f"{target.name} cannot see tokens beside each other, so drafts have no siblings: choose a policy without them")
    return policy


def rounds(
    target: Target, drafter: DraftSource | None, prompt: list[int], limit: int, policy: Policy, sampling: Sampling, chance: Chance
) -> Iterator[Round]:
    """The loop itself, behind the checks of :func:`decode`. prompt: token ids · limit: new tokens at most."""
    drafting = drafter is not None and not isinstance(policy, Autoregressive)
    layer_ids = drafter.target_layer_ids if drafting else ()
    state = drafter.new_state(prompt) if drafting else None
    cache = target.new_cache()

    clock = _Clock(target.device)
    logits, taps = target.forward(_row(prompt, target), cache, layer_ids, logits_to_keep=1)
    verified = clock.lap()
    if drafting:
        drafter.extend(state, prompt, taps)
    anchor = chance.choose(sampling.probs(logits[0, -1]))
    yield Round(0, None, 0, (), (), (), 0, 0, (anchor,), (), (), "", 0.0, verified, clock.total())
    done, index, last = 1, 0, None

    while done < limit and anchor not in target.eos_token_ids:
        clock = _Clock(target.device)
        # 1 draft. The round's last token is never a draft, so more than limit − done − 1 of them could not be kept.
        window = policy.window(last, drafter.block_size) if drafting else 0
        room = min(window, limit - done - 1)
        draft = drafter.draft(state, anchor, room, sampling, chance, policy.admits) if room > 0 else NOTHING
        # 2 schedule
        schedule = policy if draft.another else policy.chain
        length = min(schedule.lengths([draft.confidence])[0], len(draft.tokens)) if draft.tokens else 0
        siblings = _siblings(draft, schedule.siblings(draft.confidence)[:length], chance) if length and draft.another else []
        drafted = clock.lap()
        # 3 verify
        checked = draft.tokens[:length]
        tokens = [anchor, *checked, *(s.token for s in siblings)]
        before = cache.length
        logits, taps = target.forward(_row(tokens, target), cache, layer_ids, siblings=[s.position for s in siblings])
        verified = clock.lap()
        p_target = Rows(sampling, logits[0])  # [ℓ+1+siblings, vocab]
        row, next_token = accept(checked, draft.probs, p_target, chance, siblings)
        sibling = siblings[row - length - 1] if row > length else None
        accepted = sibling.position - 1 if sibling else row
        # 4 rewind: the cache keeps the anchor, the accepted drafts and an accepted sibling
        kept = [*range(1 + accepted), *([row] if sibling else [])]
        if sibling:
            cache.keep(before + 1 + accepted, before + row)
        else:
            cache.rewind(before + 1 + accepted)
        if drafting:
            drafter.extend(state, [tokens[i] for i in kept], taps if taps is None else taps[:, kept])

        committed = _until_end([*(tokens[i] for i in kept[1:]), next_token], target.eos_token_ids)
        last = Round(
            index := index + 1,
            anchor,
            window,
            tuple(draft.tokens),
            tuple(draft.confidence.tolist()),
            tuple(draft.confidence.cumprod(-1).tolist()),
            length,
            accepted,
            committed,
            _of_tokens(p_target, checked) if sampling.temperature else _at_temperature_one(logits[0], checked),
            _of_tokens(draft.probs, draft.tokens),
            draft.source,
            drafted,
            verified,
            clock.total(),
            tuple((s.position, s.token) for s in siblings),
            sibling and sibling.token,
        )
        yield last
        done += len(committed)
        anchor = committed[-1]


def _siblings(draft: Draft, counts: Sequence[int], chance: Chance) -> list[Sibling]:
    """So many further guesses at positions 1, 2, …, each drawn from what the drafter says without the guesses before it."""
    siblings = []
    for k, count in enumerate(counts):
        tried = [draft.tokens[k]]
        for _ in range(count):
            if (law := draft.another(k, tried)) is None:
                break
            tried.append(chance.choose(law))
            siblings.append(Sibling(k + 1, tried[-1], law))
    return siblings


def _row(token_ids: Sequence[int], target: Target) -> Tensor:
    return torch.tensor([token_ids], device=target.device)


def _until_end(tokens: list[int], eos_token_ids: frozenset[int]) -> tuple[int, ...]:
    """Cut behind the first end-of-text token."""
    for i, token in enumerate(tokens):
        if token in eos_token_ids:
            return tuple(tokens[: i + 1])
    return tuple(tokens)


def _of_tokens(probs: Tensor | Rows, tokens: Sequence[int]) -> tuple[float, ...]:
    """probs [≥ n, vocab], n tokens → the probability of each."""
    return tuple(float(probs[k, token]) for k, token in enumerate(tokens))


def _at_temperature_one(logits: Tensor, tokens: Sequence[int]) -> tuple[float, ...]:
    """logits [≥ n, vocab], n tokens → the probability of each."""
    return tuple(logits[: len(tokens)].softmax(-1, torch.float32)[range(len(tokens)), tokens].tolist())


class _Clock:
    """Host seconds; waits for a GPU, whose calls return before the work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def total(self) -> float:
        return time.perf_counter() - self.start
