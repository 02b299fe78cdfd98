"""Records → pictures. Pure functions: the same rounds give the same HTML string or figure, and no model is run.

Every token fate has one name and one colour in all figures, and every policy those of :mod:`dspark.schedule`. The colours follow Okabe
and Ito and can be told apart by colour-blind readers; backgrounds are translucent, so light and dark pages both work.
"""

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.stats import ALL
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

    @property
    def hex(self) -> str:
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)


FATES = {
    "draft": Look("accepted draft", (0, 114, 178), "solid"),
    "copy": Look("accepted copy from the context", (86, 180, 233), "double"),
    "bonus": Look("bonus", (0, 130, 90), "dotted"),
    "correction": Look("correction", (213, 94, 0), "dashed"),
    "plain": Look("plain step", (170, 170, 170), "solid"),
}
DRAFT_STATES = {
    "unchecked": Look("not verified", (170, 170, 170), "dotted"),
    "discarded": Look("after a rejection", (230, 190, 130), "dotted"),
    "rejected": replace(FATES["correction"], label="rejected"),
    "accepted": replace(FATES["draft"], label="accepted"),
}
GREY = "#7a7a7a"  # readable on white and on near-black
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY),
    **{"axes.facecolor": "none", "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 9},
    "axes.prop_cycle": matplotlib.cycler(color=["#0072b2", "#d55e00", "#00825a", "#cc79a7", "#56b4e9", "#a6761d"]),
    "text.parse_math": False,  # a token may be a dollar sign
}
BESIDE = "outside right center"  # the place of a legend
styled = matplotlib.rc_context(STYLE)  # decorates every function that draws


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
    joined = joiner in (first, before[-1:])
    return bool(first) and (unicodedata.category(first)[0] == "M" or joined or tones[0] <= first <= tones[1])


def draft_states(r: Round) -> list[str]:
    """The state of each draft of a round, a key of :data:`DRAFT_STATES`."""
    kept = min(r.accepted + 1, len(r.committed))  # what follows comes after a rejection, or after an accepted end of text
    judged = ("discarded" if k >= kept else "accepted" if k < r.accepted else "rejected" for k in range(r.verify_length))
    return [*judged, *["unchecked"] * (len(r.draft_tokens) - r.verify_length)]


class Drawing(Figure):
    """A figure that a notebook shows as a PNG, which survives on exported pages, on paper and on GitHub; the ground is transparent."""

    def _repr_png_(self) -> tuple[bytes, dict[str, object]]:
        """The picture at twice its size on the page, and what says so; the finding is read aloud by screen readers."""
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the font lacks some tokens' letters
            self.savefig(png := BytesIO(), format="png", dpi=160)
        width, height = (round(80 * inches) for inches in self.get_size_inches())
        return png.getvalue(), {"width": width, "height": height, "alt": self.get_suptitle().replace("\n", " ")}


def panels(finding: str, caption: str, height: float, columns: int = 1, **options: object) -> tuple[Drawing, Sequence[Axes]]:
    """An empty figure: what it shows as its title, what was measured (n, machine) below it, and panels side by side.

    height: inches; the width is 9. options: of :meth:`matplotlib.figure.Figure.subplots`.
    """
    figure = Drawing(figsize=(9, height), layout="constrained", facecolor="none")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    figure.suptitle(fill(finding, 80), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(fill(caption, 150), x=0.01, ha="left", fontsize=8)
    return figure, axes


@styled
def curves(lines: Iterable[dict[str, object]], finding: str, caption: str, height: float = 4.2, **options: object) -> Drawing:
    """Lines with marks in one panel; options set its axes.

    lines: x and y; perhaps error, half of an interval within 0 … 1, and notes, which stand beside the marks of the first line; and what
        matplotlib's ``plot`` takes.
    """
    figure, (axes,) = panels(finding, caption, height)
    for line in lines:
        x, y, error, notes = (line.pop(name, None) for name in ("x", "y", "error", "notes"))
        axes.plot(x, y, **{"marker": "o", "markersize": 5} | line)
        if error is not None:
            axes.vlines(x, (y - error).clip(0), (y + error).clip(upper=1), color=axes.lines[-1].get_color(), alpha=0.5)
        for note, *at in zip(notes, x, y, strict=True) if notes is not None and len(axes.lines) == 1 else ():
            axes.annotate(f"{note:g}", at, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(**options)
    figure.legend(loc=BESIDE)
    return figure


@styled
def distributions(named: Mapping[str, Sequence[float]], tokens: Sequence[str], finding: str, caption: str) -> Drawing:
    """Bars of distributions over the same tokens, side by side; the first one is grey."""
    figure, (axes,) = panels(finding, caption, 3.6)
    colours, wide = [GREY, *(FATES[fate].hex for fate in ("draft", "correction", "bonus"))], 0.84 / len(named)
    for i, ((name, values), colour) in enumerate(zip(named.items(), colours, strict=False)):
        places = np.arange(len(tokens)) + (i + 0.5) * wide - 0.42
        axes.bar_label(axes.bar(places, values, 0.92 * wide, label=name, color=colour, alpha=0.85), fmt="%.2f", fontsize=8)
    axes.set(xlabel="token", ylabel="probability", ylim=(0, 1.05), xticks=range(len(tokens)), xticklabels=tokens)
    axes.grid(axis="x", visible=False)
    figure.legend(loc=BESIDE)
    return figure


@styled
def by_arm(lines: pd.DataFrame, label: str, finding: str, caption: str) -> Drawing:
    """One row per arm, the fastest on top, and one panel per domain: a dot, with its interval where there is one.

    lines: columns arm, domain, n, speedup and perhaps low and high; the domain "all" comes first and sorts the arms.
    """
    domains = [ALL, *(name for name in dict.fromkeys(lines["domain"]) if name != ALL)]
    arms = list(lines[lines["domain"] == ALL].sort_values("speedup", na_position="first")["arm"])
    labels, colours = list(map(arm_label, arms)), list(map(arm_colour, arms))
    figure, axes = panels(finding, f"{caption}; all: geometric mean", 1.6 + 0.27 * len(arms), len(domains), sharex=True, sharey=True)
    for panel, domain in zip(axes, domains, strict=True):
        rows = lines[lines["domain"] == domain].set_index("arm").loc[arms]
        panel.scatter(rows["speedup"], labels, s=28, c=colours, edgecolors=GREY, linewidths=0.7)  # seen on any ground
        if "low" in rows:
            panel.hlines(labels, rows["low"], rows["high"], colours, alpha=0.6)
        panel.axvline(1, color=GREY, linestyle="--", linewidth=1)
        panel.set_title(f"{domain}, n = {rows['n'].max()}")
    axes[0].set_ylim(-0.6, len(arms) - 0.4)
    axes[len(axes) // 2].set_xlabel(label)
    return figure
