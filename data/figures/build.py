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
from collections.abc import Sequence
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
from dspark.bench.stats import ALL, summarise
from dspark.bench.table import caption
from dspark.bench.trace import Trace, record
from dspark.bench.traces import load_traces, save_trace
from dspark.cli import run_main
from dspark.draft.lookup import ContextLookup
from dspark.files import data_dir
from dspark.lab import strips
from dspark.lab.demo import NOTEBOOK
from dspark.lab.figures import DRAFT_STATES, FATES, GREY, Decode, Drawing, Look, draft_states, fates, panels, styled, whole_pieces
from dspark.lab.replaying import SAMPLE, arm_of, prompt_of, trace_decode
from dspark.lab.text import tally
from dspark.load import load_drafter, load_target
from dspark.round import Round
from dspark.schedule import Autoregressive, make_policy

HEADLINE = data_dir() / "results" / "speed-bfloat16-t0.parquet"
PROMPT = "Write a Python class for a bank account with deposit, withdraw and balance methods."
TEXT = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
COLUMNS, CELL, LINE, TOP = 92, 7.5, 19, 60  # characters in a line; pixels of a character, of a line, and above the first line


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


def still(trace: Trace, policy: str = "prefix", *, lines: int = 10) -> str:
    """The replay panel as one SVG: text, race, heatmap and window. policy: a name of the registry · lines: of the text, at most."""
    rounds, plain = replay(trace, make_policy(policy, sps=lambda: trace.times.sps)), replay(trace, Autoregressive())
    block_size, length = int(trace.about["block_size"]), len(trace.token_ids)
    t = tally(rounds, plain)
    speed = f"{t.tokens_per_second:.1f} tokens/s, {t.speedup:.2f}× plain decoding’s {t.plain_tokens_per_second:.1f}"
    title = f"Predicted from measured step times: {speed} · τ = {t.tokens_per_round:.2f} tokens per round"
    caption = f"{trace.about['target']}, n = 1 prompt: {shorten(prompt_of(trace), 80, placeholder='…')}"
    parts = [
        _text_strip(rounds, trace_decode(trace), lines, title, caption),
        strips.race([("plain", plain), (arm_of(policy, trace), rounds)], length),
        strips.heat(rounds, block_size),
        strips.windows(rounds, block_size),
    ]
    body, top = [], 0.0
    for part in parts:
        body.append(f'<g transform="translate(0 {top:g})">{part.body}</g>')
        top += part.height + 8
    drawing = strips.Strip("".join(body), top, f"The live panel: {title}; {caption}").svg()
    return re.sub(r"<title>.*?</title>", "", drawing) + "\n"  # a picture shows no tooltips


def _text_strip(rounds: Sequence[Round], decode: Decode, lines: int, title: str, caption: str) -> strips.Strip:
    """Tokens as boxes of a fixed-width text; long lines are broken between tokens."""
    tokens = fates(rounds)
    boxes, start, x, y = [], 0, 0, 0
    for count, text in whole_pieces([token.token_id for token in tokens], decode):
        start += count
        for i, part in enumerate(text.expandtabs(4).split("\n")):
            wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in part)
            if i or x + wide > COLUMNS:
                x, y = 0, y + 1
            if part and y < lines:
                boxes.append(_box(x, y, wide, part, FATES[tokens[start - 1].fate]))
            x += wide
    if y >= lines:
        boxes.append(f'<text x="2" y="{TOP + 8 + lines * LINE}">…</text>')
    bottom = TOP + 14 + min(y + 1, lines) * LINE + (14 if y >= lines else 0)
    head = f'<text x="2" y="13" font-size="12" font-weight="600">{strips.legal(title)}</text>'
    head += f'<text x="2" y="29" font-size="12">{strips.legal(caption)}</text>'
    head += strips.legend(2, 39, [(look, n) for name, look in FATES.items() if (n := sum(token.fate == name for token in tokens))])
    return strips.Strip(f'{head}<g font-family="monospace" font-size="12">{"".join(boxes)}</g>', bottom, "")


def _box(x: int, y: int, wide: int, part: str, look: Look) -> str:
    left, top = 2 + x * CELL, TOP + y * LINE
    words = strips.legal(part.replace(" ", "\u00a0"))
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{wide * CELL:.1f}" height="15" rx="2" fill="{look.colour(0.3)}"/>'
        f'<line x1="{left:.1f}" x2="{left + wide * CELL:.1f}" y1="{top + 15.5}" y2="{top + 15.5}" stroke="{look.colour()}"/>'
        f'<text x="{left:.1f}" y="{top + 11.5}" textLength="{wide * CELL:.1f}" lengthAdjust="spacingAndGlyphs" fill="{GREY}">{words}</text>'
    )


CARTOON = "draft-check-keep.png"


@styled
def cartoon(trace: Trace) -> Drawing:
    """Three frames of the first recorded round whose third draft was rejected: what was drafted, what the target said, what stays."""
    rounds, decode = replay(trace, make_policy("fixed")), trace_decode(trace)
    row = next(
        r for r in rounds if r.accepted == 2 < r.verify_length - 1 and all(map(str.strip, map(decode, zip(r.draft_tokens, strict=True))))
    )
    states, kept = draft_states([row])[0], [*["accepted"] * row.accepted, None]
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
        save_trace(record(target, ContextLookup(load_drafter("default", target)), PROMPT, max_new_tokens=128), SAMPLE)
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
