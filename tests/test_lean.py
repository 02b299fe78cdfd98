"""The lean pass, compiled or not, computes what transformers' modules compute: logits, taps and greedy texts, for every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_decode import greedy_reference
from tiny import tiny_drafter, tiny_target
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dspark
import dspark.cpu.packed
from dspark.cpu.compiled import CompiledPass
from dspark.cpu.packed import PackedLinear
from dspark.engine import Engine
from dspark.target.target import Target
from dspark.verify.lean import FAMILIES, LeanPass, Product, lean_pass, plain_product
from dspark.verify.passes import TransformersPass

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama with biases, one key head, tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "llama, wide heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 32}),
    "llama3 rotary scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_theta": 10000.0} | LLAMA3}),
    "yarn rotary scaling": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": {"rope_theta": 10000.0} | YARN}),
    "mistral with a window": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "mistral without": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2, a window in the last layers": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "qwen3, tied": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
}


TOLERANCE = {"lean": 1e-5, "compiled": 2e-5}  # of the largest number; the compiled pass sums in another order
NUMBERS = {3: 30, 9: 30, 30: 30, 80: 14}  # length of a prompt in tokens → prompts of that length, 104 in all


def random_target(name: str) -> Target:
    kind, config, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = kind(config(**(SHAPE | settings)))
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases that are not the neutral ones
                torch.nn.init.normal_(weight, 1.0 if weight.abs().sum() else 0.0, 0.2)
    return Target(model.bfloat16().float(), None, name)  # weights that both passes hold to the last digit


@pytest.fixture(params=["lean", "compiled"])
def make_pass(request: pytest.FixtureRequest) -> Callable[[Target], LeanPass]:
    return lean_pass if request.param == "lean" else lambda target: lean_pass(target, PackedLinear, torch.float32, CompiledPass)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_taps_are_those_of_transformers(name: str, make_pass: Callable[[Target], LeanPass]) -> None:
    """Prompts of different lengths, then passes over 1 to 70 tokens of three requests at once, with a rewind in between."""
    target = random_target(name)
    lean, plain = make_pass(target), TransformersPass(target)
    caches = lean.new_cache(), plain.new_cache()
    slots = [[cache.open() for _ in range(3)] for cache in caches]
    generator = torch.Generator().manual_seed(0)
    for counts in ((5, 20, 1), (1, 1, 1), (6, 1, 3), (70, 2, 1), (4, 4, 4), (0, 3, 2), (0, 0, 1), (0, 0, 6), (0, 80, 0)):
        tokens = [torch.randint(100, (n,), generator=generator).tolist() for n in counts if n]
        chosen = [[slot for slot, n in zip(s, counts, strict=True) if n] for s in slots]
        found, expected = (run(tokens, s, cache, (-1, 0, 1)) for run, s, cache in zip((lean, plain), chosen, caches, strict=True))
        for mine, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
            assert mine.shape == theirs.shape
            assert (mine - theirs).abs().max() <= TOLERANCE[lean.name] * theirs.abs().max()
        for pair in zip(*slots, strict=True):
            for slot in pair:
                slot.rewind(slot.length - min(2, slot.length - 1))
        assert [s.length for s in slots[0]] == [s.length for s in slots[1]]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_model_generate(name: str, make_pass: Callable[[Target], LeanPass]) -> None:
    target = random_target(name)
    target.verifier = make_pass(target)
    drafter = tiny_drafter(target, target_layer_ids=(0, 1))
    for prompt in ([5, 6, 7], [8, 9] * 12):
        for source in (None, drafter, dspark.ContextLookup(drafter, 1)):
            assert dspark.generate(target, source, prompt, max_new_tokens=20).token_ids == greedy_reference(target, prompt, 20)
    assert target.pass_name == make_pass(target).name


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_texts_of_a_hundred_prompts_are_those_of_transformers(name: str, make_pass: Callable[[Target], LeanPass]) -> None:
    """All prompts at once: short ones, and ones longer than the windows and than the context that scaled positions started from."""
    target, new = random_target(name), 10
    target.verifier = lean = make_pass(target)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 100, (count, length), generator=generator) for length, count in NUMBERS.items()]
    expected = [row for p in prompts for row in target.model.generate(p, do_sample=False, max_new_tokens=new, pad_token_id=0).tolist()]
    rows = [row for p in prompts for row in p.tolist()]
    outputs = dspark.generate(target, dspark.ContextLookup(None, 1, target=target), rows, max_new_tokens=new)
    assert [row + out.token_ids for row, out in zip(rows, outputs, strict=True)] == expected
    rounds = [r for out in outputs for r in out.rounds]
    assert len(rows) > 100 and sum(r.verify_length for r in rounds) > 100 and sum(r.accepted for r in rounds) > 0

    cache = lean.new_cache()
    found, _ = lean(expected, [cache.open() for _ in expected], cache)
    theirs = [logits for p in prompts for logits in target.forward(torch.tensor([expected.pop(0) for _ in p]), None)[0]]
    for mine, whole in zip(found, theirs, strict=True):
        assert (mine - whole).abs().max() <= TOLERANCE[lean.name] * whole.abs().max()


@pytest.mark.parametrize(
    "policy", [dspark.FixedWindow(3), dspark.ConfidenceThreshold(0.4, on="conditional"), dspark.Autoregressive()], ids=str
)
def test_products_run_over_the_tokens_that_are_there(policy: dspark.Policy) -> None:
    """Verify lengths differ from request to request; no product of the pass sees padding."""
    target, rows = tiny_target(eos_token_id=None), []

    def counting(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        product = plain_product(weight, bias)
        return lambda x: (rows.append(tuple(x.shape[:-1])), product(x))[1]

    target.verifier = lean_pass(target, counting)
    engine = Engine(target, dspark.ContextLookup(tiny_drafter(target), 1, 7), policy, max_requests=5)
    requests = [engine.submit([5, 6, 7, 8] * i + [9], max_new_tokens=12 + i) for i in range(5)]
    products, lengths = 4 * target.num_layers, set()
    engine.step()
    assert rows == [((n,), (1,))[i == products] for n in (1, 5, 9, 13, 17) for i in range(products + 1)]  # the head: the last token alone
    while engine.active:
        rows.clear()
        finished = engine.step()
        lengths.add(tuple(r.verify_length for _, r in finished))
        assert rows == [(sum(1 + r.verify_length for _, r in finished),)] * (products + 1)
    assert all(request.status == "finished" for request in requests)
    assert isinstance(policy, dspark.Autoregressive) or any(len(set(each)) > 1 for each in lengths)


def test_closing_a_slot_moves_the_last_request_and_nothing_else() -> None:
    target = tiny_target()
    lean = lean_pass(target)
    cache = lean.new_cache()
    slots = [cache.open() for _ in range(3)]
    texts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    lean(texts, slots, cache)
    cache.close(slots[0])
    assert [slots[2].index, slots[1].index] == [0, 1]
    found, _ = lean([[20], [20]], [slots[2], slots[1]], cache)
    for text, mine in zip((texts[2], texts[1]), found, strict=True):
        whole, _ = target.forward(torch.tensor([[*text, 20]]), None)
        assert torch.allclose(mine[0], whole[0, -1], atol=1e-4)


@pytest.mark.parametrize("prepare", ["unknown family", "other activation", "replaced module"])
def test_what_the_lean_pass_does_not_know_falls_back_to_transformers(prepare: str) -> None:
    target = random_target("llama")
    if prepare == "unknown family":
        target.config.model_type = "something-new"
    elif prepare == "other activation":
        target.config.hidden_act = "gelu"
    else:
        target.layers[1].mlp.up_proj = torch.nn.Sequential(target.layers[1].mlp.up_proj)
    assert lean_pass(target) is None and target.pass_name == "transformers"
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3"}
