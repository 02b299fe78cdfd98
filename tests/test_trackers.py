"""Inputs of the kinds that people report in public trackers: read as they are meant, or refused in one sentence. List: tests/cases.md."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit
from tiny import letter_tokenizer, random_prompt, reference, tiny_drafter, tiny_target
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import dspark
from dspark.formats.checkpoint import CONFIG, INDEX, WEIGHTS
from dspark.formats.deepspec import export_deepspec
from dspark.target.target import Target

PROMPT, NEW = random_prompt(3, 9), 12
COPYING = {"policy": dspark.FixedWindow(3)}
SENTENCE = r"^[^\n]{20,900}$"


def same_text(target: Target, drafter: object = None) -> None:
    """Drafting with copies, and with a drafter, writes what transformers alone writes."""
    expected = reference(target, PROMPT, NEW)
    for source in (None, dspark.ContextLookup(None, target=target), drafter):
        policy = COPYING if source else {}
        assert dspark.generate(target, source, PROMPT, max_new_tokens=NEW, **policy).token_ids == expected


def refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=SENTENCE) as error:
        call()
    assert said in str(error.value), str(error.value)


# ---- targets as folders


def head(config: dict, tensors: dict[str, Tensor], scale: float | None, tied: bool) -> None:
    """A head of its own (scale None: none), and what the config says of it."""
    config["tie_word_embeddings"] = tied
    tensors.pop("lm_head.weight")
    if scale is not None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * scale


def types(tensors: dict[str, Tensor], *dtypes: torch.dtype) -> None:
    for i, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to(dtypes[i % len(dtypes)])


def renamed(tensors: dict[str, Tensor], change: Callable[[str], str]) -> None:
    for name in sorted(tensors):
        tensors[change(name)] = tensors.pop(name)


FOLDERS: dict[str, tuple[Callable[[dict, dict[str, Tensor]], object], str]] = {  # → what is changed, and the refusal if it is one
    "no head, not tied": (lambda c, t: head(c, t, None, False), "lm_head.weight"),
    "no head, tied": (lambda c, t: head(c, t, None, True), ""),
    "a copy as head, tied": (lambda c, t: head(c, t, 1.0, True), ""),
    "another head, tied": (lambda c, t: head(c, t, -1.0, True), ""),
    "a tensor is missing": (lambda c, t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight"),
    "tensors of an older version": (lambda c, t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}), ""),
    "layers of multi-token prediction": (lambda c, t: t.update({"mtp.fc.weight": torch.ones(32, 64)}), ""),
    "more layers than the config has": (lambda c, t: c.update(num_hidden_layers=3), ""),
    "fewer layers than the config has": (lambda c, t: c.update(num_hidden_layers=5), "layers.4"),
    "another width than the config's": (lambda c, t: c.update(hidden_size=48), "asks for [100, 48]"),
    "types mixed": (lambda c, t: types(t, torch.bfloat16, torch.float16, torch.float32), ""),
    "float64": (lambda c, t: types(t, torch.float64), ""),
    "no type in the config": (lambda c, t: [c.pop(name, None) for name in ("dtype", "torch_dtype")], ""),
    "the old name of the type": (lambda c, t: c.update(torch_dtype="float16"), ""),
    "an unknown type": (lambda c, t: c.update(dtype="float7"), ""),
    "names without a prefix": (lambda c, t: renamed(t, lambda name: name.removeprefix("model.")), ""),
    "names as torch.compile gives": (lambda c, t: renamed(t, lambda name: f"_orig_mod.{name}"), "lacks"),
    "quantised by an absent package": (lambda c, t: c.update(quantization_config={"quant_method": "gptq", "bits": 4}), "cannot load"),
    "quantised in an unknown way": (lambda c, t: c.update(quantization_config={"quant_method": "q7"}), ""),
    "no architecture": (lambda c, t: c.pop("architectures"), ""),
    "no model type": (lambda c, t: c.pop("model_type"), "cannot load"),
    "a model type from the future": (lambda c, t: c.update(model_type="llama99"), "llama99"),
    "rotary scaling under its old name": (lambda c, t: c.update(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), ""),
    "rotary theta flat": (lambda c, t: c.update(rope_parameters=None, rope_theta=500.0), ""),
    "rotary scaling without a factor": (lambda c, t: c.update(rope_parameters={"rope_type": "linear"}), "factor"),
    "an unknown rotary scaling": (lambda c, t: c.update(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "spiral"),
    "no rotary parameters": (lambda c, t: c.pop("rope_parameters"), ""),
    "dynamic scaling": (lambda c, t: c.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), ""),
    "no width of heads": (lambda c, t: c.update(head_dim=None), ""),
    "no cache wanted": (lambda c, t: c.update(use_cache=False), ""),
    "tuples wanted": (lambda c, t: c.update(return_dict=False), ""),
    "hidden states wanted": (lambda c, t: c.update(output_hidden_states=True, output_attentions=True), ""),
    "no end of text": (lambda c, t: c.update(eos_token_id=None), ""),
    "an end of text beyond the vocabulary": (lambda c, t: c.update(eos_token_id=[2, 10**6]), ""),
    "a negative end of text": (lambda c, t: c.update(eos_token_id=-1), ""),
    "an endless context": (lambda c, t: c.update(max_position_embeddings=10**12), ""),
    "a padding token that ends the text": (lambda c, t: c.update(pad_token_id=2), ""),
    "a padding token beyond the vocabulary": (lambda c, t: c.update(pad_token_id=-1), ""),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_target().model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "a model é"))


def as_transformers_reads_it(folder: Path) -> Target:
    return Target(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, return_dict=True), None, "theirs")


@pytest.mark.parametrize("why", FOLDERS)
def test_a_changed_model_folder_is_read_as_transformers_reads_it_or_refused(copied: Path, why: str) -> None:
    change, said = FOLDERS[why]
    config, tensors = json.loads((copied / CONFIG).read_text()), load_file(copied / WEIGHTS)
    change(config, tensors)
    (copied / CONFIG).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, copied / WEIGHTS, {"format": "pt"})
    if said:
        return refused(lambda: dspark.load_target(copied, dtype="float32"), said)
    target = dspark.load_target(copied, dtype="float32")
    assert reference(target, PROMPT, NEW) == reference(as_transformers_reads_it(copied), PROMPT, NEW)
    same_text(target)


def test_weights_with_nan_are_read_and_refused_when_they_give_nan(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, copied / WEIGHTS, {"format": "pt"})
    refused(lambda: dspark.generate(dspark.load_target(copied, dtype="float32"), None, PROMPT), "damaged")


def shards(folder: Path) -> dict[str, Tensor]:
    """The folder's weights in two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}))
    (folder / WEIGHTS).unlink()
    return tensors


