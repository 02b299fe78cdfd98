"""Bit equality: in float32 every way to decode gives the greedy text of ``model.generate``; in bfloat16 rounding alone may part them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers.generation.utils as transformers_utils
from test_decode import policies
from tiny import (
    HEADS,
    SHAPES,
    WINDOW,
    Wavering,
    drafter_of_its_own_shape,
    interrupted,
    letter_tokenizer,
    random_prompt,
    reference,
    sliding_target,
    tiny_drafter,
    tiny_target,
)
from torch import Tensor

import dspark
from dspark.bench.arms import Models, parse_arms
from dspark.bench.identity import beyond_rounding, compare
from dspark.bench.measure import Settings
from dspark.bench.plan import Plan
from dspark.cpu import pack_target
from dspark.phrases import PhraseMemory
from dspark.proof import texts
from dspark.rewind import FIRST_CAPACITY
from dspark.train.start import drafter_for
from dspark.verify.accept import accept
from dspark.verify.sampling import Chance, Rows, Sampling

BLOCK_SIZES = range(1, 9)
# ---- policies, block sizes, prompts


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_policy_gives_the_text_of_model_generate(block_size: int) -> None:
    """13 prompts for each of 8 block sizes. A prompt meets a third of the policies, and each policy every source of drafts."""
    target = tiny_target(seed=block_size, eos_token_id=None, **SHAPES[block_size % len(SHAPES)])
    drafter = tiny_drafter(target, seed=block_size, block_size=block_size, **HEADS[block_size % len(HEADS)])
    for i in range(13):
        prompt = random_prompt(100 * block_size + i, 3 + 5 * i)
        whole = reference(target, prompt, 12 + block_size)
        sources = (drafter, dspark.ContextLookup(drafter, 1), *(Wavering(target, whole, block_size, errors) for errors in (0.1, 0.4)))
        for k, policy in list(enumerate(policies(block_size)))[i % 3 :: 3]:
            source = sources[(i // 3 + k) % len(sources)]
            found = dspark.generate(target, source, prompt, max_new_tokens=12, policy=policy).token_ids
            assert found == whole[:12], (policy, source, prompt)


# ---- ends


def test_an_end_of_text_at_any_place_of_an_accepted_block_ends_the_text() -> None:
    target = tiny_target(seed=3, eos_token_id=None)
    inside, sizes = 0, cycle((4, 8, 1, 5, 2, 7, 3, 6))
    for prompt in (random_prompt(seed, 6) for seed in range(4)):
        target.eos_token_ids = frozenset()
        whole = reference(target, prompt, 40)
        places = [i for i in range(12) if whole.index(whole[i]) == i]
        for i, block_size in zip(places, sizes, strict=False):
            # Several end-of-text tokens, one of which the text never reaches.
            target.eos_token_ids = frozenset([whole[i], whole[places[-1]], next(t for t in range(100) if t not in whole)])
            expected = reference(target, prompt, 30)
            assert expected == whole[: i + 1]
            for policy in (None, dspark.AdaptiveWindow(0.0, 0.0, 0.0), dspark.ConfidenceThreshold(0.2)):
                out = dspark.generate(target, Wavering(target, whole, block_size, errors=0), prompt, max_new_tokens=30, policy=policy)
                assert out.token_ids == expected, (prompt, i, block_size, policy)
                inside += len(out.rounds) > 1 and out.rounds[-1].accepted >= len(out.rounds[-1].committed)
    assert inside > 20  # an accepted draft ended the text, with more of the block behind it


@pytest.mark.parametrize("limit", range(1, 21))
def test_the_text_is_as_long_as_the_limit_and_no_longer(limit: int) -> None:
    target = tiny_target(seed=limit, eos_token_id=None)
    prompt = random_prompt(limit, 5)
    expected, whole = reference(target, prompt, limit), reference(target, prompt, limit + 10)
    for block_size in BLOCK_SIZES:
        for errors, policy in ((0.0, None), (0.3, dspark.AdaptiveWindow(0.0, 0.0, 0.0)), (0.0, dspark.PrefixScheduler(lambda b: 1.0))):
            source = Wavering(target, whole, block_size, errors)
            found = dspark.generate(target, source, prompt, max_new_tokens=limit, policy=policy).token_ids
            assert found == expected, (block_size, policy)


# ---- long and growing contexts


@pytest.mark.parametrize("boundary", [FIRST_CAPACITY, 2 * FIRST_CAPACITY])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_block_may_cross_the_caches_capacity_or_end_exactly_there(boundary: int, block_size: int) -> None:
    """With every draft accepted, the pass of round r leaves r·(block + 1) tokens behind the prompt."""
    target = tiny_target(seed=block_size, eos_token_id=None, **SHAPES[block_size % len(SHAPES)])
    drafter, step = tiny_drafter(target, block_size=block_size), block_size + 1
    for overhang in (0, 1):
        prompt = random_prompt(boundary + block_size, boundary - 2 * step + overhang)
        count = 5 * step + 10
        expected = reference(target, prompt, count)
        out = dspark.generate(target, Wavering(target, expected, block_size, errors=0), prompt, max_new_tokens=count)
        assert out.token_ids == expected
        assert [r.accepted for r in out.rounds[1:5]] == [block_size] * 4
        for source, n in ((Wavering(target, expected, block_size, errors=0.3), count), (drafter, 2 * step + 5)):
            assert dspark.generate(target, source, prompt, max_new_tokens=n).token_ids == expected[:n]


def test_turns_that_hold_earlier_answers_are_answered_alike() -> None:
    target = tiny_target(seed=5)
    target.tokenizer = letter_tokenizer()
    drafter = tiny_drafter(target, block_size=5)
    chats = (("Name three colours.", "Why these?", "Name three more."), ("1, 2, 3,", "go on", "go on"))
    ways = (None, dspark.MTP1(), dspark.AdaptiveWindow(), dspark.ConfidenceThreshold(0.4), dspark.PrefixScheduler(lambda b: 1 / (1 + b)))
    for questions, (k, policy) in product(chats, enumerate(ways)):
        source = dspark.ContextLookup(drafter, 1) if k % 2 else drafter
        messages: list[dict[str, str]] = []
        for turn, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            ids = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            expected = reference(target, ids, 16)
            out = dspark.generate(target, source, messages, max_new_tokens=16, policy=policy)
            assert out.token_ids == expected, (questions, policy, turn)
            assert turn == 0 or messages[-2]["content"] in target.tokenizer.decode(ids)
            messages.append({"role": "assistant", "content": out.text})


# ---- sliding windows


def test_a_fresh_drafter_takes_its_rope_from_the_layers_that_see_everything() -> None:
    target = sliding_target("eager")
    drafter = drafter_for(target, block_size=3, target_layer_ids=(0, 2), markov_rank=4, mask_token_id=3)
    assert drafter.config.rope_theta == target.config.rope_parameters["full_attention"]["rope_theta"] != 10_000


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_model_gives_its_text_far_beyond_the_window(attention: str) -> None:
    target, count = sliding_target(attention), 5 * WINDOW
    for i, length in enumerate((3, WINDOW, 3 * WINDOW)):  # prompts inside, at and beyond the window
        prompt = random_prompt(i, length)
        expected = reference(target, prompt, count)
        assert len(set(expected)) > 10  # a text that repeats one token would show nothing
        for block_size in BLOCK_SIZES:
            drafter = drafter_of_its_own_shape(target, block_size)
            wavering = (Wavering(target, expected, block_size, errors) for errors in (0.0, 0.2))
            source = (drafter, dspark.ContextLookup(drafter, 1), *wavering)[(i + block_size) % 4]
            policy = (None, dspark.MTP1(), dspark.ConfidenceThreshold(0.4))[(i + block_size) % 3]
            found = dspark.generate(target, source, prompt, max_new_tokens=count, policy=policy).token_ids
            assert found == expected, (block_size, source, policy, length)


# ---- bfloat16


def test_in_bfloat16_no_text_diverges_by_more_than_rounding() -> None:
    # Small weights bring the logits close together, so that rounding does decide between tokens.
    shape = {"seed": 1, "dtype": torch.bfloat16, "eos_token_id": None, "hidden_size": 256, "initializer_range": 0.02}
    target, stock = pack_target(tiny_target(**shape)), tiny_target(**shape)
    pair = Models(target, tiny_drafter(target), stock)
    settings = Settings(max_new_tokens=30)
    arms = parse_arms("plain,fixed:4,adaptive,fixed:3+copy:1")
    ways = {arm.name: pair.decoder(arm, settings) for arm in arms}
    rows = [row for seed in range(4) for row in compare(pair, ways, random_prompt(seed, 5 + 7 * seed), settings)]
    frame = pd.DataFrame(rows)
    assert not beyond_rounding(frame).any(), frame[beyond_rounding(frame)]


def tiny_models(plan: Plan, stock: bool = False) -> Models:
    """What a plan loads, with the tiny models in place of the shipped ones."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[plan.dtype]
    target, plain = (tiny_target(dtype=dtype) for _ in range(2))
    target.tokenizer = letter_tokenizer()
    drafter = tiny_drafter(target)
    said = np.arange(60).reshape(2, 30) % 15  # every token is followed by the next one
    drafter.phrases = PhraseMemory.of_text(said, np.ones_like(said, dtype=bool))
    return Models(pack_target(target), drafter, plain)


