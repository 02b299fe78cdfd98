"""Phrases are counted as one would by hand, and drafting by them changes no text."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.bench.arms import parse_arm
from dspark.draft.lookup import LEAST_SURVIVAL
from dspark.phrases import FILE, LEAST_COUNT, LEAST_RATE, ORDERS, PhraseMemory, _key, load_phrases
from dspark.train.__main__ import remember_phrases
from dspark.train.corpus import Corpus, save_corpus


def some_text(rows: int = 40, tokens: int = 30, vocab: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """So few kinds of tokens that n-grams come again and again."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (rows, tokens))
    ids[:, 10:15] = [1, 2, 3, 4, 1]  # one phrase that everybody uses
    return ids, rng.random((rows, tokens)) < 0.7


def by_hand(ids: np.ndarray, assistant: np.ndarray) -> dict[tuple[int, ...], Counter[int]]:
    seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for row, written in zip(ids.tolist(), assistant.tolist(), strict=True):
        for order in ORDERS:
            for at in range(order, len(row)):
                if written[at]:
                    seen[tuple(row[at - order : at])][row[at]] += 1
    return seen


def test_what_is_remembered_is_what_one_counts_by_hand() -> None:
    ids, assistant = some_text()
    memory = PhraseMemory.of_text(ids, assistant)
    kept = 0
    for gram, followers in by_hand(ids, assistant).items():
        best, rate = max(followers.values()), max(followers.values()) / (sum(followers.values()) + 1)
        found = memory.follower(gram)
        if best >= LEAST_COUNT and rate >= LEAST_RATE:
            kept += 1
            assert found is not None and followers[found[0]] == best
            assert found[1] == pytest.approx(rate, abs=1 / 255)
        else:
            assert found is None
    assert kept == len(memory) > 20


def test_different_ngrams_have_the_same_hash_as_seldom_as_by_chance() -> None:
    grams = [gram for order in (3, 4) for gram in itertools.product((0, 1, 2, 434, 435, 436, 50_000, 90_000), repeat=order)]
    grams += list(itertools.product(range(50), repeat=3))
    assert len({_key(gram) for gram in grams}) >= len(set(grams)) - 15, "by chance 2 in 130 000"


def drafted(source: dspark.ContextLookup, tokens: list[int], anchor: int, window: int = 4) -> dspark.draft.drafter.Draft:
    state = source.new_state(tokens)
    source.extend(state, tokens, torch.zeros(1, len(tokens), 64))
    return source.draft(state, anchor, window, dspark.verify.sampling.Sampling(), dspark.verify.sampling.Chance())


def test_a_phrase_ends_where_it_has_become_unlikely_or_long_enough() -> None:
    text = np.tile(np.arange(8), (3, 4))
    memory, target = PhraseMemory.of_text(text, np.ones_like(text, dtype=bool)), tiny_target()

    def phrase(memory: PhraseMemory, tokens: list[int], anchor: int, window: int) -> dspark.draft.drafter.Draft:
        """min_match: more than there are, so that the context is silent."""
        return drafted(dspark.ContextLookup(None, min_match=9, max_copy=20, phrases=memory, target=target), tokens, anchor, window)

    found = phrase(memory, [5, 6], 7, 20)
    assert found.tokens == [*range(8), *range(8), *range(4)][: len(found.tokens)] and found.source == "phrase"
    survival = float(found.confidence.prod())
    assert survival >= LEAST_SURVIVAL and (len(found.tokens) == 20 or survival * float(found.confidence.min()) < LEAST_SURVIVAL)
    assert phrase(memory, [5, 6], 7, 2).tokens == [0, 1]
    assert phrase(memory, [7, 6], 5, 20).tokens == []
    unsure = PhraseMemory(memory.keys, memory.followers, np.full_like(memory.rates, 128))
    assert len(phrase(unsure, [5, 6], 7, 20).tokens) == 3, "½ · ½ · ½ · ½ is less than the least survival"


def test_a_memory_survives_its_file_and_others_are_refused(tmp_path: Path) -> None:
    memory = PhraseMemory.of_text(*some_text())
    memory.save(tmp_path / FILE, "abc")
    again = load_phrases(tmp_path / FILE, "abc", 5)
    assert all(np.array_equal(getattr(memory, name), getattr(again, name)) for name in ("keys", "followers", "rates"))
    for told, arguments in (("made for weights 'abc'", ("xyz", 5)), ("damaged", ("abc", 4))):
        with pytest.raises(ValueError, match=told):
            load_phrases(tmp_path / FILE, *arguments)
    PhraseMemory(memory.keys[::-1].copy(), memory.followers, memory.rates).save(tmp_path / "disorder", "abc")
    (tmp_path / "cut").write_bytes((tmp_path / FILE).read_bytes()[:-9])
    for name, told in (("disorder", "damaged"), ("cut", "no phrase memory"), ("missing", "no phrase memory")):
        with pytest.raises(ValueError, match=told):
            load_phrases(tmp_path / name, "abc", 5)


