"""A model that keeps keys and values alone can be a target, whatever its layers are called; any other is refused before it is changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tiny import Wavering, tiny_drafter
from torch import nn

import dspark
from dspark.hf import dspark_generate
from dspark.load import load_target
from dspark.schedule import parse_policy
from dspark.target.target import Target
from dspark.train.start import drafter_for
from dspark.verify.passes import TransformersPass

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODERN = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4} | ENDS
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
OLDER = {"vocab_size": 60, "n_embd": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.4} | ENDS
PER_LAYER = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8}
CHUNKS = {"layer_types": ["chunked_attention", "full_attention"] * 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64}
LATENT = {name: value for name, value in MODERN.items() if name != "head_dim"} | {"num_key_value_heads": 4, "moe_intermediate_size": 16}
LATENT |= {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
FAMILIES = {  # class and config class without their endings → the config
    "GPT2LMHead": ("GPT2", OLDER),
    "GPTJ": ("GPTJ", OLDER | {"rotary_dim": 4}),
    "CodeGen": ("CodeGen", OLDER | {"rotary_dim": 4}),
    "Mpt": ("Mpt", {"vocab_size": 60, "d_model": 32, "n_layers": 4, "n_heads": 4, "initializer_range": 0.4}),
    "GPTNeoX": ("GPTNeoX", SIZES | ENDS | {"intermediate_size": 64, "initializer_range": 0.4}),
    "Bloom": ("Bloom", {"vocab_size": 60, "hidden_size": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.4} | ENDS),
    "Falcon": ("Falcon", SIZES | ENDS | {"initializer_range": 0.4}),
    "OPT": ("OPT", SIZES | ENDS | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.4}),
    "Qwen3Moe": ("Qwen3Moe", MODERN | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Llama": ("Llama", MODERN),
    "Qwen2": ("Qwen2", {name: value for name, value in MODERN.items() if name != "head_dim"}),
    "Mistral": ("Mistral", MODERN | {"sliding_window": 8}),
    "Mixtral": ("Mixtral", MODERN | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GptOss": ("GptOss", MODERN | WINDOWS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV2": ("DeepseekV2", LATENT),
    "DeepseekV3": ("DeepseekV3", LATENT | {"n_group": 2, "topk_group": 1}),
    "Gemma": ("Gemma", MODERN),
    "Gemma3": ("Gemma3Text", MODERN | WINDOWS | {"query_pre_attn_scalar": 8}),
    "Llama4": ("Llama4Text", MODERN | CHUNKS | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "Gemma2": ("Gemma2", MODERN | WINDOWS),
    "Gemma3n": ("Gemma3nText", MODERN | WINDOWS | PER_LAYER | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}),
    "Gemma4": ("Gemma4Text", MODERN | WINDOWS | PER_LAYER),
    "ModernBertDecoder": ("ModernBertDecoder", SIZES | ENDS | {"intermediate_size": 64, "initializer_range": 0.4, "local_attention": 8}),
}
SHARED = ["Gemma3n", "Gemma4"]
PROMPT = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6]


def model_of(family: str) -> nn.Module:
    config, values = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind = getattr(transformers, f"{family}Model" if family.endswith("Head") else f"{family}ForCausalLM")
        model = kind(getattr(transformers, f"{config}Config")(**values)).eval()
    model.generation_config.eos_token_id = None  # on to the last token
    model.config.eos_token_id = None
    return model


def lookup_of(target: Target) -> dspark.ContextLookup:
    return dspark.ContextLookup(None, target=target)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_what_generate_writes_with_copies_and_with_a_drafter(family: str) -> None:
    model = model_of(family)
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=40)[0, len(PROMPT) :].tolist()
    target = Target(model, None, family)
    outputs = [dspark.generate(target, source, PROMPT, max_new_tokens=40) for source in (lookup_of(target), tiny_drafter(target))]
    assert [out.token_ids for out in outputs] == [expected] * 2
    assert any(r.verify_length > r.accepted for out in outputs for r in out.rounds), "nothing was ever rejected"


MET = ["Llama", "Qwen2", "Mistral", "Qwen3Moe", "GptOss", "DeepseekV2", "DeepseekV3", "Llama4", "Gemma3"]
SPECS = ["plain", "mtp1", "fixed:4", "adaptive:0.6,0.5,0.3", "confidence:0.3", "conditional:0.5", "prefix"]


@pytest.mark.parametrize("family", MET)
def test_greedy_text_is_what_generate_writes_under_every_policy(family: str) -> None:
    model = model_of(family)
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=24)[0, len(PROMPT) :].tolist()
    target = Target(model, None, family)
    source = Wavering(target, expected, 4)
    for spec in SPECS:
        policy = parse_policy(spec, lambda: lambda tokens: 1 / (4 + tokens))
        assert dspark.generate(target, source, PROMPT, policy=policy, max_new_tokens=24).token_ids == expected, spec


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_token_are_what_the_cache_holds_of_it(family: str) -> None:
    target = Target(model_of(family), None, family)
    cache = target.new_cache()
    target.forward(torch.tensor([PROMPT]), cache)
    held = sum(side.numel() * side.element_size() for layer in cache.layers for side in layer.kv.view())
    assert TransformersPass(target).bytes_per_token * len(PROMPT) == held


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_sees_the_same_after_a_rewind_and_has_the_same_taps(family: str) -> None:
    target = Target(model_of(family), None, family)
    text, cache = torch.randint(4, 60, (1, 30), generator=torch.Generator().manual_seed(0)), target.new_cache()
    whole, taps = target.forward(text, None, (-1, 0, 2))
    last, first_taps = target.forward(text[:, :20], cache, (-1, 0, 2), logits_to_keep=1)
    target.forward(text[:, 3:12], cache)
    cache.rewind(20)
    rest, rest_taps = target.forward(text[:, 20:], cache, (-1, 0, 2))
    assert torch.allclose(torch.cat([last, rest], 1), whole[:, 19:], atol=1e-4)
    assert torch.allclose(torch.cat([first_taps, rest_taps], 1), taps, atol=1e-4)
    assert taps.shape == (1, 30, 3 * target.hidden_size)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PHI = {name: value for name, value in MODERN.items() if name != "head_dim"} | {"max_position_embeddings": 256}


def longrope() -> nn.Module:
    """A text of more than 24 tokens gets other position embeddings, for its first 24 tokens as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        rope = LONG | {"original_max_position_embeddings": 24}
        config = transformers.Phi3Config(**PHI | {"eos_token_id": None}, original_max_position_embeddings=24, rope_parameters=rope)
        return transformers.Phi3ForCausalLM(config).eval()


