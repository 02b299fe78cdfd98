"""The live panel: a prompt, a policy, Run, Step and Stop; the text, the heatmap, the window and the race while they happen.

It only wires: decoding is :mod:`dspark.lab.session`, text and pictures are the pure :mod:`dspark.lab.text` and
:mod:`dspark.lab.strips`. Everything is drawn into HTML widgets, at most every ``INTERVAL`` seconds.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import ClassVar

import ipywidgets as w

from dspark.bench.prompts import data_dir
from dspark.decode import DraftSource, Output, Round
from dspark.draft import Drafter
from dspark.lab import strips
from dspark.lab.controls import STYLE, PolicyControls, alert, column, family, heat_colours, policy_of, row, short
from dspark.lab.session import Request, Session, one_sentence
from dspark.lab.text import numbers, remembered, streaming_text, tally
from dspark.lookup import ContextLookup
from dspark.profile import sps_curve
from dspark.schedule import FixedWindow
from dspark.target import Target
from dspark.trace import Trace, from_rounds
from dspark.trace_file import save_trace

EXAMPLES = (
    "Write a Python class for a bank account with deposit, withdraw and balance methods.",
    "A train ticket costs 12 dollars and children pay half. What do two adults and three children pay? Explain step by step.",
    "Explain in simple words why leaves change colour in autumn.",
    "Write a JSON array of four fruits, each with the keys name, colour and season.",
    "Translate into Chinese and Japanese, with an emoji behind each: good morning, thank you, see you tomorrow.",
)
INTERVAL = 0.12  # seconds between two drawings: quicker than that nobody reads, and the decoder wants the processor
SLOW = 0.7  # seconds that slow motion shows each half of a round
KEPT = 8  # recordings of plain decoding
WORDS = {
    "recording": "decoding plainly first, for the race",
    "decoding": "decoding",
    "waiting": "waiting: Step for the next round, Run for the rest",
    "racing": "done; plain decoding is still on its way",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}


class LivePanel:
    """Show it as the last value of a cell. Its settings are the attributes that hold widgets; setting their ``value`` is as good as
    a hand on them.

    policy: a name of :data:`dspark.lab.controls.KINDS` · copy: also draft by copying from the context · thresholds: starting values
    of the policy's sliders (window, threshold, widen, narrow, fallback). A new panel closes the one before it, so a cell that is run
    again leaves no decoding and no widgets behind. A model serves one thread at a time: :meth:`stop` before using it elsewhere.
    Raises ValueError for an unknown policy.
    """

    _latest: ClassVar[weakref.ref[LivePanel] | None] = None

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        prompt: str = EXAMPLES[0],
        examples: Sequence[str] = EXAMPLES,
        policy: str = "fixed",
        copy: bool = False,
        request: Request | None = None,
        **thresholds: float,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.session: Session | None = None
        self._decode, self._lock, self._drawn = remembered(target.decode), threading.Lock(), 0.0
        self._recorded: dict[Request, tuple[Round, ...]] = {}
        request = request or Request(prompt)
        self._make_inputs(prompt, examples, copy, request)
        self.controls = PolicyControls(policy, self.source.block_size, self._check, **thresholds)
        self._make_outputs()
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
        if self.message.value:
            raise ValueError(self._told)
        rounds = list(self.session.rounds)
        token_ids = [token for r in rounds for token in r.committed]
        return Output(self.target.decode(token_ids), token_ids, rounds, sum(r.seconds for r in rounds))

    def close(self) -> None:
        """End the decoding and remove the widgets."""
        self.stop()
        for widget in family(self.box):
            widget.close()

    # ---- what it stands on

    @property
    def source(self) -> DraftSource:
        """Who drafts: the drafter, or the drafter and copying."""
        return ContextLookup(self.drafter, phrases=self.drafter.phrases) if self.copy.value else self.drafter

    @property
    def request(self) -> Request:
        """As the widgets stand."""
        return Request(self.prompt.value, self.length.value, self.temperature.value, self.top_p.value, self.seed.value)

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
            self._tell(one_sentence(error))
        else:
            self.status.value = f'<span role="status">saved: {escape(self.path.value)}</span>'

    def picture(self) -> str:
        """All of it as HTML that needs no widgets: for a notebook that runs in batch."""
        return "".join(part.value for part in (self.numbers, self.text, self.heat, self.windows, self.lanes))

    def _start(self, *, stepping: bool = False, animated: bool = True) -> None:
        self._tell("")
        if self._check():
            return
        request, (kind, values), source = self.request, self.controls.chosen(), self.source
        plain = self._recorded.get(request) if self.race.value else ()
        self.session = Session(
            self.target,
            source,
            request,
            partial(policy_of, kind, values, lambda: sps_curve(self.target)),
            plain=plain,
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
        try:
            policy_of(*self.controls.chosen(), lambda: float).check(source.block_size, source.has_confidence)
        except ValueError as error:
            self._tell(one_sentence(error))
            return True
        self._tell("")
        return False

    def _tell(self, sentence: str) -> None:
        self._told = sentence
        self.message.value = alert(sentence)

    # ---- drawing

    def _changed(self, session: Session) -> None:
        """Called by the session's thread."""
        if session is not self.session:
            return
        if session.state == "failed":
            self._tell(session.error)
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
            rounds = list(session.rounds) if session else []
            state = session.state if session else ""
            finishing = session is not None and state in ("done", "stopped", "failed")
            ended = session is None or session.ended
            self.status.value = f'<span role="status">{WORDS.get(state, "ready: press Run")}</span>'
            for button, off in (
                (self.run_button, not finishing and state not in ("", "waiting")),
                (self.stop_button, finishing or not state),
            ):
                button.disabled = off
            if session is None:
                return
            alternatives = dict(session.alternatives)
            if state == "recording":
                self.text.value = streaming_text(session.plain, self._decode, ended=False)
            else:
                self.text.value = streaming_text(rounds, self._decode, ended=ended, judged=session.judged, alternatives=alternatives)
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

    # ---- widgets

    def _make_inputs(self, prompt: str, examples: Sequence[str], copy: bool, request: Request) -> None:
        wide = w.Layout(width="auto")  # the whole line less its margins
        shared = {"style": STYLE, "layout": wide}
        late = shared | {"continuous_update": False}
        self.example = w.Dropdown(
            options=[("choose an example", "")] + [(short(e), e) for e in examples],
            description="examples",
            tooltip="Puts one of these prompts into the box below",
            **shared,
        )
        self.prompt = w.Textarea(prompt, description="prompt", tooltip="What the model is asked, as one user turn", rows=3, **late)
        self.copy = w.Checkbox(
            copy,
            description="also draft by copying",
            tooltip="Where the text repeats itself, what followed there is the draft",
            indent=False,
        )
        self.length = w.IntSlider(
            request.max_new_tokens,
            8,
            max(512, request.max_new_tokens),
            description="new tokens",
            tooltip="The text is cut behind so many tokens",
            **late,
        )
        self.temperature = w.FloatSlider(
            request.temperature,
            min=0,
            max=2,
            step=0.05,
            description="temperature",
            tooltip="0 is greedy: the likeliest token always",
            **late,
        )
        self.top_p = w.FloatSlider(
            request.top_p,
            min=0.05,
            max=1,
            step=0.05,
            description="top-p",
            tooltip="Sampling keeps the likeliest tokens up to this mass",
            **late,
        )
        self.seed = w.BoundedIntText(
            request.seed, 0, 2**31 - 1, description="seed", tooltip="Of the sampled tokens: the same seed, the same text", **shared
        )
        self.race = w.Checkbox(
            True,
            description="race plain decoding",
            tooltip="Plain decoding is recorded once for each prompt and replayed in true time",
            indent=False,
        )
        self.slow = w.Checkbox(
            False, description="slow motion", tooltip="Shows each round twice: the drafts as they wait, then the verdict", indent=False
        )
        self.colour = heat_colours()
        self.run_button = w.Button(description="Run", icon="play", button_style="primary", tooltip="Decode to the end")
        self.step_button = w.Button(description="Step", icon="step-forward", tooltip="Decode one round and wait")
        self.stop_button = w.Button(description="Stop", icon="stop", tooltip="End the decoding behind the current round")
        self.path = w.Text(
            str(data_dir().parent / "runs" / "live.parquet"),
            description="trace file",
            tooltip="Where Save keeps the run, for the replay panel",
            style=STYLE,
            layout=w.Layout(flex="1 1 300px"),
        )
        self.save_button = w.Button(description="Save", icon="save", tooltip="Keep the last run as a trace")
        self.message = w.HTML()

    def _make_outputs(self) -> None:
        self.status, self.numbers, self.text, self.heat, self.windows, self.lanes = (w.HTML() for _ in range(6))
        buttons = row([self.run_button, self.step_button, self.stop_button])
        drafting = column([self.controls.box, self.copy, self.race, self.slow], 280)
        sampling = column([self.length, self.temperature, self.top_p, self.seed], 280)
        words = column([self.status, self.numbers, self.text], 380)
        pictures = column([self.lanes, self.colour, self.heat, self.windows], 480)
        self.box = w.VBox(
            [
                self.example,
                self.prompt,
                row([drafting, sampling]),
                buttons,
                self.message,
                row([words, pictures]),
                row([self.path, self.save_button]),
            ]
        )

    def _wire(self) -> None:
        self.run_button.on_click(lambda _button: self.run())
        self.step_button.on_click(lambda _button: self.step())
        self.stop_button.on_click(lambda _button: self.stop())
        self.save_button.on_click(lambda _button: self.save())
        self.example.observe(self._take_example, names="value")
        self.copy.observe(self._check, names="value")
        self.colour.observe(self._draw, names="value")
        self.box.observe(lambda change: self.stop() if change["new"] is None else None, names="comm")  # the page closed it

    def _take_example(self, change: dict[str, object]) -> None:
        if change["new"]:
            self.prompt.value = change["new"]

    def _repr_mimebundle_(self, **options: object) -> object:
        return self.box._repr_mimebundle_(**options)


def _whole(rounds: Sequence[Round], request: Request, target: Target) -> bool:
    """Whether the text came to its end, so that it can stand for the next race."""
    tokens = sum(len(r.committed) for r in rounds)
    return tokens >= request.max_new_tokens or rounds[-1].committed[-1] in target.eos_token_ids
