"""Is a confidence of 0.8 right in 80 of 100 cases? Calibration error, ranking quality, and the fit that corrects a head.

A head learns from text that the drafter learned from as well, so on other text it is too confident. No temperature corrects that, as
it moves high and low confidences to opposite sides: an offset does, and it joins the head's bias. Then sequential temperature
scaling (STS, the paper's §4): position by position, the logit of c_k is divided by the temperature with the smallest calibration
error of the cumulative product a_k = Π_{i≤k} c_i, with the earlier temperatures fixed. Both are fitted on held-out rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.round import Round

BINS = 15
GRID = torch.logspace(-1, 1, 81).tolist()  # 0.1 … 10; holds 1 exactly, so scaling is never worse on the data it is fitted on


@dataclass(frozen=True)
class Calibration:
    """c_k = σ((logit + offset) / T_k): one offset for all positions, and a temperature for each, 1 where none is given."""

    offset: float = 0.0
    temperatures: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"offset {self.offset:+.3f}, temperatures {', '.join(f'{t:.2f}' for t in self.temperatures) or 'none'}"


AS_TRAINED = Calibration()


@dataclass(frozen=True)
class Rollouts:
    """Confidences and outcomes of n drafted blocks.

    logits: [n, γ] float32, of c_k as the head gives them.
    survived: [n, γ] bool, x_1..x_k were all accepted.
    checked: [n, γ] bool, position k was sent to the target; the others are ignored.
    acceptance: [n, γ] float32, Σ min(p_d, p_t), which a head that knew both distributions would state; None if unknown.
    """

    logits: Tensor
    survived: Tensor
    checked: Tensor
    acceptance: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.logits.shape[1]

    def survival(self, calibration: Calibration = AS_TRAINED) -> Tensor:
        """a_k after calibration. [n, γ] float32."""
        logits = self.logits + calibration.offset
        return torch.sigmoid(logits / _scale(calibration.temperatures, self.block_size)).cumprod(-1)

    def at(self, k: int, calibration: Calibration = AS_TRAINED) -> tuple[Tensor, Tensor]:
        """Confidence and outcome at 0-based position k, checked blocks only: [m] float32 in 0..1 and [m] bool."""
        chosen = self.checked[:, k]
        return self.survival(calibration)[chosen, k], self.survived[chosen, k]

    def known(self, k: int, calibration: Calibration = AS_TRAINED) -> tuple[Tensor, Tensor]:
        """As :meth:`at`, with the outcome replaced by its probability given x_1..x_{k−1}, [m] float32: without the luck of x_k's draw."""
        chosen = self.checked[:, k]
        alive = self.survived[chosen, k - 1] if k else torch.ones(int(chosen.sum()))
        return self.survival(calibration)[chosen, k], alive * self.acceptance[chosen, k]

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """As :meth:`at`, with the confidence of a head that knew both distributions."""
        chosen = self.checked[:, k]
        return self.acceptance[chosen, : k + 1].prod(-1), self.survived[chosen, k]


def _scale(temperatures: Sequence[float], block_size: int) -> Tensor:
    """[γ]: a temperature for each position, 1 where none is given."""
    return torch.tensor([*temperatures, *[1.0] * (block_size - len(temperatures))])


def rollouts(
    rounds: Iterable[Round],
    block_size: int,
    temperatures: tuple[float, ...] = (),
    acceptances: Iterable[Sequence[float]] | None = None,
) -> Rollouts:
    """Collect the drafter's blocks.

    temperatures: those that the drafter carried while it drafted, undone here.
    acceptances: of each round's checked drafts, if they are known (:func:`dspark.bench.rollouts.observed`).
    Copied blocks and rounds that ended the text inside the block are left out: their outcomes do not depend on the head.
    Raises ValueError if nothing is left.
    """
    rounds, position = list(rounds), torch.arange(block_size)
    known = [()] * len(rounds) if acceptances is None else list(acceptances)
    kept = [
        (r, a) for r, a in zip(rounds, known, strict=True) if r.source == "drafter" and r.verify_length and len(r.committed) > r.accepted
    ]
    if not kept:
        raise ValueError("no round of the drafter was checked: roll out with FixedWindow() and a drafter that has a confidence head")
    confidence = torch.stack([_padded(r.confidence, block_size, 0.5) for r, _ in kept]).double()
    return Rollouts(
        torch.logit(confidence, eps=1e-12).float() * _scale(temperatures, block_size),
        torch.stack([position < r.accepted for r, _ in kept]),
        torch.stack([position < r.verify_length for r, _ in kept]),
        None if acceptances is None else torch.stack([_padded(a, block_size, math.nan) for _, a in kept]),
    )


def _padded(values: Sequence[float], block_size: int, filler: float) -> Tensor:
    return torch.tensor([*values, *[filler] * (block_size - len(values))])


def calibration_error(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> float:
    """ECE: |mean confidence − frequency of the outcome|, averaged over equally wide bins by the share of cases in them.

    confidence: [m] in 0..1, outcome: [m] bool, or its probability where that is known. Raises ValueError if there is no case.
    """
    if not len(confidence):
        raise ValueError("the calibration error of no cases is undefined: roll out more rounds")
    index = _bins(confidence, bins)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence.double() - outcome.double())
    return float(gap.abs().sum() / len(confidence))


def _bins(confidence: Tensor, bins: int) -> Tensor:
    return (confidence.double() * bins).long().clamp_(max=bins - 1)


