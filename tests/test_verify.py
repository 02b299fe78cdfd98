"""The acceptance rule, as a function of distributions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dspark.verify.accept import accept, residual
from dspark.verify.sampling import Narrow, OneHot, Rng, Sampling, nucleus

N = 20_000


def distribution(seed: int, rows: int, vocab: int = 4) -> torch.Tensor:
    return torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def distribution_of_first_token(p_draft: torch.Tensor, p_target: torch.Tensor) -> torch.Tensor:
    rng = Rng(torch.Generator().manual_seed(0))
    counts = torch.zeros(p_target.shape[-1])
    for _ in range(N):
        drafted = rng.choose(p_draft[0])
        accepted, following = accept([drafted], p_draft, p_target, rng)
        counts[drafted if accepted else following] += 1
    return counts / N


def test_the_committed_token_follows_the_target_whatever_the_draft_distribution_is() -> None:
    p_target = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]])
    p_draft = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    found = distribution_of_first_token(p_draft, p_target)
    assert (found - p_target[0]).abs().max() < 4 * (0.25 / N) ** 0.5  # four standard deviations


def test_the_bonus_comes_from_the_row_after_the_last_accepted_draft() -> None:
    p = torch.eye(4)[[1, 2, 3]]
    assert accept([1, 2], p[:2], p, Rng()) == (2, 3)


def test_equal_distributions_accept_everything() -> None:
    p = distribution(3, 5)
    rng = Rng(torch.Generator().manual_seed(1))
    for _ in range(200):
        tokens = [rng.choose(row) for row in p[:4]]
        assert accept(tokens, p[:4], p, rng)[0] == 4


def test_one_hot_rows_are_greedy_decoding() -> None:
    p_target = torch.eye(4)[[0, 1, 2, 3]]
    p_draft = torch.eye(4)[[0, 1, 3]]
    assert accept([0, 1, 3], p_draft, p_target, Rng()) == (2, 2)


def test_rows_without_their_zeros_decide_as_whole_rows_do() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tokens = torch.randint(4, (7,), generator=generator).tolist()
        p, drafts, target = torch.rand(4, 4, generator=generator), tokens[:3], tokens[3:]
        p_target, p_draft = p / p.sum(-1, keepdim=True), torch.eye(4)[drafts]
        for whole, short in (
            ((p_draft, p_target), ([*map(OneHot, drafts)], p_target)),
            ((p_draft, torch.eye(4)[target]), ([*map(OneHot, drafts)], [*map(OneHot, target)])),
        ):
            results = [accept(drafts, *rows, Rng(torch.Generator().manual_seed(1))) for rows in (whole, short)]
            assert results[0] == results[1]
        d2t, t2d = torch.tensor([0, 2, 3]), torch.tensor([0, -1, 1, 2])
        narrow = [Narrow(p / p.sum(), d2t, t2d) for p in torch.rand(3, 3, generator=generator)]
        whole = torch.stack([torch.zeros(4).scatter(0, d2t, row.probs) for row in narrow])
        drafts = [int(d2t[token % 3]) for token in drafts]
        results = [accept(drafts, rows, p_target, Rng(torch.Generator().manual_seed(1))) for rows in (narrow, whole)]
        assert results[0] == results[1] and [[row[token] for token in range(4)] for row in narrow] == whole.tolist()
        drafts = tokens[:3]
        assert accept(drafts, p_target[:3], [*map(OneHot, target)], Rng()) == accept(drafts, p_target[:3], torch.eye(4)[target], Rng())


def test_nothing_drafted_is_a_plain_step() -> None:
    assert accept([], torch.empty(0, 4), torch.eye(4)[[2]], Rng()) == (0, 2)


def test_a_token_that_the_target_forbids_is_never_accepted() -> None:
    p_target, p_draft = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0]])
    rng = Rng(torch.Generator().manual_seed(0))
    assert all(accept([1], p_draft, p_target, rng) == (0, 0) for _ in range(100))


@pytest.mark.parametrize("seed", range(20))
def test_the_residual_is_a_distribution_over_tokens_that_the_target_prefers(seed: int) -> None:
    p_target, p_draft = distribution(seed, 1)[0], distribution(seed + 100, 1)[0]
    rest = residual(p_target, p_draft)
    assert rest.min() >= 0
    assert rest.sum().item() == pytest.approx(1, abs=1e-6)
    assert not rest[p_draft >= p_target].any()


def test_a_residual_of_tiny_mass_keeps_its_shape() -> None:
    p_target = torch.tensor([0.5 + 2e-7, 0.5 - 2e-7])
    assert residual(p_target, torch.tensor([0.5, 0.5]))[0] == 1


def test_distributions_that_differ_in_rounding_only_leave_a_residual_that_is_a_distribution() -> None:
    p_target, p_draft = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5000001, 0.5, 0.0])
    assert residual(p_target, p_draft).tolist() == [0.5, 0.5, 0]


def test_sampling_never_draws_a_token_of_probability_zero() -> None:
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    rng = Rng(torch.Generator().manual_seed(0))
    assert {rng.choose(probs) for _ in range(500)} == {1, 3}


def test_sampling_follows_the_distribution() -> None:
    probs, rng = distribution(9, 1)[0], Rng(torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([rng.choose(probs) for _ in range(N)]), minlength=4) / N
    assert (counts - probs).abs().max() < 4 * (0.25 / N) ** 0.5


def test_processed_probabilities_are_float32_and_sum_to_one() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for sampling in (Sampling(), Sampling(0.7), Sampling(1, top_k=5), Sampling(1, top_p=0.5), Sampling(0.5, 10, 0.9)):
        probs = sampling.probs(logits)
        assert probs.dtype == torch.float32
        assert torch.allclose(probs.sum(-1), torch.ones(3), atol=1e-6)


def test_top_k_keeps_k_tokens() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert (Sampling(1, top_k=5).probs(logits) > 0).sum() == 5


def test_nucleus_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert nucleus(probs, 0.7).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert nucleus(probs, 0.5).tolist() == [0, 1, 0, 0]


def test_every_draft_has_a_uniform_number_of_its_own() -> None:
    """Two drafts, each accepted with probability ½: one number for both would keep both or neither."""
    p_draft, p_target, n, draw = torch.tensor([[1.0, 0.0]] * 2), torch.full((3, 2), 0.5), 2000, Rng(torch.Generator().manual_seed(0))
    kept = Counter(accept([0, 0], p_draft, p_target, draw)[0] for _ in range(n))
    for accepted, probability in enumerate((0.5, 0.25, 0.25)):
        assert abs(kept[accepted] / n - probability) < 4 * (probability * (1 - probability) / n) ** 0.5  # four standard deviations


def test_no_residual_is_too_small_to_count() -> None:
    assert residual(torch.tensor([1.0, 1e-9, 3e-9]), torch.tensor([1.0, 3e-9, 1e-9])).tolist() == [0, 0, 1]


def test_greedy_tells_logits_apart_that_only_float32_tells_apart() -> None:
    logits = torch.tensor([1.0, 1.0 + 2**-20, 0.5])
    assert Sampling().probs(logits).tolist() == [0, 1, 0] and Sampling().row(logits).token == 1
