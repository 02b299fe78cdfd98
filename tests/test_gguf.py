"""GGUF files: what was written is what llama.cpp computes, block by block, and what it would compute otherwise is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_checkpoint import REDUCED, assert_same_drafts
from tiny import CONVOLUTIONS, SELECTOR, full_disk, random_prompt, reference, tiny_drafter, tiny_target
from torch import Tensor

from dspark import generate, load_target, save_drafter
from dspark.bench.llamacpp import LlamaCpp
from dspark.bench.measure import Settings, by_dspark
from dspark.draft.drafter import Drafter
from dspark.formats.__main__ import main as command
from dspark.formats.gguf import export_gguf, export_target
from dspark.schedule import FixedWindow
from dspark.target.target import Target

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
survivors = __import__("llamacpp").survivors  # data/ is no package
LAYER = {  # transformers' name → llama.cpp's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
} | {
    f"layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight"
    for i in range(2)
    for ours, theirs in (LAYER | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}).items()
}
TEXTS = 12
SPOKEN = [4, 5, 6, 7]  # tokens that the small pair for llama.cpp says: few, so that many of its random drafts are accepted
DRAFTERS = {
    "full vocabulary": {},
    "reduced vocabulary": {"d2t": REDUCED},
    "confidence without markov": {"confidence_head_with_markov": False},
    "no confidence": {"enable_confidence_head": False},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def target_file(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "target.gguf"
    write_target(target, path)
    return path


def rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbours, transformers the two halves of a head: rows of q and k change places."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_target(
    target: Target,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    metadata: Mapping[str, object] = {},
    vectors: Mapping[str, list[float]] = {},
    ends: Mapping[str, int] = {"eos": 2},
) -> None:
    """A tiny Llama as llama.cpp's own converter would write it; its tokens are "t0", "t1", …

    metadata: further entries after "llama.". vectors: further tensors. ends: kind of end → token id.
    """
    c, weights = target.config, {name: weight.float() for name, weight in target.model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["t0", "t", "0", *(f"t{i}" for i in range(3, c.vocab_size))])
    writer.add_token_types([gguf.TokenType.NORMAL] * c.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    for name, token in ends.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for name, value in metadata.items():
        add_entry = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add_entry(f"llama.{name}", value)
    for name, values in vectors.items():
        writer.add_tensor(f"{name}.weight", np.array(values, dtype=np.float32))

    def add(name: str, weight: Tensor) -> None:
        array = np.ascontiguousarray(weight.numpy())
        exact = weight.dim() == 1 or kind == gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", array if exact else gguf.quantize(array, kind), raw_dtype=None if exact else kind)

    add("token_embd", weights["model.embed_tokens.weight"])
    add("output_norm", weights["model.norm.weight"])
    add("output", weights["lm_head.weight"])
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    for i in range(c.num_hidden_layers):
        for ours, theirs in LAYER.items():
            weight = weights[f"model.layers.{i}.{ours}.weight"]
            add(f"blk.{i}.{theirs}", rotary_pairs(weight, heads[ours]) if ours in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def uneven_drafter(target: Target, **shape: object) -> Drafter:
    """Norms and biases that differ as well, and weights that bfloat16 holds."""
    drafter = tiny_drafter(target, **shape)
    generator = torch.Generator().manual_seed(4)
    for weight in drafter.parameters():
        if weight.dim() == 1:
            weight += 0.5 * torch.rand(weight.shape, generator=generator)
        weight.copy_(weight.bfloat16())
    return drafter


def values_of(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Metadata and tensors; those of bfloat16 as float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        integers = tensor.tensor_type == gguf.GGMLQuantizationType.I64
        tensors[tensor.name] = torch.from_numpy(
            tensor.data.copy() if integers else gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
    return fields, tensors


# ---- written and read back


@pytest.mark.parametrize("shape", DRAFTERS.values(), ids=DRAFTERS)
def test_the_tensors_of_an_exported_drafter_give_the_same_block(target: Target, target_file: Path, tmp_path: Path, shape: dict) -> None:
    drafter = uneven_drafter(target, **shape)
    export_gguf(drafter, target, tmp_path / "d.gguf", target_file)
    fields, tensors = values_of(tmp_path / "d.gguf")
    d2t = tensors.pop("d2t", None)
    again = tiny_drafter(target, seed=9, **(shape | {"confidence_head_with_markov": True, "d2t": d2t}))
    again.load_state_dict({name: tensors.pop(NAMES[name]) for name, _ in again.named_parameters()}, strict=False)
    if d2t is not None:
        assert torch.equal(tensors.pop("output.weight"), target.head_weight[d2t].float())
    assert not tensors
    assert_same_drafts(again, drafter, target)
    assert fields["dflash.has_confidence_head"] == shape.get("enable_confidence_head", True)


def test_metadata_says_how_llamacpp_must_draft(target: Target, target_file: Path, tmp_path: Path) -> None:
    export_gguf(tiny_drafter(target), target, tmp_path / "d.gguf", target_file)
    fields, _ = values_of(tmp_path / "d.gguf")
    assert fields["general.architecture"] == "dflash"
    assert fields["dflash.target_layers"] == [1, 3]  # what goes INTO layers 1 and 3 comes out of 0 and 2
    assert (fields["dflash.block_size"], fields["tokenizer.ggml.mask_token_id"]) == (4, 3)
    assert (fields["dflash.sample_from_anchor"], fields["dflash.attention.causal"]) == (True, False)
    assert len(fields["tokenizer.ggml.tokens"]) == 100


def test_a_quantised_target_becomes_its_own_values_in_bfloat16(target: Target, tmp_path: Path) -> None:
    source = tmp_path / "q8.gguf"
    write_target(target, source, gguf.GGMLQuantizationType.Q8_0)
    export_target(source, tmp_path / "bf16.gguf")
    before, stored = values_of(source)
    after, plain = values_of(tmp_path / "bf16.gguf")
    assert stored.keys() == plain.keys()
    for name, tensor in stored.items():
        assert torch.equal(plain[name], tensor if tensor.dim() == 1 else tensor.bfloat16().float()), name
    assert after.pop("general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    assert after.items() >= {name: value for name, value in before.items() if not name.startswith("GGUF.")}.items()


def test_the_exported_drafter_takes_a_quantised_target(target: Target, tmp_path: Path) -> None:
    write_target(target, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    export_gguf(tiny_drafter(target), target, tmp_path / "d.gguf", tmp_path / "q8.gguf")
    assert values_of(tmp_path / "d.gguf")[0]["tokenizer.ggml.model"] == "gpt2"


def test_the_command_writes_it_and_says_how_to_serve_it(
    target: Target, target_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.model.save_pretrained(tmp_path / "model")
    model = load_target(tmp_path / "model", pack=False)
    save_drafter(tiny_drafter(model), model, tmp_path / "native")
    export = ["export", str(tmp_path / "native"), "--to", "gguf", "--out", str(tmp_path / "d.gguf"), "--target", str(tmp_path / "model")]
    assert command(export) == 2
    assert "--target-gguf" in capsys.readouterr().err
    assert command([*export, "--target-gguf", str(target_file)]) == 0
    assert f"-m {target_file} -md {tmp_path / 'd.gguf'} --spec-type draft-dspark" in capsys.readouterr().out
    assert values_of(tmp_path / "d.gguf")[0]["dflash.block_size"] == 4


# ---- targets read from GGUF

BASE = {"rope_theta": 10000.0}
ORIGIN = {"original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGIN
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGIN
FACTORS = [1.0, 1.5, 2.0, 8.0]
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": FACTORS, "factor": 1.0, "attention_factor": 1.2} | ORIGIN
SCALED = {  # rope_parameters of the model → what its file says
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "linear, not named": ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "yarn": (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 64}),
    "yarn, other ramp": (
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.5 * (0.1 * np.log(4) + 1)},
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "attn_factor": 0.5},
    ),
    "longrope": (LONG, {"type": "longrope", "original_context_length": 64, "attn_factor": 1.2}),
    "none": ({"rope_type": "default"}, {"type": "none", "factor": 4.0}),
}
VECTORS = {"longrope": {"rope_factors_short": [1.0] * 4, "rope_factors_long": FACTORS}}


def written(rope: dict[str, object], path: Path, **file: object) -> Target:
    """A tiny Llama in float32, and its file."""
    target = tiny_target(rope_parameters=BASE | rope)
    write_target(target, path, **file)
    return target


def logits_of(target: Target, length: int = 48) -> Tensor:
    return target.forward(torch.tensor([random_prompt(0, length)]), None)[0]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("length", [48, 90])
def test_scaled_positions_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, length: int) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rope, said = SCALED[name]
    metadata = {f"rope.scaling.{key}": value for key, value in said.items()}
    model = written(rope, tmp_path / "m.gguf", metadata=metadata, vectors=VECTORS.get(name, {}))
    loaded = load_target(tmp_path / "m.gguf", dtype="float32")
    assert torch.allclose(logits_of(loaded, length), logits_of(model, length), atol=1e-4)
    assert not torch.allclose(logits_of(loaded, length), logits_of(tiny_target(), length), atol=0.1) or name == "none" or length < 64


@pytest.mark.parametrize("length", [48, 90])
def test_a_factor_for_each_frequency_is_llama3s_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """At every length: the model may use its whole context, and the lean pass runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_target(rope_parameters=BASE | LLAMA3)
    plain = tiny_target().model.model.rotary_emb.inv_freq
    write_target(model, tmp_path / "m.gguf", vectors={"rope_freqs": (plain / model.model.model.rotary_emb.inv_freq).tolist()})
    loaded = load_target(tmp_path / "m.gguf", dtype="float32")
    assert torch.allclose(logits_of(loaded, length), logits_of(model, length), atol=1e-4)
    assert loaded.max_context == 4096 and loaded.pass_name == "lean"
    prompt = random_prompt(1, 80)
    assert generate(loaded, None, prompt, max_new_tokens=12).token_ids == reference(model, prompt, 12)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1"),
        ({"rope.scaling.type": "longrope"}, "'longrope'"),
        ({"rope.scaling.type": "spiral"}, "'spiral'"),
        ({"rope.scaling.alpha": 3.0}, "alpha is 3.0"),
    ],
)
def test_an_unknown_scaling_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict, said: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written({}, tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ValueError, match=said) as caught:
        load_target(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_every_end_of_a_turn_ends_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written({}, tmp_path / "m.gguf", ends={"eos": 0, "eot": 2, "eom": 7})
    assert load_target(tmp_path / "m.gguf").eos_token_ids == {0, 2, 7}


@pytest.mark.parametrize(("kind", "exact"), [("F32", True), ("F16", True), ("Q8_0", False)])
def test_a_file_in_full_precision_keeps_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, exact: bool) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny_target()
    write_target(model, tmp_path / "m.gguf", getattr(gguf.GGMLQuantizationType, kind))
    loaded = load_target(tmp_path / "m.gguf", dtype="float32").model.model.layers[0].mlp.up_proj.weight
    stored = model.model.model.layers[0].mlp.up_proj.weight
    stored = stored.half().float() if kind == "F16" else stored
    assert torch.equal(loaded, stored) == exact
    assert torch.allclose(loaded, stored, atol=0.02)


