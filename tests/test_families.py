"""A model that keeps keys, values and states that can be copied can be a target; any other is refused before it is changed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import transformers
from tiny import Wavering, tiny_drafter
from torch import nn

import dspark
from dspark.hf import dspark_generate
from dspark.load import load_target
from dspark.rewind import GrowingKV
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
STEPS = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARES = ROUTED | {"shared_expert_intermediate_size": 16}
HEADLESS = {name: value for name, value in MODERN.items() if name != "head_dim"}
SCANS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
MIXED = ["linear_attention", "full_attention", "linear_attention", "mlp"]
DELTAS = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4}
ZAMBA = {"layer_types": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4, "n_mamba_heads": 8, "mamba_headdim": 8}
ZAMBA |= {"layers_block_type": ZAMBA["layer_types"], "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8}
STATEFUL = {
    "Qwen3Next": ("Qwen3Next", MODERN | STEPS | SHARES),
    "Qwen3_5": ("Qwen3_5Text", MODERN | STEPS),
    "Qwen3_5Moe": ("Qwen3_5MoeText", MODERN | STEPS | SHARES),
    "Lfm2": ("Lfm2", HEADLESS | {"layer_types": ["conv", "conv", "full_attention", "conv"]}),
    "Lfm2Moe": ("Lfm2Moe", HEADLESS | ROUTED | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1}),
    "Bamba": ("Bamba", HEADLESS | SCANS | {"attn_layer_indices": [1]}),
    "GraniteMoeHybrid": ("GraniteMoeHybrid", HEADLESS | SCANS | {"layer_types": MIXED[:2] * 2, "shared_intermediate_size": 32}),
    "FalconH1": ("FalconH1", MODERN | SCANS | {"mamba_d_ssm": 64}),
    "NemotronH": ("NemotronH", MODERN | {"layer_types": MIXED, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "Zamba2": ("Zamba2", HEADLESS | ZAMBA | {"num_mem_blocks": 1, "adapter_rank": 8}),
    "Mamba2": ("Mamba2", SIZES | ENDS | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "KimiLinear": ("KimiLinear", LATENT | ROUTED | {"linear_attn_config": DELTAS}),
    "OlmoHybrid": ("OlmoHybrid", HEADLESS | STEPS | {"layer_types": MIXED[:2] * 2, "linear_num_value_heads": 2}),
    "Zaya": ("Zaya", MODERN | {"num_experts": 4}),
}
FAMILIES |= STATEFUL
SHARED = ["Gemma3n", "Gemma4"]
PROMPT = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6]


def model_of(family: str) -> nn.Module:
    config, values = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind = getattr(transformers, f"{family}Model" if family.endswith("Head") else f"{family}ForCausalLM")
        model = kind(getattr(transformers, f"{config}Config")(**deepcopy(values))).eval()
    model.generation_config.eos_token_id = None  # on to the last token
    model.config.eos_token_id = None
    for part in model.modules():
        if hasattr(part, "time_step_limit"):
            part.time_step_limit = (0.0, float("inf"))
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
MET += ["Qwen3Next", "Qwen3_5", "Lfm2", "NemotronH", "Mamba2"]
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
    held = sum(side.nbytes for layer in cache.layers if isinstance(layer, GrowingKV) for side in layer.view())
    assert TransformersPass(target).bytes_per_token * len(PROMPT) == held
    assert (TransformersPass(target).bytes_per_request > 0) == (family in STATEFUL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_sees_the_same_after_a_rewind_and_has_the_same_taps(family: str) -> None:
    target = Target(model_of(family), None, family)
    text, cache = torch.randint(4, 60, (1, 30), generator=torch.Generator().manual_seed(0)), target.new_cache()
    whole, taps = target.forward(text, None, (-1, 0, 2))
    last, first_taps = target.forward(text[:, :20], cache, (-1, 0, 2), logits_to_keep=1)
    target.forward(text[:, 3:12], cache)
    cache.rewind(20)
    some, some_taps = target.forward(text[:, 20:26], cache, (-1, 0, 2))
    cache.rewind(23)
    rest, rest_taps = target.forward(text[:, 23:], cache, (-1, 0, 2))
    for found, expected in (
        (torch.cat([last, some[:, :3], rest], 1), whole[:, 19:]),
        (torch.cat([first_taps, some_taps[:, :3], rest_taps], 1), taps),
    ):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()  # states are summed in chunks or token by token
    assert taps.shape == (1, 30, 3 * target.hidden_size)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
PHI = HEADLESS | {"max_position_embeddings": 256}


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


GRIFFIN = HEADLESS | {"lru_width": 32, "attention_window_size": 8}
REFUSED = {
    "a scan without a first state": (tiny("MambaForCausalLM", "MambaConfig", **(SIZES | {"num_hidden_layers": 2})), "as Mamba-1 does"),
    "the same in between": (tiny("JambaForCausalLM", "JambaConfig", **HEADLESS, **ROUTED), "as Mamba-1 does"),
    "a clamp on some passes": (tiny("NemotronHForCausalLM", "NemotronHConfig", **STATEFUL["NemotronH"][1]), "time_step_limit"),
    "recurrence alone": (tiny("RwkvForCausalLM", "RwkvConfig", vocab_size=60, hidden_size=32, num_hidden_layers=2), "cannot rewind"),
    "states in its modules": (tiny("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **GRIFFIN), "cannot rewind"),
    "states in a cache of its own": (tiny("MiniMaxForCausalLM", "MiniMaxConfig", **MODERN, num_local_experts=4), "cannot rewind"),
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
    make, said = REFUSED["a scan without a first state"]
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} cannot be a target: .*{said}"):
        load_target(tmp_path)
