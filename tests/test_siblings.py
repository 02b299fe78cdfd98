"""Second guesses: tokens that stand beside each other in one pass see what they would see alone, and the law stays the target's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_eagle import eagle
from test_families import FAMILIES, model_of
from tiny import Wavering, random_prompt, reference, tiny_drafter, tiny_target

import dspark
from dspark.bench.identity import logits_of, pass_of
from dspark.bench.measure import positions
from dspark.bench.overheard import Overheard
from dspark.bench.replay import replay
from dspark.bench.trace import StepTimes, from_rounds, record
from dspark.cpu import attention, pack_target
from dspark.cpu.attention import NAME, share_keys
from dspark.hf import dspark_generate
from dspark.lab.figures import draft_states, fates
from dspark.proof.cases import LEVEL
from dspark.schedule import Admission, PrefixScheduler, Shortened
from dspark.target.target import Target
from dspark.verify.accept import Sibling, accept
from dspark.verify.sampling import Chance, Sampling

BESIDE = PrefixScheduler(LEVEL, sibling_rates=(0.6, 0.4))
FLAT = PrefixScheduler(lambda tokens: 1.0, sibling_rates=(0.5, 0.3, 0.2))
N = 20_000


def rows(seed: int, count: int, vocab: int = 5) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(-1)


def without(law: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    left = law.index_fill(0, torch.tensor(tokens), 0.0)
    return left / left.sum()


# ---- the rule


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_token_behind_a_rejection_follows_the_target_however_many_siblings_are_tried(count: int) -> None:
    p_draft, p_target, chance = rows(1, 1), rows(2, 2 + count), Chance(torch.Generator().manual_seed(3))
    drawn, kept = torch.zeros(5), 0
    for _ in range(N):
        tokens, siblings = [chance.choose(p_draft[0])], []
        for _ in range(count):
            law = without(p_draft[0], [*tokens, *(s.token for s in siblings)])
            siblings.append(Sibling(1, chance.choose(law), law))
        row, following = accept(tokens, p_draft, p_target, chance, siblings)
        drawn[tokens[0] if row == 1 else siblings[row - 2].token if row > 1 else following] += 1
        kept += row > 1
    assert (drawn / N - p_target[0]).abs().max() < 4 * (0.25 / N) ** 0.5  # four standard deviations
    assert kept > 0.03 * N


def test_behind_an_accepted_sibling_stands_its_own_row_and_only_siblings_of_the_rejected_draft_are_asked() -> None:
    one_hot = torch.eye(6)
    p_target = one_hot[[1, 3, 0, 0, 0, 5]]  # behind the anchor 1, behind x_1 3; the rows of x_2, x_3 and of sibling 0 are not reached
    siblings = [Sibling(1, 3, one_hot[3]), Sibling(2, 3, one_hot[3])]
    assert accept([1, 2, 4], one_hot[[1, 2, 4]], p_target, Chance(), siblings) == (5, 5)
    assert accept([1, 2, 4], one_hot[[1, 2, 4]], p_target, Chance(), siblings[:1]) == (1, 3)


# ---- the pass


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_tokens_beside_each_other_see_what_they_would_see_alone(family: str | None) -> None:
    target = Target(model_of(family), None, family) if family else tiny_target(eos_token_id=None)
    if not target.can_branch:
        with pytest.raises(ValueError, match=r"cannot see tokens beside each other.*choose a policy without them"):
            dspark.decode(target, tiny_drafter(target), [5, 6, 7], policy=BESIDE)
        return
    prompt, chain, beside = random_prompt(1, 12, 60), [5, 9, 11], {1: [20, 21], 2: [22]}
    siblings = [place for place, tokens in beside.items() for _ in tokens]
    tokens = [*chain, *(token for each in beside.values() for token in each)]
    cache = target.new_cache()
    target.forward(torch.tensor([prompt]), cache)
    logits, taps = target.forward(torch.tensor([tokens]), cache, (0, 2), siblings=siblings)
    for row, (place, token) in enumerate(zip([0, 1, 2, *siblings], tokens, strict=True)):
        alone, alone_taps = target.forward(torch.tensor([[*prompt, *chain[:place], token]]), None, (0, 2))
        assert torch.allclose(logits[0, row], alone[0, -1], atol=1e-4)
        assert torch.allclose(taps[0, row], alone_taps[0, -1], atol=1e-4)
    cache.keep(len(prompt) + 1, len(prompt) + 4)  # the second sibling of x_1
    after, _ = target.forward(torch.tensor([[30]]), cache)
    expected, _ = target.forward(torch.tensor([[*prompt, 5, 21, 30]]), None)
    assert torch.allclose(after[0, -1], expected[0, -1], atol=1e-4)


def test_some_families_can_branch_and_those_whose_masks_or_places_are_their_own_cannot() -> None:
    can = {family for family in FAMILIES if Target(model_of(family), None, family).can_branch}
    assert can >= {"Qwen3Moe", "GPTNeoX"}
    assert not can & {"GPT2LMHead", "Mpt", "Bloom", "Gemma2", "Gemma3n", "Gemma4", "Llama4", "ModernBertDecoder"}


@pytest.mark.parametrize(("length", "position"), [(3, 7), (5, 4), (3, 6)])
def test_a_cache_keeps_nothing_that_it_does_not_hold(length: int, position: int) -> None:
    target = tiny_target()
    cache = target.new_cache()
    target.forward(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), cache)
    cache.rewind(6)  # two stale tokens stand behind
    with pytest.raises(ValueError, match=f"cannot move {position} to {length}: the cache holds 6 tokens"):
        cache.keep(length, position)


def test_a_policy_that_forgets_its_chain_is_told_what_the_target_cannot_do() -> None:
    class Careless(dspark.FixedWindow):
        def siblings(self, confidence: torch.Tensor) -> list[int]:
            return [1] * len(confidence)

    target = Target(model_of("GPT2LMHead"), None, "gpt2")
    with pytest.raises(ValueError, match="gpt2 cannot see tokens beside each other"):
        dspark.generate(target, tiny_drafter(target), [5, 6, 7], max_new_tokens=8, policy=Careless())
    copying = dspark.ContextLookup(None, target=target)
    assert dspark.generate(target, copying, [5, 6, 7] * 3, max_new_tokens=8, policy=Careless()).token_ids


# ---- the loop


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("source", ["wavering", "drafter", "copying"])
def test_greedy_text_is_the_targets_with_siblings_kept_and_refused(source: str, seed: int) -> None:
    target, prompt = tiny_target(seed=seed, eos_token_id=None, initializer_range=0.2), random_prompt(seed, 7)
    expected = reference(target, prompt, 60)
    drafts = Wavering(target, expected, 4, 0.4, seed) if source == "wavering" else tiny_drafter(target, block_size=4)
    drafts = dspark.ContextLookup(drafts, 1) if source == "copying" else drafts
    for policy in (BESIDE, FLAT, Shortened(FLAT, 2)):
        out = dspark.generate(target, drafts, prompt, max_new_tokens=50, policy=policy)
        assert out.token_ids == expected[:50]
        kept = [r for r in out.rounds if r.sibling is not None]
        for r in kept:
            assert (r.accepted + 1, r.sibling) in r.siblings
            assert len(r.committed) == r.accepted + 2
            assert r.committed[r.accepted] == r.sibling != r.draft_tokens[r.accepted]
        assert all(r.source not in ("copy", "phrase") for r in out.rounds if r.siblings)
        if source == "wavering":
            assert kept
            assert any(r.siblings and r.sibling is None and r.accepted < r.verify_length for r in out.rounds) or policy is not BESIDE


def test_the_drafter_hears_the_taps_of_a_kept_sibling() -> None:
    """What it is told must be what it is told when the same text comes without siblings."""
    target, prompt = tiny_target(eos_token_id=None, initializer_range=0.2), random_prompt(4, 7)
    expected = reference(target, prompt, 60)

    class Listening(Wavering):
        def extend(self, state: dict[str, int], token_ids: list[int], taps: torch.Tensor) -> None:
            super().extend(state, token_ids, taps)
            heard.extend(zip(token_ids, taps[0], strict=True))

    told = []
    for policy in (dspark.FixedWindow(4), BESIDE):
        heard: list[tuple[int, torch.Tensor]] = []
        out = dspark.generate(target, Listening(target, expected, 4, 0.4), prompt, max_new_tokens=50, policy=policy)
        told.append(heard[:50])
    assert any(r.sibling is not None for r in out.rounds)
    assert [token for token, _ in told[0]] == [token for token, _ in told[1]]
    assert all(torch.allclose(one, other, atol=1e-4) for (_, one), (_, other) in zip(*told, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_a_text_ends_behind_an_end_that_is_a_sibling_or_stands_before_one(seed: int) -> None:
    target, prompt = tiny_target(seed=seed, eos_token_id=None, initializer_range=0.2), random_prompt(seed, 7)
    coming = reference(target, prompt, 60)
    for end in range(3, 12):
        target.eos_token_ids = frozenset([coming[end]])
        expected = coming[: coming.index(coming[end]) + 1]
        assert dspark.generate(target, Wavering(target, coming, 4, 0.4, seed), prompt, max_new_tokens=50, policy=FLAT).token_ids == expected


def test_a_packed_target_gives_siblings_the_rows_that_they_would_have_alone() -> None:
    target = pack_target(tiny_target(eos_token_id=None, dtype=torch.bfloat16, hidden_size=64))
    prompt, cache = random_prompt(1, 12), target.new_cache()
    target.forward(torch.tensor([prompt]), cache)
    logits, _ = target.forward(torch.tensor([[5, 9, 20, 21]]), cache, siblings=[1, 1])
    for row, text in enumerate(([5], [5, 9], [5, 20], [5, 21])):
        alone, _ = target.forward(torch.tensor([[*prompt, *text]]), None)
        assert (logits[0, row] - alone[0, -1]).abs().max() < 0.05 * alone.abs().max()


def test_an_autoregressive_drafter_has_no_second_guesses_and_keeps_the_text() -> None:
    target, prompt = tiny_target(eos_token_id=None), random_prompt(1, 9)
    out = dspark.generate(target, eagle(target), prompt, max_new_tokens=20, policy=FLAT)
    assert out.token_ids == reference(target, prompt, 20)
    assert not any(r.siblings for r in out.rounds)


def test_the_pass_that_is_weighed_is_the_rounds_own_and_keeps_its_text() -> None:
    _, _, run = a_run_with_siblings()
    for r in run[1:]:
        tokens, places, kept = pass_of(r)
        assert len(tokens) == 1 + r.verify_length + len(r.siblings) and len(places) == len(r.siblings)
        assert [tokens[row] for row in kept] == [r.anchor, *r.committed[:-1]]


@pytest.mark.parametrize("seed", range(4))
def test_the_passes_that_are_weighed_choose_the_very_tokens_that_were_chosen_in_bfloat16(seed: int) -> None:
    """Through transformers' own cache: what it keeps of a pass is what the rewound one keeps."""
    target = pack_target(tiny_target(eos_token_id=None, dtype=torch.bfloat16, hidden_size=64, initializer_range=0.05, seed=seed))
    prompt = random_prompt(seed, 7)
    run = dspark.generate(target, Wavering(target, reference(target, prompt, 60), 4, 0.4), prompt, max_new_tokens=50, policy=FLAT)
    assert any(r.sibling is not None for r in run.rounds)
    found = [int(logits_of(target, prompt, map(pass_of, run.rounds[1:]), i).argmax()) for i in range(50)]
    assert found == run.token_ids


