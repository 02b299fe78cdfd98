"""Exactness: every branch of a round, in fractions, gives the target's distribution; greedy texts are those of ``model.generate``."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from exact import draws, enumeration
from exact.branches import Branch, every_branch, exact
from exact.enumeration import HEADS, POLICIES, SAMPLINGS, SOURCES, Case, every_case, few_cases
from exact.greedy import BLOCK_SIZES, SITUATIONS, compared
from exact.tables import APPENDIX_A_STEPS, PAIR, PAIR_POLICIES, PAIR_STEPS, GlobalArgmax, first_tokens, served_together
from tiny import tiny_drafter, tiny_target

from dspark.schedule import POLICIES as REGISTRY
from dspark.schedule import PrefixScheduler
from dspark.verify.sampling import Sampling

CASES = few_cases()
SCHEDULED = [name for name in POLICIES if name.startswith(("confidence", "conditional", "prefix", "async"))]
prove = cache(enumeration.prove)


# ---- enumeration


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_text_has_the_targets_distribution(case: Case) -> None:
    proof = prove(case)
    assert proof.distribution == proof.expected
    assert sum(proof.distribution.values()) == 1
    assert len(proof.expected) > 1 or case.sampling.temperature == 0


@pytest.mark.parametrize("cases", [CASES, every_case()], ids=["few", "every"])
def test_the_cases_cover_every_policy_source_sampling_vocabulary_and_block_size(cases: list[Case]) -> None:
    every = {"policy": POLICIES, "source": SOURCES, "sampling": SAMPLINGS, "vocab": range(2, 6), "block_size": range(1, 5)}
    for field, values in every.items():
        assert {getattr(case, field) for case in cases} >= set(values)
    assert {name.split(":")[0] for name in POLICIES} >= set(REGISTRY) and set(SOURCES) > set(HEADS)
    assert len(set(map(str, cases))) == len(cases)


def test_the_cases_rewind_accept_and_end_the_text_in_every_way() -> None:
    met = sum((prove(case).met for case in CASES), Counter())
    assert {r.verify_length - r.accepted for r in met} >= {0, 1, 2, 3}
    assert {r.accepted for r in met if r.accepted == r.verify_length} >= {0, 1, 2, 4}
    assert {r.accepted - len(r.committed) for r in met} >= {-1, 0, 1}  # from 0 on an accepted draft ended the text
    assert {r.window - len(r.draft_tokens) for r in met} >= {0, 1, 2, 3}  # cut by the length limit
    assert {r.source for r in met} == {"", "copy", "drafter"}


@pytest.mark.parametrize("policy", SCHEDULED)
def test_a_schedule_cuts_blocks_of_the_same_length_at_different_places(policy: str) -> None:
    met = sum((prove(case).met for case in CASES if case.policy == policy), Counter())
    lengths = {(len(r.draft_tokens), r.verify_length) for r in met}
    assert any(len([checked for drafted, checked in lengths if drafted == n]) > 1 for n in range(1, 5))


def test_appendix_a_the_global_argmax_is_biased_and_the_prefix_scheduler_is_not() -> None:
    assert first_tokens(PrefixScheduler(APPENDIX_A_STEPS)) == [Fraction(7, 10), Fraction(3, 10)]
    assert first_tokens(GlobalArgmax(APPENDIX_A_STEPS)) == [Fraction(17, 20), Fraction(3, 20)]


@pytest.mark.parametrize("policy", PAIR_POLICIES)
def test_requests_that_are_served_together_stay_independent_and_exact(policy: str) -> None:
    proof = served_together(PAIR, PAIR_POLICIES[policy])
    assert proof.distribution == proof.expected and sum(proof.distribution.values()) == 1


def test_a_schedule_that_reads_later_confidences_makes_requests_depend_on_each_other() -> None:
    assert served_together(PAIR, GlobalArgmax(PAIR_STEPS)).difference > 0.01


# ---- the walk over branches


def test_every_branch_is_visited_once_and_impossible_outcomes_never() -> None:
    half, third, none = Fraction(1, 2), Fraction(1, 3), Fraction(0)
    rows = [np.array([half, none, half]), np.array([third, third, third]), np.array([none, Fraction(1), none])]
    distribution, branches = every_branch(lambda branch: [branch.choose(row) for row in rows])
    assert (branches, distribution) == (6, {(first, second, 1): Fraction(1, 6) for first in (0, 2) for second in (0, 1, 2)})
    assert every_branch(lambda branch: [branch.accepts(third, half)])[0] == {(True,): 2 * third, (False,): third}
    assert every_branch(lambda branch: [branch.accepts(half, third)]) == ({(True,): Fraction(1)}, 1)
    assert every_branch(lambda branch: [branch.choose(rows[0] / 2)])[0] == {(0,): half / 2, (2,): half / 2}  # rows are used as they are


def test_a_run_that_remembers_the_one_before_is_refused() -> None:
    kept = []

    def run(branch: Branch) -> list[int]:
        kept.append(branch.choose(exact(torch.full((2 + len(kept) % 2,), 0.5))))
        return kept[-1:]

    with pytest.raises(AssertionError, match="kept from one run to the next"):
        every_branch(run)


# ---- greedy texts


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_policy_gives_the_greedy_text_of_model_generate(situation: str) -> None:
    """One prompt of every situation, at one block size each."""
    found = Counter()
    for name, counts in compared(situation, 0, [BLOCK_SIZES[2 + list(SITUATIONS).index(situation) % 4]]):
        assert counts["equal"], name
        found += counts
    assert found["accepted"] and found["rejected"]
    assert found["inside"] or situation != "end of text"  # an accepted draft ended the text, with more of its block after it


# ---- draws


def test_draws_follow_the_target_and_those_of_a_biased_rule_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """From tiny models of eight tokens, of which one ends the text. Plain sampling, which has no residual, follows it even then."""
    target = tiny_target(vocab_size=8, num_hidden_layers=2, initializer_range=0.3)
    drafter = tiny_drafter(target, block_size=5, target_layer_ids=(0,), num_hidden_layers=1)
    asked = (target, drafter, [4, 5, 6, 4, 5, 7, 4], Sampling(1.0), 400, 7)
    assert min(draws.p_values(*asked, ["fixed", "prefix"]).values()) > 1e-3
    monkeypatch.setattr("dspark.verify.accept.residual", lambda p_target, p_draft: p_target)
    biased = draws.p_values(*asked, ["plain", "fixed"])
    assert biased["plain"] > 1e-3 > biased["fixed"]


def test_the_statistics_are_those_of_the_printed_tables() -> None:
    for dof, critical, tail in ((1, 3.841, 0.05), (10, 18.307, 0.05), (30, 50.892, 0.01), (100, 149.449, 0.001)):
        assert draws.chi2_tail(critical, dof) == pytest.approx(tail, rel=1e-3)
    drawn = {"a": 60, "b": 25, "c": 10, "d": 3, "f": 2}  # d and f are expected fewer than 5 times, and share a cell
    distribution = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.04, "e": 0.01}
    assert draws.p_value(drawn, distribution) == pytest.approx(draws.chi2_tail(2 + 25 / 30 + 25 / 15, 3))
