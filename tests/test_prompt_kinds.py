"""Whatever people pass as a prompt is read as they mean it, or refused in one sentence before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import letter_tokenizer, tiny_drafter, tiny_target
from torch import nn
from transformers import BatchEncoding

import dspark
from dspark.hf import dspark_generate
from dspark.target.target import Target

IDS = [5, 9, 40, 41, 7]
CHAT = [{"role": "user", "content": "Hello there"}]
THINKING = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}#{% endif %}"


@pytest.fixture(scope="module")
def target() -> Target:
    made = tiny_target()
    made.tokenizer = letter_tokenizer()
    return made


KINDS = {
    "list": IDS,
    "tuple": tuple(IDS),
    "tensor": torch.tensor(IDS),
    "row": torch.tensor([IDS]),
    "array": np.array(IDS),
    "numbers of an array": list(np.array(IDS)),
    "numbers of a tensor": list(torch.tensor(IDS)),
    "encoding": BatchEncoding({"input_ids": IDS, "attention_mask": [1] * 5}),
    "encoding of one row": BatchEncoding({"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 5)}),
    "padded encoding": BatchEncoding({"input_ids": torch.tensor([[0, 0, *IDS]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}),
    "dict": {"input_ids": IDS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_read_from_whatever_holds_them(target: Target, kind: str) -> None:
    assert target.encode(KINDS[kind]) == IDS
    out = dspark.generate(target, None, KINDS[kind], max_new_tokens=4)
    assert out.token_ids == dspark.generate(target, None, IDS, max_new_tokens=4).token_ids


def test_an_encoding_of_a_chat_is_that_chat(target: Target) -> None:
    encoding = target.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert target.encode(encoding) == target.encode(CHAT)
    assert target.encode(target.tokenizer("Hi!")) == target.tokenizer("Hi!")["input_ids"]


BATCHES = {
    "lists": [[5, 6], [7, 8]],
    "tensor": torch.tensor([[5, 6], [7, 8]]),
    "encoding": BatchEncoding({"input_ids": torch.tensor([[5, 6], [7, 8]])}),
    "padded": BatchEncoding({"input_ids": [[0, 5, 6], [0, 7, 8]], "attention_mask": [[0, 1, 1], [0, 1, 1]]}),
    "encodings": [BatchEncoding({"input_ids": [5, 6]}), {"input_ids": torch.tensor([[7, 8]])}],
    "tensors": [torch.tensor([5, 6]), torch.tensor([7, 8])],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_several_rows_are_several_prompts(target: Target, kind: str) -> None:
    alone = [dspark.generate(target, None, row, max_new_tokens=5).token_ids for row in ([5, 6], [7, 8])]
    assert [out.token_ids for out in dspark.generate(target, None, BATCHES[kind], max_new_tokens=5)] == alone
    with pytest.raises(ValueError, match="2 prompts"):
        dspark.decode(target, None, BATCHES[kind])


WRONG = {
    "floats": ([1.9, 2.2], "1.9"),
    "float tensor": (torch.tensor([1.0, 2.0]), "1.0"),
    "truths": ([True, False], "True"),
    "bytes": (b"hi", "bytes"),
    "nothing": (None, "None"),
    "a number": (7, "7"),
    "one message": (CHAT[0], "a list of messages"),
    "text in a list with numbers": ([5, "a"], "'a'"),
    "broken unicode": ("a\ud800", "cannot encode"),
    "empty tensor": (torch.tensor([], dtype=torch.long), "empty"),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_no_prompt_is_refused_in_one_line(target: Target, why: str) -> None:
    prompt, said = WRONG[why]
    for call in (dspark.decode, dspark.generate):
        with pytest.raises(ValueError, match=said) as error:
            call(target, None, prompt)
        assert "\n" not in str(error.value)


def test_arguments_of_the_chat_template_reach_it() -> None:
    target = tiny_target()
    target.tokenizer = letter_tokenizer()
    target.tokenizer.chat_template = THINKING
    plain = target.encode(CHAT)
    quiet = target.encode(CHAT, enable_thinking=False)
    assert quiet == [*plain, *target.tokenizer("#")["input_ids"]] and target.encode(CHAT, enable_thinking=True) == plain
    target.template_kwargs["enable_thinking"] = False
    assert target.encode(CHAT) == target.encode("Hello there") == quiet
    assert target.encode(CHAT, enable_thinking=True) == plain


def test_a_chat_that_the_template_refuses_is_one_line() -> None:
    target = tiny_target()
    target.tokenizer = letter_tokenizer()
    target.tokenizer.chat_template = "{{ raise_exception('no system role\nhere') }}"
    with pytest.raises(ValueError, match=r"tiny cannot encode this prompt.*no system role") as error:
        target.encode(CHAT)
    assert "\n" not in str(error.value)


# ---- models and drafters that are not what they seem


def test_a_compiled_or_wrapped_model_is_unwrapped() -> None:
    model = tiny_target().model
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert Target(wrapped, None, "wrapped").model is model
    out = dspark.generate(Target(torch.compile(model), None, "wrapped"), None, IDS, max_new_tokens=4)
    assert out.token_ids == dspark.generate(tiny_target(), None, IDS, max_new_tokens=4).token_ids


class PeftModelForCausalLM(nn.Module):
    """As peft wraps a model."""

    def merge_and_unload(self) -> None: ...


@pytest.mark.parametrize(
    ("model", "said"),
    [(PeftModelForCausalLM(), r"merge_and_unload\(\)"), (nn.Linear(2, 2), "Linear is no causal LM"), ("gpt2", "str is no causal LM")],
    ids=["adapters", "a layer", "a name"],
)
def test_what_is_no_model_of_transformers_is_refused_in_a_sentence(model: object, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        Target(model, None, "wrong")
    assert "\n" not in str(error.value)


def test_a_model_whose_weights_are_elsewhere_is_refused_before_anything_runs() -> None:
    model = tiny_target().model
    model.model.layers[2].to("meta")
    for call in (
        lambda: Target(model, None, "offloaded"),
        lambda: model.generate(torch.tensor([IDS]), custom_generate=dspark_generate, max_new_tokens=2),
        lambda: Target(model.to("meta"), None, "on disk"),
    ):
        with pytest.raises(ValueError, match="not in memory") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("vocab", [100, 120])
def test_a_drafter_of_another_model_is_refused_before_anything_runs(target: Target, vocab: int) -> None:
    foreign = tiny_drafter(tiny_target(seed=5, vocab_size=vocab))
    for source in (foreign, dspark.ContextLookup(foreign)):
        with pytest.raises(ValueError, match="attached to another model than tiny"):
            dspark.decode(target, source, IDS, policy=dspark.FixedWindow(2))
    again = tiny_drafter(tiny_target())  # the same weights, loaded a second time
    assert dspark.generate(target, again, IDS, policy=dspark.FixedWindow(2), max_new_tokens=4).token_ids
