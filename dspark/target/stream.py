"""Text while it is being decoded: a character may need several tokens, so tokens and pieces of text do not end together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what decoding returns where bytes of a character are missing


class TextStream:
    """Pieces of whole characters; joined, they are the text of all tokens.

    decode: token ids → text, such as ``target.decode``.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.token_ids: list[int] = []
        self.text = ""

    def put(self, token_ids: Sequence[int]) -> str:
        """The text that is complete with these further tokens, "" if none is."""
        self.token_ids.extend(token_ids)
        return self._piece(self.decode(self.token_ids).rstrip(BROKEN))

    def end(self) -> str:
        """What is left after the last token: "" unless the text ends within a character."""
        return self._piece(self.decode(self.token_ids))

    def _piece(self, text: str) -> str:
        before, self.text = len(self.text), max(self.text, text, key=len)
        return text[before:]
