"""The drafter: what its heads compute, what it sees, and that it reports exactly what it sampled from."""

from __future__ import annotations

import pytest
import torch
from tiny import HEADS, dense, tiny_drafter, tiny_target
from torch import Tensor

from dspark.draft.backbone import Context, DrafterConfig
from dspark.draft.drafter import Drafter, DraftState
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling


def ready(target: Target, drafter: Drafter, prompt: list[int]) -> tuple[DraftState, Tensor]:
    state = drafter.new_state(prompt)
    _, taps = target.forward(torch.tensor([prompt]), target.new_cache(), drafter.target_layer_ids)
    drafter.extend(state, prompt, taps)
    return state, taps


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_step_by_step_drafting_equals_the_training_forward_pass(head: dict[str, object]) -> None:
    """The distribution that a block was sampled from is the one that training computes for the same block."""
    target = tiny_target()
    drafter = tiny_drafter(target, **head)
    prompt = [5, 9, 11, 4, 30]
    state, taps = ready(target, drafter, prompt)
    draft = drafter.draft(state, 17, 4, Sampling(1.0), Rng(torch.Generator().manual_seed(0)))

    contexts = [Context(*kv) for kv in drafter.context(taps)]
    block, positions = torch.tensor([[17, 3, 3, 3]]), torch.arange(5, 9)[None]
    hidden = drafter.backbone(block, positions, contexts)[0]
    logits = hidden @ drafter.head_weight.T
    previous = torch.tensor([17, *draft.tokens[:-1]])
    embedded = None
    if drafter.markov_head is not None:
        embedded = drafter.markov_head.markov_w1(previous)
        logits = drafter.markov_head.logits(logits, drafter.markov_head.latents(hidden, embedded))
    assert torch.allclose(draft.probs, logits.softmax(-1), atol=1e-6)
    assert torch.allclose(draft.confidence, torch.sigmoid(drafter.confidence_head(hidden, embedded)), atol=1e-6)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_confidence_never_sees_the_token_it_is_about(head: dict[str, object]) -> None:
    """Other draws from the same state: c_k may differ only where an earlier token differs."""
    target = tiny_target()
    drafter = tiny_drafter(target, **head)
    seen: dict[tuple[int, ...], float] = {}
    for seed in range(30):
        state, _ = ready(target, drafter, [5, 9, 11])
        draft = drafter.draft(state, 7, 4, Sampling(3.0), Rng(torch.Generator().manual_seed(seed)))
        for k in range(4):
            before, c = tuple(draft.tokens[:k]), draft.confidence[k].item()
            assert seen.setdefault(before, c) == pytest.approx(c, abs=1e-6)


def test_the_rank_zero_head_is_purely_parallel() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, markov_rank=0)
    rows = []
    for seed in (0, 1):
        state, _ = ready(target, drafter, [5, 9, 11])
        rows.append(drafter.draft(state, 7, 4, Sampling(2.0), Rng(torch.Generator().manual_seed(seed))))
    assert rows[0].tokens != rows[1].tokens
    assert torch.equal(rows[0].probs, rows[1].probs)


def test_the_sequential_head_makes_a_token_depend_on_the_one_before() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    rows = []
    for seed in (0, 1):
        state, _ = ready(target, drafter, [5, 9, 11])
        rows.append(drafter.draft(state, 7, 4, Sampling(2.0), Rng(torch.Generator().manual_seed(seed))).probs)
    assert torch.equal(rows[0][0], rows[1][0])
    assert not torch.allclose(rows[0][1], rows[1][1])


def test_drafting_leaves_only_context_in_the_drafters_cache() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    state, taps = ready(target, drafter, [5, 9, 11])
    first = drafter.draft(state, 7, 4, Sampling(), Rng())
    assert [kv.length for kv in state.layers] == [3, 3]
    state.pending.append(taps[:, :0])
    assert drafter.draft(state, 7, 4, Sampling(), Rng()).tokens == first.tokens


def test_context_in_pieces_equals_context_at_once() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    whole, taps = ready(target, drafter, [5, 9, 11, 20, 21, 22])
    pieces = drafter.new_state()
    for part in taps.split((1, 3, 2), dim=1):
        drafter.extend(pieces, [0] * part.shape[1], part)
    a, b = (drafter.draft(s, 7, 4, Sampling(), Rng()) for s in (whole, pieces))
    assert a.tokens == b.tokens and torch.allclose(a.confidence, b.confidence, atol=1e-6)


def test_a_reduced_draft_vocabulary_proposes_only_its_own_tokens() -> None:
    target = tiny_target()
    d2t = torch.tensor([2, 5, 8, 40, 77, 99])
    drafter = tiny_drafter(target, d2t=d2t)
    state, _ = ready(target, drafter, [5, 9, 11])
    draft = drafter.draft(state, 7, 4, Sampling(1.0), Rng(torch.Generator().manual_seed(0)))
    assert set(draft.tokens) <= set(d2t.tolist())
    rows = dense(draft)
    assert rows.shape == (4, 100) and torch.allclose(rows[:, d2t].sum(-1), torch.ones(4), atol=1e-6)
    assert [[float(row[token]) for token in range(100)] for row in draft.probs] == rows.tolist()


@pytest.mark.parametrize("window", [0, 5])
def test_a_window_outside_the_block_is_refused(window: int) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    state, _ = ready(target, drafter, [5])
    with pytest.raises(ValueError, match=str(window)):
        drafter.draft(state, 7, window, Sampling(), Rng())


@pytest.mark.parametrize(
    ("field", "value"), [("block_size", 0), ("markov_head_type", "lstm"), ("draft_vocab_size", 0), ("draft_vocab_size", 101)]
)
def test_an_impossible_shape_is_refused(field: str, value: object) -> None:
    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "target_layer_ids": (0,),
        "mask_token_id": 3,
    }
    with pytest.raises(ValueError, match=str(value)):
        DrafterConfig(**(shape | {field: value}))


def test_a_short_window_draws_what_a_whole_block_starts_with() -> None:
    target = tiny_target()
    drafter, drafts = tiny_drafter(target), []
    for window in range(1, 5):
        state, _ = ready(target, drafter, [5, 9, 11, 4, 30])
        drafts.append(drafter.draft(state, 7, window, Sampling(1.0), Rng(torch.Generator().manual_seed(0))))
    for short in drafts:
        assert short.tokens == drafts[-1].tokens[: len(short.tokens)]
        assert torch.allclose(short.probs, drafts[-1].probs[: len(short.tokens)], atol=1e-6)
        assert torch.allclose(short.confidence, drafts[-1].confidence[: len(short.tokens)])


def test_a_drafter_without_a_confidence_head_reports_nan() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, enable_confidence_head=False)
    state, _ = ready(target, drafter, [5, 9, 11])
    assert not drafter.has_confidence and drafter.draft(state, 7, 3, Sampling(), Rng()).confidence.isnan().all()


def test_calibration_divides_the_logits_of_confidence() -> None:
    drafter, hidden = tiny_drafter(tiny_target()), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    plain = drafter._confidence([(hidden, [5, 6, 7, 8])])[0].logit()
    drafter.sts_temperatures = (2.0, 0.5, 1.5, 1.0)
    assert torch.allclose(
        drafter._confidence([(hidden, [5, 6, 7, 8])])[0].logit(), plain / torch.tensor(drafter.sts_temperatures), atol=1e-4
    )
