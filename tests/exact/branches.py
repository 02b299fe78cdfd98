"""Randomness as a tree: a program runs once for every way its draws can turn out, so the distribution of its output is a sum of fractions.

Nothing is rounded. A float32 is a fraction, and the acceptance rule only subtracts, clips, sums and divides: given rows of fractions,
:func:`dspark.verify.accept.accept` computes exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from torch import Tensor

from dspark.verify.sampling import OneHot, Rng

Distribution = dict[tuple[int, ...], Fraction]
Fork = tuple[int, dict[int, Fraction]]


def exact(rows: Tensor) -> np.ndarray:
    """Rows [..., vocab] as fractions, each divided by its sum, which float32 rounding kept from being 1."""
    fractions = np.frompyfunc(Fraction, 1, 1)(rows.double().cpu().numpy())
    return fractions / fractions.sum(-1, keepdims=True)


class Branch(Rng):
    """The draws along one path through the tree.

    path: the forks to take, each (index of the outcome taken, outcome → probability); after them the first outcome of every draw.
    forks: the draws with several outcomes met so far. probability: of all outcomes so far.
    Rows are used as they are: one that does not sum to 1 gives a distribution that does not.
    """

    def __init__(self, path: Sequence[Fork] = ()) -> None:
        super().__init__()
        self.path = path
        self.forks: list[Fork] = []
        self.probability = Fraction(1)

    def choose(self, probs: Tensor | np.ndarray | OneHot) -> int:
        """probs: [vocab], float32 or fractions."""
        if isinstance(probs, OneHot):
            return probs.token
        return self._take(dict(enumerate(exact(probs) if isinstance(probs, Tensor) else probs)))

    def accepts(self, p_target: Fraction, p_draft: Fraction) -> bool:
        yes = p_target / p_draft if p_target < p_draft else Fraction(p_target > 0)
        return bool(self._take({1: yes, 0: 1 - yes}))

    def _take(self, distribution: dict[int, Fraction]) -> int:
        outcomes = {outcome: p for outcome, p in distribution.items() if p > 0}
        turn = 0
        if len(outcomes) > 1:
            if len(self.forks) < len(self.path):
                turn, expected = self.path[len(self.forks)]
                assert outcomes == expected, "the same draws led elsewhere: something is kept from one run to the next"
            self.forks.append((turn, outcomes))
        outcome = list(outcomes)[turn]
        self.probability *= outcomes[outcome]
        return outcome

    def next_path(self) -> list[Fork] | None:
        """The path to the next leaf, depth first; None after the last one."""
        path = list(self.forks)
        while path:
            turn, outcomes = path.pop()
            if turn + 1 < len(outcomes):
                return [*path, (turn + 1, outcomes)]
        return None


def every_branch(run: Callable[[Branch], Sequence[int]]) -> tuple[Distribution, int]:
    """The distribution of what ``run`` returns, and the number of branches. ``run`` may be random through its argument only."""
    distribution: Distribution = {}
    branches, path = 0, []
    while path is not None:
        branch = Branch(path)
        outcome = tuple(run(branch))
        distribution[outcome] = distribution.get(outcome, Fraction(0)) + branch.probability
        branches, path = branches + 1, branch.next_path()
    return distribution, branches
