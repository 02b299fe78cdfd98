"""The live panel: a prompt, a policy, Run, Step and Stop; the text, the heatmap, the window and the race while they happen.

It only wires: the widgets are :mod:`dspark.lab.live_widgets`, decoding is :mod:`dspark.lab.session`, text and pictures are the pure
:mod:`dspark.lab.text` and :mod:`dspark.lab.strips`. Everything is drawn into HTML widgets, at most every ``INTERVAL`` seconds.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from dspark.bench.trace import Trace, from_rounds
from dspark.bench.trace_file import save_trace
from dspark.decode import DraftSource, Output, Round
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.lab import strips
from dspark.lab.controls import PolicyControls, policy_of
from dspark.lab.live_widgets import EXAMPLES, LiveWidgets
from dspark.lab.session import Request, Session, one_sentence
from dspark.lab.text import numbers, remembered, streaming_text, tally
from dspark.schedule import FixedWindow
from dspark.target.target import Target
from dspark.tune.profile import sps_curve

INTERVAL = 0.12  # seconds between two drawings: quicker than that nobody reads, and the decoder wants the processor
SLOW = 0.7  # seconds that slow motion shows each half of a round
KEPT = 8  # recordings of plain decoding


class LivePanel(LiveWidgets):
    """Show it as the last value of a cell. Its settings are the attributes that hold widgets; setting their ``value`` is as good as
    a hand on them.

    prompt: in place of the request's own (the first example, if neither is given) · policy: a name of
    :data:`dspark.lab.controls.KINDS` · copy: also draft by copying from the context · siblings: under the prefix scheduler, check second
    guesses as well · thresholds: starting values of the policy's sliders (window, threshold, widen, narrow, fallback). A new panel
    closes the one before it, so a cell that is run again leaves no decoding and no widgets behind. A model serves one thread at a time:
    :meth:`stop` before using it elsewhere.
    Raises ValueError for an unknown policy.
    """

    _latest: ClassVar[weakref.ref[LivePanel] | None] = None

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        prompt: str | None = None,
        examples: Sequence[str] = EXAMPLES,
        policy: str = "fixed",
        copy: bool = False,
        siblings: bool = False,
        request: Request | None = None,
        **thresholds: float,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.session: Session | None = None
        self._decode, self._lock, self._drawn = remembered(target.decode), threading.Lock(), 0.0
        self._recorded: dict[Request, tuple[Round, ...]] = {}
        controls = PolicyControls(policy, _source(drafter, copy).block_size, self._check, **thresholds)
        request = request or Request(EXAMPLES[0])
        super().__init__(controls, request if prompt is None else replace(request, prompt=prompt), examples, copy, siblings)
        self._wire()
        before = LivePanel._latest and LivePanel._latest()
        if before is not None:
            before.close()
        LivePanel._latest = weakref.ref(self)
        self._check()
        self._draw()

    # ---- what a hand does

    def run(self) -> None:
        """The Run button: start, or go on after steps."""
        if self._busy and self.session.state == "waiting":
            self.session.go_on()
        elif not self._busy:
            self._start()

    def step(self) -> None:
        """The Step button: one round, starting if nothing runs."""
        if self._busy:
            self.session.step()
        else:
            self._start(stepping=True)

    def stop(self) -> None:
        """The Stop button: ends the decoding behind the current round; what is there stays."""
        if self.session is not None:
            self.session.stop()

    def run_to_end(self) -> Output:
        """Run without slow motion, wait for the end and return what was decoded. Raises ValueError with the sentence in the panel."""
        self.stop()
        self._start(animated=False)
        if self.session is not None:
            self.session.join()
        if self.told:
            raise ValueError(self.told)
        rounds = list(self.session.rounds)
        token_ids = [token for r in rounds for token in r.committed]
        return Output(self.target.decode(token_ids), token_ids, rounds, sum(r.seconds for r in rounds))

    def close(self) -> None:
        """End the decoding and remove the widgets."""
        self.stop()
        super().close()

    # ---- what it stands on

    @property
    def source(self) -> DraftSource:
        """Who drafts: the drafter, or the drafter and copying."""
        return _source(self.drafter, self.copy.value)

    @property
    def plain(self) -> tuple[Round, ...]:
        """Plain decoding on the last prompt, as far as it was recorded."""
        return tuple(self.session.plain) if self.session else ()

    @property
    def _busy(self) -> bool:
        return self.session is not None and self.session.running

    def trace(self) -> Trace:
        """The last run as a trace. ValueError if nothing was decoded yet."""
        if self.session is None or not self.session.rounds:
            raise ValueError("there is no run to keep yet: press Run first")
        s, r = self.session, self.session.request
        rounds = list(s.rounds)
        return from_rounds(rounds, self.target, s.source, r.prompt, max_new_tokens=r.max_new_tokens, temperature=r.temperature)

    def save(self) -> None:
        """The Save button: the last run as a trace into the file whose path stands in the box."""
        try:
            save_trace(self.trace(), self.path.value)
        except (ValueError, OSError) as error:
            self.tell(one_sentence(error))
        else:
            self.tell("")
            self.say(f"saved: {self.path.value}")

    def _start(self, *, stepping: bool = False, animated: bool = True) -> None:
        if self._check():
            return
        request, source = self.request, self.source
        siblings = self.siblings.value and not self.siblings.disabled  # the tick stays while another policy is looked at
        self.session = Session(
            self.target,
            source,
            request,
            partial(policy_of, *self.controls.chosen(), lambda: sps_curve(self.target), siblings=siblings),
            plain=self._recorded.get(request) if self.race.value else (),
            changed=self._changed,
            pause=lambda: SLOW if self.slow.value and animated else 0.0,
            stepping=stepping,
            animated=animated,
        )
        self._block_size = source.block_size
        self.session.start()

    def _check(self, _change: object = None) -> bool:
        """Tell what stands in the way of these settings; True if something does."""
        source = self.source
        self.controls.widest(source.block_size)
        self.siblings.disabled = self.controls.kind.value != "prefix" or not self.target.can_branch
        try:
            policy_of(*self.controls.chosen(), lambda: float).check(source.block_size, source.has_confidence)
        except ValueError as error:
            self.tell(one_sentence(error))
            return True
        self.tell("")
        return False

    # ---- drawing

    def _changed(self, session: Session) -> None:
        """Called by the session's thread."""
        if session is not self.session:
            return
        if session.state == "failed":
            self.tell(session.error)
        recorded = session.ended or session.rounds
        if recorded and session.plain and _whole(session.plain, session.request, self.target):
            self._recorded[session.request] = tuple(session.plain)
            while len(self._recorded) > KEPT:
                del self._recorded[next(iter(self._recorded))]
        if session.ended or session.state == "waiting" or not session.judged or time.monotonic() - self._drawn >= INTERVAL:
            self._draw()

    def _draw(self, _change: object = None) -> None:
        with self._lock:
            session = self.session
            if session is None:
                self.show_state("")
                return
            rounds, state = list(session.rounds), session.state
            self.show_state(state)
            if state == "recording":
                self.text.value = streaming_text(session.plain, self._decode, ended=False)
            else:
                told = {"ended": session.ended, "judged": session.judged, "alternatives": dict(session.alternatives)}
                self.text.value = streaming_text(rounds, self._decode, **told)
            seen = rounds if session.judged else rounds[:-1]
            policy = session.policy or FixedWindow()
            self.numbers.value = numbers(tally(seen, session.plain if state != "recording" else ()))
            self.heat.value = strips.heat(seen, self._block_size, self.colour.value, self._decode).svg()
            self.windows.value = strips.windows(seen, policy, self._block_size).svg()
            self.lanes.value = self._race(session, seen).svg() if session.plain else ""
            self._drawn = time.monotonic()

    def _race(self, session: Session, rounds: Sequence[Round]) -> strips.Strip:
        if session.state == "recording":
            seconds = sum(r.seconds for r in session.plain[1:])
            return strips.race({"plain decoding (recording)": list(session.plain)}, seconds, session.request.max_new_tokens, ended=False)
        longest = max(sum(len(r.committed) for r in lane) for lane in (session.plain, rounds))
        lanes = {"plain decoding": list(session.plain), "DSpark": list(rounds)}
        return strips.race(lanes, session.seconds, longest, ended=session.ended)

    def _wire(self) -> None:
        self.run_button.on_click(lambda _button: self.run())
        self.step_button.on_click(lambda _button: self.step())
        self.stop_button.on_click(lambda _button: self.stop())
        self.save_button.on_click(lambda _button: self.save())
        self.copy.observe(self._check, names="value")
        self.colour.observe(self._draw, names="value")
        self.box.observe(lambda change: self.stop() if change["new"] is None else None, names="comm")  # the page closed it


def _source(drafter: Drafter, copy: bool) -> DraftSource:
    return ContextLookup(drafter, phrases=drafter.phrases) if copy else drafter


def _whole(rounds: Sequence[Round], request: Request, target: Target) -> bool:
    """Whether the text came to its end, so that it can stand for the next race."""
    tokens = sum(len(r.committed) for r in rounds)
    return tokens >= request.max_new_tokens or rounds[-1].committed[-1] in target.eos_token_ids
