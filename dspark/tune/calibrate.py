"""Is a confidence of 0.8 right in 80 of 100 cases? Calibration error, ranking quality, and what puts a head right.

A head learns from text that the drafter learned from as well, so on other text it promises too much. No temperature mends that, as
it moves high and low confidences to opposite sides: an offset does, and it joins the head's bias. Then sequential temperature
scaling (STS, the paper's §4): position by position, the temperature that divides the logit of c_k is the one with the smallest
calibration error of the cumulative product a_k = Π_{i≤k} c_i, with the earlier temperatures fixed. Both are fitted on held-out
rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.decode import Round

BINS = 15
GRID = torch.logspace(-1, 1, 81).tolist()  # 0.1 … 10; holds 1 exactly, so scaling never does worse on the data it is fitted on


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
    """What confidence heads said of n drafted blocks and what came of them.

    logits: [n, γ] float32 of c_k, as the head gives them · survived: [n, γ] bool, x_1..x_k were all accepted ·
    checked: [n, γ] bool, position k was sent to the target (the others say nothing and are left out) · acceptance: [n, γ] float32,
    Σ min(p_d, p_t), what a head would state that knew both laws; None if nobody listened.
    """

    logits: Tensor
    survived: Tensor
    checked: Tensor
    acceptance: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.logits.shape[1]

    def survival(self, calibration: Calibration = AS_TRAINED) -> Tensor:
        """a_k, so calibrated. [n, γ] float32."""
        scale = torch.ones(self.block_size)
        scale[: len(calibration.temperatures)] = torch.tensor(calibration.temperatures)
        return torch.sigmoid((self.logits + calibration.offset) / scale).cumprod(-1)

    def at(self, k: int, calibration: Calibration = AS_TRAINED) -> tuple[Tensor, Tensor]:
        """Confidence and outcome at 0-based position k, checked blocks only: [m] float32 in 0..1 and [m] bool."""
        chosen = self.checked[:, k]
        return self.survival(calibration)[chosen, k], self.survived[chosen, k]

    def known(self, k: int, calibration: Calibration = AS_TRAINED) -> tuple[Tensor, Tensor]:
        """The same with the probability of the outcome once x_1..x_{k-1} have met their fate, [m] float32: its mean is that of the
        outcome, without the luck of x_k's draw and coin."""
        chosen = self.checked[:, k]
        alive = self.survived[chosen, k - 1] if k else torch.ones(int(chosen.sum()))
        return self.survival(calibration)[chosen, k], alive * self.acceptance[chosen, k]

    def best(self, k: int) -> tuple[Tensor, Tensor]:
        """The same with the confidence of a head that knew both laws."""
        chosen = self.checked[:, k]
        return self.acceptance[chosen, : k + 1].prod(-1), self.survived[chosen, k]


def rollouts(
    rounds: Iterable[Round],
    block_size: int,
    temperatures: tuple[float, ...] = (),
    acceptances: Iterable[Sequence[float]] | None = None,
) -> Rollouts:
    """Collect the drafter's blocks. temperatures: those the drafter carried while it drafted, undone here · acceptances: of each
    round's checked drafts, if they are known (:mod:`dspark.bench.overheard`).

    Copied blocks and rounds that ended the text inside the block are left out: their outcomes are not the head's doing.
    """
    scale = torch.ones(block_size)
    scale[: len(temperatures)] = torch.tensor(temperatures)
    logits, survived, checked, known = [], [], [], []
    listened = acceptances is not None
    for r, acceptance in zip(rounds, acceptances, strict=True) if listened else ((r, ()) for r in rounds):
        if r.source != "drafter" or r.verify_length == 0 or len(r.committed) <= r.accepted:
            continue
        row = torch.full((block_size,), 0.5)
        row[: len(r.confidence)] = torch.tensor(r.confidence)
        logits.append(torch.logit(row.double(), eps=1e-12).float() * scale)
        position = torch.arange(block_size)
        survived.append(position < r.accepted)
        checked.append(position < r.verify_length)
        known.append(torch.tensor([*acceptance, *[math.nan] * (block_size - len(acceptance))]))
    if not logits:
        raise ValueError("no round of the drafter was checked: roll out with FixedWindow() and a drafter that has a confidence head")
    return Rollouts(torch.stack(logits), torch.stack(survived), torch.stack(checked), torch.stack(known) if listened else None)