def ranking_quality(confidence: Tensor, outcome: Tensor) -> float:
    """AUC: how often a case that survived has the higher confidence of a random pair; ties count half. NaN with one outcome only."""
    order = confidence.sort().values
    below = torch.searchsorted(order, confidence, right=False).double()
    upto = torch.searchsorted(order, confidence, right=True).double()
    rank = (below + upto + 1) / 2  # mid-rank, 1-based
    positive = int(outcome.sum())
    negative = len(outcome) - positive
    if not positive or not negative:
        return float("nan")
    return float((rank[outcome].sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration_noise(confidence: Tensor, bins: int = BINS, draws: int = 200, seed: int = 0) -> float:
    """The calibration error of a perfect head on as many cases: mean over outcomes drawn with these confidences, [m] in 0..1.

    An error below it is no evidence against a head.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [calibration_error(confidence, torch.rand(len(confidence), generator=generator) < confidence, bins) for _ in range(draws)]
    return sum(found) / draws


def reliability(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """The bins behind the calibration error: n, mean confidence and frequency of the outcome in each bin that is not empty."""
    index, rows = _bins(confidence, bins), []
    for i in index.unique().tolist():
        inside = index == i
        found = (int(inside.sum()), float(confidence[inside].double().mean()), float(outcome[inside].double().mean()))
        rows.append(dict(zip(("n", "confidence", "frequency"), found, strict=True)))
    return rows


def calibration_report(data: Rollouts, calibration: Calibration) -> list[dict[str, float]]:
    """One row per position with checked blocks: a_k as the head was trained, and after calibration.

    position: 1, 2, …
    n: checked blocks.
    survival: share that survived.
    ece_before, ece_after: calibration error.
    noise: :func:`calibration_noise` of the calibrated a_k.
    ece_known: after calibration, against probabilities instead of outcomes (:meth:`Rollouts.known`).
    auc_before, auc_after: :func:`ranking_quality`.
    auc_best: of a head that knew both distributions. It and ece_known are NaN if the acceptance is unknown.
    """
    rows = []
    for k in range(data.block_size):
        before, outcome = data.at(k)
        if not len(outcome):
            continue
        after, unknown = data.at(k, calibration)[0], data.acceptance is None
        row = {"position": k + 1, "n": len(outcome), "survival": float(outcome.double().mean())}
        row |= {"ece_before": calibration_error(before, outcome), "ece_after": calibration_error(after, outcome)}
        row |= {"noise": calibration_noise(after), "ece_known": math.nan if unknown else calibration_error(*data.known(k, calibration))}
        row |= {"auc_before": ranking_quality(before, outcome), "auc_after": ranking_quality(after, outcome)}
        rows.append(row | {"auc_best": math.nan if unknown else ranking_quality(*data.best(k))})
    return rows


def ranking_together(data: Rollouts, calibration: Calibration) -> dict[str, float]:
    """How well a_k ranks the checked drafts of all positions together, as Algorithm 1 sorts the drafts of all requests.

    n: checked drafts.
    auc: of the calibrated a_k.
    auc_position: of a head that knew only the position.
    auc_best: of a head that knew both distributions; NaN if the acceptance is unknown.
    """
    chosen, position = data.checked, torch.arange(data.block_size).expand_as(data.checked)
    outcome = data.survived[chosen]
    best = math.nan if data.acceptance is None else ranking_quality(data.acceptance.cumprod(-1)[chosen], outcome)
    auc, by_position = (ranking_quality(a[chosen], outcome) for a in (data.survival(calibration), -position.float()))
    return {"n": len(outcome), "auc": auc, "auc_position": by_position, "auc_best": best}


def calibrate(data: Rollouts) -> Calibration:
    """Fit the offset, then the temperatures."""
    offset = fit_offset(data)
    return Calibration(offset, fit_sts(data, offset))


def fit_offset(data: Rollouts) -> float:
    """The most likely b of c_1 = σ((logit + b) / T) while T is free as well (Platt scaling); 0 if no block was checked.

    Fitted at the first position: c_1 is a factor of every a_k, and all blocks have it.
    """
    chosen = data.checked[:, 0]
    if not chosen.any():
        return 0.0
    logits, outcome = data.logits[chosen, 0].double(), data.survived[chosen, 0].double()
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)  # 1/T and b/T
    line = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # The second term weighs as much as one case: it bounds the line where all outcomes are equal.
        pull = (line - start).square().sum() / len(logits)
        value = F.binary_cross_entropy_with_logits(line[0] * logits + line[1], outcome) + pull
        value.backward()
        return value

    optimizer.step(loss)
    slope, height = line.tolist()
    return height / max(slope, 1 / max(GRID))


def fit_sts(data: Rollouts, offset: float = 0.0, grid: Iterable[float] = GRID) -> tuple[float, ...]:
    """One temperature per position, in order, each with the smallest ECE of a_k given the ones before it; 1 where nothing was checked."""
    temperatures: list[float] = []
    for k in range(data.block_size):
        if not data.checked[:, k].any():
            temperatures.append(1.0)
            continue
        # Among equals the one nearest to 1: no scaling without evidence.
        candidates = sorted(grid, key=lambda t: abs(math.log(t)))
        temperatures.append(min(candidates, key=lambda t: calibration_error(*data.at(k, Calibration(offset, (*temperatures, t))))))
    return tuple(temperatures)