def spoilt(folder: Path, file: str) -> None:
    save_file(
        {name: torch.ones_like(tensor) for name, tensor in load_file(folder / "model-00001-of-00002.safetensors").items()}, folder / file
    )


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "two shards": (lambda f: None, ""),
    "a shard is missing": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002"),
    "a shard is empty": (lambda f: (f / "model-00002-of-00002.safetensors").write_bytes(b""), "cannot load"),
    "a shard is half there": (lambda f: os.truncate(f / "model-00002-of-00002.safetensors", 9000), "cannot load"),
    "a pointer of git-lfs": (
        lambda f: (f / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "cannot load",
    ),
    "another copy beside the index": (lambda f: spoilt(f, "consolidated.safetensors"), ""),
    "a stale third shard": (lambda f: spoilt(f, "model-00003-of-00003.safetensors"), ""),
    "an index without a shard's tensor": (lambda f: edit(f, INDEX, weight_map={}), "cannot load"),
    "an empty index": (lambda f: (f / INDEX).write_text(""), "index.json is missing or damaged"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("*token*")], ""),
    "no chat template": (lambda f: [path.unlink() for path in f.glob("chat_template*")], ""),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ""),
    "adapters alone": (lambda f: (f / CONFIG).rename(f / "adapter_config.json"), "config.json"),
    "no generation config": (lambda f: (f / "generation_config.json").unlink(), ""),
    "a damaged generation config": (lambda f: (f / "generation_config.json").write_text("{"), ""),
    "sampling by default": (lambda f: edit(f, "generation_config.json", do_sample=True, temperature=0.6, top_k=20, top_p=0.9), ""),
    "contradictions in the generation config": (lambda f: edit(f, "generation_config.json", do_sample=False, temperature=0.6), ""),
    "several ends of text there": (lambda f: edit(f, "generation_config.json", eos_token_id=[2, 40, 41]), ""),
    "a length there": (lambda f: edit(f, "generation_config.json", max_length=3, max_new_tokens=2), ""),
    "no cache there": (lambda f: edit(f, "generation_config.json", use_cache=False), ""),
    "beams there": (lambda f: edit(f, "generation_config.json", num_beams=4), ""),
}