def test_acceptances_are_overheard_of_the_block_alone() -> None:
    target, prompt = tiny_target(eos_token_id=None, initializer_range=0.2), random_prompt(4, 7)
    heard = Overheard(target, Wavering(target, reference(target, prompt, 60), 4, 0.4), Sampling())
    run = dspark.generate(heard.target, heard.drafter, prompt, max_new_tokens=50, policy=FLAT).rounds
    assert [len(a) for a in heard.acceptances] == [r.verify_length for r in run[1:]]
    assert any(r.sibling is not None for r in run)


@pytest.mark.parametrize("markov", [True, False])
def test_what_is_known_early_and_what_comes_with_the_token_make_the_confidence(markov: bool) -> None:
    drafter = tiny_drafter(tiny_target(), confidence_head_with_markov=markov)
    hidden, embedded = torch.randn(4, 32), torch.randn(4, 8)
    known, weight = drafter.confidence_head.halves(hidden)
    heard = embedded @ weight if markov else torch.zeros(4)
    assert torch.allclose(torch.tensor(known).float() + heard, drafter.confidence_head(hidden, embedded), atol=1e-5)
    assert (weight is None) != markov


def test_the_call_inside_generate_takes_a_policy_with_siblings() -> None:
    target, prompt = tiny_target(eos_token_id=None), torch.tensor([random_prompt(1, 9)])
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    call = {"custom_generate": dspark_generate, "drafter": tiny_drafter(target), "policy": FLAT}
    assert torch.equal(target.model.generate(prompt, **options, **call), target.model.generate(prompt, **options))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=3), Sampling(1.0, top_p=0.8)], ids=str)