def test_a_text_ends_where_longrope_would_move_the_positions() -> None:
    model = longrope()
    target = Target(model, None, "phi3")
    assert target.max_context == 24
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=14)[0, 10:].tolist()
    for source in (None, lookup_of(target), tiny_drafter(target)):
        assert dspark.generate(target, source, PROMPT, max_new_tokens=40).token_ids == expected
    call = {"custom_generate": dspark_generate, "do_sample": False}
    assert model.generate(torch.tensor([PROMPT]), max_new_tokens=14, **call)[0, 10:].tolist() == expected
    with pytest.raises(ValueError, match=r"up to 24 tokens.*ask for 14 new tokens at most"):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=15, **call)


@pytest.mark.parametrize(
    ("rope", "most"), [({"rope_type": "dynamic", "factor": 2.0}, 64), ({"rope_type": "linear", "factor": 2.0}, 1 << 30)]
)
def test_only_embeddings_that_depend_on_the_length_limit_a_text(rope: dict[str, object], most: int) -> None:
    config = transformers.LlamaConfig(**MODERN, max_position_embeddings=64, rope_parameters=rope | {"rope_theta": 1e4})
    assert Target(transformers.LlamaForCausalLM(config), None, "llama").steady_context == most


def test_a_drafter_needs_an_embedding_as_wide_as_the_layers_and_copying_does_not() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = transformers.OPTConfig(**FAMILIES["OPT"][1] | {"word_embed_proj_dim": 16, "eos_token_id": None})
        target = Target(transformers.OPTForCausalLM(config), None, "narrow")
    expected = target.model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=20)[0, 10:].tolist()
    assert dspark.generate(target, lookup_of(target), PROMPT, max_new_tokens=20).token_ids == expected
    with pytest.raises(ValueError, match=r"embedding of 16 and layers of 32.*ContextLookup"):
        tiny_drafter(target)


