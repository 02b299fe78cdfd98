"""The text while it is written, as HTML: fates in colour, the last round's discarded drafts struck through, characters only when whole.

A pure function of the rounds so far; :func:`dspark.lab.figures.token_fates` is its picture of a finished text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

from dspark.decode import Round
from dspark.lab.figures import DRAFT_STATES, NO_CHARACTER, Decode, draft_states, fates, legend, span, whole_pieces

Alternatives = Mapping[int, Sequence[Sequence[tuple[int, float]]]]
"""Round → what the target would rather have said at each position it checked: [(token id, probability), …], best first."""

BOX = "line-height:1.9;font-size:15px;white-space:pre-wrap;overflow-wrap:anywhere"


def remembered(decode: Decode, size: int = 8192) -> Decode:
    """The same function with a memory: a text is drawn many times while it grows, and its tokens stay the same."""
    known = lru_cache(size)(lambda token_ids: decode(list(token_ids)))
    return lambda token_ids: known(tuple(token_ids))


def streaming_text(
    rounds: Sequence[Round],
    decode: Decode,
    *,
    ended: bool = True,
    judged: bool = True,
    alternatives: Alternatives | None = None,
) -> str:
    """The text so far. decode: token ids → text, asked again at every call (see :func:`remembered`).

    ended: nothing follows, so bytes that wait for the rest of their character are shown as ▯; until then they are held back, and
    the last round's discarded drafts are shown struck through. judged False shows the last round as it was between drafting and
    checking: its drafts wait behind the text. alternatives: what else the target had in mind, for the tooltips.
    """
    last = rounds[-1] if rounds else None
    waiting = last is not None and not judged and not ended
    tokens = fates(rounds[:-1] if waiting else rounds)
    pieces = whole_pieces([t.token_id for t in tokens], decode)
    if pieces and not ended and NO_CHARACTER in decode([t.token_id for t in tokens[-pieces[-1][0] :]]):
        pieces.pop()  # the rest of the character is still to come

    discarded = _discarded(last, decode, waiting) if last is not None and not ended else ""
    cut = len(tokens) if waiting or last is None else len(tokens) - len(last.committed) + min(last.accepted, len(last.committed))
    spans, start = [], 0
    for count, text in pieces:
        if discarded and start + count > cut:
            spans.append(discarded)
            discarded = ""
        group = tokens[start : start + count]
        notes = [note for t in group if (note := _rather(alternatives, t.round, max(t.position - 1, 0), decode))]
        spans.append(span(group, text, decode, notes))
        start += count
    cursor = "" if ended else '<span style="opacity:.6">▍</span>'
    return f'<div>{legend(tokens)}<div style="{BOX}">{"".join(spans)}{discarded}{cursor}</div></div>'


def _discarded(r: Round, decode: Decode, waiting: bool) -> str:
    """The drafts of a round that did not make it (all of them while they wait), as HTML."""
    states = ["unchecked"] * len(r.draft_tokens) if waiting else draft_states([r], len(r.draft_tokens))[0] if r.anchor is not None else []
    start = next((k for k, state in enumerate(states) if state != "accepted"), len(states))
    shown, at = [], start
    for count, text in whole_pieces(r.draft_tokens[start:], decode):
        look = DRAFT_STATES[states[at]]
        label = "waits to be checked" if waiting else look.label
        strike = "" if waiting else "text-decoration:line-through;"
        style = f"{strike}opacity:.75;background:{look.colour(0.15)};border-bottom:2px {look.line} {look.colour()};border-radius:3px"
        hint = f"draft {at + 1} of round {r.index}: {label}{_numbers(r, at, waiting)}"
        shown.append(f'<span title="{escape(hint)}" style="{style}">{escape(text or "∎").replace(chr(10), "↵")}</span>')
        at += count
    return "".join(shown)


def _numbers(r: Round, k: int, waiting: bool) -> str:
    pairs = (("p_target", r.target_probs_of_drafts), ("p_draft", r.draft_probs_of_drafts), ("confidence", r.confidence))
    pairs = pairs[1:] if waiting else pairs
    return "".join(f" · {name} {values[k]:.2f}" for name, values in pairs if k < len(values) and values[k] == values[k])


def _rather(alternatives: Alternatives | None, index: int, k: int, decode: Decode) -> str:
    rows = (alternatives or {}).get(index, ())
    if k >= len(rows):
        return ""
    named = ", ".join(f"“{decode([token]).replace(NO_CHARACTER, '▯') or '∎'}” {p:.2f}" for token, p in rows[k])
    return f"the target's best: {named}"


@dataclass(frozen=True)
class Tally:
    """What a run came to, the prefill left out. speedup: over plain decoding's tokens/s on the same prompt, NaN where there is none."""

    tokens: int
    rounds: int
    seconds: float
    checked: int
    in_vain: int
    plain_tokens_per_second: float

    @property
    def tokens_per_round(self) -> float:
        return self.tokens / self.rounds if self.rounds else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else math.nan

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second


def tally(rounds: Sequence[Round], plain: Sequence[Round] = ()) -> Tally:
    """Count them, siblings among the checks. plain: rounds of plain decoding on the same prompt."""
    rounds, plain = rounds[1:], plain[1:]
    checked = sum(r.verify_length + len(r.siblings) for r in rounds)
    kept = sum(min(r.accepted + (r.sibling is not None), len(r.committed)) for r in rounds)
    seconds = sum(r.seconds for r in plain)
    speed = sum(len(r.committed) for r in plain) / seconds if seconds > 0 else math.nan
    return Tally(sum(len(r.committed) for r in rounds), len(rounds), sum(r.seconds for r in rounds), checked, checked - kept, speed)


def numbers(t: Tally, how: str = "n = 1 run") -> str:
    """The tally as one line of HTML. how: where its seconds come from."""
    if not t.rounds:
        return ""
    parts = [f"<b>{t.tokens_per_second:.1f}</b> tokens/s", f"τ = <b>{t.tokens_per_round:.2f}</b> tokens per round"]
    if t.speedup == t.speedup:
        parts.append(f"<b>{t.speedup:.2f}×</b> plain decoding’s {t.plain_tokens_per_second:.1f} ({escape(how)})")
    parts.append(f"<b>{t.in_vain}</b> of {t.checked} checks in vain, {t.rounds} rounds")
    return f'<div style="font-size:13px">{" · ".join(parts)}</div>'
