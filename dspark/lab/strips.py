"""Small pictures that are redrawn many times a second: rounds → SVG strings, in the colours of :mod:`dspark.lab.figures`.

A plotly figure weighs a megabyte of script and flickers when it is replaced; these are a few kB, need no script and can stand in
a README. Text is grey and grounds are transparent, so light and dark pages both carry them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dspark.decode import Round
from dspark.lab.figures import COPIED, DRAFT_STATES, FATES, GREY, NO_CHARACTER, Decode, draft_states, fates
from dspark.schedule import AdaptiveWindow, ConfidenceThreshold, Policy

COLOURS = {"fate": "fate", "confidence": "confidence c", "target": "target mass p_target"}
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
LINE = "rgba(128,128,128,.3)"
WIDTH, LEFT, RIGHT, END = 720, 46, 84, 14  # of every strip, its axis, the names of thresholds, and a margin where there are none
MOVES = {"widen": ("▲", "bonus"), "narrow": ("▼", "correction"), "fall back": ("■", "correction"), "cut": ("▼", "correction")}


@dataclass(frozen=True)
class Strip:
    """A drawing before it is framed: the SVG elements, its height in pixels, and what a screen reader says."""

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
    """Rounds from left to right, positions in the block from bottom to top.

    colour: "fate", "confidence" (c_k) or "target" (the probability that the target gave the draft). A ring marks where a draft
    was rejected; tooltips name the siblings. decode: shows the drafted token in the tooltip. Raises ValueError for another colour.
    """
    if colour not in COLOURS:
        raise ValueError(f"colour {colour!r} is unknown: choose one of {', '.join(COLOURS)}")
    rounds = [r for r in rounds if r.anchor is not None]
    states = draft_states(rounds, block_size)
    step, high, top = _step(len(rounds)), 15, 34
    cells = []
    for i, (r, row) in enumerate(zip(rounds, states, strict=True)):
        for k, state in enumerate(row):
            if state is None:
                continue
            fill = _fill(r, k, state, colour)
            ring = f' stroke="{DRAFT_STATES["rejected"].colour()}" stroke-width="1.5"' if state == "rejected" else ""
            x, y = LEFT + i * step + 0.5, top + (block_size - 1 - k) * high + 0.5
            hint = legal(_cell_hint(r, k, state, decode))
            box = f'x="{x:.1f}" y="{y:.1f}" width="{max(step - 1.5, 1):.1f}" height="{high - 2}" rx="2"'
            cells.append(f'<rect {box} fill="{fill}"{ring}><title>{hint}</title></rect>')
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
    if k >= len(values) or values[k] != values[k]:  # nobody knows: not checked, or no confidence head
        return "rgba(128,128,128,.12)"
    return FATES["draft"].colour(round(0.1 + 0.9 * values[k], 3))


def _cell_hint(r: Round, k: int, state: str, decode: Decode | None) -> str:
    token = _quoted(r.draft_tokens[k], decode)
    copied = COPIED.get(r.source, "")
    named = (("p_target", r.target_probs_of_drafts), ("p_draft", r.draft_probs_of_drafts), ("confidence", r.confidence))
    numbers = "".join(f" · {name} {values[k]:.2f}" for name, values in named if k < len(values) and values[k] == values[k])
    kept = r.sibling if k == r.accepted < len(r.committed) else None
    beside = [(_quoted(guess, decode), "accepted" if guess == kept else "checked") for at, guess in r.siblings if at == k + 1]
    guesses = "".join(f" · second guess{guess}: {fate}" for guess, fate in beside)
    return f"round {r.index}, position {k + 1}: {DRAFT_STATES[state].label}{copied}{token}{numbers}{guesses}"


def _quoted(token: int, decode: Decode | None) -> str:
    return f" “{decode([token]).replace(NO_CHARACTER, '▯')}”" if decode else ""


def _key(states: Sequence[Sequence[str | None]], colour: str) -> str:
    """The legend, at the right of the title's next line."""
    if colour != "fate":
        bar = "".join(f'<rect x="{WIDTH - 176 + 12 * i}" y="20" width="12" height="9" fill="{_shade(i / 9)}"/>' for i in range(10))
        return _text(WIDTH - 182, 29, "0", "end") + bar + _text(WIDTH - 52, 29, "1")
    items, x = [], LEFT + 30.0
    for name, look in DRAFT_STATES.items():
        label = f"{look.label}: {sum(row.count(name) for row in states)}"
        items.append(f'<rect x="{x:.0f}" y="20" width="10" height="9" rx="2" fill="{look.colour(0.85)}"/>' + _text(x + 14, 29, label))
        x += 34 + 5.6 * len(label)
    return "".join(items)


