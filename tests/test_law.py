"""The exact law: over every branch of draft, schedule, verify and rewind, in fractions, the output follows the target's law."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark.draft.drafter import Drafter
from dspark.draft.lookup import RATES
from dspark.proof import enumeration
from dspark.proof.branches import ExactSampling, difference, enumerate_law, exact
from dspark.proof.cases import HEADS, POLICIES, SAMPLINGS, SCHEDULED, SOURCES, Case, every_case, few_cases, served
from dspark.proof.counterexample import APPENDIX_A, STEPS_PER_SECOND, GlobalArgmax, first_token_laws
from dspark.proof.enumeration import Proof, Trip
from dspark.proof.tables import PAIR, PAIR_POLICIES, PAIR_STEPS_PER_SECOND, TEXTS, Request, joint_law, one_round, target_law
from dspark.schedule import PrefixScheduler
from dspark.verify.accept import accept, residual
from dspark.verify.sampling import Chance

CASES = few_cases()
prove = cache(enumeration.prove)


def trips(policy: str = "") -> Counter[Trip]:
    """What happened in the cases of one policy, or of all."""
    return sum((prove(case).trips for case in CASES if policy in ("", case.policy)), Counter())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_joint_law_of_the_text_is_the_targets_own(case: Case) -> None:
    proof = prove(case)
    assert proof.law == proof.expected
    assert sum(proof.law.values()) == 1
    assert len(proof.expected) > 1 or case.sampling.temperature == 0
    assert proof.branches >= len(proof.expected)


def test_the_cases_cover_every_policy_source_sampling_vocabulary_and_block_size() -> None:
    for cases in (CASES, every_case()):
        assert {case.policy for case in cases} == set(POLICIES)
        assert {case.source for case in cases} == set(SOURCES) > set(HEADS)
        assert {case.sampling for case in cases} >= set(SAMPLINGS)
        assert {case.vocab for case in cases} == {2, 3, 4, 5}
        assert {case.block_size for case in cases} == {1, 2, 3, 4}
        assert len({case.name for case in cases}) == len(cases)
    assert {(case.policy, case.source) for case in every_case()} >= {(policy, source) for policy in served(3) for source in SOURCES}


@pytest.mark.parametrize("size", range(5))
def test_rewinds_of_every_size_happened_and_blocks_of_every_size_were_accepted(size: int) -> None:
    assert any(trip.rewound == size and trip.verify_length for trip in trips())
    assert any(trip.accepted == trip.verify_length == size for trip in trips())


def test_text_ended_inside_accepted_blocks_and_the_limit_cut_blocks() -> None:
    assert {trip.accepted - trip.committed for trip in trips() if trip.ended_inside} >= {0, 1, 2}
    whole = [trip for policy in POLICIES if policy not in SCHEDULED for trip in trips(policy)]
    assert {trip.window - trip.drafted for trip in whole} >= {0, 1, 2, 3}


@pytest.mark.parametrize("policy", SCHEDULED)
def test_schedules_cut_the_same_block_at_different_places(policy: str) -> None:
    drafted = [trip for trip in trips(policy) if trip.source]
    assert {trip.verify_length for trip in drafted if trip.window == max(t.window for t in drafted)} >= {0, 1, 2}


@pytest.mark.parametrize("policy", SCHEDULED)
def test_what_will_not_be_checked_is_not_drawn(policy: str) -> None:
    assert all(trip.drafted == trip.verify_length for trip in trips(policy))


def test_siblings_of_every_position_were_kept_and_refused() -> None:
    beside = [trip for trip in trips("siblings") if trip.siblings]
    assert {trip.siblings[0] for trip in beside} == {position for trip in beside for position in trip.siblings} == {1, 2}
    assert {trip.accepted for trip in beside if trip.kept_sibling} >= {0, 1}
    assert any(not trip.kept_sibling and trip.accepted + 1 in trip.siblings for trip in beside)


def test_the_adaptive_window_moved_both_ways_and_fell_back_to_plain_steps() -> None:
    assert {trip.window for trip in trips("adaptive")} >= {0, 1, 2, 3}


def test_in_one_case_the_drafter_heard_a_token_with_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, hear = [], Drafter._heard

    def listening(self: Drafter, *arguments: object) -> object:
        heard.append(hear(self, *arguments))
        return heard[-1]

    monkeypatch.setattr(Drafter, "_heard", listening)
    enumeration.prove(next(case for case in CASES if case.source == "hearing" and case.vocab == 3))
    assert {0.0} < {rate for _, rate in heard} <= {0.0, *RATES.values()}


def test_copies_and_the_drafter_took_turns() -> None:
    for case in CASES:
        if case.source == "copying":
            assert {trip.source for trip in prove(case).trips} >= {"copy", "drafter"}


@pytest.mark.parametrize("source", ["gated", "rnn"])
def test_a_schedule_that_reads_ahead_is_seen(source: str) -> None:
    """The same loop and the same models under a global argmax: if this law were exact, the cases above would show nothing."""
    case = Case("prefix-jagged", source, tokens=4)
    proof = enumeration.prove(case, GlobalArgmax(POLICIES[case.policy].sps))
    assert proof.difference > 1e-4
    assert sum(proof.law.values()) == 1


def test_appendix_a_is_reproduced_to_the_last_digit() -> None:
    assert first_token_laws() == {
        "GlobalArgmax": {(0,): Fraction(17, 20), (1,): Fraction(3, 20)},
        "PrefixScheduler": {(0,): Fraction(7, 10), (1,): Fraction(3, 10)},
    }
    assert target_law([APPENDIX_A], 1) == {(0,): Fraction(7, 10), (1,): Fraction(3, 10)}
    assert GlobalArgmax(STEPS_PER_SECOND).lengths([torch.tensor([0.8, 0.9])]) == [2]
    assert GlobalArgmax(STEPS_PER_SECOND).lengths([torch.tensor([0.8, 0.0])]) == [0]


@pytest.mark.parametrize("policy", PAIR_POLICIES)
def test_requests_that_are_scheduled_together_stay_independent_and_exact(policy: str) -> None:
    proof = enumeration.prove_pair(policy)
    assert proof.law == proof.expected
    assert len(proof.expected) == 64


def test_one_requests_tokens_decide_on_the_others_length() -> None:
    lengths, _ = enumerate_law(lambda chance: one_round(PAIR, PrefixScheduler(PAIR_STEPS_PER_SECOND), chance)[1])
    assert set(lengths) >= {(2, 0), (1, 1)}
    assert joint_law(PAIR, GlobalArgmax(PAIR_STEPS_PER_SECOND))[0] != target_law(PAIR)


@pytest.mark.parametrize("seed", range(6))
def test_the_prefix_scheduler_is_exact_on_any_step_times(seed: int) -> None:
    dice = random.Random(seed)
    requests = [
        Request(
            *({text: Fraction(dice.randint(1, 9), 10) for text in TEXTS} for _ in range(2)), {text: dice.random() for text in TEXTS[:3]}
        )
        for _ in range(2)
    ]
    curve = {tokens: dice.uniform(0.6, 1.0) for tokens in range(2, 7)}.__getitem__
    assert joint_law(requests, PrefixScheduler(curve))[0] == target_law(requests)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sampling", [ExactSampling(0.5), ExactSampling(1.0, top_k=3), ExactSampling(1.0, top_p=0.6)], ids=str)
def test_rows_and_residuals_are_distributions_to_the_last_digit(sampling: ExactSampling, seed: int) -> None:
    p_target, p_draft = sampling.probs(torch.randn(2, 5, generator=generator(seed)))
    for row in (p_target, p_draft, residual(p_target, p_draft)):
        assert sum(row) == 1
        assert min(row) >= 0
    owed = {token: t - d for token, (t, d) in enumerate(zip(p_target, p_draft, strict=True)) if t > d}
    assert {token for token, p in enumerate(residual(p_target, p_draft)) if p} == set(owed)


def test_fractions_follow_the_rule_that_the_floats_follow() -> None:
    """One draft, its acceptance and what is drawn behind it, in floats and in fractions: the same decisions for the same coins."""
    p_draft, p_target = (torch.rand(3, 4, generator=generator(seed)).softmax(-1) for seed in (1, 2))
    for seed in range(100):
        decisions = []
        for rows in ((p_draft, p_target), (exact(p_draft), exact(p_target))):
            chance = Uniform(generator(seed))
            decisions.append(accept([1, 3], rows[0], rows[1], chance))
        assert decisions[0] == decisions[1]


class Uniform(Chance):
    """The product's chance, able to read fractions."""

    def choose(self, probs: torch.Tensor | np.ndarray) -> int:
        return super().choose(torch.as_tensor(np.asarray(probs, dtype=np.float64)))

    def accepts(self, p_target: object, p_draft: object) -> bool:
        return super().accepts(torch.tensor(float(p_target)), torch.tensor(float(p_draft)))


