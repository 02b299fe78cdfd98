"""Published drafters: each config is loaded and drafts what its description says, or is refused by name; no field goes unread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published import HIDDEN, MASK, VOCAB, WINDOW, Facts, block, config_files, frequencies, small, weights, write, yarn
from tiny import random_prompt, tiny_target
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Qwen3Config, Qwen3ForCausalLM

import dspark
from dspark.cpu import pack_target
from dspark.cpu.packed import can_pack
from dspark.draft.drafter import Drafter
from dspark.formats.deepspec import export_deepspec
from dspark.formats.describe import describe
from dspark.formats.speculators import export_speculators
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling

PROMPT, ANCHOR = random_prompt(5, 11), 17
SHAPE = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 9, "head_dim": 8, "eos_token_id": None}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4, "tie_word_embeddings": False}


def target_for(config: dict) -> Target:
    """A tiny random target of the family that a drafter was made for."""
    text = json.dumps(config).lower()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if "gemma" in text:
            kinds = ["sliding_attention", "full_attention"] * 4 + ["full_attention"]
            own = {
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 0,
                "layer_types": kinds,
                "sliding_window": 8,
                "num_kv_shared_layers": 0,
            }
            return Target(Gemma4ForCausalLM(Gemma4TextConfig(**(SHAPE | own))), None, "tiny-gemma4")
        if "qwen" in text:
            return Target(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), None, "tiny-qwen3")
    return tiny_target(num_hidden_layers=9, eos_token_id=None)


def tables_of(target: Target) -> dict[str, Tensor]:
    return {"embed_tokens.weight": target.embedding.weight.detach().clone(), "lm_head.weight": target.head_weight.detach().clone()}


def made(folder: Path, config: dict, target: Target, **has: bool) -> dict[str, Tensor]:
    """Write a drafter of this config with random weights; DeepSpec's have copies of the target's tables."""
    tensors = weights(config, **has)
    if config.get("architectures", [""])[0] in ("Qwen3DSparkModel", "Gemma4DSparkModel"):
        tensors |= tables_of(target)
    write(folder, config, tensors)
    return tensors


CONFIGS = [pytest.param(json.loads(path.read_text()), id=path.stem) for path in config_files()]
REFUSED = {"DSparkV4DraftModel": "hyper-connections"}


@pytest.mark.skipif(not CONFIGS, reason="no folder shared/configs beside the checkout")
@pytest.mark.parametrize("config", CONFIGS)
def test_every_published_config_drafts_losslessly_or_is_refused_for_its_reason(config: dict, tmp_path: Path) -> None:
    config = small(config)
    target, name = target_for(config), config.get("architectures", [""])[0]
    if name in REFUSED:
        write(tmp_path, config, {"fc.weight": torch.zeros(1)})
        with pytest.raises(ValueError, match=REFUSED[name]):
            dspark.load_drafter(tmp_path, target)
        return
    reduced = 0 < (config.get("draft_vocab_size") or 0) < VOCAB
    made(tmp_path, config, target, d2t=reduced, lm_head=reduced)
    drafter = dspark.load_drafter(tmp_path, target)
    slots = config.get("block_size", 16)
    anchor_predicts = config.get("sample_from_anchor", "DSparkModel" in name or name == "Lfm2DSparkDraftModel")
    assert drafter.block_size == slots - (not anchor_predicts)
    assert drafter.has_confidence == bool((config | config.get("dflash_config", {})).get("enable_confidence_head"))
    plain, drafted = (dspark.generate(target, d, PROMPT, max_new_tokens=12) for d in (None, drafter))
    assert drafted.token_ids == plain.token_ids
    assert all(len(r.draft_tokens) <= drafter.block_size for r in drafted.rounds)
    lines = describe(tmp_path)
    assert lines["block"].startswith(f"{slots} slots, {drafter.block_size} drafts") and "refused" not in lines
    again = tmp_path / "again"
    dspark.save_drafter(drafter, target, again)
    assert dspark.load_drafter(again, target).config == drafter.config


# ---- parity with the published equations


QWEN3 = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "block_size": 4,
    "num_hidden_layers": 2,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
    "mask_token_id": MASK,
    "target_layer_ids": [0, 2],
    "markov_rank": 8,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
GEMMA4 = QWEN3 | {
    "architectures": ["Gemma4DSparkModel"],
    "model_type": "gemma4_text",
    "attention_k_eq_v": True,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 3.0,
    "rope_theta": None,
    "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e4, "rope_type": "proportional"}},
    "layer_types": ["full_attention"] * 2,
    "sliding_window": 1024,
}
SPECFORGE = QWEN3 | {"architectures": ["DSparkDraftModel"]}
ZLAB = {k: v for k, v in QWEN3.items() if "markov" not in k and "confidence" not in k} | {
    "architectures": ["DFlashDraftModel"],
    "model_type": "dflash",
}
SLIDES = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": WINDOW}
HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "block_size", "mask_token_id")


def speculators(**changes: object) -> dict:
    layers = {k: v for k, v in (QWEN3 | changes).items() if k not in (*HEADS, "architectures", "target_layer_ids", *OUTER)}
    outer = {k: v for k, v in changes.items() if k in OUTER}
    about = {"speculators_model_type": "dspark", "aux_hidden_state_layer_ids": [1, 3], "draft_vocab_size": VOCAB}
    return about | {k: (QWEN3 | changes)[k] for k in HEADS} | outer | {"transformer_layer_config": layers}


OUTER = ("sample_from_anchor", "sliding_window_non_causal", "draft_vocab_size", "speculators_model_type")


def slides(layer: int, slot: int, key: int, anchor: int) -> bool:
    """speculators: layer 0 sees the last tokens of context before the anchor, and its block causally; layer 1 sees all."""
    return layer == 1 or (key >= anchor - WINDOW if key < anchor else key <= anchor + slot)


def slides_both_ways(layer: int, slot: int, key: int, anchor: int) -> bool:
    return layer == 1 or key >= anchor - WINDOW


def moves(layer: int, slot: int, key: int, anchor: int) -> bool:
    """SpecForge and z-lab: the window of layer 0 ends at each slot."""
    return layer == 1 or anchor + slot - WINDOW < key <= anchor + slot


def causal(layer: int, slot: int, key: int, anchor: int) -> bool:
    return key <= anchor + slot


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


PLAIN = {"slots": 4, "layers": 2, "frequencies": frequencies(1e4)}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
turns, boost = yarn(1e4, 4.0, 8)
CASES = {
    "DeepSpec": (QWEN3, {}, {}),
    "DeepSpec, gated": (QWEN3 | {"markov_head_type": "gated"}, {"kind": "gated"}, {}),
    "DeepSpec, rnn": (QWEN3 | {"markov_head_type": "rnn"}, {"kind": "rnn"}, {}),
    "DeepSpec, DFlash": (QWEN3 | {"markov_rank": 0, "enable_confidence_head": False}, {}, {}),
    "DeepSpec, bias": (QWEN3 | {"attention_bias": True}, {}, {"bias": True}),
    "DeepSpec, tanh GELU": (QWEN3 | {"hidden_act": "gelu_pytorch_tanh"}, {"act": gelu}, {}),
    "DeepSpec, a partial factor that is the target's": (QWEN3 | {"partial_rotary_factor": 0.25}, {}, {}),
    "DeepSpec, Gemma 4": (
        GEMMA4,
        {"gemma": True, "cap": 3.0, "act": gelu, "groups": 1, "frequencies": [1e4 ** (-i / 8) if i < 2 else 0.0 for i in range(8)]},
        {},
    ),
    "speculators": (speculators(sample_from_anchor=True), {}, {}),
    "speculators, sliding": (speculators(sample_from_anchor=True, **SLIDES), {"sees": slides}, {}),
    "speculators, sliding both ways": (
        speculators(sample_from_anchor=True, sliding_window_non_causal=True, **SLIDES),
        {"sees": slides_both_ways},
        {},
    ),
    "speculators, 1+N": (speculators(), {"first": 1}, {}),
    "speculators, 1+N, rnn": (speculators(markov_head_type="rnn"), {"first": 1, "kind": "rnn", "warm": True}, {}),
    "speculators, reduced": (speculators(draft_vocab_size=40, sample_from_anchor=True), {}, {"d2t": True, "lm_head": True}),
    "speculators, own tables": (speculators(sample_from_anchor=True), {}, {"embed_tokens": True, "lm_head": True}),
    "speculators, dflash": (
        speculators(speculators_model_type="dflash", markov_rank=0, enable_confidence_head=False),
        {"first": 1},
        {},
    ),
    "SpecForge": (SPECFORGE, {"first": 1}, {}),
    "SpecForge, rnn": (SPECFORGE | {"markov_head_type": "rnn"}, {"first": 1, "kind": "rnn"}, {}),
    "SpecForge, nested": (
        {k: v for k, v in SPECFORGE.items() if k not in HEADS[:4]} | {"dflash_config": {k: SPECFORGE[k] for k in HEADS[:4]}},
        {"first": 1},
        {},
    ),
    "SpecForge, causal": (SPECFORGE | {"is_causal": True}, {"first": 1, "sees": causal}, {}),
    "SpecForge, yarn": (SPECFORGE | {"rope_theta": None, "rope_parameters": YARN}, {"first": 1, "frequencies": turns, "boost": boost}, {}),
    "SpecForge, explicit": (SPECFORGE | {"sample_from_anchor": True}, {}, {}),
    "SpecForge, no Markov in the confidence": (SPECFORGE | {"confidence_head_with_markov": False}, {"first": 1}, {}),
    "SpecForge, reduced": (SPECFORGE | {"draft_vocab_size": 40}, {"first": 1}, {"d2t": True}),
    "z-lab": (ZLAB, {"first": 1}, {}),
    "z-lab, sliding": (ZLAB | SLIDES, {"first": 1, "sees": moves}, {}),
    "z-lab, sliding, not causal": (
        ZLAB | SLIDES | {"is_causal": False},
        {"first": 1, "sees": lambda n, s, p, a: n == 1 or abs(a + s - p) < WINDOW},
        {},
    ),
    "z-lab, capped": (ZLAB | {"final_logit_softcapping": 2.0}, {"first": 1, "cap": 2.0}, {}),
    "Liquid": (
        QWEN3 | {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False},
        {"neighbours": True},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tokens_logits_and_confidences_are_those_of_the_published_equations(
    case: tuple[dict, dict, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, facts, has = case
    config = {name: value for name, value in config.items() if value is not None}
    target = target_for(config) if "global_head_dim" in config else tiny_target(eos_token_id=None)
    tensors = made(tmp_path, config, target, **has)
    drafter, logits = dspark.load_drafter(tmp_path, target), []
    _, taps = target.forward(torch.tensor([PROMPT]), target.new_cache(), (0, 2))
    state = drafter.new_state(PROMPT)
    drafter.extend(state, PROMPT, taps)
    probs = Sampling.row
    monkeypatch.setattr(Sampling, "row", lambda self, row: logits.append(row.clone()) or probs(self, row))
    draft = drafter.draft(state, ANCHOR, drafter.block_size, Sampling(), Rng())
    table, head = tensors.get("embed_tokens.weight", target.embedding.weight), tensors.get("lm_head.weight")
    if "global_head_dim" in config:
        table = table * HIDDEN**0.5
    if head is None:
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"])) if "d2t" in tensors else slice(None)
        head = target.head_weight[ids]
    tokens, rows, sure = block(Facts(**(PLAIN | facts)), tensors, taps[0], ANCHOR, table.detach(), head.detach())
    assert draft.tokens == tokens
    assert torch.allclose(torch.stack(logits), rows, atol=1e-4, rtol=1e-4)
    if len(sure):
        assert torch.allclose(draft.confidence, sure.sigmoid(), atol=1e-4)
    else:
        assert draft.confidence.isnan().all()


# ---- nothing goes unread


@pytest.fixture
def llama() -> Target:
    return tiny_target(eos_token_id=None)


def loads(folder: Path, config: dict, target: Target, **more: object) -> Drafter:
    made(folder, config, target)
    return dspark.load_drafter(folder, target, **more)


UNREAD = {
    "DeepSpec": (QWEN3, "a_field_of_tomorrow"),
    "Gemma 4": (GEMMA4, "a_field_of_tomorrow"),
    "speculators": (speculators(), "a_field_of_tomorrow"),
    "speculators, layers": (speculators(), "transformer_layer_config.a_field_of_tomorrow"),
    "speculators, rotary": (
        speculators(rope_parameters={"rope_theta": 1e4}),
        "transformer_layer_config.rope_parameters.a_field_of_tomorrow",
    ),
    "SpecForge": (SPECFORGE, "a_field_of_tomorrow"),
    "SpecForge, nested": (SPECFORGE | {"dflash_config": {}}, "dflash_config.a_field_of_tomorrow"),
    "z-lab": (ZLAB, "a_field_of_tomorrow"),
    "Liquid": (QWEN3 | {"architectures": ["Lfm2DSparkDraftModel"], "rope_is_neox_style": False}, "a_field_of_tomorrow"),
}


@pytest.mark.parametrize(("config", "path"), UNREAD.values(), ids=UNREAD)
def test_an_unknown_field_is_refused_by_name_and_value_unless_the_user_insists(
    config: dict, path: str, llama: Target, tmp_path: Path
) -> None:
    target = target_for(config) if "global_head_dim" in config else llama
    config = json.loads(json.dumps({name: value for name, value in config.items() if value is not None}))
    inner, name = config, path.split(".")[-1]
    for part in path.split(".")[:-1]:
        inner = inner[part]
    inner[name] = "unheard of"
    with pytest.raises(ValueError, match=rf"{name} is 'unheard of'.*ignore_fields.*--ignore-field"):
        loads(tmp_path / "a", config, target)
    for insisted in (name, path):
        assert loads(tmp_path / insisted, config, target, ignore_fields=[insisted]).block_size
    inner[name] = None  # says nothing
    assert loads(tmp_path / "b", config, target).block_size


def test_an_ignored_field_that_is_not_there_is_an_error(llama: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tomorow'"):
        loads(tmp_path, QWEN3, llama, ignore_fields=["tomorow"])


REFUSED_FIELDS = {
    "two values": (SPECFORGE | {"dflash_config": {"markov_rank": 16}}, "markov_rank is 8, and 16 in dflash_config"),
    "DFlash 2": (ZLAB | {"dflash_config": {"selector_rank": 4}}, "selector_rank is 4: DFlash 2"),
    "DFlash 2 of speculators": (speculators(speculators_model_type="dflash2"), "dflash2"),
    "quantised": (SPECFORGE | {"quantization_config": {"quant_method": "fp8", "bits": 8}}, "quantization_config is 'fp8'"),
    "another projector": (SPECFORGE | {"projector_type": "domino"}, "projector_type is 'domino'"),
    "shifted labels": (SPECFORGE | {"shift_label": True}, "shift_label is True"),
    "multiplied logits": (ZLAB | {"output_multiplier": 2.0}, "output_multiplier is 2.0"),
    "partial rotary": (SPECFORGE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "rotary that depends on the length": (SPECFORGE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    "no window": (ZLAB | {"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
    "a window for nobody": (ZLAB | {"sliding_window": 6}, "sliding_window is 6 without"),
    "a window that is off": (ZLAB | SLIDES | {"use_sliding_window": False}, "use_sliding_window is False"),
    "another kind of layer": (ZLAB | {"layer_types": ["linear_attention", "full_attention"]}, r"layer_types\[0\] is 'linear_attention'"),
    "other taps": (speculators() | {"target_hidden_size": 64}, "target_hidden_size is 64"),
    "MHA that is none": (SPECFORGE | {"attention_mode": "mha"}, "attention_mode is 'mha'"),
    "a proposal that does not fit": (
        speculators() | {"speculators_config": {"proposal_methods": [{"speculative_tokens": 4}]}},
        "sample_from_anchor is None, but .* 4 tokens",
    ),
    "experts": (GEMMA4 | {"enable_moe_block": True}, "enable_moe_block is True"),
    "DeepSeek-V4": ({"architectures": ["DSparkV4DraftModel"]}, "DeepSeek-V4.*MLA and MoE.*hyper-connections"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED_FIELDS.values(), ids=REFUSED_FIELDS)
def test_what_would_run_as_something_else_is_refused_by_field_and_value(config: dict, message: str, llama: Target, tmp_path: Path) -> None:
    config = {name: value for name, value in config.items() if value is not None}
    write(tmp_path, config, weights(config) if "fc" in config or "num_hidden_layers" in config else {"fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=message):
        dspark.load_drafter(tmp_path, llama)
    assert any(name.startswith("refused") for name in describe(tmp_path))


def test_inspect_names_every_refused_field(tmp_path: Path) -> None:
    write(tmp_path, SPECFORGE | {"one_thing": 1, "another_thing": 2, "shift_label": True}, weights(SPECFORGE))
    refused = [text.split(" is ")[0] for name, text in describe(tmp_path).items() if name.startswith("refused")]
    assert refused == ["one_thing", "another_thing", "shift_label"]
    assert not [name for name in describe(tmp_path, ["one_thing", "another_thing", "shift_label"]) if name.startswith("refused")]


def test_a_file_of_specforge_under_deepspecs_name_is_read_as_what_it_is(llama: Target, tmp_path: Path) -> None:
    nested = {k: v for k, v in SPECFORGE.items() if k not in HEADS} | {"dflash_config": {k: SPECFORGE[k] for k in HEADS}}
    drafters = [loads(tmp_path / name, nested | {"architectures": [name]}, llama) for name in ("DSparkDraftModel", "Qwen3DSparkModel")]
    assert drafters[0].config == drafters[1].config and not drafters[1].config.sample_from_anchor


def test_a_mask_that_names_other_tokens_is_refused(llama: Target, tmp_path: Path) -> None:
    config = SPECFORGE | {"draft_vocab_size": 40}
    tensors = weights(config, d2t=True)
    tensors["t2d"] = tensors["t2d"].roll(1)
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="t2d marks 40 tokens"):
        dspark.load_drafter(tmp_path, llama)


# ---- tables, and what other parts do with such drafters


def test_equal_tables_are_the_targets_and_others_are_kept_and_saved(llama: Target, tmp_path: Path) -> None:
    tensors = weights(SPECFORGE)
    write(tmp_path / "equal", SPECFORGE, tensors | tables_of(llama))
    equal = dspark.load_drafter(tmp_path / "equal", llama)
    assert equal.config.own_tables == () and equal.embed is llama.embedding
    other = tables_of(llama)
    other["embed_tokens.weight"][MASK] += 0.5  # a trained mask token alone
    write(tmp_path / "other", SPECFORGE, tensors | other)
    own = dspark.load_drafter(tmp_path / "other", llama)
    assert own.config.own_tables == ("embed_tokens",)
    dspark.save_drafter(own, llama, tmp_path / "again")
    again = dspark.load_drafter(tmp_path / "again", llama)
    assert again.config == own.config and torch.equal(again.embed_tokens.weight, own.embed_tokens.weight.bfloat16().float())


def test_what_cannot_compute_such_drafters_refuses_them(llama: Target, tmp_path: Path) -> None:
    drafter = loads(tmp_path / "a", ZLAB | SLIDES, llama)
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match="sliding_windows"):
        drafter.block_hidden(ids, torch.zeros(1, 11, 2 * HIDDEN), ids[:, None, :4], ids[:, None, :4], torch.arange(4)[None, None])
    for export in (export_deepspec, export_speculators):
        with pytest.raises(ValueError, match="sample_from_anchor is False"):
            export(drafter, llama, tmp_path / "b")


def test_a_packed_drafter_with_other_layers_keeps_its_own_pass(tmp_path: Path) -> None:
    target = pack_target(tiny_target(dtype=torch.bfloat16, eos_token_id=None))
    assert loads(tmp_path / "windows", ZLAB | SLIDES, target).fused is None
    assert (loads(tmp_path / "plain", ZLAB, target).fused is None) == (not can_pack(target.head_weight))
