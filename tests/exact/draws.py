"""For models too large to enumerate: the first new tokens that the product's engine draws, against the target's distribution.

The expected distribution is a product of the target's own rows along a tree of prefixes, and Pearson's χ² compares. The engine reads the
same rows from the tree, which makes draws quick; drafting, scheduling, acceptance and all randomness run for every draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from dspark.decode import Engine, Request, rounds
from dspark.draft.lookup import ContextLookup
from dspark.draft.source import DraftSource
from dspark.schedule import POLICIES, Policy, make_policy
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling
from exact.enumeration import steps_per_second, text_distribution
from exact.tables import TablePass, Text

TOKENS = 3  # of which the joint distribution is compared
LEAST = 5.0  # draws that a cell expects at least
CURVE = steps_per_second(1.0, 0.9, 0.75, 0.74, 0.5, 0.6)
VALUES = {"confidence": {"threshold": 0.15}, "conditional": {"threshold": 0.25}}  # low: they cut some drafts and let others through
SAMPLINGS = (Sampling(1.0), Sampling(0.7, top_p=0.9))
NAMES = (*POLICIES, "fixed+copy")


class Tree:
    """The target's next-token rows after one prompt, as far as texts are likelier than ``cut``.

    logits: prefix → row [vocab].
    taps: prefix → [1, 1, m·hidden] of its last token; for (), [1, tokens, m·hidden] of the prompt.
    distribution: whole text → probability, float64. Less likely texts are left out; their probability is what is missing to 1.
    """

    def __init__(self, target: Target, prompt: list[int], layer_ids: Sequence[int], sampling: Sampling, cut: float) -> None:
        self.prompt, self.logits, self.taps = prompt, {}, {}

        def row(tokens: Sequence[int]) -> list[float]:
            text = tuple(tokens[len(prompt) :])
            logits, taps = target.forward(torch.tensor([tokens]), None, layer_ids, logits_to_keep=1)
            self.logits[text], self.taps[text] = logits[0, -1], taps[:, -1:] if text else taps
            probs = sampling.probs(logits[0, -1]).double()
            return (probs / probs.sum()).tolist()

        self.distribution = text_distribution(row, prompt, TOKENS, target.eos_token_ids, cut)

    def look(self, tokens: Text) -> tuple[Tensor, Tensor]:
        """Logits and taps after these tokens. A prefix outside the tree gets the prompt's row: a text that left the tree is in the last
        cell whatever follows, and a whole text does not depend on what comes after it."""
        text = tokens[len(self.prompt) :]
        return self.logits.get(text, self.logits[()]), self.taps.get(text, torch.zeros_like(self.taps[()][:, :1]))


@torch.inference_mode()
def sample(target: Target, tree: Tree, source: DraftSource, policy: Policy, sampling: Sampling, n: int, seed: int) -> Counter[Text]:
    """The first tokens of n texts drawn by the product's engine → how often each came."""
    rng, drawn = Rng(torch.Generator().manual_seed(seed)), Counter()
    looked_up = SimpleNamespace(device=target.device, verifier=TablePass(tree.look), decode=None, embedding=target.embedding)
    asked = {"prompt": tree.prompt, "limit": 64, "sampling": sampling, "rng": rng, "end_ids": target.eos_token_ids}
    for _ in range(n):
        engine, text = Engine(looked_up, source, policy), ()
        for r in rounds(engine, engine.enqueue(Request(**asked))):
            text += r.committed
            if text not in tree.logits:  # whole, or outside the tree: its cell is decided
                break
        drawn[text[:TOKENS]] += 1
    return drawn


def p_values(
    target: Target, drafter: DraftSource, prompt: list[int], sampling: Sampling, n: int, seed: int, names: Sequence[str] = NAMES
) -> dict[str, float]:
    """Policy → p-value of n draws under it."""
    tree = Tree(target, prompt, drafter.target_layer_ids, sampling, LEAST / n)
    found = {}
    for i, name in enumerate(names):
        policy, _, copying = name.partition("+")
        source = ContextLookup(drafter, 1) if copying else drafter
        drawn = sample(target, tree, source, make_policy(policy, VALUES.get(policy), lambda: CURVE), sampling, n, 1000 * seed + i)
        found[name] = p_value(drawn, tree.distribution)
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