def test_another_guess_is_none_of_those_that_were_tried(sampling: Sampling) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, block_size=3)
    state = drafter.new_state()
    drafter.extend(state, [5, 6], torch.randn(1, 2, len(drafter.target_layer_ids) * target.hidden_size))
    draft, chance = drafter.draft(state, 7, 3, sampling, Chance(torch.Generator().manual_seed(0))), Chance(torch.Generator().manual_seed(1))
    for k, token in enumerate(draft.tokens):
        tried = [token]
        while (law := draft.another(k, tried)) is not None:
            assert law.sum().item() == pytest.approx(1, abs=1e-5)
            assert not law[tried].any()
            tried.append(chance.choose(law))
        assert sorted(tried) == sorted(drafter.d2t.tolist())


# ---- the schedule


def test_siblings_are_admitted_by_what_they_are_expected_to_bring() -> None:
    steps = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 0.5}
    policy = PrefixScheduler(steps.__getitem__, sibling_rates=(0.5, 0.4))
    confidence = torch.tensor([0.4, 0.5])
    path = [(s.position, s.sibling, round(s.survival, 6)) for s in policy.admissions([confidence])]
    assert path == [(0, 0, 1.0), (1, 0, 0.4), (1, 1, 0.3), (1, 2, 0.24), (2, 0, 0.2)]
    assert policy.lengths([confidence]) == [1]
    assert policy.siblings(confidence) == [2, 0]
    assert policy.chain.lengths([confidence]) == [2]
    assert policy.chain.siblings(confidence) == [0, 0]
    assert Shortened(policy, 2).siblings(confidence) == [2, 0]
    assert Shortened(policy, 2).chain == Shortened(policy.chain, 2)


