"""Is a confidence of 0.8 right in 80 of 100 cases? Calibration error, ranking quality, and the fit that corrects a head.

A head learns from the drafter's own training text, so on other text it is too confident. An offset corrects that and joins the head's
bias. Then sequential temperature scaling (STS, the paper's §4): position by position, the logit of c_k is divided by the temperature
under which the product a_k = Π_{i≤k} c_i is likeliest, the earlier ones fixed. Both are fitted on held-out rollouts. The paper takes the
temperature with the smallest calibration error instead, whose minimum is flat: on other texts what it finds is further off (data/LOG.md).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
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
    """Confidences and outcomes of n drafted blocks."""

    logits: Tensor  # [n, γ] float32, of c_k as the head gives them
    survived: Tensor  # [n, γ] bool, x_1..x_k were all accepted
    checked: Tensor  # [n, γ] bool, position k was sent to the target; the others are ignored
    acceptance: Tensor  # [n, γ] float32, Σ min(p_d, p_t), the confidence of a perfect head; NaN where unknown

    @property
    def block_size(self) -> int:
        return self.logits.shape[1]

    def survival(self, calibration: Calibration = AS_TRAINED) -> Tensor:
        """a_k after calibration. [n, γ] float32."""
        logits = self.logits + calibration.offset
        return torch.sigmoid(logits / _padded(calibration.temperatures, self.block_size, 1.0)).cumprod(-1)

    def at(self, k: int, calibration: Calibration = AS_TRAINED) -> tuple[Tensor, Tensor]:
        """Confidence and outcome at 0-based position k, checked blocks only: [m] float32 in 0..1 and [m] bool."""
        chosen = self.checked[:, k]
        return self.survival(calibration)[chosen, k], self.survived[chosen, k]


def rollouts(rounds: Iterable[Round], block_size: int, acceptances: Sequence[Sequence[float]] = ()) -> Rollouts:
    """Collect the blocks of a drafter that carries no temperatures.

    acceptances: of each round's checked drafts, if they are known (:func:`dspark.bench.rollouts.observed`).
    Copied blocks and rounds that ended the text inside the block say nothing about the head. Raises ValueError if nothing else is left.
    """
    rounds, position = list(rounds), torch.arange(block_size)
    pairs = zip(rounds, acceptances or [()] * len(rounds), strict=True)
    kept = [(r, a) for r, a in pairs if r.source == "drafter" and r.verify_length and len(r.committed) > r.accepted]
    if not kept:
        raise ValueError("no round of the drafter was checked: roll out with FixedWindow() and a drafter that has a confidence head")
    confidence = torch.stack([_padded(r.confidence, block_size, 0.5) for r, _ in kept]).double()
    return Rollouts(
        torch.logit(confidence, eps=1e-12).float(),
        torch.stack([position < r.accepted for r, _ in kept]),
        torch.stack([position < r.verify_length for r, _ in kept]),
        torch.stack([_padded(a, block_size, math.nan) for _, a in kept]),
    )


def _padded(values: Sequence[float], block_size: int, filler: float) -> Tensor:
    return torch.tensor([*values, *[filler] * (block_size - len(values))])


def calibration_error(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> float:
    """ECE: |mean confidence − frequency of the outcome|, averaged over equally wide bins by the share of cases in them.
    confidence: [m] in 0..1, outcome: [m] bool. Raises ValueError if there is no case."""
    if not len(confidence):
        raise ValueError("the calibration error of no cases is undefined: roll out more rounds")
    index = _bins(confidence, bins)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, confidence.double() - outcome.double())
    return float(gap.abs().sum() / len(confidence))


def log_loss(confidence: Tensor, outcome: Tensor) -> float:
    """Mean −log of the probability that the confidence gave to the outcome. confidence: [m] in 0..1, outcome: [m] bool."""
    return float(F.binary_cross_entropy(confidence.double(), outcome.double()))


def _bins(confidence: Tensor, bins: int) -> Tensor:
    return (confidence.double() * bins).long().clamp_(max=bins - 1)


def ranking_quality(confidence: Tensor, outcome: Tensor) -> float:
    """AUC: how often, in a random pair of one survivor and one other, the survivor has the higher confidence; ties count half.
    NaN where only one outcome occurred, or a confidence is NaN."""
    positive = int(outcome.sum())
    negative = len(outcome) - positive
    if not positive or not negative or confidence.isnan().any():
        return math.nan
    ranks = pd.Series(confidence).rank()[outcome.numpy()]
    return float((ranks.sum() - positive * (positive + 1) / 2) / (positive * negative))


def calibration_noise(confidence: Tensor, bins: int = BINS, draws: int = 200, seed: int = 0) -> float:
    """The calibration error of a perfect head on as many cases: mean over outcomes drawn with these confidences, [m] in 0..1.
    An error below it is no evidence against a head."""
    generator = torch.Generator().manual_seed(seed)
    outcomes = (torch.rand(len(confidence), generator=generator) < confidence for _ in range(draws))
    return sum(calibration_error(confidence, outcome, bins) for outcome in outcomes) / draws


def reliability(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """The bins of the calibration error: n, mean confidence and frequency of the outcome in each bin that is not empty."""
    frame = pd.DataFrame({"confidence": confidence.double(), "frequency": outcome.double()})
    by_bin = frame.groupby(_bins(confidence, bins).numpy())
    return by_bin.mean().assign(n=by_bin.size()).to_dict("records")


def calibration_report(data: Rollouts, calibration: Calibration) -> list[dict[str, float]]:
    """One row per position with checked blocks: a_k as the head was trained, and after calibration.

    position: from 1. n, survival: checked blocks, and the share that survived.
    ece_before, ece_after, noise: :func:`calibration_error`, and :func:`calibration_noise` of the calibrated a_k.
    auc_before, auc_after: :func:`ranking_quality`. auc_best: of a perfect head; NaN if the acceptance is unknown.
    """
    rows = []
    for k in range(data.block_size):
        before, outcome = data.at(k)
        if not len(outcome):
            continue
        after, best = data.at(k, calibration)[0], data.acceptance[data.checked[:, k], : k + 1].prod(-1)
        row = {"position": k + 1, "n": len(outcome), "survival": float(outcome.double().mean())}
        row |= {"ece_before": calibration_error(before, outcome), "ece_after": calibration_error(after, outcome)}
        row |= {"noise": calibration_noise(after), "auc_before": ranking_quality(before, outcome)}
        rows.append(row | {"auc_after": ranking_quality(after, outcome), "auc_best": ranking_quality(best, outcome)})
    return rows


def ranking_together(data: Rollouts, calibration: Calibration) -> dict[str, float]:
    """How well a_k ranks the checked drafts of all positions together, as Algorithm 1 sorts the drafts of all requests.

    n, auc: checked drafts, and :func:`ranking_quality` of the calibrated a_k. auc_position: of ranking by position alone.
    auc_best: of a perfect head; NaN if the acceptance is unknown.
    """
    chosen, position = data.checked, torch.arange(data.block_size).expand_as(data.checked)
    outcome = data.survived[chosen]
    ranks = {"auc": data.survival(calibration), "auc_position": -position.float(), "auc_best": data.acceptance.cumprod(-1)}
    return {"n": len(outcome)} | {name: ranking_quality(rank[chosen], outcome) for name, rank in ranks.items()}


def calibrate(data: Rollouts) -> Calibration:
    """Fit the offset, then the temperatures given the offset."""
    offset = fit_offset(data)
    return Calibration(offset, fit_sts(data, offset))


def fit_offset(data: Rollouts) -> float:
    """The maximum-likelihood b of c_1 = σ((logit + b) / T), fitted together with T (Platt scaling); 0 if no block was checked.
    At the first position only: c_1 is a factor of every a_k, and all blocks have it."""
    chosen = data.checked[:, 0]
    if not chosen.any():
        return 0.0
    logits, outcome = data.logits[chosen, 0].double(), data.survived[chosen, 0].double()
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)  # 1/T and b/T
    line = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # A prior with the weight of one case: without it the line has no bound if all outcomes are equal.
        prior = (line - start).square().sum() / len(logits)
        value = F.binary_cross_entropy_with_logits(line[0] * logits + line[1], outcome) + prior
        value.backward()
        return value

    optimizer.step(loss)
    slope, height = line.tolist()
    return height / max(slope, 1 / max(GRID))


def fit_sts(data: Rollouts, offset: float = 0.0) -> tuple[float, ...]:
    """One temperature per position, in order, each of maximum likelihood given the ones before it; 1 where nothing was checked."""
    temperatures: list[float] = []
    candidates = sorted(GRID, key=lambda t: abs(math.log(t)))  # of equally good ones, the nearest to 1
    for k in range(data.block_size):
        if not data.checked[:, k].any():
            temperatures.append(1.0)
            continue
        temperatures.append(min(candidates, key=lambda t: log_loss(*data.at(k, Calibration(offset, (*temperatures, t))))))
    return tuple(temperatures)
