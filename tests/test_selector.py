"""DFlash 2's two additions: a selector among the K largest base logits, and causal convolutions along the block."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import corpus
from tiny import CONVOLUTIONS, DFLASH2, SELECTOR, dense, tiny_drafter, tiny_target

from dspark.draft.backbone import Context, DrafterConfig
from dspark.draft.convolution import BlockConvolution
from dspark.draft.drafter import Drafter
from dspark.draft.source import Draft
from dspark.target.target import Target
from dspark.train.features import FeatureStore
from dspark.train.loop import TrainConfig, Trainer
from dspark.train.losses import HeadLoss, block_loss, choose_blocks
from dspark.train.start import drafter_for
from dspark.verify.sampling import Rng, Sampling

TEXT = [5, 9, 11, 4, 30]


class Watching(Rng):
    """Keeps the rows that tokens are drawn from."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(torch.Generator().manual_seed(seed))
        self.rows: list[torch.Tensor] = []

    def choose(self, probs: torch.Tensor) -> int:
        self.rows.append(probs)
        return super().choose(probs)


def drafted(target: Target, drafter: Drafter, sampling: Sampling, rng: Rng, text: list[int] = TEXT) -> Draft:
    state = drafter.new_state(text[:-1])
    drafter.extend(state, text[:-1], target.forward(torch.tensor([text[:-1]]), None, drafter.target_layer_ids)[1])
    return drafter.draft(state, text[-1], 4, sampling, rng)


