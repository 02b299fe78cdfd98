"""Records → pictures. Pure functions: the same rounds give the same HTML string or plotly figure, and no model is run.

Every token fate has one name and one colour in all figures, and every policy those of :mod:`dspark.schedule`. The colours follow Okabe
and Ito and can be told apart by colour-blind readers; backgrounds are translucent, so light and dark pages both work.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import pandas as pd
import plotly.graph_objects as go

from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.trace import LONGEST_CHARACTER
from dspark.draft.source import COPY
from dspark.round import Round
from dspark.target.stream import BROKEN

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Look:
    """How one fate is drawn.

    label: its name in legends.
    rgb: red, green and blue in 0..255.
    line: the CSS style of its underline, which also works in grey prints.
    """

    label: str
    rgb: tuple[int, int, int]
    line: str

    def colour(self, alpha: float = 1.0) -> str:
        return f"rgba({self.rgb[0]},{self.rgb[1]},{self.rgb[2]},{alpha:g})"


FATES = {
    "draft": Look("accepted draft", (0, 114, 178), "solid"),
    "copy": Look("accepted copy from the context", (86, 180, 233), "double"),
    "bonus": Look("bonus", (0, 130, 90), "dotted"),
    "correction": Look("correction", (213, 94, 0), "dashed"),
    "plain": Look("plain step", (170, 170, 170), "solid"),
}
DRAFT_STATES = {
    "unchecked": Look("not verified", (170, 170, 170), "dotted"),
    "discarded": Look("verified, but after a rejection", (230, 190, 130), "dotted"),
    "rejected": replace(FATES["correction"], label="rejected"),
    "accepted": replace(FATES["draft"], label="accepted"),
}
GREY = "#7a7a7a"  # readable on white and on near-black


@dataclass(frozen=True)
class FatedToken:
    """A committed token and its origin.

    fate: a key of :data:`FATES`.
    round: the one that committed it.
    at: its index among the round's tokens, from 0. A correction replaces the draft of this index.
    """

    token_id: int
    fate: str
    round: Round
    at: int


def fates(rounds: Sequence[Round]) -> list[FatedToken]:
    """Every committed token with its fate."""
    return [FatedToken(token, _fate(r, k), r, k) for r in rounds for k, token in enumerate(r.committed)]


def _fate(r: Round, k: int) -> str:
    if r.verify_length == 0:
        return "plain"
    if k < r.accepted:
        return COPY if r.source == COPY else "draft"
    return "correction" if r.accepted < r.verify_length else "bonus"


def draft_numbers(r: Round, k: int, *, judged: bool = True) -> str:
    """Probabilities and confidence of draft k (from 0) for a tooltip, as far as they are known; judged False leaves the target's out."""
    pairs = (("p_target", r.target_probs_of_drafts), ("p_draft", r.draft_probs_of_drafts), ("confidence", r.confidence))
    known = ((name, values[k]) for name, values in pairs[not judged :] if k < len(values))
    return "".join(f" · {name} {value:.2f}" for name, value in known if not math.isnan(value))


def whole_pieces(token_ids: Sequence[int], decode: Decode) -> list[tuple[int, str]]:
    """Cut a text into the smallest groups of tokens that are whole characters: [(tokens in the group, its text), …].

    An emoji or a CJK character may consist of several byte tokens, none of which can be shown alone. Each group is decoded together with
    the one before it, because tokenizers treat the start of a text differently. Incomplete characters (a text that was cut, a mistake
    of the model) are shown as ▯. Accents, skin tones and joiners stay with the character that they modify.
    """
    pieces, before, group = [], [], []
    for i, token in enumerate(token_ids):
        group.append(token)
        text = decode([*before, *group])[len(decode(before)) if before else 0 :]
        broken = text.endswith(BROKEN) and len(group) < LONGEST_CHARACTER
        if broken and i + 1 < len(token_ids):
            continue
        if pieces and _continues(pieces[-1][1], text):
            count, start = pieces.pop()
            pieces.append((count + len(group), start + text))
        else:
            pieces.append((len(group), text.replace(BROKEN, "▯")))
        before, group = group if text else before, []
    return pieces


