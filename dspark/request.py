"""What an engine keeps of the texts it is writing: a request, and its turn in the round under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from dspark.draft.source import NOTHING, Draft
from dspark.round import Round
from dspark.verify.passes import Slot
from dspark.verify.sampling import Rng, Sampling


class Streamer(Protocol):
    """What transformers calls a streamer: it is given tokens as they are committed, then told that the text is complete."""

    def put(self, value: object) -> None: ...

    def end(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class Request:
    """One text that an engine is writing.

    id: unique within the engine.
    prompt: token ids.
    limit: new tokens at most.
    sampling: how its tokens are chosen.
    rng: its own random numbers, advanced by its own rounds alone.
    end_ids: token ids that end the text.
    stop: strings that end the text; what follows the first of them is never committed.
    streamer: is given every committed token.
    rounds: finished rounds, the prefill first.
    token_ids: the new tokens so far.
    state: the draft source's record of it, None while it waits or if nobody drafts.
    slot: its place in the target's cache, None while it waits and after its end.
    status: "waiting", "active", "finished", "cancelled" or "failed".
    error: what made it fail.
    """

    id: object
    prompt: list[int]
    limit: int
    sampling: Sampling
    rng: Rng
    end_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    streamer: Streamer | None = None
    rounds: list[Round] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    state: object = None
    slot: Slot | None = None
    status: str = "waiting"
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.status not in ("waiting", "active")

    @property
    def anchor(self) -> int:
        """x_0, the last committed token."""
        return self.token_ids[-1]


@dataclass
class Turn:
    """One request's part of a round that is under way.

    start: tokens that its slot held before.
    window: tokens that the policy asked for.
    draft: what was proposed.
    verify_length: ℓ, how much of it is checked.
    """

    request: Request
    start: int
    window: int = 0
    draft: Draft = NOTHING
    verify_length: int = 0

    @property
    def room(self) -> int:
        """Tokens to draft. A round's last token is never a draft, so more than what is left but one could not be kept."""
        return min(self.window, self.request.limit - len(self.request.token_ids) - 1)

    @property
    def tokens(self) -> list[int]:
        """The anchor and the drafts to check."""
        return [self.request.anchor, *self.draft.tokens[: self.verify_length]]
