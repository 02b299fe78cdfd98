"""Rounds → small SVG pictures that are cheap to redraw while a text is decoded, in the colours of :mod:`dspark.lab.figures`.

They are a few kB, need no script, and suit light and dark pages: grey text on a transparent ground.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from dspark.bench.arms import arm_colour, arm_label
from dspark.draft.source import COPY
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, Decode, Look, draft_numbers, draft_states, fates
from dspark.round import Round
from dspark.target.stream import BROKEN

COLOURS = {"fate": "what became of the draft", "confidence": "the drafter's confidence c", "target": "the target's probability p_target"}
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # in XML
WIDTH, LEFT, END = 720, 46, 14  # pixels: the drawing, its axis, its right margin


@dataclass(frozen=True)
class Strip:
    """A drawing without its frame.

    body: SVG elements.
    height: pixels.
    label: what a screen reader says.
    """

    body: str
    height: float
    label: str

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" role="img" aria-label="{legal(self.label)}" '
            f'style="width:100%;max-width:{WIDTH}px;display:block" font-family="system-ui,sans-serif" font-size="11" fill="{GREY}">'
            f"{self.body}</svg>"
        )


def heat(rounds: Sequence[Round], block_size: int, colour: str = "fate", decode: Decode | None = None) -> Strip:
    """Every drafted token as a cell: rounds from left to right, positions in the block from bottom to top.

    colour: "fate", "confidence" (c_k) or "target" (the probability that the target gave the draft). A ring marks a rejected draft.
    decode: shows the drafted token in the tooltip. Raises ValueError for another colour.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour {colour!r} is unknown: choose one of {', '.join(COLOURS)}")
    rounds = _without_prefill(rounds)
    states = draft_states(rounds, block_size)
    step, high, top = _step(len(rounds)), 15, 34
    cells = []
    for i, (r, row) in enumerate(zip(rounds, states, strict=True)):
        for k, state in enumerate(row):
            if state is None:
                continue
            ring = f' stroke="{DRAFT_STATES["rejected"].colour()}" stroke-width="1.5"' if state == "rejected" else ""
            x, y = LEFT + i * step + 0.5, top + (block_size - 1 - k) * high + 0.5
            box = f'x="{x:.1f}" y="{y:.1f}" width="{max(step - 1.5, 1):.1f}" height="{high - 2}" rx="2"'
            hint = legal(_cell_hint(r, k, state, decode))
            cells.append(f'<rect {box} fill="{_fill(r, k, state, colour)}"{ring}><title>{hint}</title></rect>')
    accepted = sum(row.count("accepted") for row in states)
    drafted = sum(len(r.draft_tokens) for r in rounds)
    title = f"{accepted} of {drafted} drafted tokens accepted (n = {len(rounds)} rounds), colour: {COLOURS[colour]}"
    positions = "".join(_text(LEFT - 6, top + (block_size - k - 0.25) * high, str(k + 1), "end") for k in range(block_size))
    bottom = top + block_size * high
    axis = _round_axis(rounds, step, bottom) + _text(2, top - 6, "position")
    return Strip(_title(title) + _key(states, colour) + positions + axis + "".join(cells), bottom + 26, title)


def _fill(r: Round, k: int, state: str, colour: str) -> str:
    if colour == "fate":
        return DRAFT_STATES[state].colour(0.85)
    values = r.confidence if colour == "confidence" else r.target_probs_of_drafts
    if k >= len(values) or values[k] != values[k]:  # not verified, or no confidence head
        return "rgba(128,128,128,.12)"
    return _shade(values[k])


def _shade(value: float) -> str:
    return FATES["draft"].colour(round(0.1 + 0.9 * value, 3))


def _cell_hint(r: Round, k: int, state: str, decode: Decode | None) -> str:
    token = f" “{decode([r.draft_tokens[k]]).replace(BROKEN, '▯')}”" if decode else ""
    copied = " (copied)" if r.source == COPY else ""
    return f"round {r.index}, position {k + 1}: {DRAFT_STATES[state].label}{copied}{token}{draft_numbers(r, k)}"


def _key(states: Sequence[Sequence[str | None]], colour: str) -> str:
    """The legend, in the line below the title."""
    if colour != "fate":
        bar = "".join(f'<rect x="{WIDTH - 176 + 12 * i}" y="20" width="12" height="9" fill="{_shade(i / 9)}"/>' for i in range(10))
        return _text(WIDTH - 182, 29, "0", "end") + bar + _text(WIDTH - 52, 29, "1")
    return legend(LEFT + 30, 20, [(look, sum(row.count(name) for row in states)) for name, look in DRAFT_STATES.items()])


def legend(x: float, y: float, counts: Sequence[tuple[Look, int]]) -> str:
    """One line of coloured boxes with labels and counts; its top left corner is at x, y."""
    items = []
    for look, count in counts:
        label = f"{look.label}: {count}"
        items.append(f'<rect x="{x:.0f}" y="{y}" width="10" height="9" rx="2" fill="{look.colour(0.85)}"/>' + _text(x + 14, y + 9, label))
        x += 34 + 5.8 * len(label)
    return "".join(items)


