"""Greedy texts of tiny random models in float32: every way to decode must give every token of transformers' ``model.generate``.

The prompts are chosen for what breaks speculative decoding. Drafts are the coming text with errors, and copies, so that some are accepted
and some rejected.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from tiny import WINDOW, Wavering, random_prompt, reference, sliding_target, tiny_target

from dspark.decode import generate
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.rewind import FIRST_CAPACITY
from dspark.schedule import FixedWindow, Policy, Shortened, parse_policy
from dspark.target.target import Target
from exact.enumeration import JAGGED, POLICIES

Question = tuple[Target, list[int], int]  # the prompt's ids, and how many new ones are asked for at most
TOKENS = 16
BLOCK_SIZES = range(1, 9)
ERRORS = (0.1, 0.4)  # shares of wrong tokens in drafts of the coming text
LONGER = 2  # tokens by which a block that Shortened cuts is longer
SPECS = [name for name in POLICIES if name.split(":")[0] not in ("fixed", "adaptive", "prefix smooth")]
WAYS = (*SPECS, "fixed", "adaptive:0.4,0.2,0.02", "fixed+copy", "prefix+copy", "copy", "shortened")


def ending(i: int) -> Question:
    """Two tokens end the text: one first said after i mod 12 others, and the prompt's first, which may never be said."""
    target, prompt = copy.copy(llama(i)), random_prompt(100 + i, 6)
    said = reference(target, prompt, 20)
    places = [k for k, token in enumerate(said) if said.index(token) == k]
    target.eos_token_ids = frozenset([said[min(places, key=lambda k: abs(k - (2 + i % 12)))], prompt[0]])
    return target, prompt, TOKENS


def windowed(attention: str) -> Callable[[int], Question]:
    """Prompts inside, at and beyond the sliding window; the text goes far beyond it."""
    target, lengths = cache(sliding_target), (3, WINDOW, 3 * WINDOW)
    return lambda i: (target(attention), random_prompt(400 + i, lengths[i % 3] + i // 3), 2 * WINDOW + 4)


def llama(i: int, **settings: object) -> Target:
    """Grouped, single and as many key-value heads as query heads; head and embedding apart, and the same."""
    shape = {"num_key_value_heads": (2, 1, 4)[i % 3], "tie_word_embeddings": i % 2 == 1}
    return tiny_target(i, **({"eos_token_id": None} | shape | settings))


SITUATIONS: dict[str, Callable[[int], Question]] = {  # the i-th prompt of each
    "plain": lambda i: (llama(i), random_prompt(i, 3 + 2 * i), TOKENS),
    "repeating": lambda i: (llama(i, initializer_range=0.1), random_prompt(500 + i, 3 + 5 * i), TOKENS),  # small weights: copies are right
    "end of text": ending,
    "limit": lambda i: (llama(i), random_prompt(200 + i, 5), 20 - i),
    "end of context": lambda i: (llama(i, max_position_embeddings=48), random_prompt(200 + i, 28 + i), 40),
    "growing cache": lambda i: (llama(i), random_prompt(300 + i, FIRST_CAPACITY * (1 + i % 2) - 1 - i), TOKENS),
    "window, eager": windowed("eager"),
    "window, sdpa": windowed("sdpa"),
}


def way(name: str, target: Target, coming: list[int], block_size: int, turn: int) -> tuple[DraftSource, Policy]:
    """coming: the text as if nothing ended it. turn: chooses the errors in drafts of it."""
    if name == "copy":
        return ContextLookup(None, 1, block_size, target=target), FixedWindow()
    source = Wavering(target, coming, block_size + LONGER * (name == "shortened"), ERRORS[turn % len(ERRORS)], turn)
    if name.endswith("+copy"):
        source = ContextLookup(source, 1, block_size, target=target)
    return source, Shortened(FixedWindow(), block_size) if name == "shortened" else parse_policy(name.split("+")[0], lambda: JAGGED)


def compared(situation: str, i: int, block_sizes: Sequence[int]) -> Iterator[tuple[str, Counter[str]]]:
    """(way, what happened) for one prompt in every way.

    Counted: texts, equal, tokens, accepted and rejected drafts, inside (texts that an accepted draft ended, with more of its block
    after it).
    """
    target, prompt, most = SITUATIONS[situation](i)
    endless, room = copy.copy(target), target.max_context - len(prompt)
    endless.eos_token_ids = frozenset()
    text = reference(target, prompt, min(most, room))
    coming = reference(endless, prompt, min(most + max(BLOCK_SIZES) + LONGER, room))
    for block_size in block_sizes:
        for w, name in enumerate(WAYS):
            source, policy = way(name, target, coming, block_size, i + w + block_size)
            out = generate(target, source, prompt, max_new_tokens=most, policy=policy)
            accepted, checked = (sum(getattr(r, field) for r in out.rounds) for field in ("accepted", "verify_length"))
            inside = sum(r.committed[-1] in target.eos_token_ids and len(r.committed) <= r.accepted for r in out.rounds)
            counts = {"texts": 1, "equal": int(out.token_ids == text), "tokens": len(text), "accepted": accepted}
            yield name, Counter(counts | {"rejected": checked - accepted, "inside": inside})
