"""Records → pictures. Pure functions: the same rounds give the same HTML string or plotly figure, and no model is run.

One visual language: a fate has the same name and colour everywhere. The colours lean on Okabe and Ito's and stay apart for
colour-blind readers; backgrounds are translucent and text takes the page's own colour, so light and dark themes both work.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import plotly.graph_objects as go

from dspark.decode import Round

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Look:
    """How one fate is drawn: its name in legends, its colour as red, green, blue in 0..255, its underline (for readers of grey prints)."""

    label: str
    rgb: tuple[int, int, int]
    line: str

    def colour(self, alpha: float = 1.0) -> str:
        return f"rgba({self.rgb[0]},{self.rgb[1]},{self.rgb[2]},{alpha:g})"


FATES = {
    "draft": Look("accepted draft", (0, 114, 178), "solid"),
    "copy": Look("accepted copy from the context", (86, 180, 233), "double"),
    "phrase": Look("accepted phrase from memory", (110, 60, 200), "double"),
    "sibling": Look("accepted second guess", (240, 195, 0), "solid"),
    "bonus": Look("bonus", (0, 130, 90), "dotted"),
    "correction": Look("correction", (213, 94, 0), "dashed"),
    "plain": Look("plain step", (170, 170, 170), "solid"),
}
DRAFT_STATES = {
    "unchecked": Look("not checked", (170, 170, 170), "dotted"),
    "in vain": Look("checked in vain", (230, 190, 130), "dotted"),
    "rejected": replace(FATES["correction"], label="rejected"),
    "accepted": replace(FATES["draft"], label="accepted"),
}
COPIED = {"copy": " (copied)", "phrase": " (remembered)"}  # drafts that were looked up, and what a tooltip says of them
GREY = "#7a7a7a"  # text that is read on white and on near-black
BYTES_IN_A_CHARACTER = 4  # UTF-8: so many tokens at most belong to one character
NO_CHARACTER = "\ufffd"  # what decoders return for bytes that are no whole character


@dataclass(frozen=True)
class FatedToken:
    """A committed token and how it came to be.

    position: 1..γ behind the anchor (0: no block was drafted) · replaced: the rejected draft that stood here, if any ·
    p_target, p_draft, confidence: of the draft at this position (the rejected one for a correction or a second guess), None where
    there is none.
    """

    token_id: int
    fate: str
    round: int
    position: int
    replaced: int | None = None
    p_target: float | None = None
    p_draft: float | None = None
    confidence: float | None = None


def fates(rounds: Sequence[Round]) -> list[FatedToken]:
    """Every committed token with its fate: draft, copy, phrase, sibling, bonus, correction or plain."""
    tokens = []
    for r in rounds:
        for k, token in enumerate(r.committed):
            if r.verify_length == 0:
                tokens.append(FatedToken(token, "plain", r.index, 0))
            elif k < r.accepted:
                tokens.append(FatedToken(token, r.source if r.source in COPIED else "draft", r.index, k + 1, None, *_numbers(r, k)))
            elif r.sibling is not None and k == r.accepted:
                tokens.append(FatedToken(token, "sibling", r.index, k + 1, r.draft_tokens[k], *_numbers(r, k)))
            elif r.sibling is None and r.accepted < r.verify_length:
                tokens.append(FatedToken(token, "correction", r.index, k + 1, r.draft_tokens[k], *_numbers(r, k)))
            else:
                tokens.append(FatedToken(token, "bonus", r.index, k + 1))
    return tokens


def _numbers(r: Round, k: int) -> tuple[float, float, float | None]:
    confidence = r.confidence[k] if k < len(r.confidence) else None
    return r.target_probs_of_drafts[k], r.draft_probs_of_drafts[k], confidence if confidence == confidence else None


def whole_pieces(token_ids: Sequence[int], decode: Decode) -> list[tuple[int, str]]:
    """Cut a text into the smallest groups of tokens that are whole characters: [(tokens in the group, its text), …].

    An emoji or a CJK character may be several byte tokens, of which no single one can be shown. Each group is decoded behind
    the one before it, because tokenizers treat the start of a text differently. Bytes that never become a character (the text
    was cut, or the model erred) are shown as ▯. What only changes the character before it (an accent, a skin tone, a joiner
    and what it joins) stays with it.
    """
    pieces, before, group = [], [], []
    for i, token in enumerate(token_ids):
        group.append(token)
        text = decode([*before, *group])[len(decode(before)) if before else 0 :]
        broken = text.endswith(NO_CHARACTER) and len(group) < BYTES_IN_A_CHARACTER
        if broken and i + 1 < len(token_ids):
            continue
        if pieces and _continues(pieces[-1][1], text):
            count, start = pieces.pop()
            pieces.append((count + len(group), start + text))
        else:
            pieces.append((len(group), text.replace(NO_CHARACTER, "▯")))
        before, group = group if text else before, []
    return pieces


def _continues(before: str, text: str) -> bool:
    joiner, tones = "\u200d", ("\U0001f3fb", "\U0001f3ff")
    first = text[:1]
    return bool(first) and (
        unicodedata.category(first)[0] == "M" or first == joiner or before[-1:] == joiner or tones[0] <= first <= tones[1]
    )


def token_fates(rounds: Sequence[Round], decode: Decode) -> str:
    """The text as HTML, every token coloured by its fate; the tooltip says which round it came from and how likely it was.

    decode: token ids → text, e.g. ``target.decode``. A character made of several tokens carries the colours of all of them.
    """
    tokens = fates(rounds)
    spans, start = [], 0
    for count, text in whole_pieces([t.token_id for t in tokens], decode):
        spans.append(span(tokens[start : start + count], text, decode))
        start += count
    body = "".join(spans)
    return (
        f'<div style="line-height:1.9;font-size:15px">{legend(tokens)}'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{body}</div></div>'
    )


def span(group: Sequence[FatedToken], text: str, decode: Decode, notes: Sequence[str] = ()) -> str:
    """The tokens of one piece of text as HTML; notes are lines more for the tooltip."""
    grounds = [FATES[t.fate].colour(0.33) for t in group]
    ground = grounds[0] if len(set(grounds)) == 1 else f"linear-gradient(90deg,{','.join(grounds)})"
    look = FATES[group[-1].fate]
    style = f"background:{ground};border-bottom:2px {look.line} {look.colour()};border-radius:3px"
    hint = "\n".join([" | ".join(_hint(t, decode) for t in group), *notes])
    shown = escape(text or "∎").replace("\n", '<span style="opacity:.5;user-select:none">↵</span>\n')
    return f'<span title="{escape(hint)}" style="{style}">{shown}</span>'


def _hint(t: FatedToken, decode: Decode) -> str:
    words = [FATES[t.fate].label, f"round {t.round}" + (f", position {t.position}" if t.position else "")]
    if t.replaced is not None:
        words.append(f"instead of the draft “{decode([t.replaced]).replace(NO_CHARACTER, '▯')}”")
    numbers = (("p_target", t.p_target), ("p_draft", t.p_draft), ("confidence", t.confidence))
    return " · ".join([*words, *(f"{name} {value:.2f}" for name, value in numbers if value is not None)])


def legend(tokens: Sequence[FatedToken]) -> str:
    """How many tokens met which fate, as HTML in the fates' colours."""
    items = []
    for name, look in FATES.items():
        if count := sum(t.fate == name for t in tokens):
            style = f"background:{look.colour(0.33)};border-bottom:2px {look.line} {look.colour()};border-radius:3px;padding:0 .4em"
            items.append(f'<span style="{style};white-space:nowrap">{look.label}: {count}</span>')
    return f'<div style="font-size:12px;margin-bottom:.5em">{" ".join(items)} · {len(tokens)} tokens</div>'


