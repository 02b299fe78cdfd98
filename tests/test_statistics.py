"""Laws by draws: the statistics are right, what is remembered changes no draw, and a rule that bends the law is caught."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny import tiny_drafter, tiny_target

from dspark.decode import decode
from dspark.draft.drafter import Drafter
from dspark.proof.remembered import Tree, grow
from dspark.proof.sampled import COPYING, POLICIES, SETTINGS, World, judged, over_prompts
from dspark.proof.statistics import (
    REST,
    chi2_power,
    chi2_tail,
    compare,
    detectable_noncentrality,
    detectable_tv,
    holm,
    noncentral_chi2_tail,
    pooled,
    together,
)
from dspark.target.target import Target
from dspark.verify.sampling import Sampling

PROMPT = [4, 5, 6, 4, 5, 7, 4]
N = 1_500
EPSILON = 0.02


@pytest.fixture(scope="module")
def models() -> tuple[Target, Drafter]:
    """Eight tokens, of which 2 ends the text; a drafter of another opinion, sure of itself now and then."""
    target = tiny_target(vocab_size=8, num_hidden_layers=2, initializer_range=0.3)
    return target, tiny_drafter(target, block_size=5, target_layer_ids=(0,), num_hidden_layers=1)


def grown(models: tuple[Target, Drafter], sampling: Sampling, cut: float = 0.0) -> Tree:
    target, drafter = models
    return grow(target, PROMPT, drafter.target_layer_ids, sampling, 3, cut)


def p_value(models: tuple[Target, Drafter], name: str, sampling: Sampling, n: int) -> float:
    tree = grown(models, sampling, 5 / n)
    drawn = World.remembered(*models, tree, sampling).sample(name, n, seed=len(name))
    return compare(drawn, tree.law).p_value


@pytest.mark.parametrize(("dof", "critical", "tail"), [(1, 3.841, 0.05), (10, 18.307, 0.05), (30, 50.892, 0.01), (100, 149.449, 0.001)])
def test_the_tail_of_chi_square_is_that_of_the_printed_tables(dof: int, critical: float, tail: float) -> None:
    assert chi2_tail(critical, dof) == pytest.approx(tail, rel=1e-3)


@pytest.mark.parametrize(("dof", "noncentrality"), [(1, 10.507), (5, 16.470), (10, 20.532)])
def test_power_is_that_of_the_printed_tables(dof: int, noncentrality: float) -> None:
    """Noncentralities at which a test of level 0.05 has power 0.9 (Haynam, Govindarajulu and Leone, 1970)."""
    assert detectable_noncentrality(dof, 0.05, 0.9) == pytest.approx(noncentrality, rel=1e-3)


def test_without_a_bias_the_power_is_the_level() -> None:
    assert chi2_power(0.0, 7, 0.013) == pytest.approx(0.013, rel=1e-6)
    assert noncentral_chi2_tail(12.0, 7, 0.0) == pytest.approx(chi2_tail(12.0, 7), rel=1e-12)


def test_power_agrees_with_draws_from_a_biased_law() -> None:
    """1 000 samples from a law whose bias is of the form for which the detectable total variation is stated."""
    n, level, repeats = 5_000, 0.01, 1_000
    law = torch.full((20,), 0.05, dtype=torch.float64)
    tv = detectable_tv(n, 19, level, power=0.9)
    biased = law * (1 + 2 * tv * torch.tensor([1.0, -1.0]).repeat(10))
    assert (biased - law).abs().sum() / 2 == pytest.approx(tv)
    draws = torch.multinomial(biased, n * repeats, replacement=True, generator=torch.Generator().manual_seed(0)).view(repeats, n)
    counts = torch.stack([(draws == i).sum(1) for i in range(20)], 1)
    chi2 = ((counts - n * law) ** 2 / (n * law)).sum(1)
    caught = sum(chi2_tail(x, 19) < level for x in chi2.tolist()) / repeats
    assert caught == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / repeats))


def test_no_bias_of_a_total_variation_is_harder_to_see_than_the_one_stated() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p, q = (torch.rand(12, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(2))
        assert ((q - p) ** 2 / p).sum() >= 4 * ((q - p).abs().sum() / 2) ** 2


def test_holms_correction_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_pooling_keeps_the_total_and_makes_every_cell_likely_enough() -> None:
    law = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.04, "e": 0.009}
    assert pooled(law, 10_000) == pytest.approx(law | {REST: 0.001})
    assert pooled(law, 100) == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.15, REST: 0.05})
    assert pooled(law, 50) == pytest.approx({"a": 0.5, "b": 0.3, REST: 0.2})  # the rest had 0.05, 2.5 draws: c joins it
    drawn = {"a": 50, "b": 30, "c": 10, "x": 10}
    for n in (50, 100, 10_000):
        assert math.fsum(pooled(law, n).values()) == pytest.approx(1)
    assert compare(drawn, law).chi2 == pytest.approx((10 - 15) ** 2 / 15 + (10 - 5) ** 2 / 5)


def test_too_few_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        pooled({"a": 0.5, "b": 0.5}, 6)


def test_the_expected_total_variation_is_what_chance_alone_makes() -> None:
    law = {"a": 0.6, "b": 0.25, "c": 0.15}
    n, generator = 43, torch.Generator().manual_seed(0)
    probs = torch.tensor(list(law.values()))
    found = []
    for _ in range(3_000):
        counts = torch.bincount(torch.multinomial(probs, n, True, generator=generator), minlength=3).tolist()
        found.append(compare(dict(zip(law, counts, strict=True)), law))
    mean = sum(c.tv for c in found) / len(found)
    assert found[0].cells == 3  # c joined the rest
    assert mean == pytest.approx(found[0].tv_expected, rel=0.03)


def test_parts_tested_together_add_up() -> None:
    law = {"a": 0.5, "b": 0.3}
    one, two = compare({"a": 60, "b": 20, "c": 20}, law), compare({"a": 150, "b": 90, "c": 60}, law)
    both = together([one, two])
    assert (both.n, both.dof, both.chi2) == (400, one.dof + two.dof, one.chi2 + two.chi2)
    assert both.tv == pytest.approx(0.25 * one.tv + 0.75 * two.tv)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_tree_holds_the_targets_law_of_whole_texts(models: tuple[Target, Drafter], sampling: Sampling) -> None:
    """Against one pass over each whole text."""
    target, _ = models
    tree = grown(models, sampling)
    assert math.fsum(tree.law.values()) == pytest.approx(1, abs=1e-9)
    assert all(len(text) == 3 or text[-1] in target.eos_token_ids for text in tree.law)
    assert sampling.top_p < 1 or any(len(text) < 3 for text in tree.law)
    for text, probability in tree.law.items():
        rows = sampling.probs(target.forward(torch.tensor([[*PROMPT, *text]]), None)[0][0, len(PROMPT) - 1 : -1])
        assert probability == pytest.approx(math.prod(rows[range(len(text)), list(text)].tolist()), rel=1e-4)


def test_a_cut_tree_has_every_text_above_the_cut_and_no_other(models: tuple[Target, Drafter]) -> None:
    whole, cut = grown(models, SETTINGS[0]).law, grown(models, SETTINGS[0], 0.004).law
    assert 10 < len(cut) < len(whole)
    assert set(cut) == {text for text, p in whole.items() if p >= 0.004}


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_neither_memory_nor_a_shared_prefill_changes_a_draw(models: tuple[Target, Drafter], name: str, sampling: Sampling) -> None:
    """The same seeds give the same texts as the product's own ``decode`` with its own models."""
    target, drafter = models
    tree = grown(models, sampling, 0.004)
    worlds = World.remembered(target, drafter, tree, sampling), World.running(target, drafter, tree, sampling)
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "policy": POLICIES[name], "max_new_tokens": 64}
    for seed in range(12):
        text: tuple[int, ...] = ()
        for r in decode(target, worlds[1].source(name), PROMPT, seed=seed, **options):
            text += r.committed
            if len(text) >= 3:
                break
        for world in worlds:
            drawn = world.sample(name, 1, seed)
            assert cell(drawn, tree) == cell(Counter([text[:3]]), tree)


