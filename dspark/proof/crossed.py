"""Greedy texts of tiny random models, every prompt with every policy at every block size: in float32 each must be the text of
transformers' ``model.generate``, token for token.

The models are random, so nothing is measured of how well a drafter drafts; the texts end in an end-of-text token inside a block, at a
limit, beyond the cache's first room, behind earlier turns, far beyond a sliding window. Drafts are the coming text with errors, a
random drafter's, copies and remembered phrases, so that every policy has drafts kept and drafts refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from dspark.bench.provenance import cores, environment
from dspark.bench.results import Ledger, Row
from dspark.decode import DraftSource, generate
from dspark.draft.drafter import Drafter
from dspark.draft.lookup import ContextLookup
from dspark.phrases import PhraseMemory
from dspark.proof.cases import JAGGED, LEVEL, SMOOTH
from dspark.proof.inputs import digest
from dspark.proof.tiny import (
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
from dspark.proof.workers import side_by_side
from dspark.rewind import FIRST_CAPACITY
from dspark.schedule import MTP1, AdaptiveWindow, Autoregressive, ConfidenceThreshold, FixedWindow, Policy, PrefixScheduler, Shortened
from dspark.target.target import Prompt, Target

BLOCK_SIZES = range(1, 9)
ERRORS = (0.1, 0.4)  # shares of wrong tokens in drafts of the coming text
LONGER = 2  # tokens by which a block that Shortened cuts is longer


@dataclass(frozen=True)
class Way:
    """policy: block size → policy · copies: "" drafts as it is, "copy" behind copies, "phrases" behind copies and phrases, "only" without
    a drafter · longer: tokens that the source's block is longer than the block size."""

    policy: Callable[[int], Policy]
    copies: str = ""
    longer: int = 0


WAYS = {
    "autoregressive": Way(lambda n: Autoregressive()),
    "fixed": Way(FixedWindow),
    "mtp1": Way(lambda n: MTP1()),
    "adaptive": Way(lambda n: AdaptiveWindow(0.4, 0.2, 0.02)),
    "confidence": Way(lambda n: ConfidenceThreshold(0.4)),
    "conditional": Way(lambda n: ConfidenceThreshold(0.6, on="conditional")),
    "prefix": Way(lambda n: PrefixScheduler(JAGGED)),
    "siblings": Way(lambda n: PrefixScheduler(LEVEL, sibling_rates=(0.6, 0.4))),
    "shortened": Way(partial(Shortened, FixedWindow()), longer=LONGER),
    "copy": Way(FixedWindow, "only"),
    "fixed+copy": Way(FixedWindow, "copy"),
    "prefix+copy": Way(lambda n: PrefixScheduler(SMOOTH), "copy"),
    "siblings+copy": Way(lambda n: PrefixScheduler(LEVEL, sibling_rates=(0.6, 0.4)), "copy"),
    "fixed+phrases": Way(FixedWindow, "phrases"),
    "adaptive+phrases": Way(lambda n: AdaptiveWindow(0.4, 0.2, 0.02), "phrases"),
}


@dataclass(frozen=True)
class Asked:
    """One prompt. tokens: new ones at most · text: what ``model.generate`` says · coming: the same text as if nothing had ended it."""

    target: Target
    prompt: Prompt
    tokens: int
    text: list[int]
    coming: list[int]

    @classmethod
    def of(cls, target: Target, prompt: Prompt, tokens: int = 16) -> Asked:
        ids = target.encode(prompt)
        room = target.max_context - len(ids)
        endless = copy.copy(target)
        endless.eos_token_ids = frozenset()
        return cls(
            target,
            prompt,
            tokens,
            reference(target, ids, min(tokens, room)),
            reference(endless, ids, min(tokens + max(BLOCK_SIZES) + LONGER, room)),
        )

    def source(self, way: Way, block_size: int, turn: int) -> DraftSource:
        """turn: which of the sources the prompt meets this time."""
        if way.copies == "only":
            return ContextLookup(None, 1, block_size, target=self.target)
        kind, size = turn % (len(ERRORS) + 1), block_size + way.longer
        drafts = Wavering(self.target, self.coming, size, ERRORS[kind], turn) if kind < len(ERRORS) else _drafter(self.target.model, size)
        if not way.copies:
            return drafts
        phrases = self.phrases(turn) if way.copies == "phrases" else None
        return ContextLookup(drafts, 1 if phrases is None else 3, block_size, phrases=phrases, target=self.target)

    def phrases(self, turn: int) -> PhraseMemory:
        """Of the coming text, with errors: a memory that is right for a while."""
        wrong = Wavering(self.target, self.coming, 1, ERRORS[0], turn).text
        said = np.array([[*self.target.encode(self.prompt)[-5:], *wrong]] * 2)  # what is said once is not remembered
        return PhraseMemory.of_text(said, np.ones_like(said, dtype=bool))


