"""What an engine keeps of the texts it is writing: a request, and its part of the current round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Number
from typing import Protocol

import torch
from torch import Tensor

from dspark.draft.source import NOTHING, Draft
from dspark.rewind import Slot
from dspark.round import Round
from dspark.target.prompt import plain
from dspark.target.target import Target
from dspark.verify.processors import ProcessedProbs, Processors
from dspark.verify.sampling import LazyProbs, Rng, Sampling


class Streamer(Protocol):
    """What transformers calls a streamer: ``put`` receives new tokens as they are committed, never the prompt; ``end`` follows the last."""

    def put(self, value: object) -> None: ...

    def end(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class Request:
    """One text that an engine is writing.

    id: unique within the engine; None until it is queued, for the next number.
    prompt: token ids.
    limit: new tokens at most: max_new_tokens, or fewer if the context ends before.
    sampling: how its tokens are chosen.
    rng: its own random numbers, advanced by its own rounds alone.
    end_ids: token ids that end the text.
    stop: strings that end the text; what follows the first of them is never committed.
    streamer: receives every committed token.
    processors: change the target's logits before they are sampled, None for none. The drafter does not see them.
    logprobs: whether rounds carry the log-probabilities of their tokens.
    rounds: finished rounds, the prefill first.
    token_ids: the new tokens so far.
    state: what the draft source remembers about it, None while it waits or if nobody drafts.
    slot: its place in the target's cache, None while it waits and after its end.
    status: "waiting", "active", "finished", "cancelled" or "failed".
    error: what made it fail.
    """

    id: object = None
    prompt: list[int]
    limit: int
    sampling: Sampling
    rng: Rng
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    streamer: Streamer | None = None
    processors: Processors | None = None
    logprobs: bool = False
    rounds: list[Round] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    state: object = None
    slot: Slot | None = None
    status: str = "waiting"
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.status not in ("waiting", "active")

    def end_stream(self) -> None:
        """Tell the streamer, if there is one, that no more tokens come."""
        if self.streamer is not None:
            self.streamer.end()

    @property
    def anchor(self) -> int:
        """x_0, the last committed token."""
        return self.token_ids[-1]

    def p_target(self, logits: Tensor, drafts: Sequence[int] = ()) -> Tensor | LazyProbs:
        """The distributions after the text and after each further draft, [1 + drafts, vocab]. logits: of this shape."""
        if self.processors is None:
            return self.sampling.probs(logits) if self.sampling.temperature else LazyProbs(self.sampling, logits)
        return ProcessedProbs(self.sampling, logits, [*self.prompt, *self.token_ids, *drafts], self.processors)

    def logprobs_of(self, logits: Tensor, tokens: Sequence[int]) -> tuple[float, ...]:
        """log p_t of these tokens, each in its row of the logits as the target gave them; () unless they are wanted."""
        if not self.logprobs:
            return ()
        return tuple(logits[: len(tokens)].float().log_softmax(-1)[range(len(tokens)), list(tokens)].tolist())


@dataclass
class Turn:
    """One request's part of the current round, filled in as the round goes on.

    window: tokens that the policy asked for.
    draft: what was proposed.
    verify_length: ℓ, how many of the drafts are sent to the target.
    accepted: how many of those stay.
    next_token: the token after them.
    target_probs: p_t of each checked draft, as :func:`probs_of_drafts` gives them.
    draft_probs: p_d of each draft.
    logprobs: of the accepted drafts and the next token, () unless they are wanted.
    """

    request: Request
    window: int
    draft: Draft = NOTHING
    verify_length: int = 0
    accepted: int = 0
    next_token: int = -1
    target_probs: tuple[float, ...] = ()
    draft_probs: tuple[float, ...] = ()
    logprobs: tuple[float, ...] = ()

    @property
    def start(self) -> int:
        """Tokens in the slot before the round: all but the anchor."""
        return len(self.request.prompt) + len(self.request.token_ids) - 1

    @property
    def draft_limit(self) -> int:
        """Tokens to draft at most. The last token of a round is never a draft, so one of the tokens that are left needs none."""
        return min(self.window, self.request.limit - len(self.request.token_ids) - 1)

    @property
    def tokens(self) -> list[int]:
        """The anchor and the drafts to check."""
        return [self.request.anchor, *self.draft.tokens[: self.verify_length]]


def endings(target: Target, stop: object, stop_ids: object) -> tuple[frozenset[int], tuple[str, ...]]:
    """Token ids, the target's own included, and strings that end a text. One, several or None of each may be given.

    A string that is a special token ends it as that token's id, since texts are decoded without special tokens.
    Raises ValueError for what is no token of the target or no text, and for strings that cannot be found for want of a tokenizer.
    """
    strings, ids = ([v] if isinstance(v := plain(each), (str, Number)) else list(v or ()) for each in (stop, stop_ids))
    for each in strings:
        if not isinstance(each, str) or not each:
            raise ValueError(f"stop string {each!r} is no text: pass a string or several, or leave it out")
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, Integral) or not 0 <= each < target.vocab_size:
            raise ValueError(f"stop_ids must be token ids, got {each!r}: they are 0..{target.vocab_size - 1}, and text is passed as stop")
    if strings and target.tokenizer is None:
        raise ValueError(f"{target.name} has no tokenizer, so stop strings cannot be found: pass stop_ids")
    special = getattr(target.tokenizer, "all_special_tokens", ())
    ids += [target.tokenizer.convert_tokens_to_ids(each) for each in strings if each in special]
    return target.eos_token_ids | {int(each) for each in ids}, tuple(strings)


def until_end(tokens: list[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    """Cut after the first token that ends the text."""
    end = next((n for n, token in enumerate(tokens, 1) if token in end_ids), None)
    return tuple(tokens[:end])


def until_stop(request: Request, committed: Sequence[int], decode: Callable[[list[int]], str]) -> tuple[int, ...] | None:
    """The tokens up to the one that completes a stop string; None if there is none. decode: token ids → text."""
    if not request.stop:
        return None
    reach = 4 * max(map(len, request.stop)) + 4  # tokens that a stop string can span: a token per byte, four bytes a character
    for n in range(1, len(committed) + 1):
        text = decode([*request.token_ids, *committed[:n]][-reach:])
        if any(stop in text for stop in request.stop):
            return tuple(committed[:n])
    return None


def probs_of_drafts(p_target: Tensor | LazyProbs, drafts: Sequence[int]) -> tuple[float, ...]:
    """p_t(x_k) of each checked draft; of rows that are computed when they are read, at temperature 1 and before processors instead.

    Greedy rows are one-hot, and processors may not know what follows a draft that they forbid.
    """
    if not isinstance(p_target, LazyProbs):
        return tuple(float(p_target[k][token]) for k, token in enumerate(drafts))
    return tuple(p_target.logits[: len(drafts)].softmax(-1, torch.float32)[range(len(drafts)), list(drafts)].tolist())