def calibration_error(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> float:
    """ECE: |mean confidence − frequency of the outcome|, averaged over equally wide bins by the share of cases in them.

    confidence: [m] in 0..1, outcome: [m] bool, or its probability where that is known. Raises ValueError if there is no case.
    """
    if not len(confidence):
        raise ValueError("the calibration error of no cases is undefined: roll out more rounds")
    index = (confidence.double() * bins).long().clamp_(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence.double() - outcome.double())
    return float(gap.abs().sum() / len(confidence))


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
    """The calibration error that a perfect head would show on so few cases: mean over outcomes drawn with these very confidences.

    An error below it says nothing against a head. confidence: [m] in 0..1.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [calibration_error(confidence, torch.rand(len(confidence), generator=generator) < confidence, bins) for _ in range(draws)]
    return sum(found) / draws


def reliability(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """The bins behind the calibration error: n, mean confidence and frequency of the outcome in each bin that holds a case."""
    index = (confidence.double() * bins).long().clamp_(max=bins - 1)
    rows = []
    for i in index.unique().tolist():
        inside = index == i
        found = (int(inside.sum()), float(confidence[inside].double().mean()), float(outcome[inside].double().mean()))
        rows.append(dict(zip(("n", "confidence", "frequency"), found, strict=True)))
    return rows


def calibration_report(data: Rollouts, calibration: Calibration) -> list[dict[str, float]]:
    """One row per position with checked blocks: a_k as the head was trained, and after calibration.

    position: 1, 2, … · n: checked blocks · survival: share that survived · ece_before, ece_after · noise: error of a perfect head on
    as many cases (:func:`calibration_noise`, of the calibrated a_k) · ece_known: after, against probabilities instead of outcomes
    (:meth:`Rollouts.known`) · auc_before, auc_after: see :func:`ranking_quality` · auc_best: of a head that knew both laws. ece_known
    and auc_best are NaN if nobody listened.
    """
    rows = []
    for k in range(data.block_size):
        before, outcome = data.at(k)
        if not len(outcome):
            continue
        after, _ = data.at(k, calibration)
        row = {"position": k + 1, "n": len(outcome), "survival": float(outcome.double().mean())}
        row |= {"ece_before": calibration_error(before, outcome), "ece_after": calibration_error(after, outcome)}
        row |= {"noise": calibration_noise(after)}
        row |= {"ece_known": math.nan if data.acceptance is None else calibration_error(*data.known(k, calibration))}
        row |= {"auc_before": ranking_quality(before, outcome), "auc_after": ranking_quality(after, outcome)}
        row |= {"auc_best": math.nan if data.acceptance is None else ranking_quality(*data.best(k))}
        rows.append(row)
    return rows


def ranking_together(data: Rollouts, calibration: Calibration) -> dict[str, float]:
    """How well a_k ranks the checked drafts of all positions together, as Algorithm 1 sorts the drafts of all requests.

    n: checked drafts · auc: of the calibrated a_k · auc_position: of a head that knew only the position, the earlier the likelier ·
    auc_best: of a head that knew both laws, NaN if nobody listened.
    """
    chosen = data.checked
    outcome, position = data.survived[chosen], torch.arange(data.block_size).expand_as(chosen)[chosen]
    row = {"n": len(outcome), "auc": ranking_quality(data.survival(calibration)[chosen], outcome)}
    row |= {"auc_position": ranking_quality(-position.float(), outcome)}
    best = math.nan if data.acceptance is None else ranking_quality(data.acceptance.cumprod(-1)[chosen], outcome)
    return row | {"auc_best": best}


def calibrate(data: Rollouts) -> Calibration:
    """The offset, then the temperatures, that these rollouts ask for."""
    offset = fit_offset(data)
    return Calibration(offset, fit_sts(data, offset))


def fit_offset(data: Rollouts) -> float:
    """The likeliest b of c_1 = σ((logit + b) / T) while T is free as well (Platt scaling); 0 if no block was checked.

    The first position decides: its c_1 is a factor of every a_k, and all blocks have it.
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
        # The second term weighs as much as one case: it bounds the line where all cases met the same end.
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
        # Among equals the one nearest to 1: no scaling that the data do not ask for.
        candidates = sorted(grid, key=lambda t: abs(math.log(t)))
        temperatures.append(min(candidates, key=lambda t: calibration_error(*data.at(k, Calibration(offset, (*temperatures, t))))))
    return tuple(temperatures)
