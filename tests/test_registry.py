"""The one registry of policies: every row can be made, parsed, labelled and coloured, and a new row is found by its users."""

from __future__ import annotations

import pytest
import torch

from dspark.bench.arms import arm_colour, arm_label
from dspark.schedule import POLICIES, FixedWindow, Parameter, PolicyRow, Shortened, make_policy, parse_policy


def curve() -> object:
    return lambda tokens: 1 / (1 + 0.1 * tokens)


@pytest.mark.parametrize("name", POLICIES)
def test_every_row_makes_a_policy_from_its_defaults(name: str) -> None:
    policy = make_policy(name, sps=curve)
    assert 0 <= policy.window(None, 5) <= 5
    assert 0 <= policy.lengths([torch.full((5,), 0.9)])[0] <= 5
    assert parse_policy(name, curve).window(None, 5) == policy.window(None, 5)


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("fixed:3", make_policy("fixed", {"window": 3})),
        ("adaptive:0.7,0.2", make_policy("adaptive", {"widen": 0.7, "narrow": 0.2})),
        ("confidence:0.25", make_policy("confidence", {"threshold": 0.25})),
        ("fixed:3+block:2", Shortened(FixedWindow(3), 2)),
    ],
)
def test_numbers_after_the_colon_are_the_parameters_in_their_order(spec: str, same: object) -> None:
    assert parse_policy(spec) == same


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fixd:3", "did you mean 'fixed'"),
        ("fixed:3,4", "takes 1 numbers at most"),
        ("fixed:2.5", "whole number"),
        ("fixed:0", "at least 1"),
        ("confidence:two", "must be a number, got 'two'"),
        ("confidence:1.5", "1.5"),
        ("prefix", "step_times"),
    ],
)
def test_a_wrong_name_or_number_is_refused_with_the_remedy(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_policy(spec)


def test_an_unknown_parameter_names_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        make_policy("confidence", {"treshold": 0.2})


def test_colours_of_policies_differ_and_copying_darkens_them() -> None:
    arms = [*POLICIES, *(f"{name}+copy" for name in POLICIES), "generate", "lookup", "llamacpp", "llamacpp+dspark", "copy"]
    assert len({arm_colour(arm) for arm in arms}) == len(arms)
    assert arm_colour("fixed:5") == arm_colour("fixed:2") != arm_colour("fixed:5+copy")
    assert arm_label("fixed:5+copy") == "fixed window 5, copying"


def test_a_new_policy_is_one_class_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class EveryOther(FixedWindow):
        def window(self, last: object, block_size: int) -> int:
            return 0 if last is not None and last.window else self.n

    reach = Parameter("reach", "reach", "Tokens drafted every other round", 2, 1, 16, 1)
    monkeypatch.setitem(POLICIES, "toy", PolicyRow("toy", "toy", "#123456", lambda v, sps: EveryOther(v["reach"]), (reach,)))
    assert parse_policy("toy:3").window(None, 5) == 3 and arm_colour("toy:3+copy") != arm_colour("toy")