def test_a_drafter_starts_with_the_norms_of_its_target_only_where_they_mean_the_same() -> None:
    alike, other = (Target(model_of(family), None, family) for family in ("Qwen3Moe", "Gemma2"))
    shape = {"target_layer_ids": (0, 2), "mask_token_id": 3, "block_size": 4, "init_layers": (0, 3)}
    for target in (alike, other):
        for layer in target.layers:
            layer.input_layernorm.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    taken, fresh = (drafter_for(target, **shape).layers[1].input_layernorm.weight for target in (alike, other))
    assert torch.equal(taken, alike.layers[3].input_layernorm.weight)
    assert torch.equal(fresh, torch.ones(32)), "Gemma's are added to one"


def test_a_model_that_ignores_how_many_logits_are_asked_for_gives_no_more() -> None:
    with torch.random.fork_rng(devices=[]):
        sizes = {"vocab_size": 60, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        model = transformers.TrOCRForCausalLM(transformers.TrOCRConfig(**sizes))
    target = Target(model, None, "trocr")
    logits, _ = target.forward(torch.tensor([PROMPT]), target.new_cache(), logits_to_keep=1)
    whole, _ = target.forward(torch.tensor([PROMPT]), None)
    assert torch.allclose(logits, whole[:, -1:], atol=1e-5) and whole.shape[1] == len(PROMPT)


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_read_the_keys_of_others_hold_none_of_their_own(family: str) -> None:
    target = Target(model_of(family), None, family)
    assert len(target.new_cache().layers) == 2 and target.num_layers == 4


@pytest.mark.parametrize("layer", [0, 2])
def test_a_tap_of_several_streams_is_the_models_own(layer: int) -> None:
    target, streams = Target(model_of("Gemma3n"), None, "Gemma3n"), []
    hook = target.layers[layer].register_forward_hook(lambda _m, _in, out: streams.append(out))
    _, taps = target.forward(torch.tensor([PROMPT]), None, (layer,))
    hook.remove()
    assert streams[0].shape == (4, 1, len(PROMPT), 32)
    assert torch.equal(taps, streams[0][target.config.altup_active_idx])


def tiny(name: str, config: str, **values: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            return getattr(transformers, name)(getattr(transformers, config)(**values))

    return make


STEPS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
REFUSED = {
    "a state instead of a cache": (tiny("MambaForCausalLM", "MambaConfig", **(SIZES | {"num_hidden_layers": 2})), "cannot rewind"),
    "recurrence alone": (tiny("RwkvForCausalLM", "RwkvConfig", vocab_size=60, hidden_size=32, num_hidden_layers=2), "cannot rewind"),
    "linear attention in between": (tiny("Qwen3NextForCausalLM", "Qwen3NextConfig", **MODERN, **STEPS, **ROUTED), "cannot rewind"),
    "convolutions in between": (
        tiny("Lfm2ForCausalLM", "Lfm2Config", **{k: v for k, v in MODERN.items() if k != "head_dim"}, layer_types=["conv"] * 4),
        "cannot rewind",
    ),
    "a cache of its own": (
        tiny("XLNetLMHeadModel", "XLNetConfig", vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=64),
        "cannot rewind",
    ),
    "no cache": (tiny("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", vocab_size=60, n_embd=32, n_layer=2, n_head=4), "cannot rewind"),
    "both directions": (tiny("Gemma3ForCausalLM", "Gemma3TextConfig", **MODERN, use_bidirectional_attention=True), "from left to right"),
    "no direction": (tiny("LlamaForCausalLM", "LlamaConfig", **MODERN, is_causal=False), "from left to right"),
    "pictures": (
        tiny("MllamaForCausalLM", "MllamaTextConfig", **{k: v for k, v in MODERN.items() if k != "head_dim"}, cross_attention_layers=[1]),
        "more than tokens",
    ),
    "an encoder": (tiny("T5ForConditionalGeneration", "T5Config", vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2), "encoder"),
    "no head": (tiny("LlamaModel", "LlamaConfig", **MODERN), "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_that_cannot_be_a_target_is_refused_by_name_and_left_as_it_was(why: str) -> None:
    make, said = REFUSED[why]
    model = make().train()
    with pytest.raises(ValueError, match=f"^{type(model).__name__} .*{said}") as error:
        Target(model, None, "tiny")
    assert "\n" not in str(error.value)
    assert model.training and all(weight.requires_grad for weight in model.parameters())


def test_loading_a_model_that_cannot_be_a_target_is_refused_by_its_folder(tmp_path) -> None:
    make, said = REFUSED["a state instead of a cache"]
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be a target: .*{said}"):
        load_target(tmp_path)
