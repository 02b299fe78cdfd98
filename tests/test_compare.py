"""Comparing drafters: trained alike, measured by the loop that decodes, finished work never done twice."""

from __future__ import annotations

import json
import shutil
from functools import partial, partialmethod
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_notebooks import tiny_folders  # noqa: F401, a fixture

import dspark
from dspark.bench.results import read_results, write_results
from dspark.train import __main__ as command
from dspark.train import compare
from dspark.train.compare import ALIKE, GROUPS, VARIANTS, Recipe, chosen
from dspark.train.corpus import Corpus, save_corpus
from dspark.train.features import FeatureStore
from dspark.train.loop import TrainConfig, Trainer, train_to

MAIN = [variant.name for variant in GROUPS["main"]]


@pytest.fixture
def arguments(tmp_path: Path, tiny_folders: dict[str, str]) -> list[str]:  # noqa: F811
    """A comparison that takes seconds."""
    ids = torch.randint(4, 300, (12, 40), generator=torch.Generator().manual_seed(0))
    assistant = torch.zeros(12, 40, dtype=torch.bool)
    assistant[:, 6:36] = True
    save_corpus(Corpus(ids, assistant, torch.ones(12)), tmp_path / "corpus.safetensors")
    options = {
        **{"target": tiny_folders["target"], "dtype": "float32", "corpus": tmp_path / "corpus.safetensors", "out": tmp_path / "out"},
        **{"results": tmp_path / "results", "steps": 3, "sequences": 2, "anchors": 4, "taps": "0,2", "markov-rank": 4},
        **{"draft-vocab": 200, "split": "dev", "prompts": 1, "tokens": 6, "domains": "chat,structured", "threads": 1},
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 rows are one shard otherwise, and that one would be held out."""
    monkeypatch.setattr(compare, "FeatureStore", partial(FeatureStore, shard_rows=4))


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.Comparison, "time", partialmethod(compare.Comparison.time, repeats=2))


@pytest.fixture(autouse=True)
def usual_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)


def call(*words: str) -> None:
    assert command.main(["compare", *words]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line that the command ends with."""
    capsys.readouterr()
    assert command.main(["compare", *words]) in (2, 130)
    return capsys.readouterr().err.splitlines()[-1]


def test_one_command_trains_decodes_and_times_and_every_row_names_its_origin(arguments: list[str], tmp_path: Path) -> None:
    call(*arguments, "--stages", "train,decode,time")
    results = tmp_path / "results"
    trained = read_results(results / "drafters-trained.parquet").set_index("drafter")
    assert list(trained.index) == MAIN and list(trained["layers"]) == [2, 2, 1] and list(trained["rank"]) == [4, 0, 0]
    assert (trained["held_out_acceptance"].map(len) == 5).all() and trained["held_out_tau"].between(1, 6).all()
    timed = read_results(results / "drafters-time.parquet")
    assert set(timed["drafter"]) == set(MAIN) and len(timed) == 6
    assert set(timed["schema_version"]) == set(trained["schema_version"]) == {1}
    assert (timed[["draft_ms", "verify_ms"]] > 0).all(axis=None)
    by_head = timed.groupby("drafter")["head_ms"].median()
    assert by_head["dspark"] > max(by_head["dflash"], by_head["eagle"])  # nothing to run in them
    for name in MAIN:
        rows = read_results(results / f"drafters-t1-{name}.parquet")
        assert rows["drafter"].eq(name).all() and rows["domain"].tolist() == ["chat", "structured"] and rows["split"].eq("dev").all()
        assert {"revision", "machine", "torch", "drafter_digest", "target_digest", "temperature", "seed"} <= set(rows.columns)
        assert (rows["drafter_layers"] == trained.loc[name, "layers"]).all()
    assert len({rows["drafter_digest"].iloc[0] for rows in map(read_results, results.glob("drafters-t1-*"))}) == 3


def test_finished_work_is_kept_when_more_drafters_are_added(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(*arguments, "--only", "dflash")
    kept = [*tmp_path.glob("results/drafters-t1-*"), *tmp_path.glob("out/dflash/*")]
    before = {path: path.read_bytes() for path in kept}
    monkeypatch.setattr(compare, "train_to", lambda trainer, out, **_: pytest.fail(f"{out} was trained again"))
    call(*arguments, "--only", "dflash")
    monkeypatch.setattr(compare, "train_to", train_to)
    call(*arguments, "--only", "eagle", "--stages", "train")
    assert read_results(tmp_path / "results" / "drafters-trained.parquet")["drafter"].tolist() == ["dflash", "eagle"]
    assert all(path.read_bytes() == content for path, content in before.items()) and len(before) == 3


def test_records_of_deleted_weights_stay_if_the_training_was_alike(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "results" / "drafters-trained.parquet"
    for name in ("eagle", "dspark"):
        call(*arguments, "--only", name, "--stages", "train")
        shutil.rmtree(tmp_path / "out" / name)
    call(*arguments, "--only", "dflash", "--stages", "train")
    assert read_results(records)["drafter"].tolist() == MAIN and read_results(records)["recipe"].nunique() == 1
    of_other_code = read_results(records).assign(schema_version=99)
    write_results(of_other_code, other := tmp_path / "older" / records.name)
    message = refused(capsys, *arguments, "--only", "dflash", "--stages", "train", "--results", str(other.parent))
    assert f"{other} does not hold drafters of the same 'schema_version': choose another --results" in message
    write_results(of_other_code.drop(columns="schema_version"), other)
    message = refused(capsys, *arguments, "--only", "dflash", "--stages", "train", "--results", str(other.parent))
    assert f"{other} does not hold drafters of the same 'schema_version'" in message
    before, another = records.read_bytes(), ["--only", "eagle", "--stages", "train", "--steps", "2", "--out", str(tmp_path / "other")]
    assert f"{records} does not hold drafters of the same 'recipe': choose another --results" in refused(capsys, *arguments, *another)
    assert records.read_bytes() == before and not (tmp_path / "other").exists(), "before anything is trained"
    elsewhere = tmp_path / "other" / "results"
    call(*[word for word in arguments if word not in ("--results", str(records.parent))], *another)
    assert read_results(elsewhere / "drafters-trained.parquet")["drafter"].tolist() == ["eagle"], "by default beside the drafters"


def test_records_never_replace_a_file_that_holds_something_else(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "results" / "drafters-trained.parquet"
    records.parent.mkdir()
    pd.DataFrame({"drafter": ["eagle"], "target_digest": ["0"]}).to_parquet(records)
    before = records.read_bytes()
    message = refused(capsys, *arguments, "--only", "dflash", "--stages", "train")
    assert str(records) in message and "'target_digest'" in message and "--results" in message
    assert records.read_bytes() == before and not (tmp_path / "out").exists(), "before anything is trained"


def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--only", "eagle", "--stages", "train")
    call(*arguments, *only)
    lines = (tmp_path / "out" / "eagle.training" / "log.jsonl").read_text().splitlines()
    (tmp_path / "out").rename(tmp_path / "whole")

    stepped = Trainer._train_step

    def interrupted(trainer: Trainer) -> dict[str, object]:
        if trainer.step == 2:
            raise KeyboardInterrupt
        return stepped(trainer)

    monkeypatch.setattr(Recipe, "config", lambda r, **_: TrainConfig(r.steps, r.sequences, r.anchors, r.lr, checkpoint_every=1))
    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    assert "the same command resumes there" in refused(capsys, *arguments, *only)
    assert not (tmp_path / "out" / "eagle").exists()
    monkeypatch.setattr(Trainer, "_train_step", stepped)
    call(*arguments, *only)
    records = [json.loads(line) for line in (tmp_path / "out" / "eagle.training" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3] and [r["loss"] for r in records] == [json.loads(line)["loss"] for line in lines]
    found, expected = (json.loads((tmp_path / run / "eagle" / "config.json").read_text()) for run in ("out", "whole"))
    assert found["weights_digest"] == expected["weights_digest"] and found["training"]["held_out"] == expected["training"]["held_out"]


def test_variants_differ_only_in_the_fields_they_name(tiny_folders: dict[str, str]) -> None:  # noqa: F811
    target = dspark.load_target(tiny_folders["target"], dtype="float32")
    recipe = Recipe(taps="0,2", markov_rank=4)
    text = Corpus(torch.arange(200)[None], torch.ones(1, 200, dtype=torch.bool), torch.ones(1))
    drafters = {name: recipe.start(variant, target, text) for name, variant in VARIANTS.items()}
    base = drafters["dspark"].config.to_dict()
    differing = {
        name: {key for key, value in drafter.config.to_dict().items() if value != base.get(key)} | {drafter.architecture}
        for name, drafter in drafters.items()
    }
    ours, theirs = {"DSparkDrafter"}, {"EagleDrafter"}
    assert differing["dspark"] == ours and differing["eagle"] == theirs | {"markov_rank", "num_hidden_layers"}
    assert differing["gated"] == differing["rnn"] == ours | {"markov_head_type"}
    assert differing["dflash"] == ours | {"markov_rank"}
    selector, convolutions = {"markov_head_type", "num_candidates"}, {"convolution_kernel", "convolution_groups"}
    assert differing["dspark+selector"] == ours | selector and differing["dflash2"] == ours | selector | convolutions
    assert differing["dspark+conv"] == ours | convolutions and differing["dflash+conv"] == ours | convolutions | {"markov_rank"}
    assert all(differing[f"{variant.name}-block7"] == differing[variant.name] | {"block_size"} for variant in ALIKE)
    assert differing["dspark-block8"] == ours | {"block_size"} and differing["dflash-layers3"] == ours | {
        "markov_rank",
        "num_hidden_layers",
    }
    assert {drafters[f"dspark-block{n}"].block_size for n in (2, 3, 8, 12, 16)} == {2, 3, 8, 12, 16}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--only", "dspark,dflush"), "dflush"),
        (("--stages", "train,decod"), "decod"),
        (("--domains", "cod"), "cod"),
        (("--temperature", "-1"), "-1"),
    ],
)
def test_a_misspelled_option_is_refused_before_anything_is_loaded(
    arguments: list[str], words: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load_target", lambda *_, **__: pytest.fail("it loaded"))
    message = refused(capsys, *arguments, *words)
    assert named in message and "\n" not in message


def test_a_drafter_of_another_recipe_is_refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(*arguments, "--only", "dflash", "--stages", "train")
    shutil.rmtree(tmp_path / "results")
    assert "another --out" in refused(capsys, *arguments, "--only", "dflash", "--steps", "4")
    assert "another target, recipe or corpus" in refused(capsys, *arguments, "--only", "dflash", "--lr", "0.5")


def test_the_records_hold_what_the_held_out_rows_gave_along_the_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*arguments, "--only", "dflash", "--stages", "train")
    monkeypatch.setattr(Recipe, "config", lambda r, **_: TrainConfig(r.steps, r.sequences, r.anchors, r.lr, checkpoint_every=1))
    call(*arguments, "--only", "dflash2", "--stages", "train")
    trained = read_results(tmp_path / "results" / "drafters-trained.parquet").set_index("drafter")
    assert list(trained.at["dflash2", "curve_steps"]) == [1, 2, 3] and list(trained.at["dflash", "curve_steps"]) == []
    assert trained.at["dflash2", "curve_tau"][-1] == trained.at["dflash2", "held_out_tau"]


def test_decoding_before_training_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no drafter folder at" in refused(capsys, *arguments, "--stages", "decode")


def test_a_block_is_timed_without_training(arguments: list[str], tmp_path: Path) -> None:
    call(*arguments, "--only", "dflash,dspark-block3", "--stages", "time")
    timed = read_results(tmp_path / "results" / "drafters-time.parquet").groupby("drafter").first()
    assert timed["drafter_block_size"].to_dict() == {"dflash": 5, "dspark-block3": 3} and (timed["drafter_vocab"] == 200).all()
    assert not (tmp_path / "out").exists()


def test_each_chosen_variant_appears_once_and_in_order() -> None:
    assert [v.name for v in chosen("eagle,main,eagle")] == ["eagle", "dspark", "dflash"]
    assert [v.name for v in chosen("all")] == list(VARIANTS) and list(VARIANTS)[:3] == MAIN
