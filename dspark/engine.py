"""One engine for R requests: a step is one round of draft → schedule → verify → rewind for all of them (the paper's Algorithm 1)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from numbers import Integral

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dspark.clock import Clock
from dspark.device.round import static_round
from dspark.draft.source import Ask, DraftSource, propose
from dspark.request import Request, Streamer, Turn, endings, probs_of_drafts, until_end, until_stop
from dspark.round import Round
from dspark.schedule import Autoregressive, Policy
from dspark.target.target import Prompt, Target
from dspark.tune.auto import prepared
from dspark.verify.accept import accept
from dspark.verify.passes import pass_of
from dspark.verify.processors import Processors
from dspark.verify.sampling import Rng, Sampling


class Engine:
    """Serves many requests with one target, one draft source and one policy.

    Requests join and leave between rounds; each has its own sampling, random numbers, length limit and ends, so its text does not
    depend on its neighbours. Two engines may share a target and a drafter, each in a thread of its own; one engine belongs to one thread.

    drafter: who proposes; None for plain decoding.
    policy: how many tokens to draft and verify; None to copy and draft where that pays (:func:`dspark.tune.auto.prepared`).
    max_requests: how many are served at once, at least 1; the others wait in order.
    memory: bytes of keys, values and states at most, the drafter's included; None for no limit. A request is admitted when prompt and
        limit fit beside the others; nobody passes one that waits. Buffers may be larger: each slot has room for the longest text.
    Raises ValueError for a policy that the drafter cannot serve, or a number out of range.
    """

    def __init__(
        self,
        target: Target,
        drafter: DraftSource | None = None,
        policy: Policy | None = None,
        *,
        max_requests: int = 1,
        memory: int | None = None,
    ) -> None:
        drafter, self.policy = prepared(target, drafter, policy)
        if isinstance(max_requests, bool) or not isinstance(max_requests, int) or max_requests < 1:
            raise ValueError(f"max_requests must be a whole number of at least 1, got {max_requests!r}")
        if isinstance(memory, bool) or (memory is not None and not memory > 0):
            raise ValueError(f"memory must be a positive number of bytes, got {memory!r}: None sets no limit")
        self.target, self.max_requests, self.memory = target, max_requests, memory
        self.drafter = None if isinstance(self.policy, Autoregressive) else drafter
        self.layer_ids = self.drafter.target_layer_ids if self.drafter else ()
        self.verifier = pass_of(target)
        self._draft_bytes: int = getattr(self.drafter, "bytes_per_token", 0)
        self.static = static_round(self.verifier, self.drafter)  # on the device as a whole, where pass and source allow that
        self.cache = self.static.cache if self.static else self.verifier.new_cache()
        if self.static and self.drafter:
            self.drafter = self.static
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self._finished: list[tuple[Request, Round]] = []  # rounds that a step finished before it was interrupted
        self._ids, self._known = count(), set()

    # ---- requests join and leave

    def submit(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: str | Sequence[str] | None = (),
        stop_ids: int | Sequence[int] | None = (),
        streamer: Streamer | None = None,
        processors: Sequence[LogitsProcessor] = (),
        logprobs: bool = False,
        id: object = None,
    ) -> Request:
        """Queue one request; :meth:`step` serves it.

        prompt: a string (one user turn), chat messages, or token ids.
        max_new_tokens: at least 1; decoding also ends after an end-of-text token and at the context's end.
        temperature, top_p, top_k: see :class:`~dspark.verify.sampling.Sampling`; temperature 0 is greedy.
        seed: of this request's draws.
        stop, stop_ids: strings and token ids that end the text and stay in it, besides the target's own end-of-text tokens.
        streamer: ``put`` is called with each round's tokens, never with the prompt, ``end`` after the last or a failure.
        processors: logit processors of transformers, or your own; see :class:`~dspark.verify.processors.Processors`. They and logprobs
            need rounds on the host, so on CUDA a target loaded with ``pack=False``.
        logprobs: rounds and output carry ``logprobs``, the target's own of each committed token.
        id: any hashable name; None for the next number.
        Raises ValueError for a bad option, a prompt that is empty or too long, an id that is taken, or a request larger than the memory.
        """
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value < 1 << 63:
                raise ValueError(f"{name} must be a whole number of at least {least} and below 2**63, got {value!r}")
        sampling, ids = Sampling(temperature, top_k, top_p), self.target.encode(prompt)
        limit = min(int(max_new_tokens), self.target.max_context - len(ids))
        rng = Rng(torch.Generator(self.target.device).manual_seed(int(seed)))
        ends, strings = endings(self.target, stop, stop_ids)
        around = Processors.ordered(processors)
        asked = {"sampling": sampling, "rng": rng, "end_ids": ends, "stop": strings, "processors": around, "logprobs": logprobs}
        return self.enqueue(Request(id=id, prompt=ids, limit=limit, streamer=streamer, **asked))

    def enqueue(self, request: Request) -> Request:
        """Queue a request that the caller has built. Raises ValueError for an id that is taken, or what this engine cannot serve."""
        if self.static and (request.processors or request.logprobs):
            raise ValueError("processors and logprobs need rounds on the host: load_target(…, pack=False)")
        if request.id is None:
            request.id = next(number for number in self._ids if number not in self._known)
        if request.id in self._known:
            raise ValueError(f"request id {request.id!r} is taken: choose another, or leave it out")
        if self.memory is not None and (needed := self._bytes(request)) > self.memory:
            size = f"{needed} bytes of keys, values and states ({len(request.prompt)} prompt and {request.limit} new tokens)"
            raise ValueError(f"the request needs {size}, but memory is {self.memory}: shorten it, or give the engine more")
        if hasattr(request.streamer, "next_tokens_are_prompt"):  # one of transformers: it would take the first tokens for the prompt
            request.streamer.next_tokens_are_prompt = False
        self._known.add(request.id)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now; what it has written stays. Raises ValueError if it is not waiting or active in this engine."""
        if request not in self.waiting and request not in self.active:
            raise ValueError(f"request {request.id!r} is {request.status} here: only a waiting or active one can be cancelled")
        self._leave(request, "cancelled")
        request.end_stream()

    def run(self) -> Iterator[tuple[Request, Round]]:
        """Step until nothing is left to do."""
        while self.waiting or self.active or self._finished:
            self._finished = self.step()
            while self._finished:  # one by one: a caller who stops here finds the others in the next step
                yield self._finished.pop(0)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, the drafter's included. The first call may run a token to see."""
        return self.verifier.bytes_per_token + self._draft_bytes

    def _bytes(self, *requests: Request) -> int:
        """Keys, values and states of these requests when their texts are complete."""
        states = len(requests) * getattr(self.verifier, "bytes_per_request", 0)
        return sum(len(r.prompt) + r.limit for r in requests) * self.bytes_per_token + states

    def _admit(self) -> Iterator[Request]:
        """Waiting requests that fit now, in the order in which they came."""
        while self.waiting and len(self.active) < self.max_requests:
            if self.memory is not None and self._bytes(self.waiting[0], *self.active) > self.memory:
                return
            request = self.waiting[0]  # stays there until it has a slot: an interrupt must not lose it
            request.slot, request.status = self.cache.open(), "active"
            self.active.append(self.waiting.pop(0))
            yield request

    def _leave(self, request: Request, status: str, error: Exception | None = None) -> None:
        for queue in (self.waiting, self.active):
            if request in queue:
                queue.remove(request)
        slot, request.slot, request.state, request.status, request.error = request.slot, None, None, status, error
        self._known.discard(request.id)
        if slot is not None:
            self.cache.close(slot)

    # ---- the round

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, Round]]:
        """One round for every active request, and the prefill of those that join.

        Returns the finished rounds. A request that fails (its streamer raises, it samples from NaN) ends with the error, and the
        others go on. An interrupt loses the current round only: the next step repeats it.
        """
        going = [request for request in self.active if request.token_ids]
        joining = [request for request in self.active if not request.token_ids]  # of a step that was interrupted
        for request in (*joining, *self._admit()):
            self._guard(request, self._prefill)
        if going := [request for request in going if not request.done]:
            self._round(going)
        finished, self._finished = self._finished, []
        return finished

    def _guard(self, request: Request, work: Callable[..., None], *parts: object) -> None:
        """Run ``work(request, *parts)``. If it fails, this request ends with the error, and the others go on."""
        try:
            if not request.done:  # a neighbour's streamer may have cancelled it
                work(request, *parts)
        except Exception as error:
            self._leave(request, "failed", error)
            with contextlib.suppress(Exception):  # it may be the streamer that failed
                request.end_stream()

    def _prefill(self, request: Request) -> None:
        """Run the prompt and choose the first token."""
        clock = Clock(self.target.device)
        request.slot.rewind(0)
        logits, taps = self.verifier([request.prompt], [request.slot], self.cache, self.layer_ids, last_only=True)
        verify_seconds = clock.lap()
        if self.drafter:
            request.state = self.drafter.new_state(request.prompt)
            self.drafter.extend(request.state, request.prompt, taps[0])
            if self.static:
                self.static.join(request.slot, taps[0])
        first = request.rng.choose(request.p_target(logits[0])[0])
        about = {"context": len(request.prompt), "logprobs": request.logprobs_of(logits[0], [first])}
        self._commit(request, Round(index=0, committed=(first,), verify_seconds=verify_seconds, seconds=clock.total(), **about))

    def _round(self, requests: Sequence[Request]) -> None:
        """One round for these requests. An error or an interrupt leaves them as they were, so the next round repeats it."""
        clock, histories = Clock(self.target.device), [request.rounds for request in requests]
        windows = self.policy.windows(histories, self.drafter.block_size if self.drafter else 0)  # from past rounds alone
        turns = [Turn(request, window) for request, window in zip(requests, windows, strict=True)]
        for turn in turns:
            turn.request.slot.rewind(turn.start)  # an interrupted round may have left more
        if self.static:
            seconds = self.static(turns, self.policy)
            for turn in turns:
                self._guard(turn.request, self._settle, turn, None, seconds, clock)
            return
        self._draft(turns)
        lengths = self.policy.lengths([turn.draft.confidence for turn in turns], histories)  # once, for all requests
        for turn, length in zip(turns, lengths, strict=True):
            turn.verify_length = min(length, len(turn.draft.tokens))
        seconds = [clock.lap()]
        logits, taps = self.verifier([turn.tokens for turn in turns], [r.slot for r in requests], self.cache, self.layer_ids)
        seconds.append(clock.lap())
        for turn, rows, tapped in zip(turns, logits, taps, strict=True):
            self._guard(turn.request, self._accept, turn, rows, tapped, seconds, clock)

    def _draft(self, turns: Sequence[Turn]) -> None:
        """Ask the source for all drafts together; without one all windows are 0."""
        asking = [turn for turn in turns if turn.draft_limit > 0]
        asks = [Ask(turn.request.state, turn.request.anchor, turn.draft_limit, turn.request.sampling, turn.request.rng) for turn in asking]
        for turn, draft in zip(asking, propose(self.drafter, asks) if asks else (), strict=True):
            turn.draft = draft

    def _accept(self, request: Request, turn: Turn, logits: Tensor, taps: Tensor | None, seconds: Sequence[float], clock: Clock) -> None:
        """Accept drafts by the rule. logits: [ℓ+1, vocab]; taps: [1, ℓ+1, m·hidden]; seconds: of drafting and of verifying."""
        checked, draft, p_target = turn.tokens[1:], turn.draft, request.p_target(logits, turn.tokens[1:])
        turn.accepted, turn.next_token = accept(checked, draft.probs, p_target, request.rng)
        turn.target_probs = probs_of_drafts(p_target, checked)
        turn.draft_probs = tuple(float(draft.probs[k][token]) for k, token in enumerate(draft.tokens))
        turn.logprobs = request.logprobs_of(logits, [*checked[: turn.accepted], turn.next_token])
        self._settle(request, turn, taps, seconds, clock)

    def _settle(self, request: Request, turn: Turn, taps: Tensor | None, seconds: Sequence[float], clock: Clock) -> None:
        """Rewind the slot to what was accepted, and commit the round."""
        if turn.next_token < 0:
            raise ValueError("cannot sample from probabilities without mass: the model's weights are damaged")
        kept = turn.tokens[: 1 + turn.accepted]  # the anchor and the accepted drafts
        context = turn.start + len(kept)
        request.slot.rewind(context)
        if self.drafter:
            self.drafter.extend(request.state, kept, None if taps is None else taps[:, : len(kept)])
        committed = until_end([*kept[1:], turn.next_token], request.end_ids)
        outcome = Round(
            index=len(request.rounds),
            committed=committed,
            anchor=request.anchor,
            window=turn.window,
            draft_tokens=tuple(turn.draft.tokens),
            confidence=tuple(turn.draft.confidence.tolist()),
            verify_length=turn.verify_length,
            accepted=turn.accepted,
            target_probs_of_drafts=turn.target_probs,
            draft_probs_of_drafts=turn.draft_probs,
            logprobs=turn.logprobs[: len(committed)],
            context=context,
            source=turn.draft.source,
            draft_seconds=seconds[0],
            verify_seconds=seconds[1],
            seconds=clock.total(),
        )
        self._commit(request, outcome)

    def _commit(self, request: Request, outcome: Round) -> None:
        """Add the round to the request; end the request if its text is complete."""
        stopped = until_stop(request, outcome.committed, self.target.decode)
        if stopped:
            outcome = replace(outcome, committed=stopped, logprobs=outcome.logprobs[: len(stopped)])
        request.rounds.append(outcome)
        request.token_ids.extend(outcome.committed)
        self._finished.append((request, outcome))
        if stopped or request.anchor in request.end_ids or len(request.token_ids) >= request.limit:
            self._leave(request, "finished")
        if request.streamer is not None:  # last: it may raise, cancel, or be interrupted
            request.streamer.put(torch.tensor(outcome.committed))
            if request.status == "finished":
                request.streamer.end()
