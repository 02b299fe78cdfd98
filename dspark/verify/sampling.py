"""One function turns logits into the distribution that is sampled, for target and drafter alike; one object makes the draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 is greedy; at least 0.
    top_k: keep the k most probable tokens, and any as probable as the k-th; 0 keeps all.
    top_p: of these, keep the smallest set with this much probability, in (0, 1]; 1 keeps all.
    Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name} must be a number, got {value!r}: leave it out for the default")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k < 0 or self.top_k % 1 != 0:
            raise ValueError(f"top_k must be 0 (off) or a positive whole number, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}: 1 keeps every token")

    def probs(self, logits: Tensor) -> Tensor:
        """logits: [..., vocab], any float dtype → probabilities of the same shape, float32, rows sum to 1.

        Greedy is the one-hot distribution of the arg max, so one acceptance rule serves every temperature.
        """
        logits = logits.float()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, _argmax(logits), 1.0)
        if self.temperature != 1:
            temperature = max(self.temperature, torch.finfo(torch.float32).tiny)  # a smaller one would be 0 in float32
            logits = (logits - logits.amax(-1, keepdim=True)).div_(temperature)  # ≤ 0, so a tiny temperature cannot overflow to ∞
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(int(self.top_k)).values[..., -1:]
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        probs = logits.softmax(-1)
        return nucleus(probs, self.top_p) if self.top_p < 1 else probs

    def row(self, logits: Tensor) -> Tensor | OneHot:
        """:meth:`probs` of one row, [vocab]; where decoding is greedy, without its zeros."""
        return self.probs(logits) if self.temperature else OneHot(int(_argmax(logits.float())))


@dataclass(frozen=True)
class OneHot:
    """A row [vocab] with a 1 at this token, without its zeros: writing them would take longer than the rest of a greedy round."""

    token: int
    __array_ufunc__ = None  # arrays of fractions leave − to this class

    def __getitem__(self, token: int) -> int:
        return int(token == self.token)

    def __rsub__(self, other: Tensor) -> Tensor:
        row = 1 * other
        row[self.token] -= 1
        return row


@dataclass(frozen=True)
class Narrow:
    """A row [vocab] that is zero outside the draft vocabulary, without its zeros."""

    probs: Tensor  # [draft_vocab]
    d2t: Tensor  # [draft_vocab] int64, their token ids
    t2d: Tensor  # [vocab] int64, each token's index in these, −1 if it has none

    def __getitem__(self, token: int) -> Tensor | float:
        return self.probs[index] if (index := int(self.t2d[token])) >= 0 else 0.0

    def __rsub__(self, other: Tensor) -> Tensor:
        return other.index_add(0, self.d2t, self.probs, alpha=-1)


Rows = Tensor | Sequence[OneHot | Narrow]  # [n, vocab] float32, each row sums to 1


def _argmax(x: Tensor) -> Tensor:
    """Each row's first index of the largest, or of a NaN. [..., n] float32 → [..., 1]. On a CPU NumPy is ten times as fast as PyTorch."""
    return torch.from_numpy(x.detach().numpy().argmax(-1, keepdims=True)) if x.device.type == "cpu" else x.argmax(-1, keepdim=True)


def nucleus(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches ``top_p`` and renormalise (Holtzman et al., 2020, §3.1).

    probs: [..., vocab] float32, rows sum to 1; top_p: one number, or [..., 1]. Returns the shape of probs.
    """
    ordered, index = probs.sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(-1) - ordered  # 0 for the first: one token always stays
    kept = ordered.masked_fill(mass_before >= top_p, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, kept / kept.sum(-1, keepdim=True))


class LazyProbs(dict):
    """[rows, vocab]: ``sampling.probs(logits)``, each row computed when it is first read.

    Greedy rows after the first rejection are never read. Raises ValueError for one with NaN.
    """

    def __init__(self, sampling: Sampling, logits: Tensor) -> None:
        self.sampling, self.logits = sampling, logits

    def __missing__(self, k: int) -> Tensor | OneHot:
        row = self.row(k)
        if isinstance(row, OneHot) and math.isnan(self.logits[k, row.token]):
            raise ValueError("cannot choose among logits that are NaN: the model's weights are damaged")
        return self.setdefault(k, row)

    def row(self, k: int) -> Tensor | OneHot:
        """[vocab]."""
        return self.sampling.row(self.logits[k])


class Rng:
    """All that is random in decoding: two kinds of draw, each from one uniform number.

    generator: None for PyTorch's global one. The exactness tests replace the whole object by one that takes every branch.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def choose(self, probs: Tensor | OneHot) -> int:
        """Index i with probability p_i, by inverting the cumulative distribution. probs: [vocab] float32.

        Raises ValueError if the probabilities do not sum to something positive.
        """
        if isinstance(probs, OneHot):
            return probs.token
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        total = float(cumulative[-1])
        if not total > 0:
            raise ValueError(f"cannot sample from probabilities that sum to {total:g}: the model's weights are damaged")
        # The first index whose cumulative mass exceeds the draw: never a token of probability zero.
        return min(int(torch.searchsorted(cumulative, float(self._uniform()) * total, right=True)), len(probs) - 1)

    def accepts(self, p_target: Tensor | float, p_draft: Tensor | float) -> bool:
        """True with probability min(1, p_t / p_d), for two numbers in [0, 1]; p_d > 0, since the token was drawn from it."""
        return bool(self._uniform() * p_draft < p_target)

    def _uniform(self) -> Tensor:
        """[] float64 in [0, 1)."""
        device = self.generator.device if self.generator else None
        return torch.rand((), generator=self.generator, dtype=torch.float64, device=device)
