"""The rule in its small print: a coin for every draft, no epsilon anywhere, and a p_d that is the very one drawn from."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import tiny_drafter, tiny_target
from torch import Tensor

from dspark.verify.accept import accept, residual
from dspark.verify.sampling import Chance, Sampling

REDUCED = torch.tensor([2, 5, 8, 40, 77, 99])


class Asked(Chance):
    """Remembers every distribution that it was asked to choose from."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.Generator().manual_seed(seed))
        self.distributions: list[Tensor] = []

    def choose(self, probs: Tensor) -> int:
        self.distributions.append(probs)
        return super().choose(probs)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=5), Sampling(0.0)], ids=str)
@pytest.mark.parametrize("shape", [{}, {"d2t": REDUCED}, {"markov_rank": 0}], ids=["whole", "reduced", "parallel"])
def test_a_draft_reports_the_very_distributions_it_was_drawn_from(sampling: Sampling, shape: dict[str, object]) -> None:
    target = tiny_target()
    drafter, chance, prompt = tiny_drafter(target, **shape), Asked(0), [5, 9, 11]
    state = drafter.new_state(prompt)
    drafter.extend(state, prompt, target.forward(torch.tensor([prompt]), None, drafter.target_layer_ids)[1])
    draft = drafter.draft(state, 7, 4, sampling, chance)
    for token, reported, asked in zip(draft.tokens, draft.probs, chance.distributions, strict=True):
        assert torch.equal(reported[drafter.d2t], asked)
        assert reported.count_nonzero() == asked.count_nonzero()  # none of it elsewhere
        assert reported[token] > 0


def test_every_draft_has_a_coin_of_its_own() -> None:
    """Two drafts, each kept with probability ½. One coin for both would keep both or neither."""
    p_draft, p_target = torch.tensor([[1.0, 0.0]] * 2), torch.full((3, 2), 0.5)
    chance, n = Chance(torch.Generator().manual_seed(0)), 2000
    kept = Counter(accept([0, 0], p_draft, p_target, chance)[0] for _ in range(n))
    for accepted, probability in enumerate((0.5, 0.25, 0.25)):
        assert abs(kept[accepted] / n - probability) < 4 * (probability * (1 - probability) / n) ** 0.5  # four standard deviations


def test_no_residual_is_too_small_to_count() -> None:
    p_target, p_draft = torch.tensor([1.0, 1e-9, 3e-9]), torch.tensor([1.0, 3e-9, 1e-9])
    assert residual(p_target, p_draft).tolist() == [0, 0, 1]


def test_greedy_tells_logits_apart_that_only_float32_tells_apart() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-20, 0.5], [1.0 + 2**-20, 1.0, 0.5]])
    assert Sampling().probs(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
