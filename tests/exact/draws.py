"""By draws: the first new tokens under every policy, drawn by the product's loop, against the target's distribution, for models that are
too large to enumerate.

The expected distribution is a product of the target's own rows along a tree of prefixes, and Pearson's χ² compares. The loop reads the
same rows from the tree, which makes draws quick; drafting, scheduling, acceptance and all randomness run for every draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.decode import rounds
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.schedule import POLICIES, Policy, make_policy
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling
from exact.enumeration import StepsPerSecond

TOKENS = 3  # of which the joint distribution is compared
LEAST = 5.0  # draws that a cell expects at least
REST = None  # the cell of every text that has no cell of its own
CURVE = StepsPerSecond((1.0, 0.9, 0.75, 0.74, 0.5, 0.6))
VALUES = {"confidence": {"threshold": 0.15}, "conditional": {"threshold": 0.25}}  # low: they cut some drafts and let others through
SAMPLINGS = (Sampling(1.0), Sampling(0.7, top_p=0.9))
Text = tuple[int, ...]


def policies() -> dict[str, Policy]:
    """Every policy of the registry, and one that also copies."""
    made = {name: make_policy(name, VALUES.get(name, {}), lambda: CURVE) for name in POLICIES}
    return made | {"fixed+copy": made["fixed"]}


@dataclass(frozen=True)
class Tree:
    """The target's next-token rows after one prompt, as far as texts have a probability of at least the cut.

    logits: prefix → row [vocab]. taps: prefix → [1, 1, m·hidden] of its last token; for (), [1, tokens, m·hidden] of the prompt.
    distribution: whole text → probability, float64. Texts under the cut are left out; their probability is what is missing to 1.
    """

    prompt: list[int]
    logits: dict[Text, Tensor] = field(default_factory=dict)
    taps: dict[Text, Tensor] = field(default_factory=dict)
    distribution: dict[Text, float] = field(default_factory=dict)

    @classmethod
    def grow(cls, target: Target, prompt: list[int], layer_ids: Sequence[int], sampling: Sampling, cut: float) -> Tree:
        tree = cls(prompt)
        likely = {(): 1.0}
        for depth in range(1, TOKENS + 1):
            longer: dict[Text, float] = {}
            for text, probability in likely.items():
                logits, taps = target.forward(torch.tensor([[*prompt, *text]]), None, layer_ids, logits_to_keep=1)
                tree.logits[text], tree.taps[text] = logits[0, -1], taps[:, -1:] if text else taps
                row = sampling.probs(logits[0, -1]).double()
                row *= probability / row.sum()
                for token in ((row >= cut) & (row > 0)).nonzero().flatten().tolist():
                    whole = depth == TOKENS or token in target.eos_token_ids
                    (tree.distribution if whole else longer)[(*text, token)] = float(row[token])
            likely = longer
        return tree


class TokenCache(list):
    """Stands for the target's KV cache: holds only the tokens."""

    @property
    def length(self) -> int:
        return len(self)

    def rewind(self, length: int) -> None:
        assert 0 <= length <= len(self)
        del self[length:]


class TreeTarget:
    """Answers the passes of the loop from a tree. A prefix outside it gets the prompt's row: a text that left the tree is in the cell
    REST whatever follows, and a whole text does not depend on what comes after it."""

    verifier = None  # its passes go through forward

    def __init__(self, tree: Tree, target: Target) -> None:
        self.tree, self.device, self.eos_token_ids = tree, target.device, target.eos_token_ids

    def new_cache(self) -> TokenCache:
        return TokenCache()

    def forward(self, token_ids: Tensor, cache: TokenCache, taps: Sequence[int] = (), *, logits_to_keep: int = 0) -> tuple[Tensor, Tensor]:
        start, root = cache.length - len(self.tree.prompt), self.tree.logits[()]
        cache += token_ids[0].tolist()
        if start < 0:
            return root[None, None], self.tree.taps[()]
        text = tuple(cache[len(self.tree.prompt) :])
        prefixes = [text[:end] for end in range(start + 1, len(text) + 1)]
        rows = torch.stack([self.tree.logits.get(prefix, root) for prefix in prefixes])
        nothing = torch.zeros_like(self.tree.taps[()][:, :1])
        return rows[None], torch.cat([self.tree.taps.get(prefix, nothing) for prefix in prefixes], 1)