def test_the_proof_by_texts_compares_every_way_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Plan, "load", tiny_models)
    every_way = {dtype: replace(extent, tokens=6, share=len(texts.OTHERS)) for dtype, extent in texts.SMOKE.items()}
    monkeypatch.setattr(texts, "SMOKE", every_way)
    out = tmp_path / "texts.parquet"
    kept = interrupted(partial(texts.run, out, smoke=True), after=3)
    frame = texts.run(out, smoke=True)
    assert len(frame) == 2 * 2 * (1 + len(texts.OTHERS)) and not frame.duplicated(["dtype", "prompt", "arm"]).any()
    assert list(dict.fromkeys(frame["dtype"] + "/0/" + frame["prompt"]))[:3] == kept
    assert frame.loc[frame["dtype"] == "float32", "equal"].all() and not beyond_rounding(frame).any()
    fixed = frame[frame["arm"].str.fullmatch(r"fixed:\d")]
    assert dict(zip(fixed["block_size"], fixed["drafter_block_size"], strict=True)) == {n: max(n, 4) for n in BLOCK_SIZES}
    assert "float32" in texts.table(frame) and "bfloat16" in texts.table(frame) and "2 of 2" in texts.table(frame)


def test_the_proof_by_texts_runs_a_hundred_prompts_in_every_way_and_shares_fairly_where_it_does_not() -> None:
    assert {f"fixed:{n}" for n in BLOCK_SIZES} < set(texts.OTHERS)
    for dtype, prompts in (("float32", 100), ("bfloat16", 48)):
        extent = texts.FULL[dtype]
        least = prompts * extent.share // len(texts.OTHERS)  # no way can have more where all have the same
        units = [unit for plan in extent.plans(dtype) for unit in plan.units]
        assert len({unit.item.id for unit in units}) == prompts
        met = pd.DataFrame(
            [(way, unit.item.domain) for turn, unit in enumerate(units) for way in extent.ways(turn)], columns=["way", "domain"]
        )
        of_way = met["way"].value_counts()
        assert of_way.pop("plain") == prompts and set(of_way.index) == set(texts.OTHERS) and of_way.min() >= least
        assert met.value_counts().min() >= least // 5