def draft_states(rounds: Sequence[Round], block_size: int | None = None) -> list[list[str | None]]:
    """What became of every drafted token: one row per round without the prefill, ``block_size`` columns, None where nothing was drafted."""
    rounds = [r for r in rounds if r.anchor is not None]
    width = max((len(r.draft_tokens) for r in rounds), default=0) if block_size is None else block_size
    return [[_state(r, k) for k in range(width)] for r in rounds]


def _state(r: Round, k: int) -> str | None:
    if k >= len(r.draft_tokens):
        return None
    if k >= r.verify_length:
        return "unchecked"
    if k >= min(r.accepted + 1, len(r.committed)):  # behind a rejection, or behind an end of text that was accepted
        return "in vain"
    return "accepted" if k < r.accepted else "rejected"


def acceptance_heatmap(rounds: Sequence[Round], block_size: int | None = None, decode: Decode | None = None) -> go.Figure:
    """Rounds from left to right, positions in the block from bottom to top; colour says what became of each drafted token.

    block_size: rows of the picture, default the longest draft. decode: shows the drafted token in the tooltip.
    """
    rounds = [r for r in rounds if r.anchor is not None]
    states = draft_states(rounds, block_size)
    width = len(states[0]) if states else 0
    names = list(DRAFT_STATES)
    z = [[None if row[k] is None else names.index(row[k]) for row in states] for k in range(width)]
    hints = [[_draft_hint(r, k, state[k], decode) for r, state in zip(rounds, states, strict=True)] for k in range(width)]
    scale = [(at / len(names), look.colour(0.85)) for i, look in enumerate(DRAFT_STATES.values()) for at in (i, i + 1)]
    figure = go.Figure(
        go.Heatmap(
            z=z,
            x=[r.index for r in rounds],
            y=list(range(1, width + 1)),
            text=hints,
            hovertemplate="%{text}<extra></extra>",
            hoverongaps=False,
            colorscale=scale,
            zmin=-0.5,
            zmax=len(names) - 0.5,
            xgap=2,
            ygap=2,
            colorbar={"tickvals": list(range(len(names))), "ticktext": [look.label for look in DRAFT_STATES.values()]},
        )
    )
    drafted = sum(len(r.draft_tokens) for r in rounds)
    accepted = sum(row.count("accepted") for row in states)
    figure.update_xaxes(title="round (number)", tickformat="d")
    figure.update_yaxes(title="position in the block (tokens behind the anchor)", dtick=1)
    return dressed(figure, f"What became of {drafted} drafted tokens: {accepted} accepted (n = {len(rounds)} rounds)", 260 + 24 * width)