def test_every_leaf_is_visited_once_and_answers_of_probability_zero_never() -> None:
    half, third = Fraction(1, 2), Fraction(1, 3)
    rows = [np.array([half, Fraction(0), half]), np.array([third, third, third]), np.array([Fraction(0), Fraction(1), Fraction(0)])]
    law, branches = enumerate_law(lambda chance: [chance.choose(row) for row in rows])
    assert branches == 6
    assert law == {(first, second, 1): Fraction(1, 6) for first in (0, 2) for second in (0, 1, 2)}


def test_a_coin_falls_both_ways_unless_it_is_certain() -> None:
    quarter, half = Fraction(1, 4), Fraction(1, 2)
    assert enumerate_law(lambda chance: [chance.accepts(quarter, half)]) == ({(True,): half, (False,): half}, 2)
    assert enumerate_law(lambda chance: [chance.accepts(half, quarter)]) == ({(True,): Fraction(1)}, 1)
    assert enumerate_law(lambda chance: [chance.accepts(Fraction(0), half)]) == ({(False,): Fraction(1)}, 1)


def test_a_float_row_is_taken_as_the_fractions_that_it_holds() -> None:
    row = torch.tensor([0.1, 0.2, 0.7])
    total = sum(map(Fraction, row.tolist()))
    law, _ = enumerate_law(lambda chance: [chance.choose(row)])
    assert law == {(token,): Fraction(p) / total for token, p in enumerate(row.tolist())}
    assert list(exact(row)) == list(law.values())


