"""The round: draft → schedule → verify → rewind. One loop for every mode; everything else consumes its stream of Rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dspark.clock import Clock
from dspark.draft.source import NOTHING, DraftSource
from dspark.round import Output, Round
from dspark.schedule import Autoregressive, FixedWindow, Policy
from dspark.target.target import Prompt, Target
from dspark.verify.accept import accept
from dspark.verify.sampling import Rng, Rows, Sampling


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
    """Speculative decoding as a stream of rounds; the tokens follow the target's own distribution exactly.

    drafter: who proposes (:func:`~dspark.load_drafter`, :class:`~dspark.ContextLookup`); None for plain decoding.
    prompt: a string (one user turn), chat messages, or token ids.
    max_new_tokens: at least 1; decoding also ends after an end-of-text token and at the context's end.
    policy: how far to look ahead; None for the drafter's whole block.
    temperature, top_p, top_k: see :class:`~dspark.verify.sampling.Sampling`; temperature 0 is greedy.
    seed: of all draws.
    Raises ValueError, before anything runs, for an empty or too long prompt, a bad option, or a policy that the drafter cannot serve.
    """
    policy = checked_policy(policy, drafter)
    sampling = Sampling(temperature, top_k, top_p)
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    prompt_ids = target.encode(prompt)
    limit = min(max_new_tokens, target.max_context - len(prompt_ids))
    rng = Rng(torch.Generator(target.device).manual_seed(seed))
    return rounds(target, drafter, prompt_ids, limit, policy, sampling, rng)


def checked_policy(policy: Policy | None, drafter: DraftSource | None) -> Policy:
    """The policy that will run; None stands for the whole block. Raises ValueError if the drafter cannot serve it."""
    if drafter is None:
        if policy is not None and not isinstance(policy, Autoregressive):
            raise ValueError(f"{policy} needs a drafter: pass one, or leave the policy out for plain decoding")
        return Autoregressive()
    policy = FixedWindow() if policy is None else policy
    policy.check(drafter.block_size, drafter.has_confidence)
    return policy


def rounds(
    target: Target, drafter: DraftSource | None, prompt: list[int], limit: int, policy: Policy, sampling: Sampling, rng: Rng
) -> Iterator[Round]:
    """The loop itself, after the checks of :func:`decode`. prompt: token ids. limit: new tokens at most."""
    drafting = drafter is not None and not isinstance(policy, Autoregressive)
    layer_ids = drafter.target_layer_ids if drafting else ()
    state = drafter.new_state(prompt) if drafting else None
    cache = target.new_cache()

    clock = Clock(target.device)
    logits, taps = target.forward(_row(prompt, target), cache, layer_ids, logits_to_keep=1)
    verified = clock.lap()
    if drafting:
        drafter.extend(state, prompt, taps)
    anchor = rng.choose(sampling.probs(logits[0, -1]))
    yield Round(index=0, committed=(anchor,), verify_seconds=verified, seconds=clock.total())
    done, index, last = 1, 0, None

    while done < limit and anchor not in target.eos_token_ids:
        clock = Clock(target.device)
        # draft. The round's last token is never a draft, so more than limit − done − 1 of them could not be kept.
        window = policy.window(last, drafter.block_size) if drafting else 0
        room = min(window, limit - done - 1)
        draft = drafter.draft(state, anchor, room, sampling, rng) if room > 0 else NOTHING
        # schedule
        length = policy.lengths([draft.confidence])[0] if draft.tokens else 0
        drafted = clock.lap()
        # verify
        tokens = [anchor, *draft.tokens[:length]]
        start = cache.length
        logits, taps = target.forward(_row(tokens, target), cache, layer_ids)
        verified = clock.lap()
        p_target = Rows(sampling, logits[0])  # [ℓ+1, vocab]
        accepted, next_token = accept(tokens[1:], draft.probs, p_target, rng)
        # rewind: the cache keeps the anchor and the accepted drafts
        cache.rewind(start + 1 + accepted)
        if drafting:
            drafter.extend(state, tokens[: 1 + accepted], taps if taps is None else taps[:, : 1 + accepted])

        index += 1
        last = Round(
            index=index,
            committed=_until_end([*tokens[1 : 1 + accepted], next_token], target.eos_token_ids),
            anchor=anchor,
            window=window,
            draft_tokens=tuple(draft.tokens),
            confidence=tuple(draft.confidence.tolist()),
            verify_length=length,
            accepted=accepted,
            target_probs_of_drafts=_target_probs(p_target, tokens[1:]),
            draft_probs_of_drafts=tuple(float(draft.probs[k, token]) for k, token in enumerate(draft.tokens)),
            source=draft.source,
            draft_seconds=drafted,
            verify_seconds=verified,
            seconds=clock.total(),
        )
        yield last
        done += len(last.committed)
        anchor = last.committed[-1]


def _row(token_ids: Sequence[int], target: Target) -> Tensor:
    return torch.tensor([token_ids], device=target.device)


def _until_end(tokens: list[int], eos_token_ids: frozenset[int]) -> tuple[int, ...]:
    """Cut after the first end-of-text token."""
    for i, token in enumerate(tokens):
        if token in eos_token_ids:
            return tuple(tokens[: i + 1])
    return tuple(tokens)


def _target_probs(p_target: Rows, drafts: Sequence[int]) -> tuple[float, ...]:
    """What the target gave each checked draft; at temperature 1 when decoding is greedy, where p_target is one-hot."""
    if p_target.sampling.temperature:
        return tuple(float(p_target[k, token]) for k, token in enumerate(drafts))
    return tuple(p_target.logits[: len(drafts)].softmax(-1, torch.float32)[range(len(drafts)), list(drafts)].tolist())

_Clock = Clock  # SHIM
