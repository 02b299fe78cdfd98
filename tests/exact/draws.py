"""By draws: the first new tokens under every policy, drawn by the product's engine, against the target's distribution, for models that are
too large to enumerate.

The expected distribution is a product of the target's own rows along a tree of prefixes, and Pearson's χ² compares. The engine reads the
same rows from the tree, which makes draws quick; drafting, scheduling, acceptance and all randomness run for every draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from dspark.decode import rounds
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.schedule import POLICIES, Policy, make_policy
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling
from exact.enumeration import StepsPerSecond
from exact.tables import TablePass, Text

TOKENS = 3  # of which the joint distribution is compared
LEAST = 5.0  # draws that a cell expects at least
CURVE = StepsPerSecond((1.0, 0.9, 0.75, 0.74, 0.5, 0.6))
VALUES = {"confidence": {"threshold": 0.15}, "conditional": {"threshold": 0.25}}  # low: they cut some drafts and let others through
SAMPLINGS = (Sampling(1.0), Sampling(0.7, top_p=0.9))


def policies() -> dict[str, Policy]:
    """Every policy of the registry, and one that also copies."""
    made = {name: make_policy(name, VALUES.get(name, {}), lambda: CURVE) for name in POLICIES}
    return made | {"fixed+copy": made["fixed"]}


@dataclass(frozen=True)
class Tree:
    """The target's next-token rows after one prompt, as far as texts have a probability of at least the cut.

    logits: prefix → row [vocab].
    taps: prefix → [1, 1, m·hidden] of its last token; for (), [1, tokens, m·hidden] of the prompt.
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

    def look(self, tokens: Text) -> tuple[Tensor, Tensor]:
        """Logits and taps after these tokens. A prefix outside the tree gets the prompt's row: a text that left the tree is in the last
        cell whatever follows, and a whole text does not depend on what comes after it."""
        text = tokens[len(self.prompt) :]
        return self.logits.get(text, self.logits[()]), self.taps.get(text, torch.zeros_like(self.taps[()][:, :1]))


@torch.inference_mode()
def sample(target: Target, tree: Tree, source: DraftSource, policy: Policy, sampling: Sampling, n: int, seed: int) -> Counter[Text]:
    """The first tokens of n texts drawn by the product's engine → how often each came."""
    rng, drawn = Rng(torch.Generator().manual_seed(seed)), Counter()
    looked_up = SimpleNamespace(device=target.device, eos_token_ids=target.eos_token_ids, verifier=TablePass(tree.look))
    for _ in range(n):
        text: Text = ()
        for r in rounds(looked_up, source, tree.prompt, 64, policy, sampling, rng):
            text += r.committed
            if text not in tree.logits:  # whole, or outside the tree: its cell is decided
                break
        drawn[text[:TOKENS]] += 1
    return drawn


def every_policy(target: Target, drafter: DraftSource, prompt: list[int], sampling: Sampling, n: int, seed: int) -> dict[str, float]:
    """Policy → p-value of n draws under it."""
    tree = Tree.grow(target, prompt, drafter.target_layer_ids, sampling, LEAST / n)
    found = {}
    for i, (name, policy) in enumerate(policies().items()):
        source = ContextLookup(drafter, 1) if name.endswith("+copy") else drafter
        found[name] = p_value(sample(target, tree, source, policy, sampling, n, 1000 * seed + i), tree.distribution)
    return found


# ---- statistics


def p_value(drawn: Mapping[Hashable, int], distribution: Mapping[Hashable, float]) -> float:
    """Of Pearson's χ² test. drawn: outcome → count. distribution: outcome → probability.

    A cell is an outcome expected at least LEAST times; all others, also those that the distribution does not name, share one.
    """
    n = sum(drawn.values())
    cells = sorted(((outcome, p) for outcome, p in distribution.items() if n * p >= LEAST), key=lambda cell: -cell[1])
    rest = 1 - math.fsum(p for _, p in cells)
    while cells and n * rest < LEAST:
        rest += cells.pop()[1]
    assert cells, f"{n} draws are too few: draw more, so that two cells are expected {LEAST:g} times each"
    counts = [drawn.get(outcome, 0) for outcome, _ in cells]
    expected = [n * p for p in (*(p for _, p in cells), rest)]
    return chi2_tail(sum((x - e) ** 2 / e for x, e in zip((*counts, n - sum(counts)), expected, strict=True)), len(cells))


def chi2_tail(x: float, dof: int) -> float:
    """P(X ≥ x) for X ~ χ²(dof)."""
    return float(torch.special.gammaincc(torch.tensor(dof / 2, dtype=torch.float64), torch.tensor(x / 2, dtype=torch.float64)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): reject where they are ≤ α, and with probability ≥ 1 − α nothing true is rejected."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