def _draft_hint(r: Round, k: int, state: str | None, decode: Decode | None) -> str:
    if state is None:
        return ""
    words = [f"round {r.index}, position {k + 1}: {DRAFT_STATES[state].label}"]
    if decode is not None:
        words.append(f"“{escape(decode([r.draft_tokens[k]]).replace(NO_CHARACTER, '▯'))}”" + COPIED.get(r.source, ""))
    if k < len(r.target_probs_of_drafts):
        words.append(f"p_target {r.target_probs_of_drafts[k]:.2f}")
    words.append(f"p_draft {r.draft_probs_of_drafts[k]:.2f}")
    if k < len(r.confidence) and r.confidence[k] == r.confidence[k]:
        words.append(f"confidence {r.confidence[k]:.2f}")
    return "<br>".join(words)


def race(lanes: Mapping[str, Sequence[Round]]) -> go.Figure:
    """Committed tokens over time, one staircase per lane (name → rounds of the same prompt); clocks start behind the prefill."""
    blue, green, red = (FATES[name].colour() for name in ("draft", "bonus", "correction"))
    styles = (("dash", GREY), ("solid", blue), ("dot", green), ("dashdot", red))
    figure = go.Figure()
    for i, (name, rounds) in enumerate(lanes.items()):
        seconds, tokens = [0.0], [len(rounds[0].committed)]
        for r in rounds[1:]:
            seconds.append(seconds[-1] + r.seconds)
            tokens.append(tokens[-1] + len(r.committed))
        dash, colour = styles[i % len(styles)]
        line = {"shape": "hv", "dash": dash, "color": colour, "width": 2.5}
        label = f"{name}: {tokens[-1]} tokens in {seconds[-1]:.2f} s"
        figure.add_trace(go.Scatter(x=seconds, y=tokens, mode="lines", name=label, line=line))
    figure.update_xaxes(title="time since the prefill (s)", rangemode="tozero")
    figure.update_yaxes(title="committed tokens (number)", rangemode="tozero")
    return dressed(figure, "The race on one prompt (n = 1 run per lane)", 380)


def dressed(figure: go.Figure, title: str, height: int) -> go.Figure:
    """What all figures share: a title, a transparent ground, grey text and lines that both themes can carry."""
    figure.update_xaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    return figure.update_layout(
        title=title,
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 60, "r": 20, "t": 80, "b": 50},
    )