def test_a_row_that_does_not_sum_to_one_gives_a_law_that_does_not() -> None:
    law, _ = enumerate_law(lambda chance: [chance.choose(np.array([Fraction(1, 4), Fraction(1, 4)]))])
    assert sum(law.values()) == Fraction(1, 2)


def test_a_run_that_remembers_the_one_before_is_refused() -> None:
    kept = []

    def run(chance: Chance) -> list[int]:
        kept.append(chance.choose(exact(torch.full((2 + len(kept) % 2,), 0.5))))
        return kept[-1:]

    with pytest.raises(AssertionError, match="kept from one run to the next"):
        enumerate_law(run)


def test_no_difference_is_too_small_to_be_reported() -> None:
    tiny = Fraction(1, 10**400)  # below the smallest float
    law, expected = {(0,): 1 - tiny, (1,): tiny}, {(0,): Fraction(1)}
    assert difference(law, expected) == tiny
    assert Proof(law, expected, 2).difference > 0
    assert Proof(expected, dict(expected), 1).difference == 0


def test_the_table_is_made_once_and_holds_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "proof-enumeration.parquet"
    monkeypatch.setattr(enumeration, "prove", prove)
    frame = enumeration.run(out, smoke=True)
    assert (frame["difference"] == 0.0).all()
    assert frame["branches"].sum() > len(frame)
    assert set(frame["requests"]) == {1, 2}
    assert "autoregressive" in enumeration.table(frame)
    monkeypatch.setattr(enumeration, "prove", None)  # calling it would fail
    assert enumeration.run(out, smoke=True).equals(frame)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