# ---- a second reference: transformers' own speculative sampling

theirs = getattr(transformers_utils, "_speculative_sampling", None)
Case = tuple[list[int], Tensor, Tensor]  # draft_tokens, p_draft [ℓ, vocab], p_target [ℓ+1, vocab]


class Dealt(Chance):
    """Chance from numbers dealt beforehand: one coin per draft, and ``last`` for the token behind them."""

    def __init__(self, coins: list[float], last: float) -> None:
        self.coins, self.last = iter(coins), last

    def choose(self, probs: Tensor) -> int:
        self.chosen_from, self.coins = probs, iter([self.last])
        return super().choose(probs)

    def _uniform(self, device: torch.device) -> Tensor:
        return torch.tensor(next(self.coins), dtype=torch.float64)


def drawn_cases() -> Iterator[Case]:
    """Random rows under every sampling; drafts drawn from them, copied (one-hot), forbidden by the target, or its own."""
    laws = (Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=3), Sampling(1.0, top_p=0.4), Sampling(0.0))
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        law, length, vocab = laws[seed % len(laws)], 1 + seed % 8, 2 + seed % 23
        logits = 2 * torch.randn(length + 1, vocab, generator=generator)
        p_target = law.probs(logits)
        p_draft = law.probs(logits[:-1] + torch.randn(length, vocab, generator=generator))
        if seed % 7 == 0:
            p_draft = p_target[:-1]
        tokens = [Chance(generator).choose(row) for row in p_draft]
        if seed % 4 == 0:
            tokens = torch.randint(vocab, (length,), generator=generator).tolist()
            p_draft = torch.eye(vocab)[tokens]
        yield tokens, p_draft, p_target


