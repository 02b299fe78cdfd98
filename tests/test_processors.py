"""With logit processors, the text has the distribution of ``model.generate`` with the same processors."""

from __future__ import annotations

import pytest
import torch
from exact.enumeration import POLICIES, ExactSampling, compared, small_drafter, small_target
from tiny import Wavering, letter_tokenizer, random_prompt, tiny_drafter, tiny_target
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MinPLogitsWarper
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

import dspark
from dspark.hf import _sampling, dspark_generate
from dspark.target.target import Target
from dspark.verify.lean import lean_pass
from dspark.verify.processors import CountPenalty, ProcessedProbs

PROMPT = random_prompt(3, 12)


class ByLength(LogitsProcessor):
    """A user's own: how much it favours each token depends on the number of tokens and on the last two; it changes its argument."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids[0, -1]] -= 1.5 * (input_ids.shape[1] % 3)
        scores[:, input_ids[0, -2]] += 1.0 + 8.0 * (input_ids.shape[1] % 5 == 0)
        return scores


OPTIONS = {  # arguments of model.generate
    "repetition": {"repetition_penalty": 1.4},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[42], [74, 5], [2, 31, 41]]},
    "suppressed": {"suppress_tokens": list(range(4, 60)), "begin_suppress_tokens": list(range(60, 90))},
    "min new tokens": {"min_new_tokens": 15, "eos_token_id": list(range(2, 40))},
    "min length": {"min_length": 20, "eos_token_id": list(range(2, 40))},
    "growing wish to end": {"exponential_decay_length_penalty": (9, 1.1), "eos_token_id": [88, 90]},
    "bias": {"sequence_bias": {(50,): 3.0, (51, 52): 9.0}},
    "forced end": {"forced_eos_token_id": 2},
    "own": {"logits_processor": LogitsProcessorList([ByLength()])},
    "counts": {"logits_processor": LogitsProcessorList([CountPenalty(2.0, 1.0, prompt_length=len(PROMPT))])},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "logits_processor": LogitsProcessorList([ByLength()])},
}
WARPED = OPTIONS | {
    "min-p": {"min_p": 0.3},
    "typical": {"typical_p": 0.7},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.2},
    "top-h": {"top_h": 0.4},
    "kept tokens": {"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.5, min_tokens_to_keep=3)]), "renormalize_logits": True},
}
options_of = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def stock(target: Target, **options: object) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0} | options
    return target.model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()


def made(target: Target, options: dict[str, object], **more: object) -> LogitsProcessorList:
    """The processors that generate makes of these arguments."""
    seen: list[LogitsProcessorList] = []

    def look(_model: object, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: object) -> Tensor:
        seen.append(logits_processor)
        return input_ids

    stock(target, **options, **more, custom_generate=look)
    return seen[0]


ENUMERATED = {  # name: number of tokens in the vocabulary, processor
    "repetition": (2, RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=3)),
    "counts": (2, CountPenalty(0.9, 0.4, prompt_length=3)),
    "own, copying": (2, ByLength()),
    "no repeated n-gram": (2, NoRepeatNGramLogitsProcessor(3)),
    "bad words": (2, NoBadWordsLogitsProcessor([[1, 0, 1], [0, 1, 1, 1]])),
    "suppressed": (3, SuppressTokensLogitsProcessor([1])),
    "min new tokens": (2, MinNewTokensLengthLogitsProcessor(3, 2, 1)),
    "bias": (2, SequenceBiasLogitsProcessor([[[0, 1], 0.8], [[1], -0.4]])),
    "min-p": (2, MinPLogitsWarper(0.8)),
    "typical": (2, TypicalLogitsWarper(0.6)),
}


@pytest.mark.parametrize("name", ENUMERATED)
def test_sampled_text_has_the_distribution_of_the_processed_target(name):
    """Enumerated. What they do to a token changes from draft to draft within a block."""
    vocab, processor = ENUMERATED[name]
    small = small_target(vocab, False)
    drafter = small_drafter(small, "vanilla", 3)
    drafts = dspark.ContextLookup(drafter, 1, max_copy=3) if "copying" in name else drafter
    proof = compared(small, drafts, POLICIES["fixed:3"], ExactSampling(1.0), [4], processor)
    assert proof.difference == 0
    assert {r.accepted for r in proof.met} >= {0, 1, 2}, "drafts of one block are accepted and rejected"
    assert proof.expected != compared(small, drafter, POLICIES["plain"], ExactSampling(1.0), [4]).expected


@pytest.mark.parametrize("numbers", [{"temperature": 0.7, "top_k": 30, "top_p": 0.9}, {"top_k": 0}], ids=str)
@pytest.mark.parametrize("options", WARPED.values(), ids=WARPED)
def test_processed_rows_are_those_of_generate(target, options, numbers):
    """Of a block of five: each row with its own text."""
    processors = made(target, options, do_sample=True, **numbers)
    text = [*PROMPT, *random_prompt(4, 9)]
    logits = 2 * torch.randn(5, 100, generator=torch.Generator().manual_seed(1))
    sampling, around = _sampling(processors, True)
    ours = ProcessedProbs(sampling, logits, text, around)
    for k in range(5):
        ids = torch.tensor([text[: len(text) - 4 + k]])
        expected = processors(ids, logits[k : k + 1].clone()).softmax(-1)[0]
        assert torch.allclose(ours[k], expected, atol=1e-6)


@options_of
def test_greedy_text_is_that_of_generate(target, options):
    """Through custom_generate, with a trained-like drafter and with one that foresees most of the text."""
    expected = stock(target, **options)
    assert expected != stock(target) or "eos_token_id" in options
    for source in (tiny_drafter(target), Wavering(target, [*expected, *expected], 4)):
        rounds: list = []
        arguments = {"custom_generate": dspark_generate, "drafter": source, "policy": dspark.FixedWindow(4), "on_round": rounds.append}
        assert stock(target, **options, **arguments) == expected
    assert max(r.accepted for r in rounds) > 1, rounds


@options_of
def test_an_engine_with_these_processors_writes_that_text(target, options):
    """Through the lean pass, with and without drafts."""
    expected = stock(target, **options)
    processors = made(target, options, do_sample=False)
    served = tiny_target()
    served.verifier = lean_pass(served)
    ends = options.get("eos_token_id", [2])
    served.eos_token_ids = frozenset(ends) if "eos_token_id" in options else frozenset()
    source = Wavering(served, [*expected, *expected], 4)
    out = dspark.generate(served, source, PROMPT, policy=dspark.FixedWindow(4), max_new_tokens=40, processors=processors)
    assert out.token_ids == expected
    assert (
        dspark.generate(served, None, PROMPT, policy=dspark.Autoregressive(), max_new_tokens=40, processors=processors).token_ids
        == expected
    )


def test_min_p_follows_the_temperature_as_in_generate(target):
    engine = dspark.Engine(target, None, dspark.Autoregressive())
    request = engine.submit(PROMPT, temperature=2.0, processors=[MinPLogitsWarper(0.2), SuppressTokensLogitsProcessor([5])])
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    processors = made(target, {"min_p": 0.2, "suppress_tokens": [5]}, do_sample=True, temperature=2.0, top_k=0)
    assert torch.allclose(request.p_target(logits)[0], processors(torch.tensor([PROMPT]), logits.clone()).softmax(-1)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("processors", "message"),
    [
        ([WatermarkLogitsProcessor(100, "cpu")], "WatermarkLogitsProcessor"),
        ([RepetitionPenaltyLogitsProcessor], "no logit processor"),
        ([3], "3 is no logit processor"),
    ],
)
def test_what_reads_more_than_the_text_is_refused_before_anything_runs(target, processors, message):
    with pytest.raises(ValueError, match=message) as error:
        dspark.decode(target, None, PROMPT, processors=processors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_that_forbid_everything_are_named(target, temperature):
    with pytest.raises(ValueError, match="forbid every token"):
        dspark.generate(target, None, PROMPT, temperature=temperature, processors=[SuppressTokensLogitsProcessor(list(range(100)))])


# ---- log-probabilities


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_the_targets_own(temperature):
    target = tiny_target()
    options = {"max_new_tokens": 30, "temperature": temperature, "processors": [ByLength()]}
    source = Wavering(target, dspark.generate(target, None, PROMPT, **options).token_ids, 4)
    out = dspark.generate(target, source, PROMPT, policy=dspark.FixedWindow(4), logprobs=True, **options)
    text = torch.tensor([[*PROMPT, *out.token_ids]])
    rows = target.model(text).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert torch.allclose(torch.tensor(out.logprobs), rows[range(len(out.token_ids)), out.token_ids], atol=1e-4)
    assert all(len(r.logprobs) == len(r.committed) for r in out.rounds)
    assert dspark.generate(target, source, PROMPT, policy=dspark.FixedWindow(4), **options).logprobs == []


@pytest.mark.parametrize("at", [3, 4, 5, 6])
def test_logprobs_end_with_the_text(at):
    target = tiny_target(eos_token_id=None)
    target.tokenizer = letter_tokenizer()
    full = dspark.generate(target, None, PROMPT, max_new_tokens=20).token_ids
    source = Wavering(target, [*full, *full], 4, errors=0.0)
    for end in ({"stop_ids": [full[at]]}, {"stop": target.decode(full[at : at + 1])}):
        out = dspark.generate(target, source, PROMPT, policy=dspark.FixedWindow(4), max_new_tokens=20, logprobs=True, **end)
        assert len(out.logprobs) == len(out.token_ids) <= at + 1


# ---- text as it comes


@pytest.mark.parametrize("sizes", [[1], [2, 3], [5], [100]], ids=str)
@pytest.mark.parametrize("text", ["天空为什么是蓝色的?", "🙂 of 👩‍👩‍👧 and é", "plain", "a \ufffd of its own"])
def test_pieces_are_whole_characters_and_join_to_the_text(text, sizes):
    ids, at, pieces = list(text.encode()), 0, []
    stream = dspark.Target.stream(Bytes)
    for i in range(len(ids)):
        n = sizes[i % len(sizes)]
        pieces.append(stream.put(ids[at : at + n]))
        at += n
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    pieces.append(stream.end())
    assert "".join(pieces) == text


def test_a_text_cut_within_a_character_still_joins():
    ids = list("ab🙂".encode())[:-1]
    stream = dspark.Target.stream(Bytes)
    assert [stream.put(ids[:1]), stream.put(ids[1:]), stream.end()] == ["a", "b", "\ufffd"]


class Bytes:
    """In place of a target: one token per byte."""

    @staticmethod
    def decode(token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_processors_never_see_what_follows_a_token_that_they_forbid(temperature: float) -> None:
    """A grammar knows no state after one: drafts are rejected there, and the rows behind them are not asked for."""
    target = tiny_target(eos_token_id=None)

    def allowed(_: int, ids: Tensor) -> list[int]:
        odd = [int(token) % 2 for token in ids[len(PROMPT) :]]
        assert odd == [k % 2 for k in range(len(odd))], "even and odd tokens take turns"
        return list(range(4 + len(odd) % 2, 100, 2))

    options = {"max_new_tokens": 30, "temperature": temperature, "processors": [PrefixConstrainedLogitsProcessor(allowed, 1)]}
    for policy in (dspark.FixedWindow(), dspark.AdaptiveWindow(), None):
        out = dspark.generate(target, tiny_drafter(target), PROMPT, policy=policy, **options)
        assert [token % 2 for token in out.token_ids] == [k % 2 for k in range(30)]
        assert all(0 <= p <= 1 for r in out.rounds for p in r.target_probs_of_drafts)
