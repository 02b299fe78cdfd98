"""The widgets of the live panel: what each is called, what it tells who hovers over it, where it starts, and what the panel says.

What happens when one of them is moved is :mod:`dspark.lab.live`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape

import ipywidgets as w

from dspark.bench.prompts import data_dir
from dspark.lab.controls import STYLE, PolicyControls, alert, column, family, heat_colours, row, short
from dspark.lab.session import Request

EXAMPLES = (
    "Write a Python class for a bank account with deposit, withdraw and balance methods.",
    "A train ticket costs 12 dollars and children pay half. What do two adults and three children pay? Explain step by step.",
    "Explain in simple words why leaves change colour in autumn.",
    "Write a JSON array of four fruits, each with the keys name, colour and season.",
    "Translate into Chinese and Japanese, with an emoji behind each: good morning, thank you, see you tomorrow.",
)
WORDS = {
    "recording": "decoding plainly first, for the race",
    "decoding": "decoding",
    "waiting": "waiting: Step for the next round, Run for the rest",
    "racing": "done; plain decoding is still on its way",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
}


class LiveWidgets:
    """Every widget is an attribute, ``box`` shows them all; ``told`` is the sentence that stands in the panel, "" for none.

    controls: the policy's · request: what the prompt and the sampling start with · examples: prompts to choose from · copy,
    siblings: whether these start ticked.
    """

    def __init__(self, controls: PolicyControls, request: Request, examples: Sequence[str], copy: bool, siblings: bool) -> None:
        self.controls = controls
        self._make_inputs(request, examples, copy, siblings)
        self._make_outputs()
        self.example.observe(self._take_example, names="value")
        self.tell("")

    @property
    def request(self) -> Request:
        """As the widgets stand."""
        return Request(self.prompt.value, self.length.value, self.temperature.value, self.top_p.value, self.seed.value)

    def tell(self, sentence: str) -> None:
        """What went wrong; "" takes it away."""
        self.told = sentence
        self.message.value = alert(sentence)

    def say(self, words: str) -> None:
        """The status line, which a screen reader reads out."""
        self.status.value = f'<span role="status">{escape(words)}</span>'

    def show_state(self, state: str) -> None:
        """state: of a :class:`~dspark.lab.session.Session`, "" where none was started."""
        self.say(WORDS.get(state, "ready: press Run"))
        self.run_button.disabled = state in ("recording", "decoding", "racing")
        self.stop_button.disabled = state in ("", "done", "stopped", "failed")

    def picture(self) -> str:
        """All of it as HTML that needs no widgets: for a notebook that runs in batch."""
        return "".join(part.value for part in (self.numbers, self.text, self.heat, self.windows, self.lanes))

    def close(self) -> None:
        """Remove the widgets."""
        for widget in family(self.box):
            widget.close()

    def _make_inputs(self, request: Request, examples: Sequence[str], copy: bool, siblings: bool) -> None:
        shared = {"style": STYLE, "layout": w.Layout(width="auto")}  # the whole line less its margins
        late = shared | {"continuous_update": False}
        self.example = w.Dropdown(
            options=[("choose an example", "")] + [(short(e), e) for e in examples],
            description="examples",
            tooltip="Puts one of these prompts into the box below",
            **shared,
        )
        self.prompt = w.Textarea(request.prompt, description="prompt", tooltip="What the model is asked, as one user turn", rows=3, **late)
        self.length = w.IntSlider(
            request.max_new_tokens,
            8,
            max(512, request.max_new_tokens),
            description="new tokens",
            tooltip="The text is cut behind so many tokens",
            **late,
        )
        slider = partial(w.FloatSlider, step=0.05, **late)
        self.temperature = slider(
            request.temperature, min=0, max=2, description="temperature", tooltip="0 is greedy: the likeliest token always"
        )
        self.top_p = slider(
            request.top_p, min=0.05, max=1, description="top-p", tooltip="Sampling keeps the likeliest tokens up to this mass"
        )
        self.seed = w.BoundedIntText(
            request.seed, 0, 2**31 - 1, description="seed", tooltip="Of the sampled tokens: the same seed, the same text", **shared
        )
        self.copy = _tick("also draft by copying", "Where the text repeats itself, what followed there is the draft", copy)
        self.siblings = _tick(
            "siblings", "Second guesses in the same pass: for the prefix scheduler, if the model sees tokens beside each other", siblings
        )
        self.race = _tick("race plain decoding", "Plain decoding is recorded once for each prompt and replayed in true time", True)
        self.slow = _tick("slow motion", "Shows each round twice: the drafts as they wait, then the verdict")
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

    def _make_outputs(self) -> None:
        self.message, self.status, self.numbers, self.text, self.heat, self.windows, self.lanes = (w.HTML() for _ in range(7))
        drafting = column([self.controls.box, self.siblings, self.copy, self.race, self.slow], 280)
        sampling = column([self.length, self.temperature, self.top_p, self.seed], 280)
        words = column([self.status, self.numbers, self.text], 380)
        pictures = column([self.lanes, self.colour, self.heat, self.windows], 480)
        self.box = w.VBox(
            [
                self.example,
                self.prompt,
                row([drafting, sampling]),
                row([self.run_button, self.step_button, self.stop_button]),
                self.message,
                row([words, pictures]),
                row([self.path, self.save_button]),
            ]
        )

    def _take_example(self, change: dict[str, object]) -> None:
        if change["new"]:
            self.prompt.value = change["new"]

    def _repr_mimebundle_(self, **options: object) -> object:
        return self.box._repr_mimebundle_(**options)


def _tick(label: str, tooltip: str, value: bool = False) -> w.Checkbox:
    return w.Checkbox(value, description=label, tooltip=tooltip, indent=False)