# ---- llama.cpp itself


@pytest.mark.parametrize("name", ["full vocabulary", "reduced vocabulary", "dflash"])
def test_llamacpp_commits_round_by_round_what_we_commit(tmp_path: Path, name: str) -> None:
    """In most texts of all: it multiplies in bfloat16 and keeps float16 keys, so nearly tied tokens may change places."""
    pytest.importorskip("xllamacpp")
    target = tiny_target(vocab_size=12, initializer_range=0.8)  # llama.cpp needs 11 tokens or more
    quiet = [token for token in range(12) if token not in SPOKEN]
    target.head_weight[quiet] = 0
    write_target(target, tmp_path / "target.gguf")
    shape = {"d2t": torch.tensor(SPOKEN)} if name == "reduced vocabulary" else DRAFTERS[name]
    drafter = uneven_drafter(target, **shape)
    settings = Settings(max_new_tokens=24)
    theirs = LlamaCpp(tmp_path / "target.gguf", target, drafter).decoder(settings)
    ours = by_dspark(target, drafter, FixedWindow(), settings)
    same = 0
    for prompt in (random_prompt(seed, 20, 12) for seed in range(TEXTS)):
        mine, other = ours(prompt, 0), theirs(prompt, 0)
        assert [token for r in other.rounds for token in r.committed] == other.token_ids[1:]
        same += [r.committed for r in other.rounds] == [r.committed for r in mine.rounds]
    assert same >= 7  # with its taps one layer off, or two norms exchanged: 0 and 1