@pytest.mark.parametrize("why", FILES)
def test_a_folder_of_shards_and_small_files_is_read_whole_or_refused(copied: Path, why: str) -> None:
    shards(copied)
    change, said = FILES[why]
    change(copied)
    if said:
        return refused(lambda: dspark.load_target(copied, dtype="float32"), said)
    target = dspark.load_target(copied, dtype="float32")
    target.model.generation_config = GenerationConfig(eos_token_id=target.model.generation_config.eos_token_id)  # for the reference
    same_text(target)


# ---- models in memory, and what surrounds a call

STATES: dict[str, Callable[[Target], object]] = {
    "gradient checkpointing": lambda t: t.model.gradient_checkpointing_enable(),
    "no cache in the config": lambda t: setattr(t.model.config, "use_cache", False),
    "no cache in the generation config": lambda t: setattr(t.model.generation_config, "use_cache", False),
    "hidden states wanted": lambda t: setattr(t.model.config, "output_hidden_states", True),
    "weights that learn": lambda t: t.model.requires_grad_(True),
    "eager attention": lambda t: t.model.set_attn_implementation("eager"),
    "compiled in place": lambda t: t.model.compile(backend="eager"),
    "a hook of the user's": lambda t: t.layers[1].register_forward_hook(lambda module, given, out: None),
}


@pytest.mark.parametrize("state", STATES)
def test_the_state_of_a_model_does_not_change_its_text(state: str) -> None:
    expected = reference(tiny_target(), PROMPT, NEW)
    target = tiny_target()
    drafter = tiny_drafter(target)
    STATES[state](target)
    for source in (None, dspark.ContextLookup(None, target=target), drafter):
        policy = COPYING if source else {}
        assert dspark.generate(target, source, PROMPT, max_new_tokens=NEW, **policy).token_ids == expected


def test_a_model_in_training_mode_is_refused() -> None:
    target = tiny_target()
    target.model.train()
    refused(lambda: dspark.generate(target, None, PROMPT), "call model.eval() first")


AROUND: dict[str, Callable[[], object]] = {
    "nothing": nullcontext,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
}


