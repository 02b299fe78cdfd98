"""One call that decodes: round by round (:func:`decode`) or to the end, for one prompt or several (:func:`generate`)."""

import time
from collections.abc import Iterator, Sequence

from dspark.draft.source import DraftSource
from dspark.engine import Engine
from dspark.request import Request
from dspark.round import Output, Round
from dspark.schedule import Policy
from dspark.target.prompt import Prompt, is_batch, plain
from dspark.target.target import Target

AT_ONCE = 64  # requests of one call that share their passes; the others wait


def decode(
    target: Target, drafter: DraftSource | None, prompt: Prompt, *, policy: Policy | None = None, **options: object
) -> Iterator[Round]:
    """Speculative decoding as a stream of rounds; the tokens follow the target's own distribution exactly.

    drafter: who proposes (:func:`~dspark.load_drafter`, :class:`~dspark.ContextLookup`); None for plain decoding.
    prompt: a string (one user turn), chat messages, or token ids.
    policy: how many tokens to draft and verify; None to copy and draft where that pays on this machine, which takes some seconds to
        measure once.
    options: max_new_tokens, temperature, top_p, top_k, seed, stop, stop_ids, streamer, processors, logprobs;
        see :meth:`dspark.engine.Engine.submit`.
    Raises ValueError, before anything runs, for an empty or too long prompt, a bad option, or a policy that the drafter cannot serve.
    """
    engine = Engine(target, drafter, policy)
    return rounds(engine, engine.submit(prompt, **options))


def generate(
    target: Target, drafter: DraftSource | None, prompt: Prompt | Sequence[Prompt], *, policy: Policy | None = None, **options: object
) -> Output | list[Output]:
    """Decode to the end and return the text; for a list of prompts, the texts of all, decoded together.

    Takes what :func:`decode` takes. A list of strings, of chats or of token lists is several prompts, and so are the rows of a tensor
    or of a tokenizer's encoding; one chat or one list of token ids is one. Request i of several is seeded with ``seed + i``; at most
    AT_ONCE are decoded at once. Raises ValueError also for a streamer with several prompts.
    """
    prompt = plain(prompt)
    several = is_batch(prompt)
    prompts, seed, start = prompt if several else [prompt], options.pop("seed", 0), time.perf_counter()
    if len(prompts) > 1 and options.get("streamer") is not None:
        raise ValueError(f"a streamer takes one text, got {len(prompts)} prompts: submit each to an Engine with a streamer of its own")
    engine = Engine(target, drafter, policy, max_requests=min(len(prompts), AT_ONCE))
    requests = [engine.submit(each, **options, seed=int(seed) + i if i else seed) for i, each in enumerate(prompts)]
    for _ in engine.run():
        pass
    for request in requests:
        if request.error:
            raise request.error
    seconds = time.perf_counter() - start
    outputs = [Output(target.decode(r.token_ids), r.token_ids, r.rounds, seconds) for r in requests]
    return outputs if several else outputs[0]


def rounds(engine: Engine, request: Request) -> Iterator[Round]:
    """The rounds of an engine's only request as they are finished. Raises the error that ended it, if one did."""
    for _, finished in engine.run():
        yield finished
    if request.error:
        raise request.error