@torch.inference_mode()
def sample(target: Target, tree: Tree, source: DraftSource, policy: Policy, sampling: Sampling, n: int, seed: int) -> Counter[Text]:
    """The first tokens of n texts drawn by the product's loop → how often each came."""
    rng, drawn = Rng(torch.Generator().manual_seed(seed)), Counter()
    for _ in range(n):
        text: Text = ()
        for r in rounds(TreeTarget(tree, target), source, tree.prompt, 64, policy, sampling, rng):
            text += r.committed
            if text not in tree.logits:  # whole, or outside the tree: its cell is decided
                break
        drawn[text[:TOKENS]] += 1
    return drawn


def every_policy(target: Target, drafter: DraftSource, prompt: list[int], sampling: Sampling, n: int, seed: int) -> dict[str, Comparison]:
    """Policy → n draws under it, compared with the target's distribution."""
    tree = Tree.grow(target, prompt, drafter.target_layer_ids, sampling, LEAST / n)
    found = {}
    for i, (name, policy) in enumerate(policies().items()):
        source = ContextLookup(drafter, 1) if name.endswith("+copy") else drafter
        found[name] = compare(sample(target, tree, source, policy, sampling, n, 1000 * seed + i), tree.distribution)
    return found


# ---- statistics


@dataclass(frozen=True)
class Comparison:
    """n draws against a distribution. cells: the pooled one included. p_value: of Pearson's χ² test. tv: total variation."""

    n: int
    cells: int
    chi2: float
    p_value: float
    tv: float


def compare(drawn: Mapping[Hashable, int], distribution: Mapping[Hashable, float]) -> Comparison:
    """Outcome → count against outcome → probability. Outcomes that the distribution does not name count as REST."""
    n = sum(drawn.values())
    cells = pooled(distribution, n)
    counts = dict.fromkeys(cells, 0)
    for outcome, count in drawn.items():
        counts[outcome if outcome in cells else REST] += count
    p = torch.tensor(list(cells.values()), dtype=torch.float64)
    share = torch.tensor(list(counts.values()), dtype=torch.float64) / n
    chi2 = float(n * ((share - p) ** 2 / p).sum())
    return Comparison(n, len(cells), chi2, chi2_tail(chi2, len(cells) - 1), float((share - p).abs().sum() / 2))


def pooled(distribution: Mapping[Hashable, float], n: int) -> dict[Hashable, float]:
    """The cells of a χ² test of n draws: outcomes expected at least LEAST times, and REST, all others in one."""
    cells = sorted(((outcome, p) for outcome, p in distribution.items() if n * p >= LEAST), key=lambda cell: -cell[1])
    rest = 1 - math.fsum(p for _, p in cells)
    while cells and n * rest < LEAST:
        rest += cells.pop()[1]
    assert cells, f"{n} draws are too few: draw more, so that two cells are expected {LEAST:g} times each"
    return {**dict(cells), REST: rest}


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): reject where they are ≤ α, and with probability ≥ 1 − α nothing true is rejected."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def chi2_tail(x: float, dof: float, noncentrality: float = 0.0) -> float:
    """P(X ≥ x) for X ~ χ²(dof, λ): χ²(dof + 2J) where J is Poisson with mean λ/2."""
    mean = noncentrality / 2
    j = torch.arange(math.ceil(mean + 40 + 12 * math.sqrt(mean)), dtype=torch.float64)
    weights = (torch.special.xlogy(j, torch.tensor(mean, dtype=torch.float64)) - mean - torch.lgamma(j + 1)).exp()
    return float((weights * torch.special.gammaincc(dof / 2 + j, torch.full_like(j, x / 2))).sum())


def detectable_tv(n: int, dof: int, significance: float, power: float = 0.9) -> float:
    """Any bias of this total variation over the cells is caught by n draws with at least this power.

    A distribution q in place of p makes χ² noncentral with λ = n Σ (q − p)²/p ≥ 4 n TV² (Cauchy and Schwarz), so √(λ/4n) is the worst
    case, a bias spread evenly; one in a few cells is caught when smaller.
    """
    critical = _crossing(lambda x: significance - chi2_tail(x, dof))
    return math.sqrt(_crossing(lambda noncentrality: chi2_tail(critical, dof, noncentrality) - power) / (4 * n))


def _crossing(rising: Callable[[float], float]) -> float:
    """Where a rising function of x ≥ 0 crosses zero."""
    high = 1.0
    while rising(high) < 0:
        high *= 2
    low = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high
