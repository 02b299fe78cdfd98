"""The loop: whatever is drafted, and however it is scheduled, the text is the target's own."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.decode import Round
from dspark.draft.drafter import Drafter
from dspark.draft.source import Draft
from dspark.schedule import Policy

PROMPTS = [[5, 6, 7], [8, 9] * 20]


def policies(block_size: int) -> list[Policy]:
    return [
        *(dspark.FixedWindow(n) for n in range(1, block_size + 1)),
        dspark.MTP1(),
        dspark.AdaptiveWindow(0.02, 0.01, 0.001, max_window=block_size),
        dspark.AdaptiveWindow(1.0, 1.0, 0.5),
        dspark.ConfidenceThreshold(0.3),
        dspark.ConfidenceThreshold(0.5, on="conditional"),
        dspark.PrefixScheduler(lambda b: 1 / (1 + 0.1 * b)),
        dspark.Autoregressive(),
    ]


class Oracle:
    """Drafts the target's own greedy continuation, so that every draft is accepted: full acceptance is where caches go wrong."""

    def __init__(self, drafter: Drafter, continuation: list[int]) -> None:
        self.drafter, self.continuation = drafter, continuation
        self.block_size, self.target_layer_ids, self.has_confidence = drafter.block_size, drafter.target_layer_ids, True

    def new_state(self, prompt: list[int]) -> dict[str, int]:
        return {"at": -len(prompt)}

    def extend(self, state: dict[str, int], token_ids: list[int], taps: torch.Tensor) -> None:
        state["at"] += len(token_ids)

    def draft(self, state: dict[str, int], anchor: int, window: int, *unread: object) -> object:
        tokens = self.continuation[state["at"] + 1 :][:window]
        return Draft(tokens, torch.eye(100)[tokens], torch.ones(len(tokens)), "oracle")


def greedy_reference(target: dspark.Target, prompt: list[int], count: int) -> list[int]:
    out = target.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_round_records_what_the_target_gave_each_checked_draft(temperature: float) -> None:
    """At the temperature of the decoding; greedy, at temperature 1. Adaptive windows and replays live on it."""
    target, text = tiny_target(), [5, 6, 7]
    for r in dspark.decode(target, tiny_drafter(target), text, max_new_tokens=30, temperature=temperature):
        checked = list(r.draft_tokens[: r.verify_length])
        logits, _ = target.forward(torch.tensor([[*text, *checked]]), None)
        rows = (logits[0, len(text) - 1 :] / (temperature or 1.0)).softmax(-1)
        assert r.target_probs_of_drafts == pytest.approx([float(rows[k, token]) for k, token in enumerate(checked)], rel=1e-3)
        text = [*text, *r.committed]


@pytest.mark.parametrize(("block_size", "head"), [(1, "vanilla"), (2, "gated"), (3, "none"), (5, "rnn"), (8, "vanilla")])
def test_greedy_text_equals_model_generate_for_every_policy(block_size: int, head: str) -> None:
    target = tiny_target()
    shape = {"markov_rank": 0} if head == "none" else {"markov_head_type": head}
    drafter = tiny_drafter(target, block_size=block_size, draft_vocab_size=100, **shape)
    expected = [greedy_reference(target, prompt, 16) for prompt in PROMPTS]
    for i, policy in enumerate(policies(block_size)):
        source = dspark.ContextLookup(drafter, 1) if i % 2 else drafter
        for prompt, text in zip(PROMPTS, expected, strict=True):
            assert dspark.generate(target, source, prompt, max_new_tokens=16, policy=policy).token_ids == text, (policy, prompt)