def _shade(value: float) -> str:
    return FATES["draft"].colour(round(0.1 + 0.9 * value, 3))


@dataclass(frozen=True)
class Signal:
    """What a policy read in one round: the number, and what it did because of it ("" where it just went on)."""

    value: float | None
    move: str


def signals(rounds: Sequence[Round], policy: Policy, block_size: int) -> tuple[str, dict[str, float], list[Signal]]:
    """What moved the window: (name of the number, name → threshold, one signal for each round without the prefill).

    The moves are asked from the policy itself, so that the picture cannot tell another story than the code.
    """
    rounds = [r for r in rounds if r.anchor is not None]
    if isinstance(policy, ConfidenceThreshold):
        name = "survival a" if policy.on == "survival" else "confidence c"
        return f"{name} where it decided", {"stop": policy.threshold}, [_cut(r, policy) for r in rounds]
    lines = {}
    if isinstance(policy, AdaptiveWindow):
        lines = {"widen": policy.widen_threshold, "narrow": policy.narrow_threshold, "fall back": policy.fallback_threshold}
    found = []
    for r in rounds:
        checked = r.target_probs_of_drafts
        after = policy.window(r, block_size)
        move = "fall back" if after == 0 < r.window else "widen" if after > r.window > 0 else "narrow" if after < r.window else ""
        found.append(Signal(sum(checked) / len(checked) if checked else None, move if lines else ""))
    return "mean p_target of the drafts", lines, found


def _cut(r: Round, policy: ConfidenceThreshold) -> Signal:
    values = r.survival if policy.on == "survival" else r.confidence
    if not values:
        return Signal(None, "")
    cut = r.verify_length < len(values)
    return Signal(values[r.verify_length] if cut else values[-1], "cut" if cut else "")


def windows(rounds: Sequence[Round], policy: Policy, block_size: int) -> Strip:
    """Above, how far each round looked: asked for (outline), checked (grey) and accepted (blue). Below, the number that the policy
    compares with its thresholds, and the moves that followed from it."""
    name, lines, found = signals(rounds, policy, block_size)
    rounds = [r for r in rounds if r.anchor is not None]
    step, top, high, gap, low = _step(len(rounds)), 34, 66, 38, 84
    unit, floor, base = high / max(block_size, 1), top + high, top + high + gap + low
    parts = []
    for i, (r, signal) in enumerate(zip(rounds, found, strict=True)):
        x, wide = LEFT + i * step + 0.5, max(step - 1.5, 1)
        for count, look in ((r.window, 'fill="none" stroke="rgba(128,128,128,.6)"'), (r.verify_length, 'fill="rgba(150,150,150,.35)"')):
            parts.append(f'<rect x="{x:.1f}" y="{floor - count * unit:.1f}" width="{wide:.1f}" height="{count * unit:.1f}" {look}/>')
        hint = f"round {r.index}: asked for {r.window}, checked {r.verify_length}, accepted {r.accepted}"
        tall = r.accepted * unit
        parts.append(
            f'<rect x="{x:.1f}" y="{floor - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{FATES["draft"].colour(0.85)}">'
            f"<title>{hint}</title></rect>"
        )
        if signal.value is not None:
            mark, fate = MOVES.get(signal.move, ("●", "plain"))
            colour = FATES[fate].colour() if signal.move else GREY
            told = escape(f"{hint}; {name} {signal.value:.2f}{': ' + signal.move if signal.move else ''}")
            y = base - signal.value * low
            parts.append(
                f'<text x="{x + wide / 2:.1f}" y="{y + 3.5:.1f}" text-anchor="middle" font-size="{min(10, 4 + step / 2):.1f}" '
                f'fill="{colour}">{mark}<title>{told}</title></text>'
            )
    for label, value in lines.items():
        y = base - value * low
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GREY}" stroke-dasharray="4 3"/>')
        parts.append(_text(WIDTH - RIGHT + 4, y + 4, f"{label} {value:.2f}"))
    checked, accepted = sum(r.verify_length for r in rounds), sum(min(r.accepted, len(r.committed)) for r in rounds)
    title = f"How far it looked: {checked - accepted} of {checked} drafts were checked in vain (n = {len(rounds)} rounds)"
    frame = _scale(top, high, ((0, "0"), (1, str(block_size)))) + _scale(top + high + gap, low, ((0, "0"), (0.5, ".5"), (1, "1")))
    names = _text(2, top - 6, "window (tokens): outline asked for, grey checked, blue accepted") + _text(2, floor + gap - 12, name)
    return Strip(_title(title) + frame + names + "".join(parts) + _round_axis(rounds, step, base), base + 26, title)


