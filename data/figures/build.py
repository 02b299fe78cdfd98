"""Draw the pictures of README.md, RESULTS.md and the first notebook from committed results: the same results give the same bytes.

``python data/figures/build.py`` draws; with ``--record`` it first records the trace of the live panel again. The trace keeps this
machine's step times, so record it on an idle machine.
"""

from __future__ import annotations

import argparse
import base64
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import matplotlib
import nbformat
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.replay import replay
from dspark.bench.results import read_rows
from dspark.bench.stats import ALL, caption, summarise
from dspark.bench.trace import Trace, copies, prompt_of, record, trace_decode
from dspark.bench.traces import load_traces, save_traces
from dspark.cli import run_main
from dspark.draft.lookup import ContextLookup
from dspark.files import data_dir
from dspark.lab import strips
from dspark.lab.demo import NOTEBOOK
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, Decode, Drawing, Look, draft_states, fates, panels, styled, whole_pieces
from dspark.lab.replaying import SAMPLE
from dspark.lab.rounds import Run
from dspark.load import load_drafter, load_target
from dspark.round import Round
from dspark.schedule import make_policy, parse_policy

HEADLINE = data_dir() / "results" / "speed-bfloat16-t0.parquet"
PROMPT = "Write a Python class for a bank account with deposit, withdraw and balance methods."
TEXT = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
# In pixels: of the picture, a character, a line, above them. COLUMNS: characters in a line.
WIDTH, COLUMNS, CELL, LINE, TOP = 900, 112, 7.8, 19, 54
PAPER, INK, FAINT = ("#ffffff", "#0d1117"), ("#1f2328", "#e6edf3"), "rgba(128,128,128,.25)"  # light, dark; a lit round


def headline(frame: pd.DataFrame) -> Figure:
    """Two panels over the domains: speed-up over the run's baseline with 95 % intervals, and τ of the arms that draft."""
    baseline = frame.iloc[0]["baseline"]
    lines = summarise(frame, baseline)
    arms = [arm for arm in dict.fromkeys(lines["arm"]) if arm != baseline]
    domains = list(dict.fromkeys(lines["domain"]))
    with matplotlib.rc_context(TEXT):  # grey on a transparent background: readable on light and dark pages
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        speed, tau = figure.subplots(1, 2, width_ratios=(3, 2))
        for i, arm in enumerate(arms):
            rows = lines[lines["arm"] == arm].set_index("domain").loc[domains]
            x = [at + 0.7 * ((i + 0.5) / len(arms) - 0.5) for at in range(len(domains))]
            look = {"color": arm_colour(arm), "marker": "D" if "copy" in arm else "o", "linestyle": "none", "label": arm_label(arm)}
            speed.errorbar(x, rows["speedup"], yerr=[rows["speedup"] - rows["low"], rows["high"] - rows["speedup"]], capsize=3, **look)
            if (rows["tokens_per_round"] > 1).any():
                tau.plot(x, rows["tokens_per_round"], **look)
        _dress(speed, ["all (geom.\nmean)" if d == ALL else d for d in domains], f"speed-up over {arm_label(baseline)} (×)")
        _dress(tau, domains, "τ (tokens per round)")
        figure.legend(*speed.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1.5)
        figure.supxlabel(caption(frame), fontsize=8, color=GREY)
    return figure


def _dress(axes: Axes, domains: Sequence[str], label: str) -> None:
    axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(domains)), domains, fontsize=9)
    axes.set(ylabel=label, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GREY, alpha=0.25)


