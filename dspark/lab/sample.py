"""``python -m dspark.lab.sample``: record the trace that comes with the package and draw it as the README's picture of the live panel.

The trace keeps this machine's step times, so record it on an idle machine. ``--picture`` only draws.
"""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dspark.bench.replay import replay
from dspark.bench.trace import Trace, record
from dspark.bench.trace_file import load_trace, save_trace
from dspark.cli import run_main
from dspark.draft.lookup import ContextLookup
from dspark.files import data_dir
from dspark.lab import strips
from dspark.lab.controls import short
from dspark.lab.figures import FATES, GREY, Decode, Look, fates, whole_pieces
from dspark.lab.live_widgets import EXAMPLES
from dspark.lab.replaying import arm_of, prompt_of, sample_traces, trace_decode
from dspark.lab.text import tally
from dspark.load import load_drafter, load_target
from dspark.round import Round
from dspark.schedule import Autoregressive, make_policy

COLUMNS, CELL, LINE, TOP = 92, 7.5, 19, 60  # characters in a line; pixels of a character, of a line, and above the first line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status, see :func:`dspark.cli.run_main`."""
    parser = argparse.ArgumentParser(prog="python -m dspark.lab.sample", description=__doc__)
    parser.add_argument("--out", type=Path, default=sample_traces() / "sample.parquet", help="the trace; default %(default)s")
    parser.add_argument("--figure", type=Path, default=data_dir() / "figures" / "live.svg", help="the picture; default %(default)s")
    parser.add_argument("--picture", action="store_true", help="only draw an existing trace")
    return run_main(parser, _work, arguments)


def _work(options: argparse.Namespace) -> None:
    if not options.picture:
        target = load_target("default")
        source = ContextLookup(load_drafter("default", target))
        save_trace(record(target, source, EXAMPLES[0], max_new_tokens=128), options.out)
        print(options.out)
    drawn = still(load_trace(options.out))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_text(drawn, encoding="utf-8")
    print(options.figure)


def still(trace: Trace, policy: str = "prefix", *, lines: int = 10) -> str:
    """The panel as one SVG: text, race, heatmap and window of a replayed trace. The same trace gives the same bytes.

    policy: a name of the registry · lines: of the text, at most.
    """
    rule = make_policy(policy, sps=lambda: trace.times.sps)
    rounds, plain = replay(trace, rule), replay(trace, Autoregressive())
    block_size, length = int(trace.about["block_size"]), len(trace.token_ids)
    t = tally(rounds, plain)
    speed = f"{t.tokens_per_second:.1f} tokens/s, {t.speedup:.2f}× plain decoding’s {t.plain_tokens_per_second:.1f}"
    title = f"Predicted from measured step times: {speed} · τ = {t.tokens_per_round:.2f} tokens per round"
    caption = f"{trace.about['target']}, n = 1 prompt: {short(prompt_of(trace))}"
    parts = [
        _text_strip(rounds, trace_decode(trace), lines, title, caption),
        strips.race([("plain", plain), (arm_of(policy, trace), rounds)], float("inf"), length),
        strips.heat(rounds, block_size),
        strips.windows(rounds, rule, block_size),
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


if __name__ == "__main__":
    sys.exit(main())