def test_tokens_of_any_size_are_followers_and_small_ones_take_two_bytes(tmp_path: Path) -> None:
    ids, assistant = some_text()
    small, large = PhraseMemory.of_text(ids, assistant), PhraseMemory.of_text(ids + 70_000, assistant)
    assert (small.followers.dtype, large.followers.dtype) == (np.uint16, np.int32)
    large.save(tmp_path / FILE, "abc")
    again = load_phrases(tmp_path / FILE, "abc", 70_005)
    for gram in itertools.product(range(5), repeat=3):
        found, larger = small.follower(gram), again.follower([token + 70_000 for token in gram])
        assert found == (larger and (larger[0] - 70_000, larger[1]))


def test_more_text_is_counted_with_the_first(tmp_path: Path) -> None:
    ids, assistant = (torch.from_numpy(array) for array in some_text())
    first = ids.shape[0] // 2
    for name, rows in (("corpus", slice(first)), ("more", slice(first, None))):
        text = Corpus(ids[rows], assistant[rows], torch.ones(len(ids[rows])))
        save_corpus(text, tmp_path / name)
    target = tiny_target()
    for more, rows in ((tmp_path / "more", slice(None)), (None, slice(first))):
        remember_phrases(target, argparse.Namespace(corpus=tmp_path / "corpus", more=more, out=tmp_path))
        found, wanted = load_phrases(tmp_path / FILE, target.digest, 5), PhraseMemory.of_text(ids[rows].numpy(), assistant[rows].numpy())
        assert np.array_equal(found.keys, wanted.keys) and np.array_equal(found.rates, wanted.rates)


def test_text_without_repetition_has_no_phrases() -> None:
    with pytest.raises(ValueError, match="comes twice"):
        PhraseMemory.of_text(np.arange(60).reshape(2, 30), np.ones((2, 30), dtype=bool))


def test_greedy_text_is_the_targets_and_phrases_are_accepted() -> None:
    target = tiny_target()
    prompt = [5, 6, 7]
    plain = dspark.generate(target, None, prompt, max_new_tokens=40).token_ids
    text = np.array([prompt + plain] * 2)
    memory = PhraseMemory.of_text(text, np.ones_like(text, dtype=bool))
    source = dspark.ContextLookup(tiny_drafter(target), min_match=9, phrases=memory)
    out = dspark.generate(target, source, prompt, max_new_tokens=40)
    phrases = [r for r in out.rounds if r.source == "phrase"]
    assert phrases and all(p == 1 for r in phrases for p in r.draft_probs_of_drafts)
    assert out.token_ids == plain
    assert sum(r.accepted for r in phrases) > 10


def test_the_longest_known_end_counts_then_the_context_then_the_memory_and_the_drafter_last() -> None:
    target = tiny_target()
    text = np.array([[5, 6, 7, 50], [5, 6, 7, 50]])
    memory = PhraseMemory.of_text(text, np.ones_like(text, dtype=bool))
    source = dspark.ContextLookup(tiny_drafter(target), phrases=memory)
    assert drafted(source, [5, 6, 7, 60, 5, 6], 7).tokens[0] == 60, "three tokens in the context, three in the memory"
    found = drafted(source, [6, 7, 60, 5, 6], 7)
    assert (found.tokens[0], found.source) == (50, "phrase"), "two tokens in the context, three in the memory"
    assert (drafted(source, [1, 5, 6], 7).tokens, drafted(source, [1, 5, 6], 7).source) == ([50], "phrase")
    assert drafted(source, [6, 7, 60, 6], 7).source == "copy"
    assert drafted(source, [1, 6, 5], 7).source == "drafter"


def test_a_drafters_folder_brings_its_phrases_and_the_arm_needs_them(tmp_path: Path) -> None:
    target = tiny_target()
    dspark.save_drafter(tiny_drafter(target), target, tmp_path)
    arm = parse_arm("fixed+phrases")
    with pytest.raises(ValueError, match=r"dspark\.train phrases"):
        arm.source(dspark.load_drafter(tmp_path, target), target)
    PhraseMemory.of_text(*some_text()).save(tmp_path / FILE, target.digest)
    assert len(arm.source(dspark.load_drafter(tmp_path, target), target).phrases) > 20
    PhraseMemory.of_text(*some_text()).save(tmp_path / FILE, "another")
    with pytest.raises(ValueError, match="made for weights 'another'"):
        dspark.load_drafter(tmp_path, target)
    with pytest.raises(ValueError, match="leave \\+copy out"):
        parse_arm("fixed+copy+phrases")
