"""One run as one linked view: text, drafts, windows and race share rounds, and the last three their horizontal axis.

Python writes the markup, which needs no script to be read. ``rounds.js`` links it: what is pointed at or focused lights its round
everywhere and fills one line of details. ``curve.js`` draws the lines under a slider.
"""

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import anywidget
import ipywidgets as w
import traitlets

from dspark.draft.source import COPY
from dspark.lab import strips
from dspark.lab.figures import DRAFT_STATES, FATES, Decode, draft_states, fates
from dspark.lab.text import Tally, streaming_text, tally
from dspark.round import Round
from dspark.target.stream import BROKEN


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is shown.

    rounds: of the text so far, the prefill first.
    plain: rounds of plain decoding on the same prompt; () for no race.
    arm: gives the name and the colour of the lane.
    tokens: length of the axis.
    decode: token ids → text.
    how: how the seconds were obtained.
    ended, judged: see :func:`dspark.lab.text.streaming_text`.
    """

    rounds: Sequence[Round]
    plain: Sequence[Round]
    arm: str
    tokens: int
    decode: Decode
    how: str = "measured here, n = 1 run"
    ended: bool = True
    judged: bool = True

    @property
    def seen(self) -> Sequence[Round]:
        """Without a round that is not verified yet."""
        return self.rounds if self.judged else self.rounds[:-1]

    def tally(self) -> Tally:
        return tally(self.seen, self.plain)

    def strips(self) -> dict[str, strips.Strip]:
        """Drafts, windows and race."""
        lanes = [("plain", self.plain)] * bool(self.plain) + [(self.arm, self.seen)] * bool(self.seen)
        made = {"drafts": strips.heat(self.seen, self.tokens), "windows": strips.windows(self.seen, self.tokens)}
        return made | ({"race": strips.race(lanes, self.tokens)} if lanes else {})

    def html(self) -> str:
        words = "".join(f'<span style="margin-right:14px">{escape(part)}</span> ' for part in self.tally().words(self.how))
        text = streaming_text(self.rounds, self.decode, ended=self.ended, judged=self.judged)
        pictures = "".join(strip.svg(f"linked {name}") for name, strip in self.strips().items())
        return f'<div class="numbers">{words}</div>{text}<div class="details" role="status"></div>{pictures}'

    def details(self) -> list[dict[str, object]]:
        """One row per round for the line of details: its tokens and drafts as text, with what is known about each."""
        rows, start = [], 0
        for r in self.seen:
            numbers = {"p_target": r.target_probs_of_drafts, "p_draft": r.draft_probs_of_drafts, "confidence": r.confidence}
            texts = {"tokens": r.committed, "drafts": r.draft_tokens}
            rows.append(
                {"round": r.index, "start": start, "window": r.window, "verified": r.verify_length, "ms": 1e3 * r.seconds}
                | {name: [None if math.isnan(value) else value for value in values] for name, values in numbers.items()}
                | {name: [self.decode([token]).replace(BROKEN, "▯") for token in ids] for name, ids in texts.items()}
                | {"states": [DRAFT_STATES[state].label for state in draft_states(r)], "accepted": r.accepted, "copied": r.source == COPY}
                | {"fates": [FATES[t.fate].label for t in fates([r])]}
            )
            start += len(r.committed)
        return rows


def deflated(runs: Iterable[Run | None]) -> bytes:
    """What :attr:`RoundsView.pictures` holds."""
    return zlib.compress(json.dumps([run and (run.html(), run.details()) for run in runs]).encode())


class View(anywidget.AnyWidget):
    """What follows a slider in the browser, without waiting for Python: ``slider``, and what is shown at each of its places."""

    slider = traitlets.Instance(w.SelectionSlider, allow_none=True).tag(sync=True, **w.widget_serialization)


class RoundsView(View):
    """The linked view of a :class:`Run`.

    pictures: (html, details) at each place of the slider, None where it is impossible, as deflated JSON; b"" without a slider.
    stale: it is grey, being of other settings.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    html = traitlets.Unicode().tag(sync=True)
    details = traitlets.List().tag(sync=True)
    pictures = traitlets.Bytes().tag(sync=True)
    stale = traitlets.Bool().tag(sync=True)


class CurveView(View):
    """Lines over the slider: name → one number per place, None where it is impossible."""

    _esm = Path(__file__).with_name("curve.js")
    lines = traitlets.Dict().tag(sync=True)
