"""The replay panel: a trace under sliders. Windows, checks in vain, τ and the predicted speed-up of any policy, without a model.

Every move of a slider replays the whole text (:mod:`dspark.bench.replay`, milliseconds) and draws it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import ipywidgets as w

from dspark.bench.prompts import data_dir
from dspark.bench.replay import replay
from dspark.bench.trace import LONGEST_CHARACTER, Trace
from dspark.bench.trace_file import load_traces, save_trace
from dspark.decode import Round
from dspark.lab import strips
from dspark.lab.controls import STYLE, PolicyControls, alert, column, family, heat_colours, policy_of, row, short
from dspark.lab.figures import Decode
from dspark.lab.session import one_sentence
from dspark.lab.text import Tally, numbers, remembered, streaming_text, tally
from dspark.schedule import Autoregressive


def sample_traces() -> Path:
    """The folder of the traces that come with the package."""
    return data_dir() / "results" / "traces"


def trace_decode(trace: Trace) -> Decode:
    """Token ids → text from the pieces that the trace keeps, so that no tokenizer is needed."""
    pieces = {(token,): text for token, text in trace.about["pieces"].items()}
    pieces |= {tuple(group): text for group, text in trace.about.get("characters", ())}

    def decode(token_ids: Sequence[int]) -> str:
        text, rest = "", tuple(token_ids)
        while rest:
            count = next((n for n in range(LONGEST_CHARACTER, 0, -1) if rest[:n] in pieces), 1)
            text, rest = text + pieces.get(rest[:count], f"⟨{rest[0]}⟩"), rest[count:]
        return text

    return decode


class ReplayPanel:
    """Show it as the last value of a cell. trace: what to replay, or a file of traces; default the sample that is shipped.

    policy and thresholds: where the widgets start, as in :class:`dspark.lab.live.LivePanel`. decode: token ids → text, default the
    trace's own pieces. Raises ValueError for an unknown policy; what is wrong with a file or a setting is told in the panel.
    """

    def __init__(
        self, trace: Trace | str | Path | None = None, *, policy: str = "confidence", decode: Decode | None = None, **thresholds: float
    ) -> None:
        self.trace: Trace | None = None
        self.rounds: list[Round] = []
        self.plain: list[Round] = []
        self._decode, self._given_decode, self._loaded = None, decode, []
        self._filling = False
        self._make(policy, thresholds)
        if isinstance(trace, Trace):
            self.show(trace)
        else:
            self.path.value = str(trace or sample_traces() / "sample.parquet")
            self.load()

    def show(self, trace: Trace) -> None:
        """Replay this trace from now on."""
        self._loaded = [trace]
        self._offer()

    def load(self) -> None:
        """The Load button: every trace of the file whose path stands in the box."""
        try:
            self._loaded = [found for _, found in load_traces(self.path.value)]
        except (ValueError, OSError) as error:
            self.message.value = alert(one_sentence(error))
            return
        self._offer()

    def save(self) -> None:
        """The Save button: this trace into the file whose path stands in the box."""
        try:
            save_trace(self.trace, self.path.value)
            self.message.value = f'<span role="status">saved: {escape(self.path.value)}</span>'
        except (ValueError, OSError) as error:
            self.message.value = alert(one_sentence(error))

    def tally(self) -> Tally:
        """What the policy would have come to; seconds follow from the trace's measured step times."""
        return tally(self.rounds, self.plain)

    def picture(self) -> str:
        """All of it as HTML that needs no widgets: for a notebook that runs in batch."""
        return "".join(part.value for part in (self.about, self.numbers, self.lanes, self.heat, self.windows, self.text))

    def close(self) -> None:
        """Remove the widgets."""
        for widget in family(self.box):
            widget.close()

    def _offer(self) -> None:
        """Fill the list of traces and take the first."""
        self._filling = True
        self.which.options = [(short(prompt_of(trace)), i) for i, trace in enumerate(self._loaded)]
        self.which.value = 0
        self._filling = False
        self._take()

    def _take(self, _change: object = None) -> None:
        """Another trace of the file."""
        if self._filling:
            return
        self.trace = trace = self._loaded[self.which.value]
        self._decode = remembered(self._given_decode or trace_decode(trace))
        self.plain = replay(trace, Autoregressive())
        self.controls.widest(int(trace.about["block_size"]))
        a = trace.about
        self.about.value = (
            f'<div style="font-size:12px">{escape(prompt_of(trace))}<br>{escape(str(a["target"]))}, drafter {escape(str(a["drafter"]))}, '
            f"{len(trace.token_ids)} tokens{'' if trace.complete else ', a live run: estimates only'}</div>"
        )
        self._move()

    def _move(self, _change: object = None) -> None:
        """A widget moved: replay and draw."""
        if self.trace is None:
            return
        block_size = int(self.trace.about["block_size"])
        try:
            policy = policy_of(*self.controls.chosen(), lambda: self.trace.times.sps)
            self.rounds = replay(self.trace, policy)
        except ValueError as error:
            self.message.value = alert(one_sentence(error))
            return
        self.message.value = ""
        lanes = {"plain decoding": self.plain, "this policy": self.rounds}
        self.numbers.value = numbers(self.tally(), "predicted from measured step times, n = 1 prompt")
        self.lanes.value = strips.race(lanes, float("inf"), len(self.trace.token_ids)).svg()
        self.heat.value = strips.heat(self.rounds, block_size, self.colour.value, self._decode).svg()
        self.windows.value = strips.windows(self.rounds, policy, block_size).svg()
        self.text.value = streaming_text(self.rounds, self._decode)

    def _make(self, policy: str, thresholds: dict[str, float]) -> None:
        wide = w.Layout(width="auto")  # the whole line less its margins
        self.path = w.Text(description="file", tooltip="A Parquet file of traces", style=STYLE, layout=w.Layout(flex="1 1 300px"))
        self.load_button = w.Button(description="Load", icon="folder-open", tooltip="Show the traces of this file")
        self.save_button = w.Button(description="Save", icon="save", tooltip="Write the trace that is shown into this file")
        self.which = w.Dropdown(description="trace", tooltip="Which prompt of the file", style=STYLE, layout=wide)
        self.colour = heat_colours()
        widest = int(thresholds.get("window", 7)) + 1  # until a trace is there; a window that was asked for is not the widest
        self.controls = PolicyControls(policy, widest, self._move, continuous=True, **thresholds)
        self.message, self.about, self.numbers, self.lanes, self.heat, self.windows, self.text = (w.HTML() for _ in range(7))
        files = row([self.path, self.load_button, self.save_button])
        left = column([self.controls.box, self.numbers, self.about, self.text], 380)
        right = column([self.lanes, self.colour, self.heat, self.windows], 480)
        seen = row([left, right])
        self.box = w.VBox([files, self.which, self.message, seen])
        self.load_button.on_click(lambda _button: self.load())
        self.save_button.on_click(lambda _button: self.save())
        self.which.observe(self._take, names="value")
        self.colour.observe(self._move, names="value")

    def _repr_mimebundle_(self, **options: object) -> object:
        return self.box._repr_mimebundle_(**options)


def prompt_of(trace: Trace) -> str:
    """The prompt as the trace holds it: text, chat messages, or token ids."""
    prompt = trace.about["prompt"]
    if isinstance(prompt, str):
        return prompt
    return " / ".join(part["content"] if isinstance(part, dict) else str(part) for part in prompt)
