"""The live panel as one still picture, an SVG for pages that show no widgets: text, race, heatmap and window of one replayed trace."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from dspark.bench.replay import replay
from dspark.bench.trace import Trace
from dspark.decode import Round
from dspark.lab import strips
from dspark.lab.controls import short
from dspark.lab.figures import FATES, GREY, Decode, fates, whole_pieces
from dspark.lab.replaying import prompt_of, trace_decode
from dspark.lab.text import tally
from dspark.schedule import AdaptiveWindow, Autoregressive, Policy

COLUMNS, CELL, LINE, TOP = 92, 7.5, 19, 60  # characters in a line, pixels of one, pixels of a line, and where the first begins


def still(trace: Trace, policy: Policy | None = None, *, lines: int = 10) -> str:
    """The whole drawing. policy: default the adaptive window with its own thresholds. lines: of the text, at most.

    The same trace gives the same bytes. Grey text on no ground, so that it can be read on a light and on a dark page.
    """
    policy = AdaptiveWindow() if policy is None else policy
    rounds, plain = replay(trace, policy), replay(trace, Autoregressive())
    block_size, length = int(trace.about["block_size"]), len(trace.token_ids)
    t = tally(rounds, plain)
    speed = f"{t.tokens_per_second:.1f} tokens/s, {t.speedup:.2f}× plain decoding’s {t.plain_tokens_per_second:.1f}"
    told = [
        f"{speed} · τ = {t.tokens_per_round:.2f} tokens per round",
        f"{trace.about['target']}, n = 1 prompt, {length} tokens: {short(prompt_of(trace))}",
    ]
    parts = [
        _text_strip(rounds, trace_decode(trace), lines, told),
        strips.race({"plain decoding": plain, f"DSpark, {_name(policy)}": rounds}, float("inf"), length),
        strips.heat(rounds, block_size),
        strips.windows(rounds, policy, block_size),
    ]
    body, top = [], 0.0
    for part in parts:
        body.append(f'<g transform="translate(0 {top:g})">{part.body}</g>')
        top += part.height + 8
    drawing = strips.Strip("".join(body), top, f"The live panel: {'; '.join(told)}").svg()
    return re.sub(r"<title>.*?</title>", "", drawing) + "\n"  # a still has no tooltips


def _name(policy: Policy) -> str:
    return "adaptive window" if isinstance(policy, AdaptiveWindow) else type(policy).__name__


def _text_strip(rounds: Sequence[Round], decode: Decode, lines: int, told: Sequence[str]) -> strips.Strip:
    """Tokens as boxes of a fixed-width text; a line that is too long is broken between tokens."""
    tokens = fates(rounds)
    boxes, start, x, y = [], 0, 0, 0
    for count, text in whole_pieces([token.token_id for token in tokens], decode):
        look = FATES[tokens[start + count - 1].fate]
        start += count
        for i, part in enumerate(text.expandtabs(4).split("\n")):
            if i:
                x, y = 0, y + 1
            wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in part)
            if x + wide > COLUMNS:
                x, y = 0, y + 1
            if y >= lines:
                break
            if part:
                boxes.append(_box(x, y, wide, part, look.colour(0.3), look.colour()))
            x += wide
        if y >= lines:
            boxes.append(f'<text x="2" y="{TOP + 8 + lines * LINE}">…</text>')
            break
    bottom = TOP + 14 + min(y + 1, lines) * LINE + (14 if y >= lines else 0)
    bold = ' font-weight="600"'
    head = "".join(
        f'<text x="2" y="{13 + 16 * i}" font-size="12"{"" if i else bold}>{strips.legal(words)}</text>' for i, words in enumerate(told)
    )
    return strips.Strip(head + _legend(tokens) + f'<g font-family="monospace" font-size="12">{"".join(boxes)}</g>', bottom, "")


def _box(x: int, y: int, wide: int, part: str, ground: str, line: str) -> str:
    left, top = 2 + x * CELL, TOP + y * LINE
    words = strips.legal(part.replace(" ", "\u00a0"))
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{wide * CELL:.1f}" height="15" rx="2" fill="{ground}"/>'
        f'<line x1="{left:.1f}" x2="{left + wide * CELL:.1f}" y1="{top + 15.5}" y2="{top + 15.5}" stroke="{line}" stroke-width="1.5"/>'
        f'<text x="{left:.1f}" y="{top + 11.5}" textLength="{wide * CELL:.1f}" lengthAdjust="spacingAndGlyphs" fill="{GREY}">{words}</text>'
    )


def _legend(tokens: Sequence[object]) -> str:
    items, x = [], 2.0
    for name, look in FATES.items():
        if count := sum(token.fate == name for token in tokens):
            label = f"{look.label}: {count}"
            items.append(f'<rect x="{x:.0f}" y="39" width="10" height="10" rx="2" fill="{look.colour(0.85)}"/>')
            items.append(f'<text x="{x + 14:.0f}" y="48">{label}</text>')
            x += 34 + 5.8 * len(label)
    return "".join(items)
