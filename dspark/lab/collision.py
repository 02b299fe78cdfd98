"""Why parallel drafts collide: a target that says "of course" or "no problem", and drafters of these two words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import plotly.graph_objects as go

from dspark.lab.figures import distributions

FIRST, SECOND = ("of", "no"), ("course", "problem")


def fit_of(bias: float) -> float:
    """Probability of the matching second word if the head adds ``bias`` to its logit and subtracts it from the other's."""
    return 1 / (1 + math.exp(-2 * bias))


def pair_probs(fit: float) -> dict[str, float]:
    """Probability of each pair: both first words have ½, and the second word matches the first with probability ``fit``.

    The target's fit is 1. A parallel drafter draws the second word without knowing the first, so ½ is its best. Raises ValueError for
    a fit outside 0..1.
    """
    if not 0 <= fit <= 1:
        raise ValueError(f"fit must lie in 0..1, got {fit}: it is a probability")
    words = product(enumerate(FIRST), enumerate(SECOND))
    return {f"{first} {second}": (fit if i == j else 1 - fit) / 2 for (i, first), (j, second) in words}


def accepted_drafts(fit: float) -> float:
    """Expected accepted drafts of two: the first word always (p_draft = p_target), the second with Σ min(p_draft, p_target) = fit."""
    return 1 + fit


def collisions(named: Mapping[str, float]) -> go.Figure:
    """The four pairs under the target and under drafters. named: drafter → its ``fit``."""
    shown = {name: list(pair_probs(fit).values()) for name, fit in {"target": 1.0, **named}.items()}
    pairs = list(pair_probs(1.0))
    figure = distributions(shown, pairs, f"Half of a parallel drafter's pairs make no sense (exact, {len(pairs)} pairs)")
    return figure.update_xaxes(title="drafted pair of words")
