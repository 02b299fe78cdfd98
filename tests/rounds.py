"""A short text as rounds of every kind, and the byte-level tokenizer that reads it."""

from __future__ import annotations

from dspark.round import Round

BYTES = {i: bytes([i]) for i in range(256)}


def decode(token_ids: list[int]) -> str:
    """One token per byte; other tokens have no text."""
    return b"".join(BYTES.get(token, b"") for token in token_ids).decode(errors="replace")


def ids(text: str) -> list[int]:
    return list(text.encode())


def round_of(index: int, drafts: str, length: int, accepted: int, committed: str, source: str = "drafter", seconds: float = 0.1) -> Round:
    """A round with these drafts, of which ``length`` were verified; round 0 is the prefill."""
    n = len(ids(drafts))
    return Round(
        index=index,
        anchor=None if index == 0 else 65,
        window=n,
        draft_tokens=tuple(ids(drafts)),
        confidence=tuple(0.9 - 0.1 * k for k in range(n)),
        verify_length=length,
        accepted=accepted,
        committed=tuple(ids(committed)),
        target_probs_of_drafts=(0.8,) * length,
        draft_probs_of_drafts=(0.7,) * n,
        source=source if drafts else "",
        draft_seconds=0.01,
        verify_seconds=0.08,
        seconds=seconds,
    )


ROUNDS = [
    round_of(0, "", 0, 0, "H"),
    round_of(1, "ello", 4, 4, "ello "),
    round_of(2, "<c>d", 4, 2, "<c\n"),
    round_of(3, "abcd", 3, 1, "ax", "copy"),
    round_of(4, "", 0, 0, "&"),
    round_of(5, "yz", 2, 0, '"'),
]
TEXT = 'Hello <c\nax&"'
