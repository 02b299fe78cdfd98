"""The text while it is decoded, as HTML: tokens coloured by fate, the last round's rejected drafts struck through. And its tally."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

from dspark.lab.figures import DRAFT_STATES, Decode, draft_numbers, draft_states, fates, legend, span, whole_pieces
from dspark.round import Round
from dspark.target.stream import BROKEN

BOX = "line-height:1.9;font-size:15px;white-space:pre-wrap;overflow-wrap:anywhere"


def remembered(decode: Decode, size: int = 8192) -> Decode:
    """The same function with a cache: a growing text is drawn many times from the same tokens."""
    known = lru_cache(size)(lambda token_ids: decode(list(token_ids)))
    return lambda token_ids: known(tuple(token_ids))


def streaming_text(rounds: Sequence[Round], decode: Decode, *, ended: bool = True, judged: bool = True) -> str:
    """The text so far.

    decode: token ids → text; see :func:`remembered`.
    ended: the text is complete, so bytes of an unfinished character are shown as ▯. Before that they are held back, and the last
    round's rejected drafts are shown struck through.
    judged: False shows the last round between drafting and verification: its drafts wait after the text.
    """
    last = rounds[-1] if rounds else None
    waiting = last is not None and not judged and not ended
    tokens = fates(rounds[:-1] if waiting else rounds)
    pieces = whole_pieces([t.token_id for t in tokens], decode)
    if pieces and not ended and BROKEN in decode([t.token_id for t in tokens[-pieces[-1][0] :]]):
        pieces.pop()  # the character's last bytes are still missing

    discarded = _discarded(last, decode, waiting) if last is not None and not ended else ""
    cut = len(tokens) if waiting or last is None else len(tokens) - len(last.committed) + min(last.accepted, len(last.committed))
    spans, start = [], 0
    for count, text in pieces:
        if discarded and start + count > cut:
            spans.append(discarded)
            discarded = ""
        spans.append(span(tokens[start : start + count], text, decode))
        start += count
    cursor = "" if ended else '<span style="opacity:.6">▍</span>'
    return f'<div>{legend(tokens)}<div style="{BOX}">{"".join(spans)}{discarded}{cursor}</div></div>'


def _discarded(r: Round, decode: Decode, waiting: bool) -> str:
    """The drafts of a round that were not accepted (all of them while they wait), as HTML."""
    states = ["unchecked"] * len(r.draft_tokens) if waiting else draft_states([r], len(r.draft_tokens))[0] if r.draft_tokens else []
    at = next((k for k, state in enumerate(states) if state != "accepted"), len(states))
    shown = []
    for count, text in whole_pieces(r.draft_tokens[at:], decode):
        look = DRAFT_STATES[states[at]]
        label, strike = ("waiting for verification", "") if waiting else (look.label, "text-decoration:line-through;")
        style = f"{strike}opacity:.75;background:{look.colour(0.15)};border-bottom:2px {look.line} {look.colour()};border-radius:3px"
        hint = f"draft {at + 1} of round {r.index}: {label}{draft_numbers(r, at, judged=not waiting)}"
        shown.append(f'<span title="{escape(hint)}" style="{style}">{escape(text or "∎").replace(chr(10), "↵")}</span>')
        at += count
    return "".join(shown)


@dataclass(frozen=True)
class Tally:
    """Counts of a run without its prefill.

    tokens: committed.
    rounds: after the prefill.
    seconds: of these rounds.
    verified: drafts that the target verified.
    rejected: verified drafts that are not in the text.
    plain_tokens_per_second: of plain decoding on the same prompt, NaN if unknown.
    """

    tokens: int
    rounds: int
    seconds: float
    verified: int
    rejected: int
    plain_tokens_per_second: float

    @property
    def tokens_per_round(self) -> float:
        """τ."""
        return self.tokens / self.rounds if self.rounds else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else math.nan

    @property
    def speedup(self) -> float:
        """Tokens per second over plain decoding's."""
        return self.tokens_per_second / self.plain_tokens_per_second


def tally(rounds: Sequence[Round], plain: Sequence[Round] = ()) -> Tally:
    """Count a run. plain: rounds of plain decoding on the same prompt."""
    rounds, plain = rounds[1:], plain[1:]
    verified = sum(r.verify_length for r in rounds)
    kept = sum(min(r.accepted, len(r.committed)) for r in rounds)
    seconds = sum(r.seconds for r in plain)
    speed = sum(len(r.committed) for r in plain) / seconds if seconds > 0 else math.nan
    return Tally(sum(len(r.committed) for r in rounds), len(rounds), sum(r.seconds for r in rounds), verified, verified - kept, speed)


def numbers(t: Tally, how: str = "n = 1 run") -> str:
    """The tally as one line of HTML. how: how its seconds were obtained."""
    if not t.rounds:
        return ""
    parts = [f"<b>{t.tokens_per_second:.1f}</b> tokens/s", f"τ = <b>{t.tokens_per_round:.2f}</b> tokens per round"]
    if t.speedup == t.speedup:
        parts.append(f"<b>{t.speedup:.2f}×</b> plain decoding’s {t.plain_tokens_per_second:.1f} ({escape(how)})")
    parts.append(f"<b>{t.rejected}</b> of {t.verified} verified drafts rejected, {t.rounds} rounds")
    return f'<div style="font-size:13px">{" · ".join(parts)}</div>'
