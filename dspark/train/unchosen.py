"""What a drafter is where nobody chose: its shape, taps by the target's depth, a mask token by its tokenizer and the text."""

from __future__ import annotations

import torch

from dspark.draft.drafter import Drafter
from dspark.load import ready
from dspark.target.target import Target
from dspark.train.corpus import Corpus
from dspark.train.start import drafter_for, spread

LAYERS, BLOCK_SIZE, MARKOV_RANK, DRAFT_VOCAB = 2, 5, 48, 8192


def sketch_for(target: Target, layers: int = LAYERS, block_size: int = BLOCK_SIZE) -> Drafter:
    """A drafter of the shape that training gives by default, ready to draft but with nothing learnt: what a block costs depends on
    shapes alone, so it can be timed before anything is trained (:func:`dspark.tune.profile.profile_draft`)."""
    shape = {"num_hidden_layers": layers, "block_size": block_size, "target_layer_ids": spread_taps(target.num_layers)}
    d2t = torch.arange(min(DRAFT_VOCAB, target.vocab_size))
    drafter = drafter_for(target, d2t=d2t, markov_rank=MARKOV_RANK, mask_token_id=0, **shape)
    return ready(drafter.to(target.dtype).attach(target), target)


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
    """Layers to read of a target with so many: evenly from the second to the last but one, as far as it has them; −1, the embedding,
    of a single one."""
    last = layers - 2
    first = min(1, last)
    return spread(min(most, last - first + 1), last, first)
