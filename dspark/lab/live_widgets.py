"""The widgets of the live panel: labels, tooltips, ranges and layout. What they do when moved is in :mod:`dspark.lab.live`."""

from __future__ import annotations

from functools import partial

import ipywidgets as w

from dspark.files import data_dir
from dspark.lab.controls import STYLE, Panel, PolicyControls, column, heat_colours, row, short
from dspark.lab.session import Request

EXAMPLES = (
    "Write a Python class for a bank account with deposit, withdraw and balance methods.",
    "A train ticket costs 12 dollars and children pay half. What do two adults and three children pay? Explain step by step.",
    "Explain in simple words why leaves change colour in autumn.",
    "Write a JSON array of four fruits, each with the keys name, colour and season.",
    "Translate into Chinese and Japanese, with an emoji after each: good morning, thank you, see you tomorrow.",
)
WORDS = {  # state of a session → status line
    "": "ready: press Run",
    "recording": "recording plain decoding for the race",
    "decoding": "decoding",
    "waiting": "waiting: Step for the next round, Run for the rest",
    "racing": "done; plain decoding is still running",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}


class LiveWidgets(Panel):
    """Every widget is an attribute.

    controls: of the policy · request: initial prompt and sampling · copy: initial value of its box.
    """

    def __init__(self, controls: PolicyControls, request: Request, copy: bool) -> None:
        self.controls = controls
        self._make_inputs(request, copy)
        self._make_outputs()
        self.example.observe(self._take_example, names="value")

    @property
    def request(self) -> Request:
        """The prompt and the sampling that the widgets show."""
        return Request(self.prompt.value, self.length.value, self.temperature.value, self.top_p.value, self.seed.value)

    def show_state(self, state: str) -> None:
        """Status line and buttons for a session's state; "" before the first session."""
        self.status.value = f'<span role="status">{WORDS[state]}</span>'
        self.run_button.disabled = state in ("recording", "decoding", "racing")
        self.stop_button.disabled = state in ("", "done", "stopped", "failed")

    def picture(self) -> str:
        """The outputs as plain HTML, for notebooks that run in batch."""
        return "".join(part.value for part in (self.numbers, self.text, self.heat, self.windows, self.lanes))

    def _make_inputs(self, request: Request, copy: bool) -> None:
        shared = {"style": STYLE, "layout": w.Layout(width="auto")}  # the whole line without its margins
        late = shared | {"continuous_update": False}
        real, tick, button = partial(w.FloatSlider, step=0.05, **late), partial(w.Checkbox, indent=False), w.Button
        choices = [("choose an example", "")] + [(short(e), e) for e in EXAMPLES]
        self.example = w.Dropdown(options=choices, description="examples", tooltip="Copies a prompt into the box below", **shared)
        self.prompt = w.Textarea(request.prompt, description="prompt", tooltip="The question to the model, one user turn", rows=3, **late)
        longest, tooltip = max(512, request.max_new_tokens), "Upper limit of the text's length"
        self.length = w.IntSlider(request.max_new_tokens, 8, longest, description="new tokens", tooltip=tooltip, **late)
        tooltip = "0 is greedy: always the most likely token"
        self.temperature = real(request.temperature, min=0, max=2, description="temperature", tooltip=tooltip)
        tooltip = "Sample from the most likely tokens with this total probability"
        self.top_p = real(request.top_p, min=0.05, max=1, description="top-p", tooltip=tooltip)
        tooltip = "Of the sampled tokens: the same seed gives the same text"
        self.seed = w.BoundedIntText(request.seed, 0, 2**31 - 1, description="seed", tooltip=tooltip, **shared)
        tooltip = "Where the text repeats itself, draft what followed the last time"
        self.copy = tick(copy, description="copy from the context", tooltip=tooltip)
        tooltip = "Plain decoding is recorded once per prompt and replayed in real time"
        self.race = tick(True, description="race plain decoding", tooltip=tooltip)
        tooltip = "Show every round twice: the drafts alone, then the target's verdict"
        self.slow = tick(False, description="slow motion", tooltip=tooltip)
        self.colour = heat_colours()
        self.run_button = button(description="Run", icon="play", button_style="primary", tooltip="Decode to the end")
        self.step_button = button(description="Step", icon="step-forward", tooltip="Decode one round and wait")
        self.stop_button = button(description="Stop", icon="stop", tooltip="Stop after the current round")
        path, tooltip = str(data_dir().parent / "runs" / "live.parquet"), "Where Save writes the run, for the replay panel"
        self.path = w.Text(path, description="trace file", tooltip=tooltip, style=STYLE, layout=w.Layout(flex="1 1 300px"))
        self.save_button = button(description="Save", icon="save", tooltip="Save the last run as a trace")

    def _make_outputs(self) -> None:
        self.message, self.status, self.numbers, self.text, self.heat, self.windows, self.lanes = (w.HTML() for _ in range(7))
        drafting = column([self.controls.box, self.copy, self.race, self.slow], 280)
        sampling = column([self.length, self.temperature, self.top_p, self.seed], 280)
        buttons = row([self.run_button, self.step_button, self.stop_button])
        words = column([self.status, self.numbers, self.text], 380)
        pictures = column([self.lanes, self.colour, self.heat, self.windows], 480)
        saving = row([self.path, self.save_button])
        parts = [self.example, self.prompt, row([drafting, sampling]), buttons, self.message, row([words, pictures]), saving]
        self.box = w.VBox(parts)

    def _take_example(self, change: dict[str, object]) -> None:
        if change["new"]:
            self.prompt.value = change["new"]