def _continues(before: str, text: str) -> bool:
    joiner, tones = "\u200d", ("\U0001f3fb", "\U0001f3ff")
    first = text[:1]
    return bool(first) and (
        unicodedata.category(first)[0] == "M" or first == joiner or before[-1:] == joiner or tones[0] <= first <= tones[1]
    )


def span(group: Sequence[FatedToken], text: str, decode: Decode) -> str:
    """The tokens of one piece of text as HTML."""
    grounds = [FATES[t.fate].colour(0.33) for t in group]
    ground = grounds[0] if len(set(grounds)) == 1 else f"linear-gradient(90deg,{','.join(grounds)})"
    look = FATES[group[-1].fate]
    style = f"background:{ground};border-bottom:2px {look.line} {look.colour()};border-radius:3px"
    hint = " | ".join(_hint(t, decode) for t in group)
    shown = escape(text or "∎").replace("\n", '<span style="opacity:.5;user-select:none">↵</span>\n')
    return f'<span title="{escape(hint)}" style="{style}">{shown}</span>'


def _hint(t: FatedToken, decode: Decode) -> str:
    place = "" if t.fate == "plain" else f", position {t.at + 1}"
    instead = ""
    if t.fate == "correction":
        instead = f" · instead of the draft “{decode([t.round.draft_tokens[t.at]]).replace(BROKEN, '▯')}”"
    numbers = "" if t.fate in ("plain", "bonus") else draft_numbers(t.round, t.at)
    return f"{FATES[t.fate].label} · round {t.round.index}{place}{instead}{numbers}"


def legend(tokens: Sequence[FatedToken]) -> str:
    """The number of tokens of each fate, as HTML in the fates' colours."""
    items = []
    for name, look in FATES.items():
        if count := sum(t.fate == name for t in tokens):
            style = f"background:{look.colour(0.33)};border-bottom:2px {look.line} {look.colour()};border-radius:3px;padding:0 .4em"
            items.append(f'<span style="{style};white-space:nowrap">{look.label}: {count}</span>')
    return f'<div style="font-size:12px;margin-bottom:.5em">{" ".join(items)} · {len(tokens)} tokens</div>'


def draft_states(rounds: Sequence[Round], block_size: int | None = None) -> list[list[str | None]]:
    """The state of every drafted token: one row per round without the prefill, ``block_size`` columns, None where nothing was drafted."""
    rounds = [r for r in rounds if r.anchor is not None]
    width = max((len(r.draft_tokens) for r in rounds), default=0) if block_size is None else block_size
    return [[_state(r, k) for k in range(width)] for r in rounds]


def _state(r: Round, k: int) -> str | None:
    if k >= len(r.draft_tokens):
        return None
    if k >= r.verify_length:
        return "unchecked"
    if k >= min(r.accepted + 1, len(r.committed)):  # after a rejection, or after an accepted end of text
        return "discarded"
    return "accepted" if k < r.accepted else "rejected"


def distributions(named: Mapping[str, Sequence[float]], tokens: Sequence[str], title: str) -> go.Figure:
    """Bars of distributions over the same tokens, side by side; the first one is grey."""
    colours = [GREY, *(FATES[fate].colour(0.85) for fate in ("draft", "correction", "bonus"))]
    figure = go.Figure()
    for (name, values), colour in zip(named.items(), colours, strict=False):
        figure.add_bar(x=list(tokens), y=list(values), name=name, marker_color=colour, texttemplate="%{y:.2f}")
    figure.update_xaxes(title="token")
    figure.update_yaxes(title="probability", range=[0, 1])
    return dressed(figure, title, 380)


def arm_colours(arms: pd.Series) -> dict[str, object]:
    """Arguments of a plotly.express figure that draws every arm with its own name and colour."""
    return {"color": arms.map(arm_label), "color_discrete_map": {arm_label(arm): arm_colour(arm) for arm in arms.unique()}}


def dressed(figure: go.Figure, title: str, height: int) -> go.Figure:
    """The common style: a title, the legend below, a transparent background, grey text and lines that suit light and dark pages."""
    figure.update_xaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(128,128,128,.25)", zeroline=False)
    return figure.update_layout(
        title={"text": title, "y": 0.97, "yanchor": "top"},
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY},
        legend={"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "title": None},
        margin={"l": 60, "r": 20, "t": 60 + 20 * title.count("<br>"), "b": 110},
    )