def cell(drawn: Counter, tree: Tree) -> tuple[int, ...] | None:
    (text,) = drawn
    return text if text in tree.law else REST


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_every_policy_follows_the_targets_law(models: tuple[Target, Drafter], sampling: Sampling) -> None:
    """χ² of the first three tokens; Holm's correction over all policies at 10⁻³."""
    p_values = [p_value(models, name, sampling, N) for name in POLICIES]
    assert min(holm(p_values)) > 1e-3, dict(zip(POLICIES, p_values, strict=True))


def test_every_block_run_follows_the_targets_law_as_well(models: tuple[Target, Drafter]) -> None:
    sampling = SETTINGS[0]
    tree = grown(models, sampling, 0.01)
    world = World.running(*models, tree, sampling)
    p_values = [compare(world.sample(name, 300, seed=1), tree.law).p_value for name in ("plain", "fixed:5", COPYING)]
    assert min(holm(p_values)) > 1e-3


def correction_from_the_target(p_target: torch.Tensor, p_draft: torch.Tensor) -> torch.Tensor:
    return p_target


def residual_with_epsilon(p_target: torch.Tensor, p_draft: torch.Tensor) -> torch.Tensor:
    owed = (p_target - p_draft).clip(EPSILON)
    return owed / owed.sum()


@pytest.mark.parametrize("rule", [correction_from_the_target, residual_with_epsilon])
def test_a_bent_rule_is_caught_by_the_same_procedure(models: tuple[Target, Drafter], rule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the level that passes the true rule, with no more draws; plain sampling, which has no residual, still passes."""
    monkeypatch.setattr("dspark.verify.accept.residual", rule)
    names = ["plain", "fixed:5", "adaptive", "conditional:0.25", COPYING]
    p_values = dict(zip(names, holm([p_value(models, name, SETTINGS[0], N) for name in names]), strict=True))
    assert p_values.pop("plain") > 1e-3
    assert max(p_values.values()) < 1e-3, p_values


def test_rows_are_judged_together() -> None:
    law = {"a": 0.5, "b": 0.3}
    about = {"temperature": 1.0, "top_p": 1.0, "policy": "fixed:5"}
    found = [compare({"a": 60, "b": 20, "c": 20}, law), compare({"a": 150, "b": 90, "c": 60}, law)]
    rows = [about | {"prompt": f"p{i}", "seed": i} | vars(f) for i, f in enumerate(found)]
    alone = about | {"policy": "plain", "prompt": "p0", "seed": 7} | vars(replace(found[1], p_value=0.5))
    (both,) = over_prompts([*rows, alone])
    assert (both["prompt"], both["n"], both["dof"]) == ("all", 400, 4)
    result = judged([*rows, alone, both])
    assert [row["p_adjusted"] for row in result] == holm([row["p_value"] for row in [*rows, alone, both]])
    assert result[3]["detectable_tv"] == detectable_tv(400, 4, 0.01 / 4, 0.9)