@pytest.mark.parametrize("around", AROUND)
def test_what_surrounds_a_call_does_not_change_its_text(around: str) -> None:
    target = tiny_target()
    drafter, expected = tiny_drafter(target), reference(target, PROMPT, NEW)
    with AROUND[around]():
        assert dspark.generate(target, drafter, PROMPT, policy=dspark.FixedWindow(3), max_new_tokens=NEW).token_ids == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_default_type_does_not_change_the_text(dtype: torch.dtype) -> None:
    target = tiny_target()
    drafter, expected = tiny_drafter(target), reference(target, PROMPT, NEW)
    torch.set_default_dtype(dtype)
    try:
        out = dspark.generate(target, drafter, PROMPT, policy=dspark.FixedWindow(3), max_new_tokens=NEW)
        sampled = dspark.generate(target, drafter, PROMPT, policy=dspark.FixedWindow(3), max_new_tokens=NEW, temperature=0.7, top_p=0.9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.token_ids == expected and sampled.token_ids


# ---- options

GREEDY = {
    "a tiny temperature": {"temperature": 1e-8},
    "the smallest number as temperature": {"temperature": 5e-324},
    "one token kept": {"temperature": 5.0, "top_k": 1},
    "a tiny nucleus": {"temperature": 5.0, "top_p": 1e-12},
    "a whole number as temperature": {"temperature": 0},
    "numbers of NumPy": {"temperature": np.float32(0), "top_p": np.float32(1), "top_k": np.int64(0), "seed": np.int64(3)},
    "the largest seed": {"seed": 2**63 - 1},
    "more tokens kept than there are": {"temperature": 1e-8, "top_k": 10**9},
    "no stop strings": {"stop": None, "stop_ids": None},
    "no processors": {"processors": []},
}


@pytest.mark.parametrize("name", GREEDY)
def test_extremes_of_sampling_are_greedy_or_as_told(name: str) -> None:
    target = tiny_target()
    drafter, expected = tiny_drafter(target), reference(target, PROMPT, NEW)
    for source, policy in ((None, None), (drafter, dspark.FixedWindow(3))):
        assert dspark.generate(target, source, PROMPT, policy=policy, max_new_tokens=NEW, **GREEDY[name]).token_ids == expected


def test_an_endless_temperature_still_samples() -> None:
    target = tiny_target(eos_token_id=None)
    out = dspark.generate(target, tiny_drafter(target), PROMPT, policy=dspark.FixedWindow(3), max_new_tokens=40, temperature=1e30, seed=1)
    assert len(out.token_ids) == 40 and len(set(out.token_ids)) > 20


@pytest.mark.parametrize("new", [1, 2, 10**15, np.int64(3)])
def test_any_number_of_new_tokens_fits_the_context(new: int) -> None:
    target = tiny_target(max_position_embeddings=24, eos_token_id=None)
    drafter = tiny_drafter(target)
    for length in (1, 9, 22, 23):
        prompt = random_prompt(length, length)
        expected = reference(target, prompt, min(int(new), 24 - length))
        assert dspark.generate(target, drafter, prompt, policy=dspark.FixedWindow(4), max_new_tokens=new).token_ids == expected
    refused(lambda: dspark.generate(target, drafter, random_prompt(1, 24)), "takes at most 24")


WRONG = {
    "a seed too large": ({"seed": 2**64}, "2**63"),
    "a truth as seed": ({"seed": True}, "True"),
    "text as temperature": ({"temperature": "0.7"}, "'0.7'"),
    "an endless temperature": ({"temperature": float("inf")}, "inf"),
    "no tokens": ({"max_new_tokens": 0}, "0"),
    "a fraction of a token": ({"max_new_tokens": 2.0}, "2.0"),
    "an empty stop string": ({"stop": ["a", ""]}, "''"),
    "a number as stop string": ({"stop": 5}, "5"),
    "bytes as stop string": ({"stop": b"ab"}, "97"),
    "text as stop id": ({"stop_ids": "a"}, "'a'"),
    "a fraction as stop id": ({"stop_ids": [2.5]}, "2.5"),
    "a negative stop id": ({"stop_ids": -1}, "-1"),
    "a stop id beyond the vocabulary": ({"stop_ids": [5, 100]}, "100"),
    "a truth as stop id": ({"stop_ids": [True]}, "True"),
}


@pytest.fixture(scope="module")
def speaking() -> Target:
    target = tiny_target(eos_token_id=None)
    target.tokenizer = letter_tokenizer()
    return target


@pytest.mark.parametrize("name", WRONG)
def test_an_option_of_the_wrong_kind_is_refused(speaking: Target, name: str) -> None:
    options, said = WRONG[name]
    refused(lambda: dspark.decode(speaking, None, PROMPT, **options), said)


@pytest.mark.parametrize(
    "made", [int, np.int64, torch.tensor, lambda i: [i, i], lambda i: {i}, lambda i: np.array([i, 99]), lambda i: torch.tensor([i])]
)
def test_stop_ids_come_in_any_form(speaking: Target, made: Callable) -> None:
    whole = dspark.generate(speaking, None, PROMPT, max_new_tokens=NEW).token_ids
    at = whole[5]
    drafter = tiny_drafter(speaking)
    cut = whole[: whole.index(at) + 1]
    out = dspark.generate(speaking, drafter, PROMPT, policy=dspark.FixedWindow(4), max_new_tokens=NEW, stop_ids=made(at))
    assert out.token_ids == cut or 99 in whole[: len(cut)]


STOPS: dict[str, Callable[[str], object]] = {
    "two letters across tokens": lambda text: text[4:6],
    "the first letter": lambda text: text[0],
    "the whole text": lambda text: text,
    "several, the later first": lambda text: [text[7:9], text[3:5]],
    "one inside another": lambda text: (text[3:8], text[4:6]),
    "twice the same": lambda text: [text[4:6]] * 2,
    "one that never comes": lambda text: "\x01never",
    "longer than any text": lambda text: text * 50,
}


@pytest.mark.parametrize("name", STOPS)
def test_a_text_ends_with_the_token_that_completes_a_stop_string(speaking: Target, name: str) -> None:
    ids = dspark.generate(speaking, None, PROMPT, max_new_tokens=NEW).token_ids
    stop = STOPS[name](speaking.decode(ids))
    strings = [stop] if isinstance(stop, str) else stop
    expected = next((ids[:n] for n in range(1, NEW + 1) if any(each in speaking.decode(ids[:n]) for each in strings)), ids)
    for source, policy in ((None, None), (tiny_drafter(speaking), dspark.FixedWindow(4))):
        out = dspark.generate(speaking, source, PROMPT, policy=policy, max_new_tokens=NEW, stop=stop)
        assert out.token_ids == expected and len(out.token_ids) == sum(len(r.committed) for r in out.rounds)


# ---- chats and texts

CHATS = {
    "a system message": ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], None),
    "an empty system message": ([{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}], None),
    "further fields": ([{"role": "user", "content": "Hi", "name": "me", "id": 7}], None),
    "an unknown role": ([{"role": "developer", "content": "Hi"}], None),
    "an answer begun": ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}], None),
    "parts of a message": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None),
    "no role": ([{"content": "Hi"}], None),
    "no content": ([{"role": "user"}], "cannot encode"),
    "nothing as content": ([{"role": "user", "content": None}], "cannot encode"),
    "a number as content": ([{"role": "user", "content": 5}], "cannot encode"),
    "special tokens in the text": ("<end><start>user", None),
    "a byte of zero": ("a\0b", None),
    "a letter of four bytes": ("🙂", None),
    "from right to left": ("שלום", None),
    "only a line's end": ("\r\n", "empty"),
    "a very long text": ("a" * 5000, "takes at most"),
    "messages as JSON": ('[{"role": "user", "content": "Hi"}]', None),
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("templated", [True, False], ids=["template", "no template"])
def test_chats_are_encoded_or_refused_in_a_sentence(name: str, templated: bool) -> None:
    target = tiny_target()
    target.tokenizer = letter_tokenizer()
    if not templated:
        target.tokenizer.chat_template = None
    prompt, said = CHATS[name]
    if said and (said != "cannot encode" or not templated):  # a template may do without
        return refused(lambda: target.encode(prompt), said)
    text = target.tokenizer.decode(target.encode(prompt))
    assert "type" not in text, "parts of a message were shown as Python shows them"


