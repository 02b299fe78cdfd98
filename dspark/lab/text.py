"""The text while it is decoded, as HTML: tokens coloured by fate, the last round's rejected drafts struck through. And its tally.

``rounds.js`` links it with the pictures: ``data-r`` is the round, ``data-n`` the position in the text, ``data-c`` a number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape

from dspark.lab.figures import DRAFT_STATES, FATES, Decode, FatedToken, Look, draft_states, fates, whole_pieces
from dspark.round import Output, Round
from dspark.target.stream import BROKEN

BOX = "font:13px/1.75 var(--jp-code-font-family,monospace);white-space:pre-wrap;word-break:break-word;tab-size:4;margin:0"


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

    cut = len(tokens) if waiting or last is None else len(tokens) - max(len(last.committed) - last.accepted, 0)
    shown, start = [[], []], 0  # what stands before the discarded drafts, and after them
    for count, text in pieces:
        shown[start + count > cut].append(span(tokens[start : start + count], text, start))
        start += count
    discarded = "" if last is None or ended else _discarded(last, decode, waiting)
    cursor = "" if ended else '<span class="cursor" style="opacity:.6">▍</span>'
    words = "".join([*shown[0], discarded, *shown[1], cursor])
    return f'<div>{legend(tokens)}<pre class="text" style="{BOX}">{words}</pre></div>'  # exports drop indentation outside of pre


def span(group: Sequence[FatedToken], text: str, start: int = 0) -> str:
    """The tokens of one piece of text as HTML. start: position of the first."""
    grounds = [FATES[t.fate].colour(0.33) for t in group]
    ground = grounds[0] if len(set(grounds)) == 1 else f"linear-gradient(90deg,{','.join(grounds)})"
    shown = escape(text or "∎").replace("\n", '<span style="opacity:.5;user-select:none">↵</span>\n')
    place = f'data-r="{group[-1].round.index}" data-n="{start}"' + f' data-c="{len(group)}"' * (len(group) > 1)
    hint = "; ".join(f"{FATES[t.fate].label}, round {t.round.index}, position {t.at + 1}" for t in group)
    return f'<span {place} title="{hint}" style="{_style(FATES[group[-1].fate], ground)}">{shown}</span>'


def legend(tokens: Sequence[FatedToken]) -> str:
    """The number of tokens of each fate, as HTML in the fates' colours."""
    items = []
    for name, look in FATES.items():
        if count := sum(t.fate == name for t in tokens):
            style = f"{_style(look, look.colour(0.33))};padding:0 .4em;white-space:nowrap"
            items.append(f'<span style="{style}">{look.label}: {count}</span>')
    return f'<div class="legend" style="font-size:12px;line-height:1.7;margin-bottom:.4em">{" ".join(items)} · {len(tokens)} tokens</div>'


def _discarded(r: Round, decode: Decode, waiting: bool) -> str:
    """The drafts of a round that were not accepted (all of them while they wait), as HTML."""
    states = ["unchecked"] * len(r.draft_tokens) if waiting else draft_states(r)
    at = next((k for k, state in enumerate(states) if state != "accepted"), len(states))
    shown = []
    for count, text in whole_pieces(r.draft_tokens[at:], decode):
        look, strike = DRAFT_STATES[states[at]], "" if waiting else "text-decoration:line-through;"
        words = escape(text or "∎").replace(chr(10), "↵")
        shown.append(f'<span class="draft" style="{strike}opacity:.75;{_style(look, look.colour(0.15))}">{words}</span>')
        at += count
    return "".join(shown)


def _style(look: Look, ground: str) -> str:
    return f"background:{ground};border-bottom:2px {look.line} {look.colour()};border-radius:3px;padding-bottom:1px"


@dataclass(frozen=True)
class Tally:
    """Counts of a run without its prefill; NaN where they are unknown.

    verified, rejected: drafts that the target verified, and those of them that are not in the text.
    tokens_per_round: τ.
    speedup: tokens per second over plain decoding's.
    """

    rounds: int
    verified: int
    rejected: int
    tokens_per_round: float
    tokens_per_second: float
    speedup: float

    def words(self, how: str) -> list[str]:
        """The speed-up first. how: how the seconds were obtained."""
        parts = [f"{self.speedup:.2f}× plain decoding"] if self.speedup == self.speedup else []
        parts += [f"{self.tokens_per_second:.1f} tokens/s", f"τ = {self.tokens_per_round:.2f} tokens per round"]
        parts += [f"{self.verified - self.rejected} of {self.verified} verified drafts accepted", f"{self.rounds} rounds", how]
        return parts if self.rounds else []


def tally(rounds: Sequence[Round], plain: Sequence[Round] = ()) -> Tally:
    """Count a run. plain: rounds of plain decoding on the same prompt."""
    run, beside = (Output("", [], list(each), 0.0) for each in (rounds, plain))
    verified, kept = sum(r.verify_length for r in rounds), sum(min(r.accepted, len(r.committed)) for r in rounds)
    speed = run.tokens_per_second
    return Tally(len(rounds[1:]), verified, verified - kept, run.tokens_per_round, speed, speed / beside.tokens_per_second)