def test_full_acceptance_leaves_cache_and_positions_right() -> None:
    target = tiny_target(eos_token_id=None)
    expected = greedy_reference(target, PROMPTS[0], 40)
    oracle = Oracle(tiny_drafter(target), expected)
    found = dspark.generate(target, oracle, PROMPTS[0], policy=dspark.FixedWindow(), max_new_tokens=40)
    assert found.token_ids == expected
    assert all(r.accepted == r.verify_length for r in found.rounds)
    assert found.tokens_per_round > 4.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_committed_tokens_are_the_accepted_drafts_and_one_more(temperature: float) -> None:
    target = tiny_target()
    out = dspark.generate(target, tiny_drafter(target), PROMPTS[0], max_new_tokens=60, temperature=temperature)
    anchor = out.rounds[0].committed[-1]
    for r in out.rounds[1:]:
        assert r.anchor == anchor
        assert r.accepted <= r.verify_length <= len(r.draft_tokens) <= max(r.window, 0)
        assert r.committed[:-1] == r.draft_tokens[: len(r.committed) - 1]
        assert len(r.committed) == r.accepted + 1 or r.committed[-1] in target.eos_token_ids
        assert len(r.target_probs_of_drafts) == r.verify_length
        anchor = r.committed[-1]
    assert out.token_ids == [t for r in out.rounds for t in r.committed]


def test_nothing_follows_an_end_of_text_inside_an_accepted_block() -> None:
    target = tiny_target(eos_token_id=None)
    text = greedy_reference(target, PROMPTS[0], 30)
    stop = text[6]  # now make a token in the middle of the text an end
    first = text.index(stop)
    target.eos_token_ids = frozenset([2, stop])
    out = dspark.generate(target, Oracle(tiny_drafter(target), text), PROMPTS[0], policy=dspark.FixedWindow(), max_new_tokens=30)
    assert out.token_ids == text[: first + 1]
    assert sum(len(r.committed) for r in out.rounds) == first + 1  # τ counts nothing after it


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 17])
def test_the_length_limit_is_never_exceeded(limit: int) -> None:
    target = tiny_target(eos_token_id=None)
    oracle = Oracle(tiny_drafter(target), greedy_reference(target, PROMPTS[0], 40))
    assert len(dspark.generate(target, oracle, PROMPTS[0], max_new_tokens=limit).token_ids) == limit


def test_decoding_stops_at_the_end_of_the_context() -> None:
    target = tiny_target(eos_token_id=None, max_position_embeddings=32)
    out = dspark.generate(target, tiny_drafter(target), [5] * 20, max_new_tokens=100)
    assert len(out.token_ids) == 12


def test_a_context_that_outgrows_the_preallocated_cache_changes_nothing() -> None:
    target = tiny_target(eos_token_id=None)
    prompt = torch.randint(4, 100, (250,), generator=torch.Generator().manual_seed(0)).tolist()
    assert dspark.generate(target, tiny_drafter(target), prompt, max_new_tokens=30).token_ids == greedy_reference(target, prompt, 30)


def test_the_same_seed_gives_the_same_sample_and_another_seed_another() -> None:
    target = tiny_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    one, two, other = (
        dspark.generate(target, drafter, PROMPTS[0], max_new_tokens=30, temperature=1.0, seed=s).token_ids for s in (7, 7, 8)
    )
    assert one == two != other


def test_plain_decoding_is_the_same_loop_without_drafts() -> None:
    out = dspark.generate(tiny_target(eos_token_id=None), None, PROMPTS[0], max_new_tokens=10)
    assert all(isinstance(r, Round) and r.verify_length == 0 and len(r.committed) == 1 for r in out.rounds)
    assert out.tokens_per_round == 1


def test_drafting_is_skipped_when_the_policy_asks_for_nothing() -> None:
    target = tiny_target(eos_token_id=None)
    drafter = tiny_drafter(target)
    drafter.draft = None  # calling it would fail
    assert dspark.generate(target, drafter, PROMPTS[0], max_new_tokens=5, policy=dspark.Autoregressive()).tokens_per_round == 1


def test_one_token_has_no_rounds_and_no_tokens_per_round() -> None:
    target = tiny_target()
    assert math.isnan(dspark.generate(target, None, PROMPTS[0], max_new_tokens=1).tokens_per_round)
