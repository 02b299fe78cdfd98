"""One decoding in a background thread that can be stopped, paused and stepped; a callback reports every change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from dspark.decode import decode
from dspark.draft.source import DraftSource
from dspark.files import one_line
from dspark.round import Round
from dspark.schedule import Autoregressive, Policy
from dspark.target.target import Target

log = logging.getLogger(__name__)
NO_MEMORY = "the machine is out of memory: ask for fewer tokens or a shorter prompt"


@dataclass(frozen=True)
class Request:
    """What to decode: the prompt, one user turn, and the options of :func:`dspark.decode`."""

    prompt: str
    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Session(threading.Thread):
    """Decodes one request; for a race, records plain decoding first.

    policy: called in the thread, because it may have to measure step times first.
    plain: rounds of an earlier recording of plain decoding; None to record them now, () for no race.
    changed: called in the thread after every change.
    pause: seconds that slow motion shows each half of a round; asked anew for each, 0 for full speed.
    stepping: wait after every round for :meth:`go`.

    state: "recording", "decoding", "waiting" (for a step), then "done", "stopped" or "failed"; ``error`` says why in one sentence.
    """

    def __init__(
        self,
        target: Target,
        source: DraftSource,
        request: Request,
        policy: Callable[[], Policy],
        *,
        plain: Sequence[Round] | None = (),
        changed: Callable[[Session], None] = lambda session: None,
        pause: Callable[[], float] = lambda: 0.0,
        stepping: bool = False,
    ) -> None:
        super().__init__(name="dspark-live", daemon=True)
        self.target, self.source, self.request, self.changed, self.pause = target, source, request, changed, pause
        self.state, self.error = "decoding", ""
        self.rounds: list[Round] = []
        self.plain: list[Round] = list(plain or ())
        self.judged = True  # False while slow motion shows the last round's drafts without the verdict
        self._make_policy, self._record, self._stepping = policy, plain is None, stepping
        self._end, self._go = threading.Event(), threading.Semaphore(0)

    @property
    def ended(self) -> bool:
        """Whether the text is complete."""
        return self.state in ("done", "stopped", "failed")

    def stop(self, timeout: float | None = 60.0) -> None:
        """End the decoding after the current round and wait for the thread."""
        self._end.set()
        self._go.release()
        if self.is_alive() and self is not threading.current_thread():
            self.join(timeout)

    def go(self, stepping: bool) -> None:
        """Go on if it waits: one more round with ``stepping``, else to the end."""
        self._stepping = stepping
        if self.state == "waiting":
            self._go.release()

    def run(self) -> None:
        try:
            self._decode(self._make_policy())
            self._show("stopped" if self._end.is_set() else "done")
        except Exception as error:
            log.debug("the live session failed", exc_info=True)
            words = one_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
            self.error = NO_MEMORY if isinstance(error, torch.OutOfMemoryError | MemoryError) else words
            self._show("failed")

    def _decode(self, policy: Policy) -> None:
        if self._record:
            self._show("recording")
            plain = decode(self.target, None, **asdict(self.request))
            while not self._end.is_set() and (r := next(plain, None)) is not None:
                self.plain.append(r)
                self._show("recording")
        source = None if isinstance(policy, Autoregressive) else self.source
        rounds = decode(self.target, source, policy=policy, **asdict(self.request))
        while not self._end.is_set() and (r := next(rounds, None)) is not None:
            self.rounds.append(r)
            if self.pause() and r.draft_tokens:
                self.judged = False
                self._show("decoding")
                self._end.wait(self.pause())
            self.judged, stepping = True, self._stepping
            self._show("waiting" if stepping else "decoding")
            if stepping:
                self._go.acquire()
            else:
                self._end.wait(self.pause())

    def _show(self, state: str) -> None:
        self.state = state
        self.changed(self)
