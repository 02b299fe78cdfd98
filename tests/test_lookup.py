"""Drafting by copying."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.draft.lookup import LEAST_SURVIVAL, RATES
from dspark.draft.source import Draft
from dspark.verify.sampling import OneHot, Rng, Sampling


def state_after(source: dspark.ContextLookup, tokens: list[int]) -> object:
    state = source.new_state(tokens)
    source.extend(state, tokens, torch.zeros(1, len(tokens), 64))
    return state


def drafted(source: dspark.ContextLookup, state: object, anchor: int, window: int = 8) -> Draft:
    return source.draft(state, anchor, min(window, source.block_size), Sampling(), Rng())


@pytest.fixture
def source() -> dspark.ContextLookup:
    return dspark.ContextLookup(tiny_drafter(tiny_target()), min_match=2, max_copy=6)


def test_what_followed_the_last_occurrence_is_copied(source: dspark.ContextLookup) -> None:
    draft = drafted(source, state_after(source, [5, 6, 7, 8, 5, 6, 9, 10, 5]), anchor=6)
    assert draft.tokens[:3] == [9, 10, 5]
    assert draft.source == "copy"
    assert draft.probs == [*map(OneHot, draft.tokens)]


def test_what_followed_the_longest_repeated_end_is_copied(source: dspark.ContextLookup) -> None:
    """The last occurrence of two tokens gives way to an earlier one of three."""
    assert drafted(source, state_after(source, [4, 5, 6, 7, 3, 5, 6, 9, 4, 5]), anchor=6).tokens[0] == 7


def test_every_draft_is_looked_up_with_the_ones_before_it_as_text(source: dspark.ContextLookup) -> None:
    """7 follows 5 6, and 8 follows 6 7 where that stood last, in another place."""
    draft = drafted(source, state_after(source, [5, 6, 7, 1, 6, 7, 8, 2, 5]), anchor=6)
    assert draft.tokens[0] == 7 and draft.confidence[0] == pytest.approx(RATES[2])
    assert draft.tokens[1] == 1 and draft.confidence[1] == pytest.approx(RATES[3]), "5 6 7 is longer than 6 7"


def test_a_loop_is_followed_on_and_on(source: dspark.ContextLookup) -> None:
    assert drafted(source, state_after(source, [7, 8, 7, 8, 7, 8, 7]), anchor=8).tokens == [7, 8, 7, 8, 7, 8]
    assert drafted(source, state_after(source, [3, 7, 7, 7, 7, 7, 7]), anchor=7).tokens == [7, 7, 7, 7, 7, 7]


def test_a_block_ends_where_it_has_become_unlikely_to_be_right(source: dspark.ContextLookup) -> None:
    """Each of these ends stands earlier with two tokens only: the next is 0.45 likely, and 0.45³ is below the least survival."""
    text = [1, 2, 3, 9, 2, 3, 4, 9, 3, 4, 5, 9, 4, 5, 6, 9, 0, 1]
    draft = drafted(source, state_after(source, text), anchor=2)
    assert draft.tokens[0] == 3 and float(draft.confidence.prod()) >= LEAST_SURVIVAL
    assert len(draft.tokens) < source.max_copy


def test_where_nothing_repeats_the_drafter_proposes_at_most_its_own_block(source: dspark.ContextLookup) -> None:
    draft = drafted(source, state_after(source, [5, 6, 7, 8]), anchor=9)
    assert draft.source == "drafter"
    assert len(draft.tokens) == source.drafter.block_size == 4 < source.block_size


def test_copies_never_exceed_window_and_limit(source: dspark.ContextLookup) -> None:
    text = [1, 2, 3, 4, 5, 6, *range(20, 40), 1, 2, 3, 4, 5]
    assert len(drafted(source, state_after(source, text), 6, window=3).tokens) == 3
    assert len(drafted(source, state_after(source, text), 6, window=9).tokens) == source.max_copy


def test_confidence_is_the_rate_of_suffixes_of_that_length(source: dspark.ContextLookup) -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5]
    for length in (2, 3, 4, 5, 6):
        draft = drafted(source, state_after(source, [*text[:9], *text[15 - length :]]), 6)
        assert draft.tokens[0] == 7 and draft.confidence[0] == pytest.approx(RATES[length])


@pytest.mark.parametrize("option", [{"min_match": 0}, {"max_copy": 0}])
def test_impossible_settings_are_refused(option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        dspark.ContextLookup(tiny_drafter(tiny_target()), **option)


def test_without_a_drafter_a_round_with_nothing_to_copy_is_a_plain_step() -> None:
    target = tiny_target(vocab_size=8)  # so small that a text repeats itself
    source = dspark.ContextLookup(None, min_match=1, target=target)
    rounds = dspark.generate(target, source, [1, 2, 3], max_new_tokens=30).rounds[1:]
    assert {r.source for r in rounds} == {"", "copy"}
    assert all(r.verify_length == 0 for r in rounds if r.source == "") and any(r.accepted for r in rounds)


def test_without_drafter_and_target_there_is_nothing_to_copy_with() -> None:
    with pytest.raises(ValueError, match="target=target"):
        dspark.ContextLookup(None)
