"""Randomness as a tree: a run is repeated once for every way in which its questions can be answered, so its law is a sum of fractions.

Nothing is rounded. A float32 is a fraction, and the acceptance rule only subtracts, clips, sums and divides: given rows of
fractions, the product's own :func:`dspark.verify.accept.accept` computes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dspark.decode import DraftSource
from dspark.draft.drafter import Admits, Draft
from dspark.verify.sampling import Chance, Sampling

Law = dict[tuple[int, ...], Fraction]


def exact(rows: Tensor) -> np.ndarray:
    """[..., vocab] float32 → the same numbers as fractions, each row divided by its sum, which rounding kept from being 1."""
    fractions = np.frompyfunc(Fraction, 1, 1)(rows.double().cpu().numpy())
    return fractions / fractions.sum(-1, keepdims=True)


class Fork(NamedTuple):
    """A question with several answers. turn: which of them was given · possible: answer → its probability, none of them zero."""

    turn: int
    possible: dict[int, Fraction]


class Branches(Chance):
    """Answers along one path through the tree of all answers. path: the forks to take; behind them always the first answer.

    forks: those met so far · probability: of all answers given so far. It asks less of the rows than it could: an exact row is
    taken at its word, so one that does not sum to 1 leaves a law that does not.
    """

    def __init__(self, path: Sequence[Fork] = ()) -> None:
        self.path = path
        self.forks: list[Fork] = []
        self.probability = Fraction(1)

    def choose(self, probs: Tensor | np.ndarray) -> int:
        """probs: [vocab], float32 or fractions."""
        row = exact(probs) if isinstance(probs, Tensor) else probs
        return self._answer(dict(enumerate(row)))

    def accepts(self, p_target: Fraction, p_draft: Fraction) -> bool:
        yes = p_target / p_draft if p_target < p_draft else Fraction(p_target > 0)
        return bool(self._answer({1: yes, 0: 1 - yes}))

    def _answer(self, law: dict[int, Fraction]) -> int:
        possible = {answer: p for answer, p in law.items() if p > 0}
        turn = 0
        if len(possible) > 1:
            behind = len(self.forks) >= len(self.path)
            turn, expected = (0, possible) if behind else self.path[len(self.forks)]
            assert possible == expected, "the same answers led to another question: something is kept from one run to the next"
            self.forks.append(Fork(turn, possible))
        answer = list(possible)[turn]
        self.probability *= possible[answer]
        return answer

    def next_path(self) -> list[Fork] | None:
        """The path to the next leaf, depth first; None behind the last one."""
        assert len(self.forks) >= len(self.path), "the same answers led to fewer questions: something is kept from one run to the next"
        path = list(self.forks)
        while path and path[-1].turn == len(path[-1].possible) - 1:
            path.pop()
        return [*path[:-1], Fork(path[-1].turn + 1, path[-1].possible)] if path else None


def enumerate_law(run: Callable[[Chance], Sequence[int]]) -> tuple[Law, int]:
    """The law of what ``run`` returns, and the number of leaves of its tree. ``run`` may be random through its argument only."""
    law: Law = {}
    leaves, path = 0, []
    while path is not None:
        chance = Branches(path)
        outcome = tuple(run(chance))
        law[outcome] = law.get(outcome, Fraction(0)) + chance.probability
        leaves, path = leaves + 1, chance.next_path()
    return law, leaves


@dataclass
class Junction:
    """A state on the way, from which several branches go on. reached: its probability · forks: questions answered before it ·
    law: of the whole texts, given that it was reached, as far as they are enumerated · leaves: of its part of the tree."""

    state: Hashable = None
    reached: Fraction = Fraction(1)
    forks: int = 0
    law: Law = field(default_factory=dict)
    leaves: int = 0

    def add(self, law: Law, probability: Fraction, leaves: int) -> None:
        """A part of the tree that is reached with that probability, from the root on."""
        share = probability / self.reached
        for outcome, p in law.items():
            self.law[outcome] = self.law.get(outcome, Fraction(0)) + share * p
        self.leaves += leaves


def enumerate_joined(run: Callable[[Chance], Iterator[tuple[Sequence[int], Hashable]]]) -> tuple[Law, int]:
    """The law and the number of leaves that :func:`enumerate_law` gives, on trees that are too large for it: branches that come to
    the same state go on as one.

    ``run`` yields (outcome so far, state) now and then, and at its end. The state must hold everything that what follows depends on.
    """
    known: dict[Hashable, tuple[Law, int]] = {}
    way, path = [Junction()], []  # way: the junctions of this branch that are not yet done
    while path is not None:
        chance, outcome = Branches(path), ()
        for place, (text, state) in enumerate(run(chance), 1):
            outcome = tuple(text)
            if place < len(way):
                assert way[place].state == state, "the same answers led to another state: something is kept from one run to the next"
            elif state in known:
                law, leaves = known[state]
                way[-1].add(law, chance.probability, leaves)
                break
            else:
                way.append(Junction(state, chance.probability, len(chance.forks)))
        else:
            way[-1].add({outcome: Fraction(1)}, chance.probability, 1)
        path = chance.next_path()
        while len(way) > 1 and (path is None or way[-1].forks >= len(path)):
            done = way.pop()
            known[done.state] = done.law, done.leaves
            way[-1].add(done.law, done.reached, done.leaves)
    return way[0].law, way[0].leaves


def difference(law: Law, expected: Law) -> Fraction:
    """The largest difference of two laws in the probability of one outcome."""
    return max(abs(law.get(outcome, Fraction(0)) - expected.get(outcome, Fraction(0))) for outcome in {**law, **expected})


@dataclass(frozen=True)
class ExactSampling(Sampling):
    """The product's own probabilities, temperature, top-k and top-p included, as fractions whose rows sum to exactly 1."""

    def probs(self, logits: Tensor) -> np.ndarray:
        """logits: [..., vocab] → an object array of the same shape."""
        return exact(super().probs(logits))

    @property
    def in_floats(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


class ExactSource:
    """A source of drafts that runs as in the product and reports its distributions as fractions.

    :meth:`Branches.choose` turns a float32 row into fractions by the same function, so if the source reports the row that it
    drew from, p_d is to the last digit the law that the draft was drawn from; and if it reports another, the law shows it.
    """

    def __init__(self, source: DraftSource) -> None:
        self.source = source
        self.block_size, self.target_layer_ids, self.has_confidence = source.block_size, source.target_layer_ids, source.has_confidence
        self.extend = source.extend
        self.state: object = None  # of the latest request

    def new_state(self, prompt: Sequence[int]) -> object:
        self.state = self.source.new_state(prompt)
        return self.state

    def draft(self, state: object, anchor: int, window: int, sampling: ExactSampling, chance: Chance, admits: Admits) -> Draft:
        draft = self.source.draft(state, anchor, window, sampling.in_floats, chance, admits)
        another = draft.another and (lambda *asked: None if (law := draft.another(*asked)) is None else exact(law))
        return replace(draft, probs=exact(draft.probs), another=another)