def windows(rounds: Sequence[Round], block_size: int) -> Strip:
    """Each round's window: asked for (outline), verified (grey) and accepted (blue)."""
    rounds = _without_prefill(rounds)
    step, top, high = _step(len(rounds)), 34, 66
    unit, floor, wide, parts = high / max(block_size, 1), top + high, max(step - 1.5, 1), []
    for i, r in enumerate(rounds):
        hint = f"round {r.index}: asked for {r.window}, verified {r.verify_length}, accepted {r.accepted}"
        asked, grey, blue = 'fill="none" stroke="rgba(128,128,128,.6)"', 'fill="rgba(150,150,150,.35)"', f'fill="{_shade(0.85)}"'
        for count, look in ((r.window, asked), (r.verify_length, grey), (r.accepted, blue)):
            box = f'x="{LEFT + i * step + 0.5:.1f}" y="{floor - count * unit:.1f}" width="{wide:.1f}" height="{count * unit:.1f}"'
            parts.append(f"<rect {box} {look}><title>{hint}</title></rect>")
    verified, accepted = sum(r.verify_length for r in rounds), sum(min(r.accepted, len(r.committed)) for r in rounds)
    title = f"The window: {accepted} of {verified} verified drafts accepted (n = {len(rounds)} rounds)"
    for y, name in ((floor, "0"), (top, str(block_size))):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - END}" y1="{y}" y2="{y}" stroke="rgba(128,128,128,.3)"/>')
        parts.append(_text(LEFT - 6, y + 4, name, "end"))
    names = _text(2, top - 6, "window (tokens): outline asked for, grey verified, blue accepted")
    return Strip(_title(title) + names + "".join(parts) + _round_axis(rounds, step, floor), floor + 26, title)


def race(lanes: Sequence[tuple[str, Sequence[Round]]], tokens: int) -> Strip:
    """Where all lanes were when the last of them was where it is now: one track each, with a tick per committed token.

    lanes: (arm, rounds of the same prompt); the arm gives the label and the colour. The clock starts after the prefill.
    tokens: length of the track.
    """
    top, high, parts, labels = 24, 38, [], []
    clock = sum(r.seconds for r in lanes[-1][1][1:])
    unit = (WIDTH - LEFT - END) / max(tokens, 1)
    for i, (arm, rounds) in enumerate(lanes):
        committed, spent = fates(reached(rounds, clock)), min(clock, sum(r.seconds for r in rounds[1:]))
        speed = f", {(len(committed) - 1) / spent:.1f} tokens/s" if spent > 0 and len(committed) > 1 else ""
        labels.append(f"{arm_label(arm)}: {len(committed)} tokens in {spent:.2f} s{speed}")
        y = top + i * high
        parts.append(f'<rect x="{LEFT - 16}" y="{y}" width="8" height="26" rx="2" fill="{arm_colour(arm)}"/>')
        parts.append(_text(LEFT, y + 9, labels[-1]))
        parts.append(f'<rect x="{LEFT}" y="{y + 14}" width="{tokens * unit:.1f}" height="12" rx="3" fill="rgba(128,128,128,.12)"/>')
        for j, token in enumerate(committed):
            place = f'x="{LEFT + j * unit:.1f}" y="{y + 14}" width="{max(unit * 0.85, 0.6):.1f}"'
            parts.append(f'<rect {place} height="12" fill="{FATES[token.fate].colour(0.85)}"/>')
    title = f"The race on one prompt after {clock:.2f} s (n = 1 run per lane)"
    return Strip(_title(title) + "".join(parts), top + high * len(lanes) + 4, "; ".join(labels))


def reached(rounds: Sequence[Round], seconds: float) -> list[Round]:
    """The rounds that were finished ``seconds`` of decoding after the prefill."""
    ends = accumulate(r.seconds if r.anchor is not None else 0.0 for r in rounds)
    return [r for r, end in zip(rounds, ends, strict=True) if end <= seconds + 1e-9]


def legal(words: str) -> str:
    """Escaped for an SVG; characters that XML forbids become ▯."""
    return escape(FORBIDDEN.sub("▯", words))


def _without_prefill(rounds: Sequence[Round]) -> list[Round]:
    return [r for r in rounds if r.anchor is not None]


def _step(rounds: int) -> float:
    """Pixels from one round to the next: less where there are many."""
    return min(18.0, (WIDTH - LEFT - END) / max(rounds, 1))


def _title(words: str) -> str:
    return f'<text x="2" y="13" font-size="12" font-weight="600">{legal(words)}</text>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{legal(words)}</text>'


def _round_axis(rounds: Sequence[Round], step: float, y: float) -> str:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**6) if n * step >= 26)
    marks = [_text(LEFT + (i + 0.5) * step, y + 13, str(r.index), "middle") for i, r in enumerate(rounds) if r.index % every == 0]
    return "".join(marks) + _text(2, y + 13, "round")