def still(trace: Trace, policy: str = "confidence:0.04", *, lines: int = 10) -> str:
    """The live panel as one SVG: text, details of one correction, drafts, windows and race, with the correction's round lit.

    policy: a name of the registry · lines: of the text, at most.
    """
    rounds, plain = (replay(trace, parse_policy(name, lambda: trace.times.sps)) for name in (policy, "plain"))
    arm, decode = policy.partition(":")[0] + "+copy" * copies(trace), trace_decode(trace)
    run = Run(rounds=rounds, plain=plain, arm=arm, tokens=len(trace.token_ids), decode=decode)
    title = " · ".join(run.tally().words("")[:4])
    caption = f"{trace.about['target']}, predicted from step times, n = 1 prompt: {shorten(prompt_of(trace), 80, placeholder='…')}"
    lit = next((row for row in run.details()[6:] if _corrected(row) and row["accepted"] > 1 and not row["copied"]), None)
    parts = [_text_strip(rounds, decode, lines, title, caption, lit)]
    if lit:
        box = f'<rect width="100%" height="26" fill="{FAINT}"/><rect width="4" height="26" fill="{FATES["draft"].colour()}"/>'
        parts.append(strips.Strip(f'{box}<text x="12" y="18">{strips.legal(_details(lit))}</text>', 26, ""))
    parts += run.strips().values()
    body, top = [], 0.0
    for i, part in enumerate(parts):
        left, right = (strips.LEFT + 8, strips.RIGHT + 8) if part.label else (0, 0) if i == 0 else (8, 8)
        frame = f'x="{left}" y="{top:g}" width="{WIDTH - left - right}" height="{part.height:g}" overflow="visible"'
        body.append(f"<svg {frame}>{part.body}</svg>")
        top += part.height + 8
    drawn = "".join(body)
    if lit:
        drawn = re.sub(
            rf'(class="band" data-r="{lit["round"]}"[^>]*) fill="transparent"', rf'\1 fill="{FAINT}" stroke="currentColor"', drawn
        )
    light, dark = (f"svg{{color:{ink}}}.paper{{fill:{paper}}}.gap{{stroke:{paper}}}" for ink, paper in zip(INK, PAPER, strict=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:g}" width="{WIDTH}" height="{top:g}" role="img" '
        f'aria-label="{strips.legal(f"The live panel: {title}; {caption}")}" font-family="system-ui,sans-serif" font-size="12" '
        f'fill="currentColor"><style>{light}@media(prefers-color-scheme:dark){{{dark}}}</style>'
        f'<rect class="paper" width="100%" height="100%" rx="8"/>{drawn}</svg>\n'
    )


def _corrected(row: Mapping[str, list]) -> bool:
    return row["fates"][-1] == FATES["correction"].label


def _details(row: Mapping[str, list]) -> str:
    """The line of details of the round's correction, as the panel says it."""
    k = len(row["tokens"]) - 1
    known = " · ".join(f"{name} {row[name][k]:.2f}" for name in ("p_target", "p_draft", "confidence") if row[name][k] is not None)
    words = f"“{row['tokens'][k]}” · correction · round {row['round']}, position {k + 1} · instead of “{row['drafts'][k]}” · {known}"
    return words.replace("\n", "↵")


def _text_strip(
    rounds: Sequence[Round], decode: Decode, lines: int, title: str, caption: str, lit: Mapping[str, list] | None
) -> strips.Strip:
    """Tokens as boxes of a fixed-width text; long lines are broken between tokens. lit: the round that has a frame."""
    tokens = fates(rounds)
    boxes, start, x, y = [], 0, 0, 0
    for count, text in whole_pieces([token.token_id for token in tokens], decode):
        start += count
        for i, part in enumerate(text.expandtabs(4).split("\n")):
            wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in part)
            if i or x + wide > COLUMNS:
                x, y = 0, y + 1
            if part and y < lines:
                framed = lit is not None and tokens[start - 1].round.index == lit["round"]
                boxes.append(_box(x, y, wide, part, FATES[tokens[start - 1].fate], framed))
            x += wide
    if y >= lines:
        boxes.append(f'<text x="10" y="{TOP + 8 + lines * LINE}">…</text>')
    bottom = TOP + 4 + min(y + 1, lines) * LINE + (14 if y >= lines else 0)
    head = f'<text x="10" y="20" font-size="13" font-weight="600">{strips.legal(title)}</text>'
    head += f'<text x="10" y="39">{strips.legal(caption)}</text>'
    return strips.Strip(f'{head}<g font-family="monospace" font-size="12">{"".join(boxes)}</g>', bottom, "")