def test_without_rates_nothing_stands_beside_the_block_and_a_step_names_no_sibling() -> None:
    policy = PrefixScheduler(lambda tokens: 1.0)
    assert policy.chain is policy
    assert policy.siblings(torch.tensor([0.5, 0.5])) == [0, 0]
    assert all(step.sibling == 0 for step in policy.admissions([torch.tensor([0.5, 0.5])]))
    assert Admission(0, 1, 0.5, 1.5, 2, 1.0, True).sibling == 0


@pytest.mark.parametrize("rates", [(1.0,), (0.5, -0.1), (0.6, 0.5)])
def test_rates_that_are_no_shares_of_the_rejected_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"sibling_rates must lie in \[0, 1\)"):
        PrefixScheduler(lambda tokens: 1.0, sibling_rates=rates)


# ---- what is shown and kept of it


def a_run_with_siblings() -> tuple[Target, Wavering, list[dspark.Round]]:
    target, prompt = tiny_target(eos_token_id=None, initializer_range=0.2), random_prompt(4, 7)
    source = Wavering(target, reference(target, prompt, 60), 4, 0.4)
    return target, source, dspark.generate(target, source, prompt, max_new_tokens=50, policy=FLAT).rounds


def test_an_accepted_sibling_has_a_fate_of_its_own_and_a_bonus_behind_it() -> None:
    _, _, run = a_run_with_siblings()
    found = [t for t in fates(run) if t.fate == "sibling"]
    assert [(t.round, t.token_id) for t in found] == [(r.index, r.sibling) for r in run if r.sibling is not None] != []
    for t in found:
        r = run[t.round]
        assert (t.position, t.replaced) == (r.accepted + 1, r.draft_tokens[r.accepted])
        assert [x.fate for x in fates([r])][-2:] == ["sibling", "bonus"]
        states = draft_states([r])[0]
        assert states[r.accepted] == "rejected"
        assert "rejected" not in states[r.accepted + 1 :]