# ---- situations: the i-th prompt of each


def plain(i: int) -> Asked:
    return Asked.of(_llama(i), random_prompt(i, 3 + 2 * i))


def repeating(i: int) -> Asked:
    """Small weights make a model repeat itself: copies are right."""
    return Asked.of(_llama(i, initializer_range=0.1), random_prompt(500 + i, 3 + 5 * i))


def end_of_text(i: int) -> Asked:
    """Two tokens that end the text: one that it says for the first time after i mod 12 others, and one that it never says."""
    target, prompt = copy.copy(_llama(i)), random_prompt(100 + i, 6)
    said = reference(target, prompt, 20)
    firsts = [k for k, token in enumerate(said) if said.index(token) == k]
    place = min(firsts, key=lambda k: abs(k - (2 + i % 12)))
    target.eos_token_ids = frozenset([said[place], next(token for token in range(target.vocab_size) if token not in said)])
    return Asked.of(target, prompt)


def limit(i: int) -> Asked:
    """20, 19, … new tokens: asked for, or all that fit into what the model was made for."""
    tokens = 20 - i
    if i % 2 == 0:
        return Asked.of(_llama(i), random_prompt(200 + i, 5), tokens)
    target = _llama(i, max_position_embeddings=48)
    return Asked.of(target, random_prompt(200 + i, target.max_context - tokens), tokens + 1)


def growth(i: int) -> Asked:
    """The cache's first room, or its second, ends somewhere among the new tokens."""
    return Asked.of(_llama(i), random_prompt(300 + i, FIRST_CAPACITY * (1 + i % 2) - 1 - i))


def turns(i: int) -> Asked:
    """The second, third or fourth question of a chat, behind the model's own answers."""
    target, messages = _llama(i, talks=True, eos_token_id=2), []
    for turn in range(1 + i % 3):
        messages.append({"role": "user", "content": f"Question {i}.{turn}: why?"})
        answer = reference(target, target.encode(messages), 12)
        messages.append({"role": "assistant", "content": target.decode(answer)})
    return Asked.of(target, [*messages, {"role": "user", "content": "And then?"}])