def _box(x: int, y: int, wide: int, part: str, look: Look, framed: bool) -> str:
    left, top, words = 10 + x * CELL, TOP + y * LINE, strips.legal(part.replace(" ", "\u00a0"))
    dash = {"dashed": "4 2", "dotted": "1.5 1.5"}.get(look.line, "none")
    place = f'x="{left:.1f}" y="{top}" width="{wide * CELL:.1f}" height="15"' + ' stroke="currentColor"' * framed
    return (
        f'<rect {place} rx="2" fill="{look.colour(0.33)}"/>'
        f'<path d="M{left:.1f} {top + 15.5}h{wide * CELL:.1f}" stroke="{look.colour()}" stroke-width="1.5" stroke-dasharray="{dash}"/>'
        f'<text x="{left:.1f}" y="{top + 11.5}" textLength="{wide * CELL:.1f}" lengthAdjust="spacingAndGlyphs">{words}</text>'
    )


CARTOON = "draft-check-keep.png"


@styled
def cartoon(trace: Trace) -> Drawing:
    """Three frames of the first recorded round whose third draft was rejected: what was drafted, what the target said, what stays."""
    rounds, decode = replay(trace, make_policy("fixed")), trace_decode(trace)
    row = next(
        r for r in rounds if r.accepted == 2 < r.verify_length - 1 and all(map(str.strip, map(decode, zip(r.draft_tokens, strict=True))))
    )
    states, kept = draft_states(row), [*["accepted"] * row.accepted, None]
    frames = {
        f"1  Draft {len(states)} tokens, cheaply": [(token, DRAFT_STATES["unchecked"], "") for token in row.draft_tokens],
        "2  Check them all in one pass": [
            (token, DRAFT_STATES[state], {"accepted": "✓", "rejected": "✗"}.get(state, ""))
            for token, state in zip(row.draft_tokens, states, strict=True)
        ],
        "3  Keep what is right, correct the next": [
            (token, DRAFT_STATES[state] if state else FATES["correction"], "") for token, state in zip(row.committed, kept, strict=True)
        ],
    }
    about = f"One round of {trace.about['target']}, as recorded: three tokens for one pass of the full model, and the text is its own"
    figure, axes = panels("Draft, check, keep", about, 1.5, len(frames))
    for panel, (title, tokens) in zip(axes, frames.items(), strict=True):
        for x, (token, look, mark) in enumerate([(row.anchor, Look("", (128, 128, 128), ""), ""), *tokens]):
            box = matplotlib.patches.FancyBboxPatch(
                (x + 0.06, 0), 0.88, 1, "round,pad=0,rounding_size=0.1", ec=look.hex, fc=look.hex + "33"
            )
            panel.add_patch(box)
            panel.text(x + 0.5, 0.5, decode([token]).strip() or "·", ha="center", va="center", fontsize=7.5)
            panel.text(x + 0.5, 1.1, mark, ha="center", fontsize=10, color=look.hex)
        panel.set(xlim=(0, len(states) + 1), ylim=(-0.1, 1.6), title=title)
        panel.set_axis_off()
    return figure


def embed(picture: bytes, notebook: Path = NOTEBOOK) -> None:
    """Put the cartoon into the notebook's first cell, which a reader sees before anything has run."""
    pages = nbformat.read(notebook, as_version=4)
    pages.cells[0].attachments = {CARTOON: {"image/png": base64.b64encode(picture).decode()}}
    nbformat.write(pages, notebook)


def draw(options: argparse.Namespace) -> None:
    """Write headline.svg, live.svg and the cartoon into ``options.out``; the cartoon also into the notebook, unless --out is given."""
    if options.record:
        target = load_target("default")
        save_traces([record(target, ContextLookup(load_drafter("default", target)), PROMPT, max_new_tokens=128)], SAMPLE)
    trace = load_traces(SAMPLE)[0][1]
    panel, figure, frames = still(trace), headline(read_rows(HEADLINE)), cartoon(trace)._repr_png_()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "live.svg").write_text(panel, encoding="utf-8")
    (options.out / CARTOON).write_bytes(frames)
    if options.out == data_dir() / "figures":
        embed(frames)
    with matplotlib.rc_context({"svg.hashsalt": "dspark"}):
        figure.savefig(options.out / "headline.svg", transparent=True, metadata={"Date": None})
    print(options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python data/figures/build.py", description=__doc__)
    parser.add_argument("--record", action="store_true", help="record the trace of the live panel again")
    parser.add_argument("--out", type=Path, default=data_dir() / "figures", help="folder; default %(default)s")
    return run_main(parser, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
