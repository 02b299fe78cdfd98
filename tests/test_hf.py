"""``model.generate(custom_generate=dspark_generate)`` gives what ``model.generate`` gives, or says in one sentence why it does not."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_drafter, tiny_target
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    WatermarkingConfig,
)

import dspark
from dspark.cpu import pack_target
from dspark.draft.drafter import Drafter
from dspark.hf import _sampling as sampling_of
from dspark.hf import dspark_generate
from dspark.target.target import Target

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=4, initializer_range=0.4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=8)
    ),
}
PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6]])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(3)
    return FAMILIES[request.param]().eval()


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny_target(initializer_range=0.6).model


def drafter_of(model: torch.nn.Module) -> Drafter:
    return tiny_drafter(Target(model, None, "tiny"))


def both(model: torch.nn.Module, *, drafter: object = None, policy: object = None, **options: object) -> tuple[list[int], list[int], list]:
    """The new tokens of transformers, ours, and our rounds."""
    rounds: list = []
    stock = model.generate(PROMPT, **options)
    ours = model.generate(PROMPT, custom_generate=dspark_generate, drafter=drafter, policy=policy, on_round=rounds.append, **options)
    return stock[0].tolist(), ours[0].tolist(), rounds


@pytest.mark.parametrize("trained", [True, False], ids=["drafter", "copying"])
def test_greedy_text_in_float32_is_generates(model, trained):
    """60 tokens: several windows of the sliding layers."""
    drafter = drafter_of(model) if trained else None
    stock, ours, rounds = both(model, drafter=drafter, do_sample=False, max_new_tokens=60, eos_token_id=None)
    assert ours == stock and len(ours) == PROMPT.shape[1] + 60
    assert any(r.verify_length for r in rounds)


def test_a_policy_and_a_wrapped_drafter_are_used(llama):
    source = dspark.ContextLookup(drafter_of(llama))
    _, _, rounds = both(llama, drafter=source, policy=dspark.FixedWindow(2), do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert {len(r.draft_tokens) for r in rounds[1:-2]} <= {1, 2}


class OneOf(StoppingCriteria):
    """Ends after any of these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], torch.tensor(self.tokens))


class Foretelling(dspark.ContextLookup):
    """Copies from a text that it was shown before, so that whole blocks are accepted."""

    def __init__(self, target: Target, shown: list[int]) -> None:
        super().__init__(None, target=target)
        self.shown = shown

    def new_state(self, prompt: object = ()) -> object:
        state = super().new_state(prompt)
        self.extend(state, self.shown, None)
        return state


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_ends_of_text_and_stopping_criteria_end_it_at_the_same_token(llama, at):
    shown = llama.generate(PROMPT, do_sample=False, max_new_tokens=20, eos_token_id=None)[0].tolist()
    full = shown[PROMPT.shape[1] :]
    foretelling = Foretelling(Target(llama, None, "tiny"), shown)
    assert max(r.accepted for r in both(llama, drafter=foretelling, do_sample=False, max_new_tokens=20, eos_token_id=None)[2]) > 3
    for options in (
        {"eos_token_id": [2, full[at]]},
        {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([OneOf([full[at]])])},
        {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + at)])},
    ):
        for source in (foretelling, None):
            stock, ours, _ = both(llama, drafter=source, do_sample=False, max_new_tokens=20, **options)
            assert ours == stock and len(ours) <= PROMPT.shape[1] + at + 1


SAMPLED = [
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 5, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.8},
]


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_every_sampled_token_is_one_that_transformers_warpers_allow(llama, options):
    """The warpers run on the logits of the finished text, which went through drafts and rejections."""
    torch.manual_seed(0)
    options = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 60, **options}
    text = llama.generate(PROMPT, custom_generate=dspark_generate, drafter=drafter_of(llama), **options)
    warpers = llama._get_logits_processor(GenerationConfig(**options))
    n = PROMPT.shape[1]
    rows = warpers(text, llama(text).logits[0, n - 1 : -1])
    assert rows[range(60), text[0, n:]].isfinite().all()
    assert options["temperature"] == 0.7 or not rows.isfinite().all()


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_the_distribution_is_that_of_transformers_warpers(llama, options):
    warpers = llama._get_logits_processor(GenerationConfig(do_sample=True, **options))
    logits = 3 * torch.randn(200, 100, generator=torch.Generator().manual_seed(1))
    expected = warpers(PROMPT, logits).softmax(-1)
    sampling, processors = sampling_of(warpers, True)
    assert processors is None and torch.allclose(sampling.probs(logits), expected, atol=1e-6)


@pytest.mark.parametrize("warper", [TopKLogitsWarper(3), TopKLogitsWarper(3, min_tokens_to_keep=5)], ids=["another order", "more kept"])
def test_warpers_in_another_order_are_applied_in_theirs(llama, warper):
    options = {"do_sample": True, "temperature": 0.5, "top_k": 0, "top_p": 0.9}
    warpers = llama._get_logits_processor(GenerationConfig(**options), logits_processor=LogitsProcessorList([warper]))
    sampling, processors = sampling_of(warpers, True)
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
    logits = 3 * torch.randn(1, 100, generator=torch.Generator().manual_seed(1))
    expected = warpers(PROMPT, logits.clone()).softmax(-1)[0]
    assert torch.allclose(processors.probs(sampling, PROMPT[0].tolist(), logits[0]), expected, atol=1e-6)