def test_our_own_rounds_are_the_ones_that_our_drafter_finds_in_the_text() -> None:
    """What data/llamacpp.py asks of llama.cpp's texts."""
    target = tiny_target(vocab_size=12, initializer_range=0.8)
    target.head_weight[[token for token in range(12) if token not in SPOKEN]] = 0
    drafter = tiny_drafter(target)
    for seed in range(2):
        prompt = random_prompt(seed, 20, 12)
        trial = by_dspark(target, drafter, FixedWindow(), Settings(max_new_tokens=24))(prompt, 0)
        accepted = [len(r.committed) - 1 for r in trial.rounds[:-1]]
        assert survivors(target, drafter, prompt, trial.token_ids, trial.rounds) == accepted
        assert survivors(target, tiny_drafter(target, seed=8), prompt, trial.token_ids, trial.rounds) != accepted


# ---- what is refused


@pytest.mark.parametrize("shape", [SELECTOR, CONVOLUTIONS], ids=["selector", "convolutions"])
def test_what_llamacpp_has_no_field_for_is_refused(target: Target, target_file: Path, tmp_path: Path, shape: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(name for name in shape if name != 'markov_head_type')} is .*no such field"):
        export_gguf(tiny_drafter(target, **shape), target, tmp_path / "d.gguf", target_file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_a_head_that_llamacpp_would_compute_as_another_one_is_refused(target: Target, target_file: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"markov_head_type is '{kind}'"):
        export_gguf(tiny_drafter(target, markov_head_type=kind), target, tmp_path / "d.gguf", target_file)
    assert not list(tmp_path.iterdir())


def test_another_models_file_is_refused(target: Target, target_file: Path, tmp_path: Path) -> None:
    for other in (tiny_target(seed=5, dtype=torch.bfloat16), tiny_target(vocab_size=101, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"target\.gguf does not hold tiny"):
            export_gguf(tiny_drafter(other), other, tmp_path / "d.gguf", target_file)


def test_a_damaged_or_missing_file_is_one_line(target: Target, target_file: Path, tmp_path: Path) -> None:
    for content in (None, b"", target_file.read_bytes()[:900]):
        path = tmp_path / f"{len(content or b'')}.gguf"
        if content is not None:
            path.write_bytes(content)
        for write in (
            lambda p: export_target(p, tmp_path / "out"),
            lambda p: export_gguf(tiny_drafter(target), target, tmp_path / "out", p),
        ):
            with pytest.raises(ValueError, match=path.name) as caught:
                write(path)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_keeps_the_old_file(target: Target, target_file: Path, tmp_path: Path) -> None:
    path, drafter = tmp_path / "d.gguf", tiny_drafter(target)
    path.write_bytes(b"old")
    with full_disk(), pytest.raises(ValueError, match="cannot write"):
        export_gguf(drafter, target, path, target_file)
    assert [each.name for each in tmp_path.iterdir()] == ["d.gguf"] and path.read_bytes() == b"old"
