"""On the device the rules for many requests at once decide what the rules for one decide, number by number."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.device.rules import Block, Samplings, accept_each, accept_greedy, choose_each
from dspark.verify.accept import accept
from dspark.verify.sampling import Rng, Sampling

SAMPLINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.3, top_k=5),
    Sampling(0.8, top_p=0.6),
    Sampling(1.0, 3, 0.5),
    Sampling(1, 999),
]


class Given(Rng):
    """Uniform numbers from a list, in the order in which the token-by-token rule asks for them."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = list(numbers)

    def _uniform(self) -> torch.Tensor:
        return torch.tensor(self.numbers.pop(0), dtype=torch.float64)


def samplings(chosen: list[Sampling]) -> Samplings:
    columns = (torch.tensor([getattr(s, name) for s in chosen]) for name in ("temperature", "top_k", "top_p"))
    temperature, top_k, top_p = columns
    return Samplings(temperature.float(), top_k.long(), top_p.float(), any(s.top_k or s.top_p < 1 for s in chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_the_distribution_of_its_own_sampling(dtype: torch.dtype) -> None:
    logits = torch.randn(len(SAMPLINGS) * 4, 50, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    logits[::5] = logits[::5].round()  # ties
    chosen = SAMPLINGS * 4
    expected = torch.stack([s.probs(row) for s, row in zip(chosen, logits, strict=True)])
    assert torch.equal(samplings(chosen).probs(logits), expected)
    plain = [s for s in chosen if not s.top_k and s.top_p == 1]
    rows = [i for i, s in enumerate(chosen) if s in plain]
    assert not samplings(plain).filtered and torch.equal(samplings(plain).probs(logits[rows]), expected[rows])


def test_a_row_without_mass_is_reported_and_no_token_of_probability_zero_is_chosen() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0] * 4, [torch.nan] * 4, [0.0, 1.0, 0.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2**-53):
        chosen = choose_each(probs, torch.full((4,), u, dtype=torch.float64)).tolist()
        assert chosen == [1 if u < 0.5 else 2, -1, -1, 1]


@given(st.data())
def test_given_the_same_uniforms_both_rules_decide_the_same(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    requests, widest, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6)), data.draw(st.integers(2, 9))
    lengths = data.draw(st.lists(st.integers(0, widest), min_size=requests, max_size=requests))
    chosen = [data.draw(st.sampled_from(SAMPLINGS)) for _ in range(requests)]
    each = [s.probs(torch.randn(widest, vocab, generator=generator)) for s in chosen]
    near = [s.probs(torch.randn(n + 1, vocab, generator=generator)) for s, n in zip(chosen, lengths, strict=True)]
    if data.draw(st.booleans()):  # the target's own distribution: every draft stays
        near = [torch.cat([p[:n], q[n:]]) for p, q, n in zip(each, near, lengths, strict=True)]
    p_draft, uniforms = torch.stack(each), torch.rand(requests, 2 * widest + 1, generator=generator, dtype=torch.float64)
    tokens = torch.stack([choose_each(p_draft[:, k], uniforms[:, k]) for k in range(widest)], 1)
    counts = torch.tensor(lengths) + 1
    block = Block(tokens, torch.tensor(lengths), counts.cumsum(0) - counts)
    drafted = p_draft.gather(2, tokens[..., None])[..., 0]
    accepted, following = accept_each(block, drafted, lambda k: p_draft[torch.arange(len(k)), k], torch.cat(near), uniforms[:, widest:])
    for r, n in enumerate(lengths):
        judge, (*tests, last) = Given(uniforms[r, :widest].tolist()), uniforms[r, widest:].tolist()
        drafts = [judge.choose(p_draft[r, k]) for k in range(widest)]
        assert drafts == tokens[r].tolist()
        stays = next((k for k in range(n) if not tests[k] * drafted[r, k].double() < near[r][k, drafts[k]]), n)
        expected = accept(drafts[:n], p_draft[r], near[r], Given([*tests[: min(stays + 1, n)], last]))
        assert (int(accepted[r]), int(following[r])) == expected
        if chosen[r].temperature == 0:
            best = torch.cat(near).argmax(-1)
            greedy = accept_greedy(block, best)
            assert (int(greedy[0][r]), int(greedy[1][r])) == expected


def test_the_batched_rule_keeps_the_distribution_by_enumeration() -> None:
    """Uniform numbers on a fine grid, all combinations: the share of each first token is the target's probability, exactly."""
    p_target, p_draft, steps = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]]), 8
    grid = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    u = torch.cartesian_prod(grid, grid, grid)
    count = len(u)
    tokens = choose_each(p_draft.expand(count, -1), u[:, 0])[:, None]
    drafted = p_draft[0][tokens]
    first = 2 * torch.arange(count)
    flat = p_target.repeat(count, 1)
    block = Block(tokens, torch.ones(count, dtype=torch.long), first)
    accepted, following = accept_each(block, drafted, lambda k: p_draft[k], flat, u[:, 1:])
    head = tokens[:, 0].where(accepted == 1, following)
    shares = [Fraction(int((head == token).sum()), count) for token in range(3)]
    assert shares == [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
    after = following[(accepted == 1)]
    assert [Fraction(int((after == t).sum()), len(after)) for t in range(3)] == [Fraction(1, 4), Fraction(1, 2), Fraction(1, 4)]