def test_a_drafted_token_follows_that_distribution(llama):
    """The second new token is drafted, accepted or corrected; its distribution is known by enumerating the first. 80 draws."""
    options = {"do_sample": True, "eos_token_id": None, "temperature": 0.9, "top_k": 3, "top_p": 1.0}
    warpers = llama._get_logits_processor(GenerationConfig(**options))
    first = warpers(PROMPT, llama(PROMPT).logits[:, -1]).softmax(-1)[0]
    after = torch.cat([PROMPT.expand(100, -1), torch.arange(100)[:, None]], 1)
    expected = first @ warpers(after, llama(after).logits[:, -1]).softmax(-1)
    drafter, n = drafter_of(llama), PROMPT.shape[1]
    torch.manual_seed(0)
    draw = lambda: llama.generate(PROMPT, max_new_tokens=3, custom_generate=dspark_generate, drafter=drafter, **options)  # noqa: E731
    counts = torch.bincount(torch.stack([draw()[0, n + 1] for _ in range(80)]), minlength=100)
    kept = expected > 0
    chi = ((counts - 80 * expected)[kept] ** 2 / (80 * expected)[kept]).sum()
    assert counts[~kept].sum() == 0 and chi < kept.sum() + 5 * (2 * kept.sum()) ** 0.5, (counts[kept], 80 * expected[kept])


def test_sampling_obeys_the_global_seed(llama):
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(llama.generate(PROMPT, custom_generate=dspark_generate, do_sample=True, max_new_tokens=12, eos_token_id=None).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_the_model_is_left_as_it_was(llama):
    weight = llama.lm_head.weight
    weight.requires_grad_(True)
    llama.generate(PROMPT, custom_generate=dspark_generate, max_new_tokens=3)
    assert weight.requires_grad
    weight.requires_grad_(False)


def test_the_rounds_hold_every_new_token_once(llama):
    _, ours, rounds = both(llama, do_sample=False, max_new_tokens=15)
    assert [*PROMPT[0].tolist(), *(token for r in rounds for token in r.committed)] == ours


def test_a_dictionary_is_returned_where_one_is_asked_for(llama):
    out = llama.generate(PROMPT, custom_generate=dspark_generate, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(out.sequences, llama.generate(PROMPT, do_sample=False, max_new_tokens=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": PROMPT.repeat(2, 1)}, "got 2 sequences"),
        ({"num_beams": 2}, "beam_search"),
        ({"attention_mask": torch.tensor([[0] + [1] * 9])}, "padded"),
        ({"watermarking_config": WatermarkingConfig()}, "WatermarkLogitsProcessor"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"logits_to_keep": 5}, "logits_to_keep is 5"),
        ({"return_dict_in_generate": True, "output_scores": True}, "scores cannot be returned"),
        ({"policy": dspark.FixedWindow(99)}, "a window of 99"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 20, 21, 22, 23, 24]])}, "counts positions itself"),
        ({"position_ids": torch.arange(9)[None]}, "counts positions itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_in_one_sentence(llama, options, message):
    with pytest.raises(ValueError, match=message) as error:
        llama.generate(**({"inputs": PROMPT, "custom_generate": dspark_generate, "max_new_tokens": 4, "top_k": 0} | options))
    assert "\n" not in str(error.value)


def test_positions_that_are_the_usual_ones_are_taken(llama):
    positions = torch.arange(PROMPT.shape[1])[None]
    stock, ours, _ = both(llama, position_ids=positions, do_sample=False, max_new_tokens=8)
    assert ours == stock


def test_a_model_that_also_sees_decodes_text_alone():
    text = Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    sight = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(3)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)).eval()
    stock, ours, rounds = both(model, do_sample=False, max_new_tokens=30, eos_token_id=None)
    assert ours == stock and any(r.verify_length for r in rounds)


def test_a_model_whose_cache_cannot_be_rewound_is_refused_and_left_as_it_was():
    model = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=2)).eval()
    with pytest.raises(ValueError, match="MambaForCausalLM scans from a zero state"):
        model.generate(PROMPT, custom_generate=dspark_generate, do_sample=False, max_new_tokens=4)
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_drafter_of_another_model_is_refused(llama):
    with pytest.raises(ValueError, match="attached to another model"):
        llama.generate(PROMPT, custom_generate=dspark_generate, drafter=tiny_drafter(tiny_target()), max_new_tokens=4)


def test_a_model_in_training_mode_is_refused():
    model = tiny_target().model.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        model.generate(PROMPT, custom_generate=dspark_generate, max_new_tokens=4)


def test_a_packed_model_still_generates_with_us() -> None:
    target = pack_target(tiny_target(dtype=torch.bfloat16))
    drafter = tiny_drafter(target)
    ours = target.model.generate(
        PROMPT, custom_generate=dspark_generate, drafter=drafter, do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    expected = dspark.generate(target, drafter, PROMPT[0].tolist(), max_new_tokens=12)
    assert ours[0, PROMPT.shape[1] :].tolist() == expected.token_ids
