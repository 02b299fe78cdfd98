"""Greedy texts of tiny random models in float32: every way to decode must give the text of transformers' ``model.generate``, token for
token.

The prompts are chosen for what breaks speculative decoding. Drafts are the coming text with errors, a random drafter's and copies, so
that some are accepted and some rejected.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product

from tiny import (
    HEADS,
    SHAPES,
    WINDOW,
    Wavering,
    drafter_of_its_own_shape,
    letter_tokenizer,
    random_prompt,
    reference,
    sliding_target,
    tiny_drafter,
    tiny_target,
)

from dspark.decode import generate
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.rewind import FIRST_CAPACITY
from dspark.schedule import FixedWindow, Policy, Shortened, parse_policy
from dspark.target.target import Prompt, Target
from exact.enumeration import JAGGED, POLICIES

BLOCK_SIZES = range(1, 9)
ERRORS = (0.1, 0.4)  # shares of wrong tokens in drafts of the coming text
LONGER = 2  # tokens by which a block that Shortened cuts is longer
SPECS = [name for name in POLICIES if name.split(":")[0] not in ("fixed", "adaptive", "prefix smooth")]
WAYS = (*SPECS, "fixed", "adaptive:0.4,0.2,0.02", "fixed+copy", "prefix+copy", "copy", "shortened")


@dataclass(frozen=True)
class Question:
    """One prompt. tokens: new ones at most. text: what ``model.generate`` says. coming: the same as if nothing ended it."""

    target: Target
    prompt: Prompt
    tokens: int
    text: list[int]
    coming: list[int]

    @classmethod
    def of(cls, target: Target, prompt: Prompt, tokens: int = 16) -> Question:
        ids, endless = target.encode(prompt), copy.copy(target)
        endless.eos_token_ids = frozenset()
        room = target.max_context - len(ids)
        text = reference(target, ids, min(tokens, room))
        return cls(target, prompt, tokens, text, reference(endless, ids, min(tokens + max(BLOCK_SIZES) + LONGER, room)))

    def way(self, name: str, block_size: int, turn: int) -> tuple[DraftSource, Policy]:
        """turn: which of the sources drafts this time."""
        if name == "copy":
            return ContextLookup(None, 1, block_size, target=self.target), FixedWindow()
        size, kind = block_size + LONGER * (name == "shortened"), turn % (len(ERRORS) + 1)
        source = Wavering(self.target, self.coming, size, ERRORS[kind], turn) if kind < len(ERRORS) else drafter_of(self.target.model, size)
        if name.endswith("+copy"):
            source = ContextLookup(source, 1, block_size, target=self.target)
        policy = Shortened(FixedWindow(), block_size) if name == "shortened" else parse_policy(name.split("+")[0], lambda: JAGGED)
        return source, policy


# ---- situations: the i-th prompt of each


def plain(i: int) -> Question:
    return Question.of(llama(i), random_prompt(i, 3 + 2 * i))


def repeating(i: int) -> Question:
    """Small weights make a model repeat itself: copies are right."""
    return Question.of(llama(i, initializer_range=0.1), random_prompt(500 + i, 3 + 5 * i))


def end_of_text(i: int) -> Question:
    """Two tokens end the text: one first said after i mod 12 others, and one that is never said."""
    target, prompt = copy.copy(llama(i)), random_prompt(100 + i, 6)
    said = reference(target, prompt, 20)
    firsts = [k for k, token in enumerate(said) if said.index(token) == k]
    place = min(firsts, key=lambda k: abs(k - (2 + i % 12)))
    target.eos_token_ids = frozenset([said[place], next(token for token in range(target.vocab_size) if token not in said)])
    return Question.of(target, prompt)


def limit(i: int) -> Question:
    """20, 19, … new tokens: asked for, or all that fit into the model's context."""
    if i % 2 == 0:
        return Question.of(llama(i), random_prompt(200 + i, 5), 20 - i)
    target = llama(i, max_position_embeddings=48)
    return Question.of(target, random_prompt(200 + i, target.max_context - (20 - i)), 21 - i)


def growing(i: int) -> Question:
    """The cache's first or second capacity ends somewhere among the new tokens."""
    return Question.of(llama(i), random_prompt(300 + i, FIRST_CAPACITY * (1 + i % 2) - 1 - i))


def turns(i: int) -> Question:
    """The second, third or fourth question of a chat, after the model's own answers."""
    target, messages = llama(i, eos_token_id=2), []
    target.tokenizer = letter_tokenizer()
    for turn in range(1 + i % 3):
        messages.append({"role": "user", "content": f"Question {i}.{turn}: why?"})
        messages.append({"role": "assistant", "content": target.decode(reference(target, target.encode(messages), 12))})
    return Question.of(target, [*messages, {"role": "user", "content": "And then?"}])


def sliding(attention: str, i: int) -> Question:
    """Prompts inside, at and beyond the sliding window; the text goes far beyond it."""
    return Question.of(sliding_target_of(attention), random_prompt(400 + i, (3, WINDOW, 3 * WINDOW)[i % 3] + i // 3), 2 * WINDOW + 4)


SITUATIONS: dict[str, Callable[[int], Question]] = {
    "plain": plain,
    "repeating": repeating,
    "end of text": end_of_text,
    "limit": limit,
    "growing cache": growing,
    "turns": turns,
    "window, eager": partial(sliding, "eager"),
    "window, sdpa": partial(sliding, "sdpa"),
}
sliding_target_of = cache(sliding_target)


@cache
def question(situation: str, i: int) -> Question:
    return SITUATIONS[situation](i)


def llama(i: int, **settings: object) -> Target:
    return tiny_target(seed=i % len(SHAPES), **SHAPES[i % len(SHAPES)], **({"eos_token_id": None} | settings))


@cache
def drafter_of(model: object, block_size: int) -> Drafter:
    """A random drafter of that model, with another head at every block size."""
    target = Target(model, None, "tiny")
    if model.config.model_type != "llama":
        return drafter_of_its_own_shape(target, block_size)
    return tiny_drafter(target, seed=block_size, block_size=block_size, **HEADS[block_size % len(HEADS)])


def compared(prompts: int, block_sizes: Callable[[int], list[int]]) -> Iterator[tuple[str, Counter[str]]]:
    """(way, what happened) for the first prompts of every situation, each in every way at block_sizes(i).

    Counted: texts, equal, tokens, accepted and rejected drafts, inside (texts that an accepted draft ended, with more of its block
    after it).
    """
    for (s, situation), i in product(enumerate(SITUATIONS), range(prompts)):
        asked = question(situation, i)
        for block_size, (w, name) in product(block_sizes(s + i), enumerate(WAYS)):
            source, policy = asked.way(name, block_size, i + w + block_size)
            out = generate(asked.target, source, asked.prompt, max_new_tokens=asked.tokens, policy=policy)
            accepted, checked = (sum(getattr(r, field) for r in out.rounds) for field in ("accepted", "verify_length"))
            inside = sum(r.committed[-1] in asked.target.eos_token_ids and len(r.committed) <= r.accepted for r in out.rounds)
            counts = {"texts": 1, "equal": int(out.token_ids == asked.text), "tokens": len(asked.text), "accepted": accepted}
            yield name, Counter(counts | {"rejected": checked - accepted, "inside": inside})
