"""The replay panel: any policy over a recorded trace, without a model. Every move of a slider replays the whole text in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import shorten

import ipywidgets as w

from dspark.bench.replay import replay
from dspark.bench.trace import LONGEST_CHARACTER, Trace
from dspark.bench.traces import load_traces, save_trace
from dspark.draft.source import COPY
from dspark.files import data_dir, one_line
from dspark.lab.figures import Decode
from dspark.lab.text import Tally, remembered, streaming_text, tally
from dspark.lab.widgets import STYLE, Panel, column, labelled, row
from dspark.round import Round
from dspark.schedule import Autoregressive, make_policy

SAMPLE = data_dir() / "results" / "traces" / "sample.parquet"  # comes with the repository


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


def prompt_of(trace: Trace) -> str:
    """The prompt that the trace holds (text, chat messages, or token ids) as text."""
    prompt = trace.about["prompt"]
    if isinstance(prompt, str):
        return prompt
    return " / ".join(part["content"] if isinstance(part, dict) else str(part) for part in prompt)


def arm_of(policy: str, trace: Trace) -> str:
    """The name of the arm that a replay of this policy shows: with copying if the trace has copied drafts."""
    return policy + "+copy" * any(r.source == COPY for r in trace.rounds)


class ReplayPanel(Panel):
    """Show it as the last value of a cell.

    trace: what to replay, or a file of traces.
    policy: a name of :data:`dspark.schedule.POLICIES`, perhaps with numbers ("confidence:0.3").

    Raises ValueError for an unknown policy; other errors are shown in the panel.
    """

    def __init__(self, trace: Trace | str | Path = SAMPLE, *, policy: str = "prefix") -> None:
        self.rounds: list[Round] = []
        self.plain: list[Round] = []
        super().__init__(policy, self._replay)
        self._make()
        if isinstance(trace, Trace):
            self.show(trace)
        else:
            self.path.value = str(trace)
            self.load()

    def show(self, *traces: Trace) -> None:
        """Offer these traces and replay the first."""
        self.which.options = [(shorten(prompt_of(trace), 80, placeholder="…"), trace) for trace in traces]
        self.which.index = 0

    def load(self) -> None:
        """The Load button: show every trace of the file in the box."""
        try:
            self.show(*(trace for _, trace in load_traces(self.path.value)))
        except (ValueError, OSError) as error:
            self.show_error(one_line(error))

    def save(self) -> None:
        """The Save button: write the trace that is shown to the file in the box."""
        try:
            save_trace(self.trace(), self.path.value)
        except (ValueError, OSError) as error:
            self.show_error(one_line(error))
        else:
            self.show_error("")
            self.message.value = f'<span role="status">{escape(f"saved: {self.path.value}")}</span>'

    def trace(self) -> Trace:
        """The trace that is shown."""
        return self.which.value

    def tally(self) -> Tally:
        """Counts of the replayed run; its seconds come from the trace's measured step times."""
        return tally(self.rounds, self.plain)

    def _take(self, change: dict[str, Trace]) -> None:
        """Another trace was chosen."""
        trace = change["new"]
        self.decode = remembered(trace_decode(trace))
        self.plain = replay(trace, Autoregressive())
        self.controls.set_block_size(int(trace.about["block_size"]))
        models = f"{trace.about['target']}, drafter {trace.about['drafter']}, {len(trace.token_ids)} tokens"
        self.about.value = f'<div style="font-size:12px">{escape(prompt_of(trace))}<br>{escape(models)}</div>'
        self._replay()

    def _replay(self, _change: object = None) -> None:
        if (trace := self.trace()) is None:
            return
        try:
            self.rounds = replay(trace, make_policy(*self.controls.chosen(), lambda: trace.times.sps))
        except ValueError as error:
            self.show_error(one_line(error))
            return
        self.show_error("")
        arm, block_size = arm_of(self.controls.kind.value, trace), int(trace.about["block_size"])
        how = "predicted from measured step times, n = 1 prompt"
        self.draw(self.rounds, self.plain, arm, block_size, len(trace.token_ids), how)
        self.text.value = streaming_text(self.rounds, self.decode)

    def _make(self) -> None:
        self.path = w.Text(description="file", tooltip="A Parquet file of traces", style=STYLE, layout=w.Layout(flex="1 1 300px"))
        self.load_button = w.Button(description="Load", icon="folder-open", tooltip="Show the traces of this file")
        self.save_button = w.Button(description="Save", icon="save", tooltip="Write the trace that is shown to this file")
        self.which = labelled(w.Dropdown, None, "trace", "A prompt of the file")
        self.about = w.HTML()
        left = column([self.controls.box, self.numbers, self.about, self.text], 380)
        files = row([self.path, self.load_button, self.save_button])
        self.box = w.VBox([files, self.which, self.message, row([left, self.pictures])])
        self.load_button.on_click(lambda _button: self.load())
        self.save_button.on_click(lambda _button: self.save())
        self.which.observe(self._take, names="value")
        self.colour.observe(self._replay, names="value")
