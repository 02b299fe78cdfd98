"""Does a sample follow a law? Pearson's χ², the smallest bias it would have caught, total variation, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REST = None  # the cell of everything that has no cell of its own


@dataclass(frozen=True)
class Comparison:
    """n draws against a law. cells: the pooled one included · chi2, dof, p_value: Pearson's test · tv: total variation between the
    shares drawn and the law, over the cells · tv_expected: its mean if the law is right, which is chance alone."""

    n: int
    cells: int
    chi2: float
    dof: int
    p_value: float
    tv: float
    tv_expected: float


def compare(drawn: Mapping[Hashable, int], law: Mapping[Hashable, float], least: float = 5.0) -> Comparison:
    """Outcome → how often it was drawn, against outcome → probability. Outcomes that the law does not name fall into the rest."""
    n = sum(drawn.values())
    cells = pooled(law, n, least)
    counts = dict.fromkeys(cells, 0)
    for outcome, count in drawn.items():
        counts[outcome if outcome in cells else REST] += count
    p = torch.tensor(list(cells.values()), dtype=torch.float64)
    share = torch.tensor(list(counts.values()), dtype=torch.float64) / n
    chi2 = float(n * ((share - p) ** 2 / p).sum())
    tv, tv_expected = float((share - p).abs().sum() / 2), float(_mean_deviation(n, p).sum() / 2)
    return Comparison(n, len(cells), chi2, len(cells) - 1, chi2_tail(chi2, len(cells) - 1), tv, tv_expected)


def pooled(law: Mapping[Hashable, float], n: int, least: float = 5.0) -> dict[Hashable, float]:
    """The cells of a χ² test of n draws: outcomes expected at least ``least`` times, and REST, all others in one.

    law: outcome → probability; what it lacks to 1 belongs to the rest. If the rest is expected too rarely, the rarest cells join
    it. Raises ValueError if no cell of its own remains: then n is too small for this law.
    """
    cells = sorted(((outcome, p) for outcome, p in law.items() if n * p >= least), key=lambda cell: -cell[1])
    rest = 1 - math.fsum(p for _, p in cells)
    while cells and n * rest < least:
        rest += cells.pop()[1]
    if not cells:
        raise ValueError(f"{n} draws are too few for this law: draw more, so that two cells are expected {least:g} times each")
    return {**dict(cells), REST: rest}


def together(parts: Sequence[Comparison]) -> Comparison:
    """Independent samples, each against its own law, as one test: of the joint law of part and outcome, the sizes of the parts given."""
    n, dof, chi2 = (sum(getattr(part, name) for part in parts) for name in ("n", "dof", "chi2"))
    tv, tv_expected = (sum(part.n * getattr(part, name) for part in parts) / n for name in ("tv", "tv_expected"))
    return Comparison(n, sum(part.cells for part in parts), chi2, dof, chi2_tail(chi2, dof), tv, tv_expected)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): reject where they are ≤ α, and with probability ≥ 1 − α no true law is rejected."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def detectable_tv(n: int, dof: int, significance: float, power: float = 0.9) -> float:
    """Whatever its form, a bias of this total variation over the cells is caught by n draws with at least this power.

    A law q in place of p makes χ² noncentral with λ = n Σ (q − p)²/p, and by Cauchy and Schwarz Σ (q − p)²/p ≥ (Σ |q − p|)² =
    4 TV². So √(λ/4n) is the worst case, a bias spread evenly over all cells; one that sits in a few cells is caught when smaller.
    """
    return math.sqrt(detectable_noncentrality(dof, significance, power) / (4 * n))


def detectable_noncentrality(dof: int, significance: float, power: float = 0.9) -> float:
    """λ at which a χ² test of that level has that power."""
    return _crossing(lambda noncentrality: chi2_power(noncentrality, dof, significance) - power)


def chi2_power(noncentrality: float, dof: int, significance: float) -> float:
    """Probability that a χ² test of level ``significance`` rejects, if χ² has noncentrality λ."""
    critical = _crossing(lambda x: significance - chi2_tail(x, dof))
    return noncentral_chi2_tail(critical, dof, noncentrality)


def chi2_tail(x: float, dof: int) -> float:
    """P(X ≥ x) for X ~ χ²(dof)."""
    return float(_tail(torch.tensor(dof / 2, dtype=torch.float64), x))


def noncentral_chi2_tail(x: float, dof: int, noncentrality: float) -> float:
    """P(X ≥ x) for X ~ χ²(dof, λ): χ²(dof + 2J) where J is Poisson with mean λ/2."""
    mean = noncentrality / 2
    reach = 40 + 12 * math.sqrt(mean)  # J is farther from its mean with a probability far below float64's resolution of the result
    j = torch.arange(max(0, math.floor(mean - reach)), math.ceil(mean + reach), dtype=torch.float64)
    weights = (torch.special.xlogy(j, mean) - mean - torch.lgamma(j + 1)).exp()
    return float((weights * _tail(dof / 2 + j, x)).sum())


def _tail(shape: Tensor, x: float) -> Tensor:
    """The regularised upper incomplete gamma function at (shape, x/2)."""
    return torch.special.gammaincc(shape, torch.full_like(shape, x / 2))


def _mean_deviation(n: int, p: Tensor) -> Tensor:
    """E|X/n − p| for X ~ binomial(n, p), exactly (De Moivre, 1730): 2 m C(n, m) p^m (1 − p)^(n − m + 1) / n, m = ⌊np⌋ + 1."""
    m = (n * p).floor() + 1
    log_choose = math.lgamma(n + 1) - torch.lgamma(m + 1) - torch.lgamma(n - m + 1)
    return (2 * m).div(n) * (log_choose + m * p.log() + (n - m + 1) * torch.log1p(-p)).exp()


def _crossing(rising: Callable[[float], float]) -> float:
    """Where a rising function of x ≥ 0 crosses zero."""
    low, high = 0.0, 1.0
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high
