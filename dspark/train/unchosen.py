"""What a drafter reads and masks where nobody chose: taps by the target's depth, a mask token by its tokenizer and the text."""

from __future__ import annotations

from dspark.target import Target
from dspark.train.corpus import Corpus
from dspark.train.start import spread


def unused_token(target: Target, corpus: Corpus) -> int:
    """What can stand for a token still unknown: a special one with no other role that no text holds, else the last token that none holds.

    Raises ValueError if the corpus holds every token.
    """
    added = target.tokenizer.added_tokens_decoder if target.tokenizer else {}
    special = {token for token, about in added.items() if about.special}
    roles = {getattr(target.tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk", "sep", "cls")}
    unused = set(range(target.vocab_size)) - set(corpus.token_ids.unique().tolist()) - target.eos_token_ids - roles
    if not unused:
        raise ValueError(f"the corpus holds every token of {target.name}: name one that can stand for an unknown token with --mask-token")
    return min(unused & special, default=max(unused))


def spread_taps(layers: int, most: int = 5) -> tuple[int, ...]:
    """Layers to read of a target with so many: evenly from the second to the last but one, as far as it has them."""
    last = max(layers - 2, 0)
    first = min(1, last)
    return spread(min(most, last - first + 1), last, first)
