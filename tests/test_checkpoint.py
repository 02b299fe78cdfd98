"""Drafters on disk: what is read equals what was written, an interrupted save loses nothing, and nothing wrong is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONVOLUTIONS, DFLASH2, SELECTOR, dense, full_disk, sliding_target, tiny_drafter, tiny_target
from torch import Tensor
from transformers import Qwen3Config

import dspark
from dspark.cpu import pack_target
from dspark.draft.backbone import DrafterConfig
from dspark.draft.drafter import Draft, Drafter
from dspark.files import data_dir
from dspark.formats.__main__ import main as command
from dspark.formats.deepspec import export_deepspec
from dspark.formats.speculators import export_speculators
from dspark.target.target import Target
from dspark.verify.sampling import Rng, Sampling

OURS = {"selector": SELECTOR, "convolutions": CONVOLUTIONS, "both": DFLASH2}
HEADS = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"markov_rank": 0, "enable_confidence_head": False},
    "confidence without markov": {"confidence_head_with_markov": False},
}
REDUCED = torch.tensor([0, 2, 3, 5, 7, 11, 13, 17, 19, 23, 50, 99])


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.bfloat16)


@pytest.fixture(params=HEADS.values(), ids=HEADS)
def drafter(request: pytest.FixtureRequest, target: Target) -> Drafter:
    return tiny_drafter(target, **request.param)


@pytest.fixture
def folder(target: Target, tmp_path: Path) -> Path:
    """A native checkpoint with a reduced draft vocabulary."""
    dspark.save_drafter(tiny_drafter(target, d2t=REDUCED), target, tmp_path / "drafter")
    return tmp_path / "drafter"


@pytest.fixture
def reference(target: Target, tmp_path: Path) -> Path:
    export_deepspec(tiny_drafter(target), target, tmp_path / "reference")
    return tmp_path / "reference"


def drafts(drafter: Drafter, target: Target) -> Draft:
    prompt = [1, 17, 42, 5, 8]
    _, taps = target.forward(torch.tensor([prompt]), target.new_cache(), drafter.target_layer_ids)
    state = drafter.new_state(prompt)
    drafter.extend(state, prompt, taps)
    return drafter.draft(state, 9, drafter.block_size, Sampling(temperature=1.0), Rng(torch.Generator().manual_seed(3)))


def assert_same_drafts(one: Drafter, other: Drafter, target: Target) -> None:
    a, b = drafts(one, target), drafts(other, target)
    assert a.tokens == b.tokens
    assert torch.equal(dense(a), dense(b))
    assert torch.equal(a.confidence.nan_to_num(2.0), b.confidence.nan_to_num(2.0))


def edit(folder: Path, name: str = "config.json", /, **changes: object) -> None:
    """Change entries of a JSON file; None removes one."""
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors as another tool would: without our digest."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    edit(folder, weights_digest=None)


def refused(name: object, target: Target, *values: object) -> None:
    with pytest.raises(ValueError) as caught:
        dspark.load_drafter(name, target)
    message = str(caught.value)
    assert "\n" not in message
    for value in values:
        assert str(value) in message


# ---- round trips


@pytest.mark.parametrize("shape", (HEADS | OURS).values(), ids=HEADS | OURS)
def test_a_native_round_trip_gives_bit_equal_drafts(target: Target, tmp_path: Path, shape: dict) -> None:
    drafter = tiny_drafter(target, **shape)
    dspark.save_drafter(drafter, target, tmp_path)
    loaded = dspark.load_drafter(tmp_path, target)
    assert loaded.config == drafter.config
    assert_same_drafts(loaded, drafter, target)


def test_a_reference_round_trip_gives_bit_equal_drafts(drafter: Drafter, target: Target, tmp_path: Path) -> None:
    export_deepspec(drafter, target, tmp_path)
    assert_same_drafts(dspark.load_drafter(tmp_path, target), drafter, target)


@pytest.mark.parametrize("export", [export_deepspec, export_speculators])
@pytest.mark.parametrize("shape", OURS.values(), ids=OURS)
def test_other_programs_layouts_hold_no_selector_and_no_convolutions(target: Target, tmp_path: Path, shape: dict, export: Callable) -> None:
    with pytest.raises(
        ValueError, match=rf"{'num_candidates' if shape is not CONVOLUTIONS else 'convolution_kernel'} is \d, and .* has no"
    ):
        export(tiny_drafter(target, **shape), target, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["num_candidates", "convolution_kernel", "convolution_groups"])
@pytest.mark.parametrize("value", [0, -1, True, 2.5, "many"])
def test_a_selector_or_convolution_of_an_impossible_size_is_refused(target: Target, tmp_path: Path, field: str, value: object) -> None:
    dspark.save_drafter(tiny_drafter(target, **DFLASH2), target, tmp_path)
    edit(tmp_path, **{field: value})
    refused(tmp_path, target, field)


def test_a_reduced_vocabulary_and_its_temperatures_survive(target: Target, tmp_path: Path) -> None:
    drafter = tiny_drafter(target, d2t=REDUCED)
    drafter.sts_temperatures = (1.0, 1.5, 0.75, 2.0)
    dspark.save_drafter(drafter, target, tmp_path, training={"steps": 7})
    loaded = dspark.load_drafter(tmp_path, target)
    assert loaded.d2t.tolist() == REDUCED.tolist()
    assert loaded.sts_temperatures == drafter.sts_temperatures
    assert_same_drafts(loaded, drafter, target)
    assert json.loads((tmp_path / "config.json").read_text())["training"] == {"steps": 7}


def test_the_native_format_is_bf16_and_holds_nothing_of_the_targets(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for n, t in tensors.items() if n != "d2t"} == {torch.bfloat16}
    assert not {"embed_tokens.weight", "lm_head.weight", "head_weight"} & tensors.keys()
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_the_reference_layout_has_the_published_names_and_copies(reference: Path, target: Target) -> None:
    tensors, config = load_file(reference / "model.safetensors"), json.loads((reference / "config.json").read_text())
    assert torch.equal(tensors["embed_tokens.weight"], target.embedding.weight)
    assert torch.equal(tensors["lm_head.weight"], target.head_weight)
    assert tensors["markov_head.markov_w2.weight"].shape == (100, 8)
    assert (config["architectures"], config["model_type"], config["num_target_layers"]) == (["Qwen3DSparkModel"], "llama", 4)
    assert (config["num_hidden_layers"], config["target_layer_ids"], config["block_size"]) == (2, [0, 2], 4)


def test_a_loaded_drafter_is_frozen_and_in_the_targets_dtype(folder: Path) -> None:
    loaded = dspark.load_drafter(str(folder), tiny_target(dtype=torch.float32))
    assert {w.dtype for w in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert not any(w.requires_grad for w in loaded.parameters())


def test_a_packed_target_gets_a_packed_drafter_that_can_be_saved_again(target: Target, tmp_path: Path) -> None:
    packed = pack_target(tiny_target(dtype=torch.bfloat16))
    drafter = tiny_drafter(target)
    for write in (dspark.save_drafter, export_deepspec):
        write(drafter, packed, tmp_path)
        loaded = dspark.load_drafter(tmp_path, packed)
        assert type(loaded.fc) is type(packed.verifier.head)
        write(loaded, packed, tmp_path)
        assert_same_drafts(dspark.load_drafter(tmp_path, target), drafter, target)


def test_a_loaded_drafter_can_be_saved_over_itself(folder: Path, target: Target) -> None:
    first = dspark.load_drafter(folder, target)
    dspark.save_drafter(first, target, folder)
    assert_same_drafts(dspark.load_drafter(folder, target), first, target)


def test_the_default_is_read_from_the_data_folder(folder: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_DATA", str(folder.parent))
    refused("default", target, "smollm2-135m-instruct")
    (folder.parent / "drafters").mkdir()
    folder.rename(folder.parent / "drafters" / "smollm2-135m-instruct")
    assert dspark.load_drafter("default", target).config.draft_vocab_size == len(REDUCED)
    monkeypatch.setenv("DSPARK_DATA", "/nowhere/at/all")
    with pytest.raises(ValueError, match="/nowhere/at/all"):
        data_dir()


def test_a_hub_id_fetches_config_and_safetensors_only(folder: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    dspark.load_drafter("someone/drafter", target)
    assert asked == {"someone/drafter": ["config.json", "*.safetensors", "model.safetensors.index.json"]}


# ---- other people's layouts


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    placed = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(placed.values()):
        save_file({n: tensors[n] for n in names if placed[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "model.safetensors").unlink()


def test_shards_are_one_drafter(reference: Path, target: Target) -> None:
    shard(reference)
    assert_same_drafts(dspark.load_drafter(reference, target), tiny_drafter(target), target)


def test_rope_theta_may_be_outside_rope_parameters(reference: Path, target: Target) -> None:
    edit(reference, rope_parameters=None, rope_theta=10000)
    assert_same_drafts(dspark.load_drafter(reference, target), tiny_drafter(target), target)


def test_the_reference_may_leave_out_what_it_does_not_use(target: Target, tmp_path: Path) -> None:
    drafter = tiny_drafter(target, **HEADS["dflash"])
    export_deepspec(drafter, target, tmp_path)
    edit(tmp_path, markov_head_type=None, confidence_head_with_markov=None, sts_temperatures=None, weights_digest=None)
    assert_same_drafts(dspark.load_drafter(tmp_path, target), drafter, target)


def speculators(target: Target, drafter: Drafter, folder: Path) -> None:
    """The layout that the package `speculators` saves: nested config, taps counted from the embedding, d2t as offsets."""
    shape = drafter.config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    layers = Qwen3Config(**{name: getattr(shape, name) for name in names}, rms_norm_eps=shape.rms_norm_eps)
    tensors = {name: weight.detach() for name, weight in drafter.named_parameters()}
    if shape.draft_vocab_size < shape.vocab_size:
        mask = torch.zeros(shape.vocab_size, dtype=torch.bool)
        mask[drafter.d2t] = True
        tensors |= {"t2d": mask, "d2t": drafter.d2t - torch.arange(shape.draft_vocab_size)}
        tensors["lm_head.weight"] = target.head_weight[drafter.d2t]
    about = {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "sample_from_anchor": True,
        "transformer_layer_config": layers.to_diff_dict(),
        "aux_hidden_state_layer_ids": [i + 1 for i in shape.target_layer_ids],
        **{n: getattr(shape, n) for n in ("block_size", "draft_vocab_size", "mask_token_id", "markov_rank", "markov_head_type")},
        **{n: getattr(shape, n) for n in ("enable_confidence_head", "confidence_head_with_markov")},
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("d2t", [None, REDUCED], ids=["full", "reduced"])
def test_speculators_layout_is_read(target: Target, tmp_path: Path, d2t: Tensor | None) -> None:
    drafter = tiny_drafter(target, d2t=d2t)
    speculators(target, drafter, tmp_path)
    loaded = dspark.load_drafter(tmp_path, target)
    assert loaded.config == drafter.config
    assert_same_drafts(loaded, drafter, target)


@pytest.mark.parametrize("d2t", [None, REDUCED], ids=["full", "reduced"])
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
def test_a_speculators_round_trip_gives_bit_equal_drafts(target: Target, tmp_path: Path, shape: dict, d2t: Tensor | None) -> None:
    drafter = tiny_drafter(target, d2t=d2t, **shape)
    export_speculators(drafter, target, tmp_path)
    assert_same_drafts(dspark.load_drafter(tmp_path, target), drafter, target)


@pytest.mark.parametrize("d2t", [None, REDUCED], ids=["full", "reduced"])
def test_an_exported_drafter_is_what_speculators_saves(target: Target, tmp_path: Path, d2t: Tensor | None) -> None:
    drafter = tiny_drafter(target, d2t=d2t)
    speculators(target, drafter, tmp_path / "theirs")
    export_speculators(drafter, target, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) and theirs[name].dtype == ours[name].dtype for name in theirs)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for name, value in json.loads((tmp_path / "theirs" / "config.json").read_text()).items():
        if name not in ("architectures", "transformer_layer_config"):  # written by its classes, which fill in more
            assert config[name] == value, name
    assert config["transformer_layer_config"]["layer_types"] == ["full_attention"] * 2  # where it is missing, theirs slide
    assert config["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("to", ["deepspec", "speculators"])
def test_the_command_writes_what_vllm_serves(target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    target.model.save_pretrained(tmp_path / "model")
    target = dspark.load_target(tmp_path / "model", pack=False)
    dspark.save_drafter(tiny_drafter(target), target, tmp_path / "native")
    assert command(["export", str(tmp_path / "native"), "--to", to, "--out", str(tmp_path / to), "--target", str(tmp_path / "model")]) == 0
    assert f'"model": "{tmp_path / to}"' in capsys.readouterr().out.splitlines()[-1]
    assert_same_drafts(dspark.load_drafter(tmp_path / to, target), tiny_drafter(target), target)


def test_a_scaled_embedding_goes_out_only_where_the_drafter_reads_the_table_itself(tmp_path: Path) -> None:
    target = sliding_target("eager")  # a Gemma, whose module scales the table
    with pytest.raises(ValueError, match=r"embedding_scale is None.*tiny-gemma3's table"):
        export_speculators(tiny_drafter(target), target, tmp_path)
    drafter = tiny_drafter(target, embedding_scale=1.0)
    drafter.load_state_dict({name: weight.bfloat16() for name, weight in drafter.state_dict().items()})
    export_speculators(drafter, target, tmp_path)
    assert_same_drafts(dspark.load_drafter(tmp_path, target), drafter, target)


def test_speculators_without_sample_from_anchor_is_another_block_layout(target: Target, tmp_path: Path) -> None:
    speculators(target, tiny_drafter(target), tmp_path)
    edit(tmp_path, sample_from_anchor=None)
    assert dspark.load_drafter(tmp_path, target).block_size == 3
    edit(tmp_path, speculators_config={"proposal_methods": [{"speculative_tokens": 4}]})
    refused(tmp_path, target, "sample_from_anchor", "4 tokens")
    edit(tmp_path, sample_from_anchor=True, speculators_model_type="eagle3")
    refused(tmp_path, target, "eagle3")


def test_a_reduced_vocabulary_has_no_reference_layout(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"12 of 100.*save_drafter"):
        export_deepspec(tiny_drafter(target, d2t=REDUCED), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- interrupted saves


@pytest.mark.parametrize("moment", range(4), ids=["first write", "first rename", "second write", "second rename"])
def test_an_interrupted_save_leaves_one_whole_checkpoint(
    folder: Path, target: Target, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    old, new = dspark.load_drafter(folder, target), tiny_drafter(target, seed=8, block_size=3)
    steps = iter(range(4))

    def interrupted(real: Callable) -> Callable:
        def step(*args: object) -> object:
            if next(steps) == moment:
                raise KeyboardInterrupt
            return real(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted(Path.write_bytes))
        patch.setattr(Path, "replace", interrupted(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            dspark.save_drafter(new, target, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same_drafts(dspark.load_drafter(folder, target), new if moment >= 2 else old, target)


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(folder: Path, target: Target) -> None:
    old = dspark.load_drafter(folder, target)
    with full_disk(), pytest.raises(ValueError, match=f"cannot write {folder}.*room"):
        dspark.save_drafter(tiny_drafter(target, seed=8), target, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same_drafts(dspark.load_drafter(folder, target), old, target)


def test_a_drafter_with_nan_is_not_saved(folder: Path, target: Target) -> None:
    broken = tiny_drafter(target)
    broken.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"fc\.weight .*1 NaN"):
        dspark.save_drafter(broken, target, folder)
    dspark.load_drafter(folder, target)


# ---- what is refused


def test_a_missing_folder_config_or_weights_is_named(folder: Path, target: Target) -> None:
    refused(folder / "absent", target, folder / "absent")
    refused("no-such-drafter", target, "no-such-drafter")
    refused(folder / "config.json", target, folder / "config.json")
    (folder / "model.safetensors").rename(folder / "elsewhere")
    refused(folder, target, folder, "model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, target, folder / "config.json")


def test_an_unreachable_hub_is_one_line(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused("someone/drafter", target, "someone/drafter", "no route")


def test_a_flipped_bit_is_damage(folder: Path, target: Target) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    refused(folder, target, "damaged", path)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda t: t.pop("fc.weight"), ["fc.weight missing or unexpected"]),
        (lambda t: t.update({"extra.weight": torch.zeros(3)}), ["extra.weight missing or unexpected"]),
        (lambda t: t.update({"fc.weight": torch.zeros(32, 31)}), ["fc.weight", "[32, 31]", "[32, 64]"]),
        (lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)}), ["fc.weight", "int8"]),
        (lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)}), ["fc.weight", "float8"]),
        (lambda t: t["norm.weight"].fill_(torch.nan), ["norm.weight", "32 NaN"]),
        (lambda t: t["norm.weight"][:1].fill_(torch.inf), ["norm.weight", "1 NaN or inf"]),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1")], ["num_hidden_layers", "2"]),
        (lambda t: t.pop("d2t"), ["d2t", "none", "12"]),
        (lambda t: t["d2t"][3:5].copy_(t["d2t"][3:5].flip(0)), ["d2t", "rising"]),
        (lambda t: t["d2t"][4:5].copy_(t["d2t"][3:4]), ["d2t", "rising"]),
        (lambda t: t["d2t"][-1:].fill_(100), ["d2t", "0..99", "to 100"]),
        (lambda t: t["d2t"][:1].fill_(-1), ["d2t", "from -1"]),
        (lambda t: t.update({"d2t": t["d2t"][:5].clone()}), ["d2t", "[5]", "12"]),
        (lambda t: t.update({"d2t": t["d2t"].float()}), ["d2t", "float32"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_tensors_are_refused(folder: Path, target: Target, change: Callable, values: list[str]) -> None:
    rewrite(folder, change)
    refused(folder, target, *values)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", 1 << 40),
        ("hidden_size", None),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2_000_000_000),
        ("intermediate_size", 2_147_483_647),
        ("block_size", 0),
        ("markov_rank", -1),
        ("markov_head_type", "magic"),
        ("enable_confidence_head", 1),
        ("draft_vocab_size", 101),
        ("mask_token_id", 100),
        ("target_layer_ids", [0.5, 2]),
        ("target_layer_ids", "02"),
        ("target_layer_ids", [0, 3]),
        ("target_layer_ids", [0, 40]),
        ("rope_theta", -1.0),
        ("rms_norm_eps", float("inf")),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("sts_temperatures", [1.0, 0.0, 1.0, 1.0]),
        ("sts_temperatures", [1.0]),
        ("format_version", 99),
        ("architectures", ["Gemma5DSparkModel"]),
        ("architectures", None),
    ],
)
def test_wrong_config_values_are_refused(folder: Path, target: Target, field: str, value: object) -> None:
    edit(folder, **{field: value})
    refused(folder, target, field if value is None else value if field != "markov_head_type" else "magic")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"mlp_bias": True},
        {"a_field_of_tomorrow": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"use_sliding_window": True, "layer_types": None},
        {"is_causal": True},
        {"dflash_query_causal": True},
        {"sample_from_anchor": False},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": 7},
        {"rope_is_neox_style": False},
        {"final_logit_softcapping": 30.0},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_that_changes_the_computation_is_refused_by_name(reference: Path, target: Target, changes: dict[str, object]) -> None:
    edit(reference, **changes)
    field, value = next(iter(changes.items()))
    refused(reference, target, "rope_type" if isinstance(value, dict) and field.startswith("rope") else "" if value == 7 else field)


def test_an_export_does_not_take_over_what_only_the_target_computes(target: Target, tmp_path: Path) -> None:
    """A target may have a bias or a soft cap that our layers do not have."""
    target.config.mlp_bias = True
    try:
        export_deepspec(tiny_drafter(target), target, tmp_path)
    finally:
        target.config.mlp_bias = False
    assert_same_drafts(dspark.load_drafter(tmp_path, target), tiny_drafter(target), target)


def test_an_index_that_disagrees_with_its_shards_is_refused(reference: Path, target: Target) -> None:
    shard(reference)
    placed = json.loads((reference / "model.safetensors.index.json").read_text())["weight_map"]
    edit(reference, "model.safetensors.index.json", weight_map=placed | {"a.weight": "model-0.safetensors"})
    refused(reference, target, "a.weight")


@pytest.mark.parametrize(
    ("other", "values"),
    [
        ({"hidden_size": 64}, ["hidden_size", 32, 64]),
        ({"vocab_size": 120}, ["vocab_size", 100, 120]),
        ({"vocab_size": 80}, ["another target", 100, 80]),
        ({"num_hidden_layers": 3}, ["[0, 2]", "3 layers"]),
        ({"seed": 5}, ["tiny"]),
    ],
    ids=["hidden size", "vocabulary", "smaller vocabulary", "taps", "weights"],
)
def test_a_drafter_of_another_target_is_refused(folder: Path, target: Target, other: dict[str, int], values: list[object]) -> None:
    stranger = tiny_target(**{"dtype": torch.bfloat16, **other})
    refused(folder, stranger, *values, *((target.digest, stranger.digest) if "seed" in other else ()))


def test_a_drafter_may_be_taken_for_a_target_with_other_weights(folder: Path) -> None:
    tuned = tiny_target(seed=5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="target_digest"):
        dspark.load_drafter(folder, tuned)
    drafter = dspark.load_drafter(folder, tuned, ignore_fields=["target_digest"])
    out = dspark.generate(tuned, drafter, [5, 6, 7], max_new_tokens=8, policy=dspark.FixedWindow())
    assert out.token_ids == dspark.generate(tuned, None, [5, 6, 7], max_new_tokens=8).token_ids


def test_copies_of_another_targets_head_are_noticed(reference: Path, target: Target) -> None:
    refused(reference, tiny_target(seed=5, dtype=torch.bfloat16), "embed_tokens.weight", "tiny")
    rewrite(reference, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(99, 32)}))
    refused(reference, target, "lm_head.weight", "[99, 32]", "[100, 32]")


def test_every_field_of_the_config_is_written(folder: Path, target: Target) -> None:
    about = json.loads((folder / "config.json").read_text())
    names = [field.name for field in dataclasses.fields(DrafterConfig)]
    assert set(names[: names.index("num_candidates")]) <= about.keys()
    assert not set(names[names.index("num_candidates") :]) & about.keys()  # as in every file before those fields
    assert (about["target"], about["target_digest"], about["architectures"]) == ("tiny", target.digest, ["DSparkDrafter"])
