"""The live panel: decode a prompt under any policy and watch the text, the heatmap, the window and the race against plain decoding."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from typing import ClassVar

import ipywidgets as w

from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.files import one_line
from dspark.lab.session import Request, Session
from dspark.lab.text import remembered, streaming_text
from dspark.lab.widgets import Panel, column, labelled, row
from dspark.round import Output, Round
from dspark.schedule import make_policy
from dspark.target.target import Target
from dspark.tune.profile import step_times

INTERVAL = 0.12  # seconds between two drawings; drawing more often would only slow the decoder
SLOW = 0.7  # seconds that slow motion shows each half of a round
WORDS = {  # state of a session → status line
    "": "ready: press Run",
    "recording": "recording plain decoding for the race",
    "decoding": "decoding",
    "waiting": "waiting: Step for the next round, Run for the rest",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}


class LivePanel(Panel):
    """Show it as the last value of a cell. To change a setting from code, set the ``value`` of the widget of that name.

    request: the prompt and the sampling to start with.
    policy: a name of :data:`dspark.schedule.POLICIES`, perhaps with numbers ("adaptive:0.6,0.3").
    copy: also draft by copying from the context.

    A new panel closes the one before it, so running a cell again leaves no thread and no widgets. A model serves one thread at a
    time: call :meth:`stop` before using it elsewhere. Raises ValueError for an unknown policy.
    """

    _latest: ClassVar[weakref.ref[LivePanel] | None] = None

    def __init__(self, target: Target, drafter: Drafter, request: Request, *, policy: str = "prefix", copy: bool = True) -> None:
        self.target, self.drafter = target, drafter
        self.session: Session | None = None
        self.decode, self._lock, self._drawn = remembered(target.decode), threading.Lock(), 0.0
        self._recorded: dict[Request, tuple[Round, ...]] = {}  # plain decoding of the last prompt
        super().__init__(policy, self._check)
        self._make(request, copy)
        before = LivePanel._latest and LivePanel._latest()
        if before is not None:
            before.close()
        LivePanel._latest = weakref.ref(self)
        self._check()
        self._show()

    # ---- the buttons

    def run(self) -> None:
        """Start, or go on after steps."""
        if self.session is None or not self.session.running:
            self._start()
        elif self.session.state == "waiting":
            self.session.go_on()

    def step(self) -> None:
        """Decode one round; starts if nothing runs."""
        if self.session is None or not self.session.running:
            self._start(stepping=True)
        else:
            self.session.step()

    def stop(self) -> None:
        """End the decoding after the current round; the text so far stays."""
        if self.session is not None:
            self.session.stop()

    # ---- for code

    def run_to_end(self) -> Output:
        """Run at full speed, wait for the end and return what was decoded. Raises ValueError with the error that the panel shows."""
        self.stop()
        self._start(slow=False)
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

    # ---- inside

    def _start(self, *, stepping: bool = False, slow: bool = True) -> None:
        if self._check():
            return
        request = Request(self.prompt.value, self.length.value, self.temperature.value, self.top_p.value, self.seed.value)
        source, (name, values) = self.source, self.controls.chosen()
        self.session = Session(
            self.target,
            source,
            request,
            partial(make_policy, name, values, lambda: step_times(self.target, source)),
            plain=self._recorded.get(request) if self.race.value else (),
            changed=self._changed,
            pause=lambda: SLOW if self.slow.value and slow else 0.0,
            stepping=stepping,
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
            self._recorded = {session.request: tuple(session.plain)}
        if session.ended or session.state == "waiting" or not session.judged or time.monotonic() - self._drawn >= INTERVAL:
            self._show()

    def _show(self, _change: object = None) -> None:
        with self._lock:
            session = self.session
            state = session.state if session else ""
            self.status.value = f'<span role="status">{WORDS[state]}</span>'
            self.run_button.disabled = state in ("recording", "decoding")
            self.stop_button.disabled = state in ("", "done", "stopped", "failed")
            if session is None:
                return
            rounds, plain = list(session.rounds), list(session.plain)
            shown = plain if state == "recording" else rounds
            self.text.value = streaming_text(shown, self.decode, ended=session.ended, judged=session.judged)
            seen = rounds if session.judged else rounds[:-1]
            self.draw(seen, plain, self._arm, self._block_size, session.request.max_new_tokens)
            self._drawn = time.monotonic()

    def _make(self, request: Request, copy: bool) -> None:
        """Every widget is an attribute."""
        late, part = partial(labelled, continuous_update=False), {"step": 0.05, "continuous_update": False}
        self.prompt = late(w.Textarea, request.prompt, "prompt", "The question to the model, one user turn", rows=3)
        longest, tooltip = max(512, request.max_new_tokens), "Upper limit of the text's length"
        self.length = late(w.IntSlider, request.max_new_tokens, "new tokens", tooltip, min=8, max=longest)
        tooltip = "0 is greedy: always the most likely token"
        self.temperature = labelled(w.FloatSlider, request.temperature, "temperature", tooltip, min=0, max=2, **part)
        tooltip = "Sample from the most likely tokens with this total probability"
        self.top_p = labelled(w.FloatSlider, request.top_p, "top-p", tooltip, min=0.05, max=1, **part)
        tooltip = "Of the sampled tokens: the same seed gives the same text"
        self.seed = labelled(w.BoundedIntText, request.seed, "seed", tooltip, min=0, max=2**31 - 1)
        tick, button = partial(w.Checkbox, indent=False), w.Button
        tooltip = "Where the text repeats itself, draft what followed the last time"
        self.copy = tick(copy, description="copy from the context", tooltip=tooltip)
        tooltip = "Plain decoding is recorded once per prompt and replayed in real time"
        self.race = tick(True, description="race plain decoding", tooltip=tooltip)
        tooltip = "Show every round twice: the drafts alone, then the target's verdict"
        self.slow = tick(False, description="slow motion", tooltip=tooltip)
        self.run_button = button(description="Run", icon="play", button_style="primary", tooltip="Decode to the end")
        self.step_button = button(description="Step", icon="step-forward", tooltip="Decode one round and wait")
        self.stop_button = button(description="Stop", icon="stop", tooltip="Stop after the current round")
        self.status = w.HTML()
        drafting = column([self.controls.box, self.copy, self.race, self.slow], 280)
        sampling = column([self.length, self.temperature, self.top_p, self.seed], 280)
        buttons = row([self.run_button, self.step_button, self.stop_button])
        words = column([self.status, self.numbers, self.text], 380)
        self.box = w.VBox([self.prompt, row([drafting, sampling]), buttons, self.message, row([words, self.pictures])])
        self.run_button.on_click(lambda _button: self.run())
        self.step_button.on_click(lambda _button: self.step())
        self.stop_button.on_click(lambda _button: self.stop())
        self.copy.observe(self._check, names="value")
        self.colour.observe(self._show, names="value")
        self.box.observe(lambda change: self.stop() if change["new"] is None else None, names="comm")  # the page closed it
