"""The autoregressive baseline: it drafts exactly what it was trained on, forgets its own features, and changes no text."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from exact.enumeration import SEED, ExactSampling, compared, small_target
from test_train import corpus
from tiny import dense, tiny_drafter, tiny_target

import dspark
from dspark.draft.drafter import Draft, Drafter
from dspark.draft.eagle import EagleDrafter
from dspark.formats.deepspec import export_deepspec
from dspark.target.target import Target
from dspark.train.features import FeatureStore
from dspark.train.loop import TrainConfig, Trainer
from dspark.train.losses import block_loss, choose_blocks
from dspark.train.start import drafter_for
from dspark.verify.sampling import Rng, Sampling

SHAPE = {"kind": EagleDrafter, "num_hidden_layers": 1, "markov_rank": 0}


def eagle(target: Target, **shape: object) -> EagleDrafter:
    return tiny_drafter(target, **(SHAPE | shape))


def draft_after(drafter: EagleDrafter, target: Target, text: list[int], anchor: int, seed: int = 0) -> Draft:
    state = drafter.new_state(text)
    _, taps = target.forward(torch.tensor([text]), None, drafter.target_layer_ids)
    drafter.extend(state, text, taps)
    return drafter.draft(state, anchor, drafter.block_size, Sampling(1.0), Rng(torch.Generator().manual_seed(seed)))


def trainer(folder: Path, steps: int = 6, kind: type = EagleDrafter, seed: int = 0) -> Trainer:
    target = tiny_target()
    store = FeatureStore(target, corpus(), (0, 2), shard_rows=4)
    config = TrainConfig(steps=steps, sequences=2, anchors=3, learning_rate=1e-2, checkpoint_every=2, seed=seed)
    drafter = drafter_for(
        target,
        kind=kind,
        init_layers=(3,),
        block_size=4,
        target_layer_ids=(0, 2),
        markov_rank=0,
        mask_token_id=3,
        d2t=torch.arange(2, 90),
    )
    return Trainer(target, drafter, store, config, folder)


# ---- training and drafting


@pytest.mark.parametrize("row", range(3))
def test_training_and_drafting_see_the_same_distributions(row: int) -> None:
    """The hidden states of a training block are those of the block drafted at its anchor, and its acceptance Σ min(p_d, p_t)."""
    target = tiny_target()
    drafter = eagle(target, block_size=4)
    shard = FeatureStore(target, corpus(), (0, 2)).shard(0)
    blocks = choose_blocks(shard, 5, 4, 3, torch.Generator().manual_seed(row))
    ids = shard.token_ids[row]
    for which in range(5):
        anchor = int(blocks.positions[row, which, 0])
        text = ids.tolist()
        draft = draft_after(drafter, target, text[:anchor], text[anchor])
        blocks.previous[row, which] = torch.tensor([text[anchor], *draft.tokens[:-1]])  # as if the text were what was drafted
        hidden = drafter.block_hidden(shard.token_ids, shard.taps, blocks.tokens, blocks.previous, blocks.positions)[row, which]
        assert torch.allclose((hidden @ drafter.head_weight.T).softmax(-1), draft.probs, atol=1e-5)
        assert torch.allclose(torch.sigmoid(drafter.confidence_head(hidden, None)), draft.confidence, atol=1e-5)

    blocks = choose_blocks(shard, 5, 4, 3, torch.Generator().manual_seed(row))
    result = block_loss(drafter, shard, blocks)
    hidden = drafter.block_hidden(shard.token_ids, shard.taps, blocks.tokens, blocks.previous, blocks.positions)
    p_draft = (hidden[row] @ drafter.head_weight.T).softmax(-1)
    p_target = target.forward(ids[None], None)[0][0].softmax(-1)[blocks.positions[row].clamp(max=23)]
    valid = blocks.valid[row]
    assert valid.sum() >= 6
    assert torch.allclose(result.acceptance[row][valid], torch.minimum(p_draft, p_target).sum(-1)[valid], atol=1e-5)


def test_later_steps_teach_through_the_features_of_earlier_ones() -> None:
    """Training-time test: nothing is cut off between the steps, so the gradient is what a small change really does."""
    target = tiny_target(dtype=torch.float64)
    drafter = eagle(target).requires_grad_(True)
    shard = FeatureStore(target, corpus(), (0, 2)).shard(0)
    blocks = choose_blocks(shard, 2, 4, 3, torch.Generator().manual_seed(0))

    def last_step() -> torch.Tensor:
        hidden = drafter.block_hidden(shard.token_ids, shard.taps.clone(), blocks.tokens, blocks.previous, blocks.positions)
        return hidden[..., 3, :].sin().sum()

    for weight in (drafter.fc.weight, drafter.combine.weight, drafter.layers[0].mlp.down_proj.weight):
        (gradient,) = torch.autograd.grad(last_step(), weight)
        step, found = 1e-6 * gradient / gradient.norm(), []
        with torch.no_grad():
            for change in (step, -2 * step, step):
                weight += change
                found.append(last_step().item())
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    records = list(trainer(tmp_path, steps=40).run())
    first, last = (sum(r["loss"] for r in part) for part in (records[:8], records[-8:]))
    assert last < first


def test_a_training_resumed_twice_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    losses = [r["loss"] for r in whole.run()]
    found = []
    for part in (2, 3, 1):
        broken = trainer(tmp_path / "broken")
        assert broken.step == len(found)
        found += [record["loss"] for _, record in zip(range(part), broken.run(), strict=False)]
    assert found == losses
    for a, b in zip(whole.drafter.state_dict().values(), broken.drafter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    list(trainer(tmp_path, steps=2).run())
    with pytest.raises(ValueError, match="EagleDrafter"):
        trainer(tmp_path, steps=2, kind=Drafter)


# ---- drafting


def test_context_in_pieces_with_drafts_between_equals_context_at_once() -> None:
    """Entries that stood on the drafter's own features are gone: the target's take their place, accepted or not."""
    target = tiny_target()
    drafter = eagle(target)
    text = [5, 9, 11, 20, 21, 22, 30, 31]
    _, taps = target.forward(torch.tensor([text]), None, drafter.target_layer_ids)
    state = drafter.new_state(text[:2])
    for first, last in ((0, 2), (2, 5), (5, 6), (6, 8)):
        drafter.extend(state, text[first:last], taps[:, first:last])
        found = drafter.draft(state, 40 + last, 4, Sampling(1.0), Rng(torch.Generator().manual_seed(last)))
        assert [kv.length for kv in state.layers] == [last - 1]
        expected = draft_after(drafter, target, text[:last], 40 + last, seed=last)
        assert found.tokens == expected.tokens
        assert torch.allclose(found.probs, expected.probs, atol=1e-6)


def test_a_second_draft_from_the_same_context_knows_nothing_of_the_first() -> None:
    target = tiny_target()
    drafter = eagle(target)
    state = drafter.new_state([5, 9, 11])
    drafter.extend(state, [5, 9, 11], target.forward(torch.tensor([[5, 9, 11]]), None, (0, 2))[1])
    first, _, again = (drafter.draft(state, anchor, 4, Sampling(), Rng()) for anchor in (7, 50, 7))
    assert first.tokens == again.tokens and torch.allclose(first.confidence, again.confidence, atol=1e-6)


def test_a_token_depends_on_all_tokens_drafted_before_it() -> None:
    target = tiny_target()
    drafter = eagle(target)
    one, other = (draft_after(drafter, target, [5, 9, 11], 7, seed) for seed in (0, 3))
    assert one.tokens[0] != other.tokens[0]
    assert torch.equal(one.probs[0], other.probs[0]) and not torch.allclose(one.probs[1], other.probs[1])
    assert one.confidence[0] == other.confidence[0]


@pytest.mark.parametrize("window", [0, 5])
def test_a_window_outside_the_block_is_refused(window: int) -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match=str(window)):
        eagle(target).draft(DraftFreeState(), 7, window, Sampling(), Rng())


class DraftFreeState:
    """A state that must not be touched."""


# ---- exactness


@pytest.mark.parametrize("block_size", [1, 3, 6])
def test_greedy_text_in_float32_is_plain_decodings(block_size: int) -> None:
    target = tiny_target(seed=block_size, eos_token_id=None)
    drafter = eagle(target, block_size=block_size)
    policies = (None, dspark.MTP1(), dspark.AdaptiveWindow(0.5, 0.2, 0.1), dspark.ConfidenceThreshold(0.3))
    for seed in range(2):
        prompt = torch.randint(4, 100, (3 + 7 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        plain = dspark.generate(target, None, prompt, max_new_tokens=24).token_ids
        for policy in policies:
            for source in (drafter, dspark.ContextLookup(drafter, 1)):
                assert dspark.generate(target, source, prompt, max_new_tokens=24, policy=policy).token_ids == plain


@pytest.mark.parametrize("policy", [dspark.FixedWindow(), dspark.ConfidenceThreshold(0.3), dspark.AdaptiveWindow(0.6, 0.5, 0.3)], ids=str)
def test_the_joint_distribution_of_sampled_text_is_the_targets_own(policy: dspark.FixedWindow) -> None:
    """By enumeration of every branch in fractions, as :mod:`exact.enumeration` does for our own drafters."""
    target = small_target(2, eos=False)
    drafter = drafter_for(target, **SHAPE, block_size=3, target_layer_ids=(0,), mask_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for weight in drafter.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.5)
    drafter = drafter.to(target.dtype).attach(target).eval().requires_grad_(False)
    proof = compared(target, drafter, policy, ExactSampling(1.0), (4,))
    assert proof.distribution == proof.expected
    assert sum(proof.distribution.values()) == Fraction(1)
    assert any(r.accepted == r.verify_length > 0 for r in proof.met) and any(r.accepted < r.verify_length for r in proof.met)


# ---- on disk


def test_a_round_trip_gives_the_same_class_and_bit_equal_drafts(tmp_path: Path) -> None:
    target = tiny_target(dtype=torch.bfloat16)
    drafter = eagle(target, d2t=torch.arange(2, 90))
    dspark.save_drafter(drafter, target, tmp_path)
    loaded = dspark.load_drafter(tmp_path, target)
    assert type(loaded) is EagleDrafter and loaded.config == drafter.config
    a, b = (draft_after(d, target, [5, 9, 11, 4], 7) for d in (drafter, loaded))
    assert a.tokens == b.tokens and torch.equal(dense(a), dense(b)) and torch.equal(a.confidence, b.confidence)
    with pytest.raises(ValueError, match="was made for"):
        dspark.load_drafter(tmp_path, tiny_target(seed=5, dtype=torch.bfloat16))


def test_what_the_reference_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match="save_drafter"):
        export_deepspec(eagle(target), target, tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["DSparkDrafter"]}, "combine.weight, embed_norm.weight missing or unexpected"),
        ({"architectures": ["OstrichDrafter"]}, "OstrichDrafter"),
        ({"markov_rank": 8}, "markov_rank 8"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    target = tiny_target()
    dspark.save_drafter(eagle(target), target, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=named) as caught:
        dspark.load_drafter(tmp_path, target)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [{"num_hidden_layers": 2}, {"markov_rank": 4}], ids=str)
def test_an_impossible_shape_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="1 layer and no Markov head"):
        eagle(tiny_target(), **shape)