def decoded_cases() -> list[Case]:
    """What the loop itself passes to the acceptance rule while it decodes."""
    target = tiny_target(eos_token_id=None, initializer_range=0.2)  # flat rows, so that some drafts are accepted
    drafter, cases = tiny_drafter(target), []

    def noting(tokens: list[int], p_draft: Tensor, p_target: Rows, chance: Chance, *siblings: object) -> tuple[int, int]:
        if tokens:
            cases.append((tokens, p_draft[: len(tokens)], torch.stack([p_target[k] for k in range(len(tokens) + 1)])))
        return accept(tokens, p_draft, p_target, chance, *siblings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inspect.getmodule(dspark.decode), "accept", noting)
        for source, options in product((drafter, dspark.ContextLookup(drafter, 1)), ({}, {"top_p": 0.9}, {"top_k": 5})):
            dspark.generate(target, source, [5, 6, 7] * 4, max_new_tokens=80, temperature=2.0, **options)
    return cases


@pytest.mark.skipif(theirs is None, reason="this transformers has no _speculative_sampling")
@pytest.mark.parametrize("cases", [drawn_cases, decoded_cases])
def test_transformers_speculative_sampling_accepts_the_same_drafts(
    cases: Callable[[], Iterator[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    older = [False] if "is_done_candidate" in inspect.signature(theirs).parameters else []
    outcomes = []
    for tokens, p_draft, p_target in cases():
        coins, last = torch.rand(len(tokens), generator=generator, dtype=torch.float64), float(torch.rand((), generator=generator))
        ours, reference = (Dealt(coins.tolist(), last) for _ in range(2))
        accepted, following = accept(tokens, p_draft, p_target, ours)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand_like", lambda like, coins=coins: coins.view_as(like))
            patched.setattr(torch, "multinomial", lambda probs, num_samples, by=reference: torch.tensor([[by.choose(probs[0])]]))
            ids = torch.tensor([[1, 2, 3, *tokens]])
            logits = (p.double().log()[None] for p in (p_draft, p_target))
            chosen, matches = theirs(ids, next(logits), len(tokens), next(logits), *older)

        assert int(matches) == accepted
        assert chosen.tolist() == [[*tokens[:accepted], following]]
        assert torch.allclose(reference.chosen_from, ours.chosen_from.double(), atol=1e-6)
        outcomes.append((accepted == 0, accepted == len(tokens)))
    assert len(outcomes) > 100
    assert min(sum(rejected for rejected, _ in outcomes), sum(full for _, full in outcomes)) > 10


def test_a_token_that_the_target_forbids_is_rejected_whatever_the_coin() -> None:
    p_draft, p_target = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.4, 0.0, 0.6], [0.2, 0.3, 0.5]])
    for coin in (0.0, 1e-300, 0.5, 1 - 2**-53):
        assert accept([1], p_draft, p_target, Dealt([coin], 0.9)) == (0, 2)
