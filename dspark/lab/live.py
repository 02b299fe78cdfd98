"""The live panel: decode a prompt under any policy and watch the text, the heatmap, the window and the race against plain decoding.

This module connects the widgets (:mod:`dspark.lab.live_widgets`), the decoding thread (:mod:`dspark.lab.session`) and the pure
drawing functions (:mod:`dspark.lab.text`, :mod:`dspark.lab.strips`).
"""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from typing import ClassVar

from dspark.bench.trace import Trace, from_rounds
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.files import one_line
from dspark.lab import strips
from dspark.lab.controls import PolicyControls
from dspark.lab.live_widgets import EXAMPLES, LiveWidgets
from dspark.lab.session import Request, Session
from dspark.lab.text import numbers, remembered, streaming_text, tally
from dspark.round import Output, Round
from dspark.schedule import FixedWindow, make_policy
from dspark.target.target import Target
from dspark.tune.profile import sps_curve

INTERVAL = 0.12  # seconds between two drawings; drawing more often would only slow the decoder
SLOW = 0.7  # seconds that slow motion shows each half of a round
KEPT = 8  # recordings of plain decoding
DEFAULT = Request(EXAMPLES[0])


class LivePanel(LiveWidgets):
    """Show it as the last value of a cell. To change a setting from code, set the ``value`` of the widget of that name.

    policy: a name of :data:`dspark.schedule.POLICIES`, perhaps with numbers ("adaptive:0.6,0.3").
    copy: also draft by copying from the context.
    request: the prompt and the sampling to start with.

    A new panel closes the one before it, so running a cell again leaves no thread and no widgets. A model serves one thread at a
    time: call :meth:`stop` before using it elsewhere. Raises ValueError for an unknown policy.
    """

    _latest: ClassVar[weakref.ref[LivePanel] | None] = None

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        policy: str = "prefix",
        copy: bool = True,
        request: Request = DEFAULT,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.session: Session | None = None
        self._decode, self._lock, self._drawn = remembered(target.decode), threading.Lock(), 0.0
        self._recorded: dict[Request, tuple[Round, ...]] = {}
        super().__init__(PolicyControls(policy, self._check), request, copy)
        self._connect()
        before = LivePanel._latest and LivePanel._latest()
        if before is not None:
            before.close()
        LivePanel._latest = weakref.ref(self)
        self._check()
        self._draw()

    # ---- the buttons

    def run(self) -> None:
        """Start, or go on after steps."""
        if self._busy and self.session.state == "waiting":
            self.session.go_on()
        elif not self._busy:
            self._start()

    def step(self) -> None:
        """Decode one round; starts if nothing runs."""
        if self._busy:
            self.session.step()
        else:
            self._start(stepping=True)

    def stop(self) -> None:
        """End the decoding after the current round; the text so far stays."""
        if self.session is not None:
            self.session.stop()

    # ---- for code

    def run_to_end(self) -> Output:
        """Run at full speed, wait for the end and return what was decoded. Raises ValueError with the error that the panel shows."""
        self.stop()
        self._start(animated=False)
        if self.session is not None:
            self.session.join()
        if self.error:
            raise ValueError(self.error)
        rounds = list(self.session.rounds)
        token_ids = [token for r in rounds for token in r.committed]
        return Output(self.target.decode(token_ids), token_ids, rounds, sum(r.seconds for r in rounds))

    def close(self) -> None:
        """End the decoding and remove the widgets."""
        self.stop()
        super().close()

    @property
    def source(self) -> DraftSource:
        """The drafter, with copying if its box is ticked."""
        return ContextLookup(self.drafter) if self.copy.value else self.drafter

    def trace(self) -> Trace:
        """The last run as a trace. Raises ValueError if there is none."""
        if self.session is None or not self.session.rounds:
            raise ValueError("there is no run to save yet: press Run first")
        s, r = self.session, self.session.request
        return from_rounds(list(s.rounds), self.target, s.source, r.prompt, max_new_tokens=r.max_new_tokens, temperature=r.temperature)

    # ---- inside

    @property
    def _busy(self) -> bool:
        return self.session is not None and self.session.running

    def _start(self, *, stepping: bool = False, animated: bool = True) -> None:
        if self._check():
            return
        request, source = self.request, self.source
        name, values = self.controls.chosen()
        self.session = Session(
            self.target,
            source,
            request,
            partial(make_policy, name, values, lambda: sps_curve(self.target)),
            plain=self._recorded.get(request) if self.race.value else (),
            changed=self._changed,
            pause=lambda: SLOW if self.slow.value and animated else 0.0,
            stepping=stepping,
            animated=animated,
        )
        self._arm, self._block_size = name + "+copy" * (source is not self.drafter), source.block_size
        self.session.start()

    def _check(self, _change: object = None) -> bool:
        """Show why these settings cannot run; True if they cannot."""
        source = self.source
        self.controls.set_block_size(source.block_size)
        try:
            make_policy(*self.controls.chosen(), lambda: float).check(source.block_size, source.has_confidence)
        except ValueError as error:
            self.show_error(one_line(error))
            return True
        self.show_error("")
        return False

    def _changed(self, session: Session) -> None:
        """Called by the session's thread."""
        if session is not self.session:
            return
        if session.state == "failed":
            self.show_error(session.error)
        if session.rounds and session.plain:  # decoding starts only after a complete recording
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
            recording = state == "recording"
            self.show_state(state)
            shown = session.plain if recording else rounds
            self.text.value = streaming_text(shown, self._decode, ended=session.ended, judged=session.judged)
            seen = rounds if session.judged else rounds[:-1]
            self.numbers.value = numbers(tally(seen, () if recording else session.plain))
            self.heat.value = strips.heat(seen, self._block_size, self.colour.value, self._decode).svg()
            self.windows.value = strips.windows(seen, session.policy or FixedWindow(), self._block_size).svg()
            lanes = [("plain", list(session.plain)), (self._arm, seen)][: 1 if recording else 2]
            seconds, length = float("inf") if recording else session.seconds, session.request.max_new_tokens
            self.lanes.value = strips.race(lanes, seconds, length, ended=session.state in ("racing", "done")).svg() if session.plain else ""
            self._drawn = time.monotonic()

    def _connect(self) -> None:
        self.run_button.on_click(lambda _button: self.run())
        self.step_button.on_click(lambda _button: self.step())
        self.stop_button.on_click(lambda _button: self.stop())
        self.save_button.on_click(lambda _button: self.save())
        self.copy.observe(self._check, names="value")
        self.colour.observe(self._draw, names="value")
        self.box.observe(lambda change: self.stop() if change["new"] is None else None, names="comm")  # the page closed it
