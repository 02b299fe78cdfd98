"""Rounds → drafts, windows and race as small SVG pictures that are cheap to redraw, in the colours of :mod:`dspark.lab.figures`.

They share one horizontal axis, the position in the text: a round is as wide as the number of its committed tokens. Horizontal places are
percentages, so a picture fills any width and its words keep their size. Text has the colour of its page.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from dspark.bench.arms import arm_colour, arm_label
from dspark.draft.source import COPY
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, draft_states, fates
from dspark.lab.text import tally
from dspark.round import Round

FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # in XML
LEFT, RIGHT, WIDTH = 46, 12, 760  # pixels: margins, and the width of a picture of its own
FAINT = "rgba(128,128,128,.3)"


@dataclass(frozen=True)
class Strip:
    """A drawing without its frame: SVG elements, height in pixels, and what a screen reader says."""

    body: str
    height: float
    label: str

    def svg(self, kind: str = "") -> str:
        """A picture of its own; with ``kind``, its class, a part of the page: as wide, and in its colour of text."""
        about = f'class="{kind}" role="img" aria-label="{legal(self.label)}" height="{self.height:g}" font-size="12"'
        if kind:
            style = f"display:block;overflow:visible;margin-left:{LEFT}px;width:calc(100% - {LEFT + RIGHT}px)"
            return f'<svg xmlns="http://www.w3.org/2000/svg" {about} style="{style}" fill="currentColor">{self.body}</svg>'
        body = f'<svg x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" overflow="visible">{self.body}</svg>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {about} width="{WIDTH}" fill="{GREY}" font-family="sans-serif">{body}</svg>'


def columns(rounds: Sequence[Round], tokens: int | None = None) -> Iterator[tuple[Round, int, float, float]]:
    """Each round after the prefill, the position of its first token, its left edge and width in percent of ``tokens`` (None: so far)."""
    start, unit = 0, 100 / max(tokens or sum(len(r.committed) for r in rounds), 1)
    for r in rounds:
        if r.anchor is not None:
            yield r, start, start * unit, (len(r.committed) - 0.15) * unit
        start += len(r.committed)


def heat(rounds: Sequence[Round], tokens: int | None = None) -> Strip:
    """Every drafted token as a cell, positions in the block from bottom to top. tokens: length of the axis."""
    seen, states = list(columns(rounds, tokens)), []
    count = max((len(r.draft_tokens) for r, *_ in seen), default=0)
    high, top = max(min(14.0, 108 / max(count, 1)), 6.0), 24
    bottom, cells = top + high * max(count, 1), []
    for r, start, x, wide in seen:
        cells.append(_band(r, x, wide, top, bottom))
        states += draft_states(r)
        for k, state in enumerate(draft_states(r)):
            mark = _mark(x, bottom - (k + 1) * high, wide, high - 1.5, state, r.source == COPY)
            cells.append(f'<g data-r="{r.index}" data-n="{start + k}" data-k="{k}">{mark}</g>')
    step = next(n for n in (1, 2, 4, 8, 10**6) if n * high >= 12)
    axis = "".join(_text(-6, bottom - (k + 0.5) * high + 4, str(k + 1), "end") for k in range(0, count, step))
    key, x = [], 14.0
    for name in reversed(DRAFT_STATES):
        label = f"{DRAFT_STATES[name].label} {states.count(name)}"
        key.append(f"<g>{_mark(x, 3, 10, 9, name, False, '')}{_text(x + 15, 12, label)}</g>")
        x += 34 + 6.2 * len(label)
    label = f"Drafts by position in the block: {states.count('accepted')} of {len(states)} accepted, n = {len(seen)} rounds"
    return Strip(f'{_text(-LEFT, 12, "drafts", weight=600)}<g class="key">{"".join(key)}</g>{axis}{"".join(cells)}', bottom + 4, label)


def _mark(x: float, y: float, wide: float, high: float, state: str, copied: bool, unit: str = "%") -> str:
    """One draft. Shapes differ too: accepted is filled (a copy with a gap), rejected crossed, discarded dashed, unverified empty."""
    look = FATES["copy"] if copied and state == "accepted" else DRAFT_STATES[state]
    line, ends = f'stroke="{look.colour()}"', f'x1="{x:.2f}{unit}" x2="{x + wide:.2f}{unit}"'
    dash = {"discarded": ' stroke-dasharray="2 2"', "unchecked": ' stroke-opacity=".6"'}.get(state, "")
    fill = look.colour({"accepted": 0.9, "unchecked": 0}.get(state, 0.25))
    made = f'<rect x="{x:.2f}{unit}" y="{y:.1f}" width="{wide:.2f}{unit}" height="{high:.1f}" rx="1.5" fill="{fill}" {line}{dash}/>'
    if state == "rejected":
        made += f'<line {ends} y1="{y:.1f}" y2="{y + high:.1f}" {line}/><line {ends} y1="{y + high:.1f}" y2="{y:.1f}" {line}/>'
    elif state == "accepted" and copied:
        made += f'<line {ends} y1="{y + high / 2:.1f}" y2="{y + high / 2:.1f}" class="gap" stroke="var(--jp-layout-color0,#fff)"/>'
    return made


def windows(rounds: Sequence[Round], tokens: int | None = None) -> Strip:
    """Each round's window: drafted (outline), verified (grey) and accepted (blue). tokens: length of the axis."""
    seen = list(columns(rounds, tokens))
    most = max((len(r.draft_tokens) for r, *_ in seen), default=0)
    top, high, parts = 22, 40, []
    floor, unit = top + high, high / max(most, 1)
    for r, _, x, wide in seen:
        grey, blue = 'fill="rgba(150,150,150,.5)"', f'fill="{FATES["draft"].colour(0.9)}"'
        bars = ((len(r.draft_tokens), f'fill="none" stroke="{FAINT}"'), (r.verify_length, grey), (r.accepted, blue))
        place = f'x="{x:.2f}%" width="{wide:.2f}%"'
        boxes = "".join(f'<rect {place} y="{floor - n * unit:.1f}" height="{n * unit:.1f}" {look}/>' for n, look in bars if n)
        parts.append(f'{_band(r, x, wide, top, floor)}<g data-r="{r.index}">{boxes}</g>')
    for y, name in ((floor, "0"), (top, str(most))):
        parts.append(f'<line x1="0" x2="100%" y1="{y}" y2="{y}" stroke="{FAINT}"/>{_text(-6, y + 4, name, "end")}')
    t = tally(rounds)
    label = f"The window: {t.verified - t.rejected} of {t.verified} verified drafts accepted, n = {len(seen)} rounds"
    key = _text(14, 12, "drafted (outline), verified (grey), accepted (blue)")
    return Strip(f'{_text(-LEFT, 12, "window", weight=600)}<g class="key">{key}</g>' + "".join(parts), floor + 4, label)


