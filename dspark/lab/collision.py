"""Why parallel drafts collide: two phrases of two words, worked out to the last fraction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import product

import numpy as np
import plotly.graph_objects as go

from dspark.lab.proof import laws
from dspark.proof.branches import enumerate_law
from dspark.verify.accept import accept
from dspark.verify.sampling import Chance

FIRST, SECOND = ("of", "no"), ("course", "problem")
PAIRS = tuple(f"{a} {b}" for a, b in product(FIRST, SECOND))


def fit_of(bias: float) -> Fraction:
    """Probability of the word that fits, if the head adds ``bias`` to its logit and takes ``bias`` from the other's: softmax of (b, −b)."""
    return Fraction(1 / (1 + math.exp(-2 * bias)))


def pair_law(fit: Fraction) -> dict[str, Fraction]:
    """Each first word half of the time; the second fits the first with probability ``fit``. A parallel drafter cannot know which
    word came first, so ½ is its best; the target's own law is that of 1."""
    if not 0 <= fit <= 1:
        raise ValueError(f"fit must lie in 0..1, got {fit}: it is a probability")
    return {f"{a} {b}": Fraction(1, 2) * (fit if i == j else 1 - fit) for (i, a), (j, b) in product(enumerate(FIRST), enumerate(SECOND))}


def accepted_words(fit: Fraction) -> tuple[Fraction, dict[str, Fraction]]:
    """Every branch of drafting two words and checking them with :func:`dspark.verify.accept.accept`: the expected number of accepted
    drafts, and the law of the two words that come out, which must be the target's whatever ``fit`` is."""
    half, one = Fraction(1, 2), Fraction(1)
    fitting = np.array([[fit, 1 - fit], [1 - fit, fit]], dtype=object)  # [first word, second word]
    target = np.array([[one, 0 * one], [0 * one, one]], dtype=object)
    start = np.array([half, half], dtype=object)

    def block(chance: Chance) -> tuple[int, ...]:
        first = chance.choose(start)
        second = chance.choose(fitting[first])
        kept, following = accept([first, second], np.stack([start, fitting[first]]), np.stack([start, target[first], start]), chance)
        words = [*[first, second][:kept], following]
        return kept, *words[:2]

    law, _ = enumerate_law(block)
    text = dict.fromkeys(PAIRS, Fraction(0))
    for (_, a, b), mass in law.items():
        text[f"{FIRST[a]} {SECOND[b]}"] += mass
    return sum(kept * mass for (kept, *_), mass in law.items()), text


def collisions(named: Mapping[str, Fraction]) -> go.Figure:
    """The four pairs under the target and under drafters. named: what a drafter is called → its ``fit``."""
    shown = {"target": pair_law(Fraction(1))} | {name: pair_law(fit) for name, fit in named.items()}
    figure = laws(
        {name: [float(p) for p in law.values()] for name, law in shown.items()},
        PAIRS,
        f"Half of what a parallel drafter says is no phrase (exact, {len(PAIRS)} pairs)",
    )
    return figure.update_xaxes(title="drafted pair of words")