def hidden_of(drafter: Drafter, taps: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[1, blocks, γ] tokens at the same place of the same text → [blocks, γ, hidden]."""
    positions = (5 + torch.arange(4)).expand_as(blocks)
    return drafter.block_hidden(torch.zeros(1, 5, dtype=torch.long), taps, blocks, blocks, positions)[0]


def copied(target: Target, drafter: Drafter, **shape: object) -> Drafter:
    """A fresh drafter of another shape with the same weights where it has them."""
    other = drafter_for(target, block_size=4, target_layer_ids=(0, 2), mask_token_id=3, markov_rank=8, num_hidden_layers=2, **shape)
    missing = other.load_state_dict(drafter.state_dict(), strict=False).missing_keys
    assert missing and not any(name in drafter.state_dict() for name in missing)
    return other.attach(target).eval().requires_grad_(False)


# ---- the selector


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 3), Sampling(2.0, 0, 0.8)], ids=str)
def test_a_selector_reports_what_it_drew_from_and_that_is_k_tokens(sampling: Sampling) -> None:
    target = tiny_target()
    drafter, rng = tiny_drafter(target, **SELECTOR), Watching()
    draft = drafted(target, drafter, sampling, rng)
    assert torch.equal(draft.probs, torch.stack(rng.rows))
    _, taps = target.forward(torch.tensor([TEXT[:-1]]), None, drafter.target_layer_ids)
    hidden = drafter.backbone(torch.tensor([[TEXT[-1], 3, 3, 3]]), torch.arange(4, 8)[None], [Context(*kv) for kv in drafter.context(taps)])
    for probs, base in zip(draft.probs, drafter.head(hidden[0]), strict=True):
        assert set(probs.nonzero()[:, 0].tolist()) <= set(base.topk(6).indices.tolist())
        if sampling == Sampling(1.0):
            assert probs.count_nonzero() == 6 and probs.sum() == pytest.approx(1)


def test_a_selector_among_all_tokens_is_a_softmax_over_the_vocabulary() -> None:
    """Drafting and loss, gradients included, are those of a head without candidates."""
    head = tiny_drafter(tiny_target(), markov_head_type="selector", num_candidates=100).markov_head
    generator = torch.Generator().manual_seed(0)
    base, latent = torch.randn(7, 100, generator=generator), torch.randn(7, 8, generator=generator)
    assert torch.allclose(head.logits(base, latent), base + head.markov_w2(latent), atol=1e-5)
    hidden, table, final = (torch.randn(n, 16, generator=generator) for n in (300, 100, 300))
    latents, w2 = torch.randn(300, 8, generator=generator), torch.randn(100, 8, generator=generator)
    label, weight = torch.randint(-1, 100, (300,), generator=generator), torch.rand(300, generator=generator)
    results = []
    for candidates in (0, 100):
        inputs = [each.clone().requires_grad_() for each in (hidden, latents, w2)]
        loss, acceptance = HeadLoss.apply(*inputs, table, final, (final @ table.T).logsumexp(-1), label, weight, candidates)
        results.append([loss, acceptance, *torch.autograd.grad(loss, inputs)])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))


def test_a_selectors_gradient_equals_autograds() -> None:
    """L1 distance by the softmax over the candidates, cross-entropy by the one over all tokens, the bias on the candidates alone."""
    generator = torch.Generator().manual_seed(1)
    hidden, latent, w2 = (torch.randn(*size, generator=generator, requires_grad=True) for size in ((400, 16), (400, 8), (40, 8)))
    head, final = torch.randn(60, 16, generator=generator), torch.randn(400, 16, generator=generator)
    label, weight = torch.randint(-1, 40, (400,), generator=generator), torch.rand(400, generator=generator)
    q = (final @ head.T).softmax(-1)
    inputs = (hidden, latent, w2)
    loss, acceptance = HeadLoss.apply(*inputs, head[:40], final, (final @ head.T).logsumexp(-1), label, weight, 5)
    base = hidden @ head[:40].T
    chosen = base >= base.topk(5).values[:, -1:]
    logits = base + chosen * (latent @ w2.T)
    p = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(logits, label, ignore_index=-1, reduction="none")
    distance = (p - q[:, :40]).abs().sum(-1) + q[:, 40:].sum(-1)
    expected = (weight * (0.1 * cross_entropy + 0.9 * distance)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(acceptance, torch.minimum(p, q[:, :40]).sum(-1), atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_selector_without_a_bias_chooses_as_the_parallel_drafter() -> None:
    target = tiny_target()
    parallel = tiny_drafter(target, markov_rank=0)
    parallel.confidence_head = None
    selector = copied(target, parallel, **SELECTOR, enable_confidence_head=False)
    ours, theirs = (drafted(target, each, Sampling(1.0), Watching()).probs for each in (selector, parallel))
    best = theirs.topk(6)
    assert torch.allclose(ours.gather(1, best.indices), best.values / best.values.sum(-1, keepdim=True), atol=1e-6)
    ours, theirs = (drafted(target, each, Sampling(), Watching()).tokens for each in (selector, parallel))
    assert ours == theirs


@pytest.mark.parametrize("shape", [SELECTOR, CONVOLUTIONS, DFLASH2], ids=["selector", "convolutions", "both"])
def test_training_judges_the_blocks_that_drafting_draws(shape: dict[str, object]) -> None:
    """The acceptance of a block in training is Σ min(p_d, p_t) of the rows that drafting it at the same place would draw from."""
    target = tiny_target()
    drafter = tiny_drafter(target, **shape, d2t=torch.arange(2, 100))
    shard = FeatureStore(target, corpus(), (0, 2)).shard(0)
    blocks = choose_blocks(shard, 2, 4, 3, torch.Generator().manual_seed(3))
    result, row, which = block_loss(drafter, shard, blocks), 1, 1
    anchor, ids = int(blocks.positions[row, which, 0]), shard.token_ids[row]

    class Following(Watching):
        def choose(self, probs: torch.Tensor) -> int:
            super().choose(probs)
            return int(ids[anchor + len(self.rows)] - 2)

    text = ids[: anchor + 1].tolist()
    draft = drafted(target, drafter, Sampling(1.0), Following(), text)
    p_target = target.forward(ids[None], None)[0][0, anchor : anchor + 4].softmax(-1)
    expected, valid = torch.minimum(dense(draft), p_target).sum(-1), blocks.valid[row, which]
    assert valid.sum() >= 2 and torch.allclose(result.acceptance[row, which][valid], expected[valid], atol=1e-5)


def test_a_drafter_with_both_learns(tmp_path: Path) -> None:
    target = tiny_target()
    shape = {"block_size": 4, "target_layer_ids": (0, 2), "mask_token_id": 3, "markov_rank": 8, "d2t": torch.arange(2, 90)}
    drafter = drafter_for(target, init_layers=(0,), **shape, **DFLASH2)
    before = {name: weight.clone() for name, weight in drafter.named_parameters()}
    store, config = FeatureStore(target, corpus(), (0, 2), shard_rows=4), TrainConfig(40, 2, 3, 1e-2)
    records = list(Trainer(target, drafter, store, config, tmp_path).run())
    first, last = (sum(r["loss"] for r in part) for part in (records[:8], records[-8:]))
    assert last < first
    assert not [name for name, weight in drafter.named_parameters() if torch.equal(weight, before[name])]


# ---- the convolutions


def random_convolution(kernel: int = 3, groups: int = 4) -> BlockConvolution:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "block_size": 5, "convolution_kernel": kernel, "convolution_groups": groups, "layer_type": "qwen3"}
    convolution = BlockConvolution(SimpleNamespace(**shape))
    torch.nn.init.normal_(convolution.base)
    return convolution


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_convolution_is_its_definition(kernel: int) -> None:
    """Slot by slot and channel by channel; also where the kernel is longer than the block."""
    convolution = random_convolution(kernel)
    x = torch.randn(2, 10, 8)
    found = convolution(x)
    for row in range(2):
        for block in (0, 5):
            for k in range(5):
                here = x[row, block + k]
                of_token = convolution.proj(here).view(4, kernel).repeat_interleave(2, 0)  # [channels, taps]
                expected = here.clone()
                for t in range(min(kernel, k + 1)):
                    expected += (convolution.base[t] + of_token[:, t]) * x[row, block + k - t]
                assert torch.allclose(found[row, block + k], expected, atol=1e-5)


def test_a_slot_is_not_convolved_with_later_slots_or_other_blocks() -> None:
    convolution = random_convolution()
    x = torch.randn(1, 15, 8)
    plain = convolution(x)
    for changed in range(15):
        other = x.clone()
        other[0, changed] += 1
        moved = (convolution(other) != plain).any(-1)[0].nonzero()[:, 0].tolist()
        assert moved == [slot for slot in range(changed, changed + 3) if slot // 5 == changed // 5]


def test_convolutions_at_zero_leave_the_drafter_as_it_is() -> None:
    target = tiny_target()
    plain = tiny_drafter(target)
    convolved = copied(target, plain, **CONVOLUTIONS)
    ours, theirs = (drafted(target, each, Sampling(1.0), Watching()) for each in (convolved, plain))
    assert ours.tokens == theirs.tokens and torch.equal(ours.probs, theirs.probs) and torch.equal(ours.confidence, theirs.confidence)


def test_convolutions_change_a_block_and_no_block_sees_another() -> None:
    """Two blocks of one text in one pass are what each of them is alone."""
    target = tiny_target()
    drafter = tiny_drafter(target, **CONVOLUTIONS)
    _, taps = target.forward(torch.tensor([TEXT]), None, drafter.target_layer_ids)
    blocks = torch.tensor([[[7, 3, 3, 3], [8, 3, 3, 3]]])
    both = hidden_of(drafter, taps, blocks)
    for i in range(2):
        assert torch.allclose(both[i], hidden_of(drafter, taps, blocks[:, i : i + 1])[0], atol=1e-4)
    for name, weight in drafter.named_parameters():
        if ".convolutions." in name:
            weight.zero_()
    assert not torch.allclose(both, hidden_of(drafter, taps, blocks), atol=1e-2)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"markov_head_type": "selector"}, "num_candidates is 0"),
        (SELECTOR | {"num_candidates": 101}, r"num_candidates is 101: .*\(100\)"),
        (SELECTOR | {"num_candidates": 51, "draft_vocab_size": 50}, r"num_candidates is 51: .*\(50\)"),
        (SELECTOR | {"markov_rank": 0}, "num_candidates is 6"),
        ({"num_candidates": 4}, "num_candidates is 4"),
        (CONVOLUTIONS | {"convolution_groups": 5}, "convolution_groups 5 divide"),
        (CONVOLUTIONS | {"convolution_kernel": -1}, "convolution_kernel -1"),
        (CONVOLUTIONS | {"layer_type": "gemma4"}, "convolution_kernel is 3"),
    ],
    ids=str,
)
def test_an_impossible_selector_or_convolution_is_refused(changes: dict[str, object], named: str) -> None:
    shape = tiny_drafter(tiny_target()).config.to_dict()
    with pytest.raises(ValueError, match=named):
        Drafter(DrafterConfig(**(shape | changes)))