def test_counts_by_position_are_those_of_the_block_alone() -> None:
    _, _, run = a_run_with_siblings()
    reached, accepted = positions(run[1:])
    assert sum(accepted) == sum(r.accepted for r in run)
    assert sum(reached) - sum(accepted) == sum(r.accepted < r.verify_length for r in run)


def test_traces_and_replays_refuse_siblings() -> None:
    target, source, run = a_run_with_siblings()
    with pytest.raises(ValueError, match="siblings cannot be kept as a trace"):
        from_rounds(run, target, source, [5, 6])
    trace = record(target, source, random_prompt(4, 7), max_new_tokens=8, times=StepTimes({0: 1.0, 4: 1.0}, {1: 1.0, 5: 1.0}))
    with pytest.raises(ValueError, match="a trace knows nothing of siblings"):
        replay(trace, FLAT)
    assert replay(trace, FLAT.chain)


# ---- attention without copies


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_the_same_whoever_attends(family: str) -> None:
    """With prompt lookup as well, whose first pass asks for several rows of logits."""
    model, prompt = model_of(family), torch.tensor([random_prompt(1, 6, 60) * 2])
    ways = [{"do_sample": False, "max_new_tokens": 16, "use_cache": True} | more for more in ({}, {"prompt_lookup_num_tokens": 3})]
    before = [model.generate(prompt, **way) for way in ways]
    share_keys(Target(model, None, family).decoder)
    assert all(torch.equal(model.generate(prompt, **way), text) for way, text in zip(ways, before, strict=True))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_without_copies_gives_the_same_sums(heads: int) -> None:
    plain, shared = (tiny_target(num_key_value_heads=heads, dtype=torch.bfloat16) for _ in range(2))
    share_keys(shared.decoder)
    assert shared.config._attn_implementation == NAME
    for new in ([5], [5, 6, 7, 8]):
        found = []
        for target in (plain, shared):
            cache = target.new_cache()
            target.forward(torch.tensor([random_prompt(0, 20)]), cache)
            found.append(target.forward(torch.tensor([new]), cache)[0])
        assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_the_same_whoever_attends(family: str) -> None:
    """Two texts at once: behind the prompts a token of each, whose heads stand in line."""
    model, prompts = model_of(family), torch.tensor([random_prompt(i, 6, 60) for i in range(2)])
    before = model.generate(prompts, do_sample=False, max_new_tokens=16)
    share_keys(Target(model, None, family).decoder)
    assert torch.equal(model.generate(prompts, do_sample=False, max_new_tokens=16), before)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_single_tokens_of_a_batch_attend_alike_with_their_heads_in_line(
    heads: int, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in self-play, up to rounding. A stream by itself attends as transformers does, and so do heads that share nothing."""
    plain, shared = (tiny_target(num_key_value_heads=heads, dtype=dtype) for _ in range(2))
    share_keys(shared.decoder)
    asked = []
    real = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: asked.append(a[1].shape[2]) or real(*a, **k))
    for streams in (1, 3):
        prompts = torch.tensor([random_prompt(i, 20) for i in range(streams)])
        found = []
        for target in (plain, shared):
            cache = target.new_cache()
            target.forward(prompts[:, :-1], cache)
            asked.clear()
            found.append(target.forward(prompts[:, -1:], cache)[0].float())
        usual = streams == 1 or heads == 4
        assert torch.equal(*found) if usual else torch.allclose(*found, atol=close * float(found[0].abs().max()))
        assert asked == [1] * (plain.num_layers if usual else 0)