def window(attention: str, i: int) -> Asked:
    """Prompts inside, at and beyond the window; the text goes far beyond it."""
    return Asked.of(_gemma(attention), random_prompt(400 + i, (3, WINDOW, 3 * WINDOW)[i % 3] + i // 3), 2 * WINDOW + 4)


SITUATIONS: dict[str, Callable[[int], Asked]] = {
    "plain": plain,
    "repeating": repeating,
    "end of text": end_of_text,
    "limit": limit,
    "growing cache": growth,
    "turns": turns,
    "window, eager": partial(window, "eager"),
    "window, sdpa": partial(window, "sdpa"),
}
PROMPTS = dict(zip(SITUATIONS, (18, 14, 18, 20, 12, 12, 5, 5), strict=True))


@cache
def asked(situation: str, i: int) -> Asked:
    return SITUATIONS[situation](i)


@cache
def _llama_of(shape: int, talks: bool, settings: tuple[tuple[str, object], ...]) -> Target:
    target = tiny_target(seed=shape, **SHAPES[shape], **dict(settings))
    target.tokenizer = letter_tokenizer() if talks else None
    return target


def _llama(i: int, talks: bool = False, **settings: object) -> Target:
    return _llama_of(i % len(SHAPES), talks, tuple(({"eos_token_id": None} | settings).items()))


@cache
def _gemma(attention: str) -> Target:
    return sliding_target(attention)


@cache
def _drafter(model: object, block_size: int) -> Drafter:
    """A random drafter of that model; its head is another one at every block size."""
    target = Target(model, None, "tiny")
    if model.config.model_type != "llama":
        return drafter_of_its_own_shape(target, block_size)
    return tiny_drafter(target, seed=block_size, block_size=block_size, **HEADS[block_size % len(HEADS)])


# ---- the run


@dataclass(frozen=True)
class Piece:
    """All prompts of a situation, in every way, at one block size."""

    situation: str
    prompts: int
    block_size: int

    @property
    def key(self) -> str:
        return f"{self.situation}/{self.block_size}"

    def compared(self) -> list[Row]:
        place = environment(asked(self.situation, 0).target) | {"target_digest": ""}  # the prompts have several models
        return [self._about(name) | place for name in WAYS]

    def _about(self, name: str) -> Row:
        totals = Total()
        for i in range(self.prompts):
            totals += one(asked(self.situation, i), WAYS[name], self.block_size, i + self.block_size + list(WAYS).index(name))
        return {"situation": self.situation, "policy": name, "block_size": self.block_size} | totals.columns


@dataclass(frozen=True)
class Total:
    """See :func:`run`."""

    prompts: int = 0
    equal: int = 0
    tokens: int = 0
    accepted: int = 0
    rejected: int = 0
    ended_inside: int = 0
    context: int = 0

    def __add__(self, other: Total) -> Total:
        sums = {name: value + getattr(other, name) for name, value in self.columns.items()}
        return replace(self, **sums | {"context": max(self.context, other.context)})

    @property
    def columns(self) -> Row:
        return dict(self.__dict__)


def one(prompt: Asked, way: Way, block_size: int, turn: int) -> Total:
    """Decode one prompt one way and compare. Where tokens cannot stand beside each other, blocks have no siblings."""
    source, policy = prompt.source(way, block_size, turn), way.policy(block_size)
    policy = policy if prompt.target.can_branch else policy.chain
    out = generate(prompt.target, source, prompt.prompt, max_new_tokens=prompt.tokens, policy=policy)
    return Total(
        prompts=1,
        equal=int(out.token_ids == prompt.text),
        tokens=len(prompt.text),
        accepted=sum(r.accepted for r in out.rounds),
        rejected=sum(r.verify_length - r.accepted for r in out.rounds),
        ended_inside=sum(r.committed[-1] in prompt.target.eos_token_ids and len(r.committed) <= r.accepted for r in out.rounds),
        context=len(prompt.target.encode(prompt.prompt)) + len(out.token_ids),
    )


def run(out: Path, smoke: bool = False) -> pd.DataFrame:
    """One row per situation, policy and block size, in ``out`` and returned. Goes on where a killed run stopped.

    smoke: one prompt of each situation, at two block sizes. prompts: each met every policy at every block size · equal: how many of
    their texts are ``model.generate``'s · tokens: that were compared · accepted, rejected: drafts that the target checked, kept or
    not · ended_inside: texts that an accepted draft ended, with more behind it in its block · context: the longest, in tokens.
    """
    pieces = few_pieces() if smoke else every_piece()
    origin = {"inputs": inputs()}
    ledger = Ledger(out, {"part": "crossed", "pieces": [piece.key for piece in pieces]} | origin)
    if ledger.complete:
        return ledger.finish()
    todo = [piece for piece in pieces if piece.key not in ledger.done]
    done = side_by_side(Piece.compared, todo, 1 if smoke else cores())
    for piece, rows in tqdm(done, desc="crossed", unit="piece", initial=len(pieces) - len(todo), total=len(pieces)):
        ledger.add(piece.key, [row | origin for row in rows])
    ledger.done = {piece.key: ledger.done[piece.key] for piece in pieces}  # in order, whoever was done first
    return ledger.finish()


def every_piece() -> list[Piece]:
    return [Piece(situation, prompts, n) for (situation, prompts), n in product(PROMPTS.items(), BLOCK_SIZES)]


def few_pieces() -> list[Piece]:
    """The first prompt of each situation at two block sizes, which take turns."""
    sizes = [(BLOCK_SIZES[i % 8], BLOCK_SIZES[-1 - i % 8]) for i in range(len(SITUATIONS))]
    return [Piece(situation, 1, n) for situation, both in zip(SITUATIONS, sizes, strict=True) for n in both]


def inputs() -> str:
    return digest([__name__])


def table(frame: pd.DataFrame) -> str:
    """Situations, then policies: texts, those that are equal, and how their drafts fared."""
    return "\n\n".join(summed(frame, by).reset_index().to_string(index=False) for by in ("situation", "policy"))


def summed(frame: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Per value of ``by``: texts, of them equal, tokens, accepted and rejected drafts, texts that ended inside a block, longest context."""
    sums = {"texts": "prompts"} | {name: name for name in ("equal", "tokens", "accepted", "rejected", "ended_inside")}
    columns = {name: (column, "sum") for name, column in sums.items()} | {"context": ("context", "max")}
    return frame.groupby(by, sort=False).agg(**columns)
