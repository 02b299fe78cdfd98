"""One decoding in a thread of its own: it can be stopped, paused and stepped, and tells whoever draws it when something happened."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.decode import DraftSource, Round, decode
from dspark.schedule import Autoregressive, Policy
from dspark.target.target import Target

log = logging.getLogger(__name__)

Row = list[tuple[int, float]]
"""The likeliest tokens at one position, as (token id, probability), best first."""

TICK = 0.1  # seconds between two looks at the race when only the plain lane still runs


@dataclass(frozen=True)
class Request:
    """What is to be decoded. max_new_tokens: at most · temperature 0 is greedy · seed: of the sampled tokens."""

    prompt: str
    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def options(self) -> dict[str, object]:
        """For :func:`dspark.decode`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {"max_new_tokens": self.max_new_tokens, **sampling}


class Watched:
    """A target that remembers the logits of its last pass, so that they can be read once the round's clock has stopped."""

    def __init__(self, target: Target, temperature: float) -> None:
        self.target, self.temperature = target, temperature or 1.0
        self.logits: Tensor | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.target, name)

    def forward(self, *args: object, **options: object) -> tuple[Tensor, Tensor | None]:
        logits, taps = self.target.forward(*args, **options)
        self.logits = logits[0]
        return logits, taps

    def best(self, n: int = 3) -> list[Row]:
        """The n likeliest tokens at each position of the last pass, as (token id, probability at this temperature)."""
        n = min(n, self.logits.shape[-1])
        top = (self.logits.float() / self.temperature).softmax(-1).topk(n)
        return [list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


class Session:
    """A request decoded in the background by ``decode``; plain decoding goes first if it is to be raced and was not recorded before.

    policy: made in the thread, as it may have to measure something first · plain: rounds of plain decoding recorded before, None
    to record them, () for no race · changed: called in the thread after everything that happens · pause: seconds of slow motion,
    asked anew each time; each round is then shown twice, before and after its check.

    state: "recording", "decoding", "waiting" (for a step), "racing" (only the plain lane still runs), then "done", "stopped" or
    "failed", with the error in one sentence.
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
        animated: bool = True,
    ) -> None:
        self.target, self.source, self.request = target, source, request
        self.changed, self.pause, self.animated = changed, pause, animated
        self.state, self.error = "decoding", ""
        self.rounds: list[Round] = []
        self.plain: list[Round] = list(plain or ())
        self.alternatives: dict[int, list[Row]] = {}
        self.judged = True  # False while the last round is shown as it was before its check
        self.policy: Policy | None = None
        self.extra_seconds = 0.0  # the race's clock behind the last round
        self._make_policy, self._record = policy, plain is None
        self._stop, self._go = threading.Event(), threading.Semaphore(0)
        self._stepping = stepping
        self._thread = threading.Thread(target=self._work, name="dspark-live", daemon=True)

    @property
    def seconds(self) -> float:
        """Seconds on the race's clock: decoding time behind the prefill."""
        return sum(r.seconds for r in self.rounds[1:]) + self.extra_seconds

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether no token will follow."""
        return self.state in ("racing", "done", "stopped", "failed")

    def start(self) -> Session:
        self._thread.start()
        return self

    def stop(self, timeout: float | None = 60.0) -> None:
        """End it behind the round that is being decoded, and wait for the thread."""
        self._stop.set()
        self._go.release()
        self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def step(self) -> None:
        """One round more if it waits; else wait behind the current one."""
        self._stepping = True
        if self.state == "waiting":
            self._go.release()

    def go_on(self) -> None:
        """No more steps: to the end."""
        self._stepping = False
        self._go.release()

    def _work(self) -> None:
        try:
            self.policy = self._make_policy()
            if self._record:
                self._show("recording")
                for r in decode(self.target, None, self.request.prompt, **self.request.options()):
                    self.plain.append(r)
                    self._show("recording")
                    if self._stop.is_set():
                        break
            self._decode()
            self._race_on()
            self._show("stopped" if self._stop.is_set() else "done")
        except Exception as error:
            log.debug("the live session failed", exc_info=True)
            self.error = one_sentence(error)
            self._show("failed")

    def _decode(self) -> None:
        watched = Watched(self.target, self.request.temperature)
        source = None if isinstance(self.policy, Autoregressive) else self.source
        for r in self._unless_stopped(decode(watched, source, self.request.prompt, policy=self.policy, **self.request.options())):
            self.alternatives[r.index] = along_the_text(r, watched.best())
            self.rounds.append(r)
            if self.pause() and r.draft_tokens:
                self.judged = False
                self._show("decoding")
                self._stop.wait(self.pause())
            self.judged = True
            self._show("waiting" if self._stepping else "decoding")
            if self._stepping:
                self._go.acquire()
            elif self.pause():
                self._stop.wait(self.pause())

    def _unless_stopped(self, rounds: Iterator[Round]) -> Iterator[Round]:
        while not self._stop.is_set() and (r := next(rounds, None)) is not None:
            yield r

    def _race_on(self) -> None:
        """DSpark is through; plain decoding goes on at its own pace."""
        left = sum(r.seconds for r in self.plain[1:]) - self.seconds
        while self.animated and left > 0 and not self._stop.wait(min(TICK, left)):
            self.extra_seconds += min(TICK, left)
            left -= TICK
            self._show("racing")
        self.extra_seconds += max(left, 0.0) if not self._stop.is_set() else 0.0

    def _show(self, state: str) -> None:
        self.state = state
        self.changed(self)


def along_the_text(r: Round, rows: list[Row]) -> list[Row]:
    """One row for each token of a round's pass, the anchor, ℓ drafts and their siblings → 1 + ℓ rows: an accepted sibling's stands in the
    place of the rejected draft's, as the sibling does in the text."""
    along = rows[: 1 + r.verify_length]
    if r.sibling is not None:
        along[r.accepted + 1] = rows[1 + r.verify_length + r.siblings.index((r.accepted + 1, r.sibling))]
    return along


def one_sentence(error: BaseException) -> str:
    """What went wrong, for somebody who cannot see the traceback."""
    words = (str(error).splitlines() or [""])[0]
    if isinstance(error, ValueError) and words:
        return words
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "the machine has no memory left for this: ask for fewer tokens or a shorter prompt"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
