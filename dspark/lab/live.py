"""The live panel: one instrument that replays a recorded text under any policy at once, and decodes a prompt of one's own."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import ClassVar

import ipywidgets as w
from IPython.display import HTML, display

from dspark.bench.trace import Trace, copies, prompt_of, record, shortened
from dspark.bench.traces import load_traces, save_traces
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.files import one_line
from dspark.lab.replaying import SAMPLE, examples, replayer, runs_over
from dspark.lab.rounds import CurveView, RoundsView, Run, deflated
from dspark.lab.session import Request, Session
from dspark.lab.text import remembered
from dspark.lab.widgets import PolicyControls, Settings, family
from dspark.round import Output, Round
from dspark.schedule import make_policy
from dspark.target.target import Target
from dspark.tune.profile import step_times

INTERVAL = 0.12  # seconds between two drawings; drawing more often would only slow the decoder
SLOW = 0.7  # seconds that slow motion shows each half of a round
WORDS = {"recording": "recording plain decoding for the race", "waiting": "waiting: Step for the next round, Run for the rest"}


class LivePanel(Settings):
    """Show it as the last value of a cell. To change a setting from code, set the ``value`` of the widget of that name.

    request: the prompt and the sampling to start with.
    policy: a name of :data:`dspark.schedule.POLICIES`, perhaps with numbers ("adaptive:0.6,0.3").
    copy: also draft by copying from the context.
    traces: a file of traces; their prompts are replayed at once, without a model.

    :meth:`attach` gives it the models; then Run decodes. A new panel closes the one before it, so running a cell again leaves no thread
    and no widgets. A model serves one thread at a time: call :meth:`stop` before using it elsewhere. Raises ValueError for an unknown
    policy; other errors are shown in the panel.
    """

    _latest: ClassVar[weakref.ref[LivePanel] | None] = None

    def __init__(self, request: Request, *, policy: str = "confidence:0.04", copy: bool = True, traces: str | Path = SAMPLE) -> None:
        super().__init__(request, copy)
        self.target: Target | None = None
        self.drafter: Drafter | None = None
        self.session: Session | None = None
        self.shown: Run | None = None
        self.error = ""
        self.view, self.curve = RoundsView(), CurveView()
        self.controls = PolicyControls(policy, self._settle)
        self._traces: dict[str, Trace] = {}  # by prompt
        self._recorded: dict[Request, tuple[Round, ...]] = {}  # plain decoding of the last prompt
        self._drawn, self._asked, self._curved = 0.0, None, None
        self._arrange()
        if before := LivePanel._latest and LivePanel._latest():
            before.close()
        LivePanel._latest = weakref.ref(self)
        self.path.value = str(traces)
        with self._errors(OSError):
            self._traces |= {prompt_of(trace): trace for _, trace in load_traces(traces)}
        self._list_examples()
        if not self.error:
            self._settle()

    def attach(self, target: Target, drafter: Drafter) -> None:
        """Give it the models."""
        self.stop()
        self.target, self.drafter, self._decode = target, drafter, remembered(target.decode)
        self.run_button.disabled = self.step_button.disabled = self.record_button.disabled = False
        self._settle()

    # ---- the buttons

    def run(self, *, stepping: bool = False, slow: bool = True) -> None:
        """Start, or go on after steps. stepping: for one round. slow: in slow motion, if its box is ticked."""
        if self.session is not None and self.session.is_alive():
            self.session.go(stepping)
            return
        self.say("")
        with self._errors():
            self._check()
            source, (request, name, values, _) = self.source, self._settings()
            make = partial(make_policy, name, values, lambda: step_times(self.target, source))
            plain = self._recorded.get(request) if self.race.value else ()
            options = {"changed": self._changed, "pause": lambda: SLOW if self.slow.value and slow else 0.0, "stepping": stepping}
            self.session = Session(self.target, source, request, make, plain=plain, **options)
            self._asked, self._arm = self._settings(), name + "+copy" * (source is not self.drafter)
            self.session.start()

    def step(self) -> None:
        """Decode one round; starts if nothing runs."""
        self.run(stepping=True)

    def stop(self) -> None:
        """End the decoding after the current round; the text so far stays."""
        if self.session is not None:
            self.session.stop()

    def record(self) -> None:
        """Record a greedy trace of the prompt, so that the sliders replay it at once."""
        self.stop()
        self.say("recording a trace: one round for each token")
        with self._errors(RuntimeError):
            self.offer(record(self.target, self.source, self.prompt.value, max_new_tokens=self.length.value))

    def load(self) -> None:
        """Replay the traces of the file in the box, the first of them now."""
        with self._errors(OSError):
            self.offer(*(trace for _, trace in load_traces(self.path.value)))

    def save(self) -> None:
        """Write the trace that is replayed to the file in the box."""
        with self._errors(OSError):
            if (trace := self.trace()) is None:
                raise ValueError("no trace of these settings: record one first")
            save_traces([trace], self.path.value)
            self.say(f"saved: {self.path.value}")

    # ---- for code

    def run_to_end(self) -> Output:
        """Run at full speed, wait for the end and return what was decoded. Raises ValueError with the error that the panel shows."""
        self.stop()
        self.run(slow=False)
        if self.session is not None:
            self.session.join()
        if self.error:
            raise ValueError(self.error)
        rounds = list(self.session.rounds)
        token_ids = [token for r in rounds for token in r.committed]
        return Output(self.target.decode(token_ids), token_ids, rounds, sum(r.seconds for r in rounds))

    def offer(self, *traces: Trace) -> None:
        """Add traces to the examples and replay the first."""
        self._traces |= {prompt_of(trace): trace for trace in traces}
        self._curved = None
        self._list_examples()
        self.choose(prompt_of(traces[0]))

    def choose(self, prompt: str) -> None:
        """Take a prompt; one with a trace brings the settings of its recording."""
        self.prompt.value = prompt
        if trace := self._traces.get(prompt):
            self.temperature.value, self.copy.value, limit = 0.0, copies(trace), int(trace.about["max_new_tokens"])
            self.length.max, self.length.value = max(self.length.max, limit), limit
        self._settle()

    def trace(self) -> Trace | None:
        """The trace of these settings, if there is one: greedy, of this prompt, with or without copying, and long enough."""
        trace = self._traces.get(self.prompt.value)
        if trace is None or self.temperature.value > 0 or self.copy.value != copies(trace):
            return None
        return shortened(trace, self.length.value)

    def close(self) -> None:
        """End the decoding and remove the widgets."""
        self.stop()
        for member in family(self.box):
            member.close()

    @property
    def source(self) -> DraftSource:
        """The drafter, with copying if its box is ticked."""
        return ContextLookup(self.drafter) if self.copy.value else self.drafter

    def say(self, words: str, error: bool = False) -> None:
        """Show one sentence, which a screen reader announces."""
        self.error = words if error else ""
        role, style = ("alert", "border-left:4px solid rgb(213,94,0);padding:.2em .6em;") if error else ("status", "")
        self.status.value = f'<div role="{role}" style="{style}line-height:1.4">{escape(words)}</div>'

    # ---- inside

    @contextmanager
    def _errors(self, *kinds: type[Exception]) -> Iterator[None]:
        """Errors of these kinds, and ValueError, become a sentence in the panel."""
        try:
            yield
        except (ValueError, *kinds) as error:
            self.say(one_line(error), error=True)

    def _ipython_display_(self) -> None:
        display(self.box)
        if self.shown:  # for pages without scripts; rounds.css hides it where the view runs
            display(HTML(f'<div class="dspark-still">{self.shown.html()}</div>'))

    def _settings(self, but: str = "") -> tuple[Request, str, dict[str, float], bool]:
        """What Run would decode. but: a slider to leave out."""
        name, values = self.controls.chosen()
        request = Request(self.prompt.value, self.length.value, self.temperature.value, self.top_p.value, self.seed.value)
        return request, name, {key: value for key, value in values.items() if key != but}, self.copy.value

    def _settle(self, _change: object = None) -> None:
        """Settings changed: replay them if there is a trace of them; else what is shown is stale until Run."""
        if self.session is not None and self.session.is_alive():
            return
        trace = self.trace()
        with self._errors():
            if trace is not None:
                self._replay(trace)
            else:
                self.say("these settings have not run: press Run")
                self._check()
        self.view.stale = self._asked != self._settings()
        self._draw_curve(trace)

    def _check(self) -> None:
        """Raises ValueError without models, or if the drafter cannot serve the policy."""
        if self.target is None:
            raise ValueError("no model yet: run the cell that loads the models")
        source = self.source
        self.controls.set_block_size(source.block_size)
        make_policy(*self.controls.chosen(), lambda: float).check(source.block_size, source.has_confidence)

    def _replay(self, trace: Trace) -> None:
        self.controls.set_block_size(int(trace.about["block_size"]))
        run = replayer(trace)(*self.controls.chosen())
        self._asked = self._settings()
        self.view.slider = self.controls.sliders.get(self.controls.moved)  # pictures of another one no longer hold
        self._draw(run)
        other = self.target is not None and trace.about["target_digest"] != self.target.digest
        self.say(f"replayed from a trace of {trace.about['target']}" + ", not of the model that Run uses" * other)

    def _changed(self, session: Session) -> None:
        """Called by the session's thread."""
        if session is not self.session:
            return
        state, plain = session.state, list(session.plain)
        if session.rounds and plain:  # decoding starts only after a complete recording
            self._recorded = {session.request: tuple(plain)}
        rests = session.ended or state == "waiting" or not session.judged
        if not rests and time.monotonic() - self._drawn < INTERVAL:
            return
        self.say(session.error or WORDS.get(state, state), error=state == "failed")
        self.run_button.disabled, self.stop_button.disabled = state in ("recording", "decoding"), session.ended
        rounds, lane, arm = (plain, (), "plain") if state == "recording" else (list(session.rounds), plain, self._arm)
        end = {"ended": session.ended, "judged": session.judged}
        if rounds:
            self._draw(Run(rounds=rounds, plain=lane, arm=arm, tokens=session.request.max_new_tokens, decode=self._decode, **end))
        elif session.ended:
            self._asked = None  # what is shown is of other settings and stays, grey
        self.view.stale = not rounds or (session.ended and self._asked != self._settings())
        self._drawn = time.monotonic()

    def _draw(self, run: Run) -> None:
        self.shown = run
        with self.view.hold_sync():
            self.view.html, self.view.details = run.html(), run.details()

    def _draw_curve(self, trace: Trace | None) -> None:
        """Speed-up, τ and the picture at every place of the slider that was moved last."""
        name = self.controls.moved
        slider = self.controls.sliders.get(name) if trace is not None else None
        over = slider, slider and slider.options, self._settings(name)
        if over == self._curved or (self.error and slider):
            return
        _, places, (_, kind, others, _) = self._curved = over
        runs = runs_over(places, replayer(trace), kind, others, name) if slider else []
        tallies = [run and run.tally() for run in runs]
        lines = {"speed-up": [t and t.speedup for t in tallies], "τ": [t and t.tokens_per_round for t in tallies]}
        with self.curve.hold_sync(), self.view.hold_sync():
            self.curve.slider, self.curve.lines = slider, lines if slider else {}
            self.view.slider, self.view.pictures = slider, deflated(runs) if slider else b""

    def _list_examples(self, _change: object = None) -> None:
        self.examples.options = offered = [("own prompt", ""), *examples(self._traces)]
        self.examples.value = self.prompt.value if self.prompt.value in dict(offered).values() else ""

    def _arrange(self) -> None:
        buttons = w.HBox([self.run_button, self.step_button, self.stop_button])
        settings = [self.examples, self.prompt, self.controls.box, self.curve, self.temperature, buttons]
        left = w.VBox([*settings, self.status, self.more, self.rest])
        self.box = w.HBox([left, self.view])
        for part, name in ((left, "dspark-controls"), (self.view, "dspark-view"), (self.box, "dspark-panel")):
            part.add_class(name)  # see rounds.css
        for name in ("run", "step", "stop", "record", "load", "save"):
            getattr(self, f"{name}_button").on_click(lambda _button, name=name: getattr(self, name)())
        for widget in (self.prompt, self.length, self.temperature, self.top_p, self.seed, self.copy):
            widget.observe(self._settle, names="value")
        self.prompt.observe(self._list_examples, names="value")
        self.examples.observe(lambda change: change["new"] in ("", self.prompt.value) or self.choose(change["new"]), names="value")
        self.box.observe(lambda change: self.stop() if change["new"] is None else None, names="comm")  # the page closed it