def race(lanes: Mapping[str, Sequence[Round]], seconds: float, tokens: int, *, ended: bool = True) -> Strip:
    """One track per lane (name → rounds of the same prompt) as it stood ``seconds`` of decoding behind the prefill; a tick is a
    committed token in the colour of its fate. tokens: the length of the track · ended: False while the last lane still grows."""
    top, high, parts, told = 24, 38, [], []
    totals = {name: sum(r.seconds for r in rounds[1:]) for name, rounds in lanes.items()}
    first = min(totals, key=totals.get)
    unit = (WIDTH - LEFT - END) / max(tokens, 1)
    for i, (name, rounds) in enumerate(lanes.items()):
        there = reached(rounds, seconds)
        spent = min(seconds, sum(r.seconds for r in rounds[1:]))
        done = len(there) == len(rounds) > 0 and (ended or i < len(lanes) - 1)
        came = fates(there)
        speed = f", {(len(came) - 1) / spent:.1f} tokens/s" if spent > 0 and len(came) > 1 else ""
        words = f"{name}: {len(came)} tokens in {spent:.2f} s{speed}{' · finished' if done else ''}"
        y = top + i * high
        parts.append(_text(LEFT, y + 9, words))
        parts.append(f'<rect x="{LEFT}" y="{y + 14}" width="{tokens * unit:.1f}" height="12" rx="3" fill="rgba(128,128,128,.12)"/>')
        for j, token in enumerate(came):
            x = LEFT + j * unit
            parts.append(f'<rect x="{x:.1f}" y="{y + 14}" width="{max(unit * 0.85, 0.6):.1f}" height="12" fill="{_fate(token.fate)}"/>')
        told.append(words)
        if ended and len(lanes) > 1 and name != first and seconds >= totals[first]:
            then = sum(len(r.committed) for r in reached(rounds, totals[first]))
            x = LEFT + then * unit
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 12}" y2="{y + 28}" stroke="{_fate("correction")}" stroke-width="2"/>')
            parts.append(_text(WIDTH - END, y + 9, f"at token {then} when {first} was through", "end"))
    return Strip(_title("The race on one prompt (n = 1 run per lane)") + "".join(parts), top + high * len(lanes) + 4, "; ".join(told))


def reached(rounds: Sequence[Round], seconds: float) -> list[Round]:
    """The rounds that were over ``seconds`` of decoding behind the prefill."""
    there, spent = list(rounds[:1]), 0.0
    for r in rounds[1:]:
        spent += r.seconds
        if spent > seconds + 1e-9:
            break
        there.append(r)
    return there


def _fate(name: str) -> str:
    return FATES[name].colour(0.85)


def legal(words: str) -> str:
    """Escaped for an SVG; characters that XML forbids become ▯."""
    return escape(FORBIDDEN.sub("▯", words))


def _step(rounds: int) -> float:
    """Pixels from one round to the next: as wide as reads well, narrower where there are many."""
    return min(18.0, (WIDTH - LEFT - RIGHT) / max(rounds, 1))


def _title(words: str) -> str:
    return f'<text x="2" y="13" font-size="12" font-weight="600">{legal(words)}</text>'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{legal(words)}</text>'


def _scale(top: float, high: float, marks: Sequence[tuple[float, str]]) -> str:
    """Lines across and their names at the left; a mark is (share of the height, name)."""
    lines = []
    for share, name in marks:
        y = top + high * (1 - share)
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINE}"/>' + _text(LEFT - 6, y + 4, name, "end")
        )
    return "".join(lines)


def _round_axis(rounds: Sequence[Round], step: float, y: float) -> str:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**6) if n * step >= 26)
    marks = [_text(LEFT + (i + 0.5) * step, y + 13, str(r.index), "middle") for i, r in enumerate(rounds) if r.index % every == 0]
    return "".join(marks) + _text(2, y + 13, "round")