def race(lanes: Sequence[tuple[str, Sequence[Round]]], tokens: int) -> Strip:
    """Where all lanes were when the last of them was where it is now: one track each, with a cell per committed token.

    lanes: (arm, rounds of the same prompt); the arm gives the label and the colour. The clock starts after the prefill.
    tokens: length of the axis.
    """
    top, high, parts, labels = 2, 32, [], []
    ends = list(accumulate(r.seconds for r in lanes[-1][1][1:]))
    clock, unit = ends[-1] if ends else 0.0, 100 / max(tokens, 1)
    for i, (arm, rounds) in enumerate(lanes):
        when = dict(zip((r.index for r in rounds), accumulate(r.seconds if r.anchor is not None else 0.0 for r in rounds), strict=True))
        committed = [token for token in fates(rounds) if when[token.round.index] <= clock + 1e-9]
        y, spent = top + i * high, min(clock, max(when.values(), default=0.0))
        labels.append(f"{arm_label(arm)}: {len(committed)} tokens in {spent:.2f} s")
        parts.append(f'<rect x="-14" y="{y}" width="8" height="26" rx="2" fill="{arm_colour(arm)}"/>{_text(0, y + 9, labels[-1])}')
        parts.append(f'<rect width="100%" y="{y + 14}" height="12" rx="3" fill="rgba(128,128,128,.12)"/>')
        for n, token in enumerate(committed):
            r, own = token.round.index, f' data-n="{n}"' * (i == len(lanes) - 1)
            if not own and r:  # what the last lane did meanwhile
                r = min(bisect_left(ends, when[r] - 1e-9), len(ends) - 1) + 1
            place = f'x="{n * unit:.2f}%" y="{y + 14}" width="{0.85 * unit:.2f}%" height="12"'
            parts.append(f'<rect data-r="{r}"{own} {place} fill="{FATES[token.fate].colour(0.9)}"/>')
    floor, every = top + high * len(lanes) + 8, next(step for step in (1, 5, 10, 20, 50, 100, 10**9) if tokens / step <= 8)
    marks = (f'<text x="{n * unit:.2f}%" y="{floor}" text-anchor="middle">{n}</text>' for n in range(0, tokens + 1, every))
    return Strip("".join(parts) + "".join(marks) + _text(-10, floor, "token", "end"), floor + 6, "; ".join(labels))


def legal(words: str) -> str:
    """Escaped for an SVG; characters that XML forbids become ▯."""
    return escape(FORBIDDEN.sub("▯", words))


def _band(r: Round, x: float, wide: float, top: float, bottom: float) -> str:
    """The round's column: what is lit, and where it can be pointed at."""
    height = bottom - top
    return f'<rect class="band" data-r="{r.index}" x="{x:.2f}%" y="{top}" width="{wide:.2f}%" height="{height:g}" fill="transparent"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", weight: int = 400) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{legal(words)}</text>'