def test_an_image_in_a_message_is_refused(speaking: Target) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    refused(lambda: speaking.encode([{"role": "user", "content": picture}]), "decodes text alone")


# ---- drafters as folders

DRAFTERS: dict[str, tuple[Callable[[dict, dict[str, Tensor]], object], str]] = {
    "as it was": (lambda c, t: None, ""),
    "a mask token beyond the vocabulary": (lambda c, t: c.update(mask_token_id=100), "mask_token_id 100"),
    "a negative mask token": (lambda c, t: c.update(mask_token_id=-1), "mask_token_id is -1"),
    "a deeper target": (lambda c, t: c.update(num_target_layers=36), "num_target_layers 36"),
    "a tap of the last layer": (lambda c, t: c.update(target_layer_ids=[0, 3]), "last layer"),
    "a tap below the embedding": (lambda c, t: c.update(target_layer_ids=[-2, 0]), "[-2, 0]"),
    "taps of the embedding": (lambda c, t: c.update(target_layer_ids=[-1, 0]), ""),
    "taps in another order": (lambda c, t: c.update(target_layer_ids=[2, 0]), ""),
    "more taps than its weights": (lambda c, t: c.update(target_layer_ids=[0, 1, 2]), "fc.weight"),
    "another width": (lambda c, t: c.update(hidden_size=64), "asks for"),
    "a block of one": (lambda c, t: c.update(block_size=1), ""),
    "an endless block": (lambda c, t: c.update(block_size=10**6), "block_size 1000000"),
    "no block size": (lambda c, t: c.pop("block_size"), "block_size"),
    "names with a prefix": (lambda c, t: renamed(t, lambda name: f"model.{name}"), "num_hidden_layers 2 does not fit"),
    "no copies of the tables": (lambda c, t: [t.pop(name) for name in ("embed_tokens.weight", "lm_head.weight")], ""),
    "the head of another target": (lambda c, t: t.update({"lm_head.weight": -t["lm_head.weight"]}), "lm_head.weight"),
    "types mixed": (lambda c, t: types(t, torch.bfloat16, torch.float32, torch.float64), ""),
    "8-bit floats": (lambda c, t: types(t, torch.float8_e4m3fn), "not quantised"),
    "8-bit numbers": (lambda c, t: t.update({"fc.weight": torch.ones_like(t["fc.weight"], dtype=torch.int8)}), "not quantised"),
    "no confidence head": (lambda c, t: [t.pop(name) for name in sorted(t) if "confidence" in name], "confidence_head"),
    "a Markov head that is switched off": (lambda c, t: c.update(markov_rank=0), "markov_head"),
    "kinds of the target's layers": (lambda c, t: c.update(layer_types=["full_attention"] * 36), "36 layers"),
    "quantised": (lambda c, t: c.update(quantization_config={"quant_method": "fp8"}), "'fp8'"),
    "tied tables, both there": (lambda c, t: c.update(tie_word_embeddings=True), ""),
    "theta in two places": (lambda c, t: c.update(rope_theta=5e5), "rope_theta"),
    "no theta": (lambda c, t: c.update(rope_parameters=None, rope_theta=None), "rope_theta"),
    "the target itself": (lambda c, t: c.update(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    "an architecture as text": (lambda c, t: c.update(architectures="Qwen3DSparkModel"), "no drafter"),
    "several ends of text": (lambda c, t: c.update(eos_token_id=[2, 3], bos_token_id=None), ""),
    "infinite weights": (lambda c, t: t["fc.weight"][0].fill_(float("inf")), "infinite"),
    "temperatures of another block": (lambda c, t: c.update(sts_temperatures=[1.0] * 9), "sts_temperatures"),
}


@pytest.mark.parametrize("why", DRAFTERS)
def test_a_changed_drafter_folder_is_read_or_refused(tmp_path: Path, why: str) -> None:
    change, said = DRAFTERS[why]
    target, folder = tiny_target(), tmp_path / "a drafter é"
    export_deepspec(tiny_drafter(target), target, folder)
    config = json.loads((folder / CONFIG).read_text())
    del config["weights_digest"]  # published ones have none
    tensors = load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    if said:
        return refused(lambda: dspark.load_drafter(folder, target), said)
    drafter = dspark.load_drafter(f"{folder}/", target)
    expected = reference(target, PROMPT, NEW)
    assert dspark.generate(target, drafter, PROMPT, policy=dspark.FixedWindow(), max_new_tokens=NEW).token_ids == expected
