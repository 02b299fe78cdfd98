"""The benchmark: fair in its order, clear about where rows come from, and never a row lost, doubled or mixed."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.bench import __main__ as command
from dspark.bench import llamacpp, provenance, results, speed
from dspark.bench import plan as plan_module
from dspark.bench.arms import Models, parse_arm, parse_arms
from dspark.bench.llamacpp import LlamaCpp, passes
from dspark.bench.measure import Settings, by_transformers, first_divergence, positions
from dspark.bench.plan import Plan, rotated
from dspark.bench.prompts import data_dir
from dspark.bench.results import Ledger, read_results, write_results
from dspark.bench.speed import check_identity, in_new_process, margin, measure_speed, weigh
from dspark.bench.stats import acceptance_by_position, beyond_rounding, identity_table, memory_table, speed_table, speedups, summarise
from dspark.cpu import is_packed, pack_target
from dspark.draft.drafter import Drafter
from dspark.rewind import RewindCache, Slot
from dspark.round import Round
from dspark.schedule import POLICIES, FixedWindow, PolicyRow
from dspark.target.target import Target
from dspark.verify.lean import Attention, lean_pass

EVERY_POLICY = "plain,fixed:4,mtp1,adaptive,adaptive:0.3,0.1,0.01,confidence:0.4,conditional:0.4,prefix,fixed:3+copy:1,adaptive+copy"


class LetterTokenizer:
    """A token per letter, at most 24 of them: what the prompt sets need of a tokenizer."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5 + ord(letter) % 90 for letter in text[:24]]}

    def decode(self, token_ids: list[int], **_: object) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target()
    target.tokenizer = LetterTokenizer()
    return target


@pytest.fixture(scope="module")
def drafter(target: Target) -> Drafter:
    return tiny_drafter(target)


@pytest.fixture(scope="module")
def models(target: Target, drafter: Drafter) -> Models:
    return Models(target, drafter, stock=target)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))


def small(**changed: object) -> Plan:
    return Plan(**({"arms": "plain,generate,fixed:4", "domains": "code,chat", "prompts": 3, "tokens": 8, "threads": 1} | changed))


# ---- arms


def test_a_comma_inside_an_arms_numbers_does_not_split_it():
    assert [arm.name for arm in parse_arms("plain, adaptive:0.6,0.3,0.05+copy:2,fixed:5")] == [
        "plain",
        "adaptive:0.6,0.3,0.05+copy:2",
        "fixed:5",
    ]


def test_every_policy_of_the_registry_is_an_arm_and_so_is_a_plug_in(models, monkeypatch):
    class Mine(FixedWindow):
        pass

    monkeypatch.setitem(POLICIES, "mine", PolicyRow("mine", "mine", "#000000", lambda values, sps: Mine(3)))
    for name in POLICIES.keys() - {"plain"}:
        arm = parse_arm(f"{name}+copy:3+block:2")
        assert arm.trained and arm.min_match == 3 and arm.policy(models.target, models.drafter).n == 2
    assert len(models.decoder(parse_arm("mine"), Settings(max_new_tokens=9))([5, 6, 7], 0).token_ids) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        "fixd:5",
        "plain+copy",
        "fixed:0",
        "fixed:x",
        "confidence:2",
        "mtp1:2",
        "fixed:5+copy:0",
        "fixed:5+paste",
        "fixed:5+block",
        "fixed:5+block:0",
        "fixed:5+copy+copy",
        "lookup:2",
        "assisted:1",
        "fixed:5+phrases",
        "prefix+siblings",
        "plain+block:2",
        "generate+copy",
        "copy:0",
        "",
    ],
)
def test_a_misspelled_arm_is_named_with_the_choices(wrong):
    with pytest.raises(ValueError, match=r"choose from plain, generate") as error:
        parse_arm(wrong)
    assert repr(wrong) in str(error.value)


def test_an_arm_named_twice_is_refused():
    with pytest.raises(ValueError, match="'mtp1' is named twice"):
        parse_arms("mtp1,plain,mtp1")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--arms", "plain,fixd:5"],
        ["--baseline", "generat"],
        ["--domains", "prose"],
        ["--prompts", "100000"],
        ["--prompts", "0"],
        ["--temperature", "-1"],
        ["--dtype", "int3"],
        ["--top-p", "0"],
        ["--threads", "0"],
        ["identity", "--temperature", "1"],
    ],
)
def test_bad_input_is_one_line_before_anything_runs(wrong, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "load", lambda *_, **__: pytest.fail("the models were loaded"))
    assert command.main(wrong) == 2
    assert wrong[-1].removeprefix("plain,") in capsys.readouterr().err
    assert capsys.readouterr().err.count("\n") <= 1


def test_a_window_beyond_the_drafters_block_is_refused_before_anything_runs(models, tmp_path):
    with pytest.raises(ValueError, match=r"'fixed:9'.*block size 4"):
        measure_speed(small(arms="plain,fixed:9"), models, tmp_path / "r.parquet")


# ---- the paired run


def test_arms_rotate_from_prompt_to_prompt():
    assert [rotated("ABC", turn) for turn in range(4)] == [list("ABC"), list("BCA"), list("CAB"), list("ABC")]


def test_every_arm_stands_in_every_place_equally_often_in_every_domain(models, tmp_path):
    frame = measure_speed(small(), models, tmp_path / "r.parquet")
    assert set(frame.groupby(["domain", "arm", "place"]).size()) == {1}
    assert frame.groupby(["domain", "arm", "place"]).ngroups == 2 * 3 * 3


def test_the_warm_up_prompt_is_not_measured():
    for split in ("dev", "test"):
        plan = small(split=split)
        assert plan.warm_up_prompt().id not in {unit.item.id for unit in plan.units}


def test_a_set_of_ones_own_may_come_first(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    plan = small(domains=f"{tmp_path / 'mine.jsonl'},code", prompts=2)
    assert plan.warm_up_prompt().messages[0]["content"] == "a"


def test_rows_carry_their_provenance(models, target, tmp_path):
    frame = measure_speed(small(prompts=1), models, tmp_path / "r.parquet")
    assert len(frame) == 2 * 3
    row = frame[frame["arm"] == "fixed:4"].iloc[0]
    assert (row["target_digest"], row["dtype"], row["device"], row["threads"]) == (target.digest, "float32", "cpu", 1)
    assert (row["drafter"], row["drafter_block_size"], row["drafter_layers"]) == ("default", 4, 2)
    assert (row["prompt_set"], row["split"], row["n"], row["temperature"], row["seed"]) == ("code,chat", "test", 1, 0, 0)
    assert row["schema_version"] == 1 and row["machine"] and row["cores"] >= 1
    assert (row["torch"], row["dspark"]) == (torch.__version__, dspark.__version__)
    assert row["revision"] and row["utc"].endswith("+00:00")
    assert set(frame.loc[frame["arm"] == "plain", "drafter"]) == {""}


def test_counts_of_a_row_agree_with_each_other(models, tmp_path):
    frame = measure_speed(small(), models, tmp_path / "r.parquet")
    assert (frame["decoded_tokens"] == frame["tokens"] - 1).all()
    drafted = frame[frame["arm"] == "fixed:4"]
    assert (drafted["accepted"] <= drafted["checked"]).all() and (drafted["checked"] <= drafted["drafted"]).all()
    assert (drafted["tokens_per_round"] <= 5).all()
    assert (frame.loc[frame["arm"] == "plain", "tokens_per_round"] == 1).all()
    assert frame.loc[frame["arm"] == "generate", "verify_ms"].isna().all()


def test_greedy_arms_in_float32_give_identical_ids(models, tmp_path):
    frame = check_identity(small(arms=EVERY_POLICY, prompts=1, tokens=24), models, tmp_path / "i.parquet")
    assert frame["equal"].all() and (frame["first_divergence"] == -1).all() and frame[["margin", "noise"]].isna().all(axis=None)
    assert len(frame) == 2 * 10 and not beyond_rounding(frame).any()
    assert "2 of 2" in identity_table(frame)


PEERS = "eager,generate,lookup,assisted,copy,copy:1,copy+block:3"


def test_every_peers_greedy_text_in_float32_is_plains(models, tmp_path):
    """Random text of few tokens repeats itself, so the peers that copy do draft here."""
    plan = small(arms=f"plain,{PEERS},adaptive+copy:1+block:2", prompts=1, tokens=24)
    frame = measure_speed(plan, models, tmp_path / "speed.parquet")
    assert frame["equals_baseline"].all(), frame.loc[~frame["equals_baseline"], ["arm", "prompt_id"]]
    faster = frame[frame["tokens_per_round"] > 1].groupby("arm").size()
    assert {"lookup", "copy:1"} <= set(faster.index), faster


def test_a_peers_steps_are_its_own_and_nothing_is_claimed_about_their_inside(models):
    prompt = [5, 6, 7, 8, 9]
    plain = models.decoder(parse_arm("plain"), Settings(max_new_tokens=24))(prompt, 0)
    for name in ("generate", "lookup", "assisted"):
        trial = models.decoder(parse_arm(name), Settings(max_new_tokens=24))(prompt, 0)
        assert trial.token_ids == plain.token_ids
        assert [token for r in trial.rounds for token in r.committed] == trial.token_ids[-sum(len(r.committed) for r in trial.rounds) :]
        assert [r.anchor for r in trial.rounds[1:]] == [r.committed[-1] for r in trial.rounds[:-1]]
        assert all(r.verify_length == 0 and math.isnan(r.verify_seconds) for r in trial.rounds)


@pytest.mark.parametrize("name", ["copy", "copy:1", "copy+block:3"])
def test_copying_without_a_drafter_keeps_drafts_of_a_text_that_repeats_itself(name):
    models = Models(tiny_target(vocab_size=8, eos_token_id=None))  # so few tokens that it must
    trials = {arm: models.decoder(parse_arm(arm), Settings(max_new_tokens=48))([3, 4, 5], 0) for arm in ("plain", name)}
    assert trials[name].token_ids == trials["plain"].token_ids
    assert any(r.accepted for r in trials[name].rounds)


def answer(tokens: int, milliseconds: float, accepted: int | None = None) -> dict:
    """What llama.cpp says with a token: how many there are, when their pass ended, how many drafts were accepted so far."""
    drafted = {} if accepted is None else {"draft_n_accepted": accepted}
    return {"tokens_predicted": tokens, "timings": {"prompt_ms": 2000.0, "predicted_ms": milliseconds} | drafted}


def test_llamacpps_passes_are_counted_from_what_its_server_says():
    plain = [(3.0, answer(1, 0.001)), (4.0, answer(2, 1000.0)), (5.0, answer(3, 2000.0))]
    assert passes(1.0, plain) == [(1, 3.0), (2, 4.0), (3, 5.0)]
    assert passes(1.0, [*plain, (5.5, answer(3, 2100.0))]) == [(1, 3.0), (2, 4.0), (3, 5.0)]  # the last answer repeats the count
    blocks = [(3.0, answer(1, 0.001, 0)), *((4.0 + i / 8, answer(2 + i, 1000.0, 2)) for i in range(3)), (6.0, answer(5, 3000.0, 2))]
    assert passes(1.0, blocks) == [(1, 3.0), (4, 4.0), (5, 6.0)]
    ended = [(3.0, answer(1, 0.001, 0)), (4.0, answer(2, 1000.0, 3))]  # an end-of-text token among accepted drafts
    assert passes(1.0, ended) == [(1, 3.0), (2, 4.0)]


def test_a_character_of_several_tokens_costs_llamacpp_several_passes():
    emoji = [(3.0, answer(1, 0.001)), (6.0, answer(4, 3000.0))]  # the stream leaves out tokens 2 and 3
    assert passes(1.0, emoji) == [(1, 3.0), (2, 4.0), (3, 5.0), (4, 6.0)]
    drafted = [(3.0, answer(1, 0.001, 0)), (7.0, answer(5, 4000.0, 2))]  # two passes: four tokens, two of them drafts
    assert passes(1.0, drafted) == [(1, 3.0), (4, 5.0), (5, 7.0)]
    first = [(6.0, answer(3, 2000.0))]
    assert passes(1.0, first) == [(1, 4.0), (2, 5.0), (3, 6.0)]


@pytest.mark.parametrize("name", ["llamacpp", "llamacpp+dspark"])
def test_llamacpp_is_refused_where_it_would_measure_something_else(models, monkeypatch, name):
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct in bfloat16.*tiny in torch.float32"):
        models.decoder(parse_arm(name), Settings())
    with pytest.raises(ValueError, match=r"temperature is 0\.5"):
        models.decoder(parse_arm(name), Settings(temperature=0.5))
    monkeypatch.setattr(llamacpp, "PACKAGE", "no-such-package")
    for work in (lambda: LlamaCpp(Path("target.gguf"), models.target), lambda: parse_arm(name).pass_name):
        with pytest.raises(ValueError, match="pip install no-such-package"):
            work()


def test_copying_alone_leaves_a_drafter_that_is_there_for_other_arms_alone(models):
    trial = models.decoder(parse_arm("copy"), Settings(max_new_tokens=24))([5, 6, 7, 8, 9], 0)
    assert {r.source for r in trial.rounds} <= {"", "copy"}


def test_a_peer_that_leaves_early_leaves_the_target_whole(models):
    layers = models.target.model.config.num_hidden_layers
    models.decoder(parse_arm("assisted"), Settings(max_new_tokens=6))([5, 6, 7], 0)
    assert models.target.model.config.num_hidden_layers == layers


def test_a_shortened_policy_never_drafts_beyond_its_block(models):
    long, short = (models.decoder(parse_arm(name), Settings(max_new_tokens=24))([5, 6, 7], 0) for name in ("fixed", "fixed+block:2"))
    assert max(len(r.draft_tokens) for r in long.rounds) == 4 and max(len(r.draft_tokens) for r in short.rounds) == 2
    with pytest.raises(ValueError, match=r"'fixed:3\+block:2': a window of 3"):
        models.decoder(parse_arm("fixed:3+block:2"), Settings())
    with pytest.raises(ValueError, match="blocks of 5 tokens"):
        models.decoder(parse_arm("adaptive+block:5"), Settings())


def test_a_divergence_is_found_where_it_is():
    assert first_divergence([1, 2, 3], [1, 2, 3]) == -1
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize("arm", ["plain", "fixed:4"])
@pytest.mark.parametrize("i", [0, 1, 7, 19])
def test_only_a_divergence_between_tied_tokens_passes_for_rounding(arm, i):
    target = tiny_target(eos_token_id=None, tie_word_embeddings=False)
    models = Models(target, tiny_drafter(target), stock=target)
    prompt = [5, 6, 7]
    trial = models.decoder(parse_arm(arm), Settings(max_new_tokens=20))(prompt, 0)
    right = trial.token_ids
    other = next(token for token in range(100) if token not in right)
    diverged = replace(trial, token_ids=[*right[:i], other, *right[i + 1 :]])
    margin, noise = weigh(models, prompt, right, diverged, i)
    assert margin > 1e-2 > noise
    with torch.no_grad():
        target.head_weight[other] = target.head_weight[right[i]]
    assert weigh(models, prompt, right, diverged, i) == (0, 0)


def test_a_text_that_only_ends_elsewhere_never_passes_for_rounding(models):
    trial = models.decoder(parse_arm("plain"), Settings(max_new_tokens=5))([5, 6, 7], 0)
    margin, noise = weigh(models, [5, 6, 7], trial.token_ids[:3], trial, 3)
    assert margin > noise


@pytest.mark.parametrize("make", [None, lean_pass], ids=["transformers", "lean"])
def test_a_fault_of_the_cache_does_not_pass_for_rounding(make, tmp_path, monkeypatch):
    target = tiny_target()
    target.tokenizer, target.verifier = LetterTokenizer(), make and make(target)
    models = Models(target, tiny_drafter(target), stock=target)
    for slot in (RewindCache, Slot):
        rewind = slot.rewind
        monkeypatch.setattr(slot, "rewind", lambda self, length, rewind=rewind: rewind(self, min(length + 1, self.length)))
    frame = check_identity(small(arms="plain,fixed:4", prompts=2, tokens=24), models, tmp_path / "i.parquet")
    faulty = frame[frame["arm"] == "fixed:4"]
    assert frame.loc[frame["arm"] == "plain", "equal"].all()
    assert not faulty["equal"].any() and beyond_rounding(faulty).all()
    assert identity_table(frame).splitlines()[-1].split()[-1] == "4"


def test_a_fault_of_the_pass_does_not_pass_for_rounding(monkeypatch):
    """Run again, it computes the same wrong logits; rounding cannot explain them."""
    target = tiny_target(eos_token_id=None)
    stock, target.verifier = copy.copy(target), lean_pass(target)
    models, rotate = Models(target, tiny_drafter(target), stock), Attention.rotate
    monkeypatch.setattr(Attention, "rotate", lambda self, x: rotate(self, x) * (1 + 0.2 * (self.widest == 5)))
    prompt, settings = [5, 6, 7], Settings(max_new_tokens=40)
    right, trial = (models.decoder(parse_arm(arm), settings)(prompt, 0) for arm in ("generate", "fixed:4"))
    i = first_divergence(trial.token_ids, right.token_ids)
    margin, noise = weigh(models, prompt, right.token_ids, trial, i)
    assert i > 0 and margin > noise


def test_a_flip_in_bfloat16_is_explained_by_the_pass_that_decoded():
    """Our passes round in places of their own, so the run that explains their texts is their own."""
    stock = tiny_target(dtype=torch.bfloat16, eos_token_id=None)
    target = pack_target(copy.copy(stock))
    models, settings = Models(target, tiny_drafter(stock), stock), Settings(max_new_tokens=24)
    flips = 0
    for first in range(5, 15):
        prompt = [first, 6, 7]
        expected = models.decoder(parse_arm("generate"), settings)(prompt, 0).token_ids
        for arm in ("plain", "fixed:4"):
            trial = models.decoder(parse_arm(arm), settings)(prompt, 0)
            if (i := first_divergence(trial.token_ids, expected)) >= 0:
                margin, noise = weigh(models, prompt, expected, trial, i)
                assert margin <= noise, (first, arm, i, margin, noise)
                flips += 1
    assert target.pass_name != "transformers" and flips


def test_generate_is_measured_on_the_stock_target_and_no_drafter_is_loaded_without_need(monkeypatch):
    def load(name, *, dtype, device, pack=True):
        target = tiny_target(dtype=torch.bfloat16)
        return pack_target(target) if pack else target

    monkeypatch.setattr(plan_module, "load_target", load)
    monkeypatch.setattr(plan_module, "load_drafter", lambda *_: pytest.fail("no arm is trained"))
    both = small(arms="plain,generate,lookup,copy").load()
    assert not is_packed(both.stock.model) and both.stock.digest == both.target.digest
    assert small(arms="plain").load().stock is None
    assert small(arms="plain").load(stock=True).stock is not None
    only = small(arms="generate").load()
    assert only.target is only.stock and not is_packed(only.stock.model)
    if is_packed(both.target.model):
        with pytest.raises(ValueError, match="pack=False"):
            by_transformers(both.target, small().settings)


def test_sampling_through_transformers_obeys_its_seed_and_leaves_the_global_one(target):
    decoder = by_transformers(target, small(temperature=1.0, tokens=12).settings)
    before = torch.get_rng_state()
    first, second, other = (decoder([5, 6, 7], seed).token_ids for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(before, torch.get_rng_state())


# ---- results


def kill_before(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the n-th unit of a process is being written."""
    keep, calls = Ledger.add, []

    def add(self: Ledger, key: str, rows: list) -> None:
        calls.append(key)
        if len(calls) == n:
            with self.partial.open("ab") as file:
                file.write(b'{"unit": "' + key.encode())
            raise KeyboardInterrupt
        keep(self, key, rows)

    monkeypatch.setattr(Ledger, "add", add)


def test_a_killed_bench_resumes_without_a_row_twice(models, tmp_path, monkeypatch):
    out, plan = tmp_path / "r.parquet", small(prompts=2, repeats=2, arms="plain,generate,mtp1")
    with monkeypatch.context() as patched:
        kill_before(4, patched)
        with pytest.raises(KeyboardInterrupt):
            measure_speed(plan, models, out)
    assert not out.exists()
    frame = measure_speed(plan, models, out)
    assert len(frame) == 2 * 2 * 3 * 2
    assert not frame.duplicated(["domain", "prompt_id", "arm", "repeat"]).any()
    assert list(tmp_path.glob("*.partial*")) == []


def test_a_finished_bench_is_not_run_again(models, tmp_path, monkeypatch):
    out = tmp_path / "r.parquet"
    first = measure_speed(small(prompts=1), models, out)
    monkeypatch.setattr(speed, "warm_up", lambda *_: pytest.fail("it ran again"))
    pd.testing.assert_frame_equal(measure_speed(small(prompts=1), models, out), first)


@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_in_the_same_file_is_refused_naming_both(finished, models, tmp_path, monkeypatch):
    out = tmp_path / "r.parquet"
    if finished:
        measure_speed(small(prompts=1), models, out)
    else:
        kill_before(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            measure_speed(small(prompts=1), models, out)
    with pytest.raises(ValueError, match=r"tokens=8.*tokens=9.*--out"):
        measure_speed(small(prompts=1, tokens=9), models, out)
    retrained = replace(models, drafter=tiny_drafter(models.target, seed=5))
    with pytest.raises(ValueError, match="drafter_digest"):
        measure_speed(small(prompts=1), retrained, out)


def test_a_partial_file_damaged_in_the_middle_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "r.parquet", {"a": 1})
    ledger.add("0/x", [{"v": 1}])
    ledger.partial.write_bytes(ledger.partial.read_bytes().replace(b'"v"', b'"v'))
    with pytest.raises(ValueError, match="damaged in line 2"):
        Ledger(tmp_path / "r.parquet", {"a": 1})


def test_results_come_back_number_for_number_and_measured_ones_are_packed_closely(tmp_path):
    chance = np.random.default_rng(0)
    measured = chance.normal(1, 0.01, 20_000).astype("float32")
    frame = pd.DataFrame(
        {
            "seconds": [1.5, math.nan, math.inf, -0.0],
            "logits": np.split(measured, 4),
            "tokens": [[1, 2], [], [3], [2**40]],
            "arm": ["plain", None, "prefix", "plain"],
            "rounds": [1, 2, 3, 4],
        }
    )
    write_results(frame, tmp_path / "r.parquet")
    pd.testing.assert_frame_equal(read_results(tmp_path / "r.parquet"), frame)
    assert (tmp_path / "r.parquet").stat().st_size < 0.7 * measured.nbytes


def test_parquet_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.parquet"
    old = pd.DataFrame({"a": [1]})
    write_results(old, path)

    def half(_table: object, scratch: Path, **_: object) -> None:
        scratch.write_bytes(b"PAR1 half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.pq, "write_table", half)
    with pytest.raises(ValueError, match="No space left"):
        write_results(pd.DataFrame({"a": [2]}), path)
    pd.testing.assert_frame_equal(read_results(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_the_results_in_data_load_and_name_only_arms_that_exist():
    for path in sorted((data_dir() / "results").glob("*.parquet")):
        frame = read_results(path)
        for arm in filter(None, dict.fromkeys(frame["arm"]) if "arm" in frame else ()):  # a load's step times are of no arm
            assert parse_arm(arm).name == arm, path


def test_lists_that_are_empty_everywhere_come_back_as_lists(tmp_path):
    write_results(pd.DataFrame({"arm": ["plain"], "acceptance_at": [[]]}), tmp_path / "r.parquet")
    assert list(read_results(tmp_path / "r.parquet")["acceptance_at"][0]) == []


def test_ctrl_c_ends_with_one_line(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "load", lambda *_, **__: models)
    kill_before(2, monkeypatch)
    arguments = ["--arms", "plain,mtp1", "--domains", "chat", "--prompts", "2", "--tokens", "4", "--threads", "1"]
    assert command.main([*arguments, "--out", str(tmp_path / "r.parquet")]) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dspark.bench:")]
    assert len(lines) == 1 and "same command resumes" in lines[0]


def test_the_command_measures_and_prints(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "load", lambda *_, **__: models)
    arguments = ["--arms", "plain,generate,mtp1", "--domains", "chat", "--prompts", "2", "--tokens", "6", "--threads", "1"]
    assert command.main([*arguments, "--baseline", "generate", "--out", str(tmp_path / "r.parquet")]) == 0
    shown = capsys.readouterr().out
    assert "speed-up over generate" in shown and "2 test prompts" in shown and "1 threads" in shown and "greedy" in shown


def test_a_run_without_a_place_is_kept_apart_from_committed_results_and_from_runs_with_other_options(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "load", lambda *_, **__: models)
    monkeypatch.chdir(tmp_path)
    for tokens in ("4", "5", "4"):
        arguments = ["--arms", "plain,mtp1", "--domains", "chat", "--prompts", "1", "--tokens", tokens, "--threads", "1"]
        assert command.main(arguments) == 0
    found = sorted(path.relative_to(tmp_path).parent.as_posix() for path in tmp_path.rglob("*.parquet"))
    assert found == ["runs/bench", "runs/bench"]


# ---- where it ran


def test_the_revision_is_a_hash_marked_dirty_and_unknown_outside_git(tmp_path, monkeypatch):
    source = tmp_path / "dspark" / "__init__.py"
    source.parent.mkdir()
    source.write_text("")
    monkeypatch.setattr(dspark, "__file__", str(source))
    current = provenance.revision.__wrapped__
    assert current() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert current() == "unknown"  # not tracked: the revision would be of another repository
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    clean = current()
    assert len(clean) >= 7 and int(clean, 16) >= 0
    source.write_text("changed = 1\n")
    assert current() == f"{clean}-dirty"


def test_memory_is_measured_per_arm_and_resumes(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "load", lambda plan: models if plan.parsed_arms[0].spec else replace(models, drafter=None))
    monkeypatch.setattr(speed, "in_new_process", lambda function, plan: json.loads(json.dumps(function(plan))))
    plan, out = small(arms="plain,fixed:4", prompts=1, repeats=2), tmp_path / "m.parquet"
    with monkeypatch.context() as patched:
        kill_before(3, patched)
        with pytest.raises(KeyboardInterrupt):
            speed.measure_memory(plan, out)
    frame = speed.measure_memory(plan, out)
    assert list(frame["arm"]) == ["plain", "fixed:4", "fixed:4", "plain"]
    assert (frame["peak_rss_mib"] > 0).all() and (frame["tokens"] == frame["tokens"].iloc[0]).all()
    assert "peak_rss_mib / plain's" in memory_table(frame, "plain")
    with pytest.raises(ValueError, match="'mtp1' was not measured"):
        memory_table(frame, "mtp1")


def test_an_error_in_a_new_process_is_raised_here():
    with pytest.raises(ValueError, match=r"^no model at './missing'"):
        in_new_process(speed.peak_of, small(arms="plain", target="./missing"))


def test_a_process_that_is_killed_is_one_clear_error():
    with pytest.raises(ValueError, match="was killed"):
        in_new_process(os._exit, 9)


# ---- statistics, on frames made up for it


def made_up(ratio: float, n: int = 12, noise: float = 0.1, domains: tuple[str, ...] = ("code", "chat")) -> pd.DataFrame:
    """Two arms, "fast" being ``ratio`` times faster on the median prompt, and a third that equals the baseline."""
    rng = np.random.default_rng(0)
    rows = []
    for domain in domains:
        for i in range(n):
            plain = 30 + 5 * rng.random()
            for arm, latency in (("plain", plain), ("same", plain), ("fast", plain / (ratio * math.exp(noise * rng.normal())))):
                rows.append(
                    {"arm": arm, "domain": domain, "prompt_id": f"{domain}/{i}", "repeat": 0, "latency_ms": latency}
                    | {
                        "decoded_tokens": 100,
                        "rounds": 50 if arm == "fast" else 100,
                        "seconds": latency / 10,
                        "model_seconds": latency / 11,
                    }
                    | {"draft_ms": 5.0, "verify_ms": 30.0, "round_ms": 36.0, "equals_baseline": True}
                    | {"reached_at": [50, 30], "accepted_at": [30, 20]}
                )
    return pd.DataFrame(rows)


def of(summary: pd.DataFrame, arm: str, domain: str = "all") -> pd.Series:
    return summary[(summary["arm"] == arm) & (summary["domain"] == domain)].iloc[0]


def test_the_margin_is_between_the_two_best_tokens_of_plain_decoding(target):
    text, prompt = [9, 30, 7, 55], [5, 6, 7]
    for i in range(4):
        logits, _ = target.forward(torch.tensor([prompt + text[:i]]), target.new_cache())
        best, second = logits[0, -1].topk(2).values.tolist()
        assert margin(target, prompt, text, i) == pytest.approx(best - second, abs=1e-4) and best > second


def test_the_speed_up_of_identical_arms_is_one():
    same = of(summarise(made_up(1.5), "plain", resamples=200), "same")
    assert (same["speedup"], same["low"], same["high"]) == pytest.approx((1, 1, 1))


def test_the_interval_covers_a_known_ratio_and_is_deterministic():
    frame = made_up(1.7)
    first, again = (summarise(frame, "plain", resamples=2000) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)
    for domain in ("code", "chat", "all"):
        line = of(first, "fast", domain)
        assert line["low"] <= 1.7 <= line["high"] and line["low"] < line["speedup"] < line["high"]
    assert of(first, "fast")["high"] - of(first, "fast")["low"] < 0.4


def test_a_domains_interval_does_not_depend_on_the_other_domains():
    frame = made_up(1.7)
    both, alone = summarise(frame, "plain"), summarise(frame[frame["domain"] == "chat"], "plain")
    columns = ["n", "speedup", "low", "high"]
    assert of(both, "fast", "chat")[columns].equals(of(alone, "fast", "chat")[columns])


def test_overall_is_the_geometric_mean_of_the_domains():
    frame = made_up(1.0, noise=0)
    frame.loc[(frame["arm"] == "fast") & (frame["domain"] == "code"), "latency_ms"] /= 4
    assert of(summarise(frame, "plain", resamples=100), "fast")["speedup"] == pytest.approx(2)


def test_repeats_count_by_their_median():
    frame = pd.concat([made_up(2.0, noise=0).assign(repeat=r) for r in range(3)], ignore_index=True)
    frame.loc[(frame["arm"] == "fast") & (frame["repeat"] == 1), "latency_ms"] *= 50
    paired = speedups(frame, "plain")
    assert len(paired) == 3 * 24
    assert paired.loc[paired["arm"] == "fast", "speedup"].to_numpy() == pytest.approx(np.full(24, 2.0))


def test_tau_is_all_tokens_over_all_rounds_and_the_table_says_so():
    frame = made_up(1.7).assign(**HEADING)
    lines = summarise(frame, "plain", resamples=100)
    assert of(lines, "fast", "code")["tokens_per_round"] == 2
    assert "bfloat16" in speed_table(frame, "plain")


HEADING = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "drafter": "",
    "target": "t",
    "n": 12,
    "split": "test",
    "prompt_set": "code,chat",
} | {
    "max_new_tokens": 128,
    "dtype": "bfloat16",
    "threads": 2,
    "machine": "m",
    "device": "cpu",
}


def test_a_prompt_that_ends_at_once_is_left_out_of_the_ratio_in_both_arms():
    frame = made_up(2.0, noise=0)
    frame.loc[(frame["arm"] == "fast") & (frame["prompt_id"] == "code/0"), "latency_ms"] = math.nan
    assert of(summarise(frame, "plain", resamples=100), "fast", "code")["n"] == 11


def test_a_baseline_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"'generate' was not measured: choose one of fast, plain, same"):
        summarise(made_up(1.5), "generate")


def a_round(checked: int, accepted: int, committed: int) -> Round:
    return Round(index=1, committed=(7,) * committed, draft_tokens=(7,) * 4, verify_length=checked, accepted=accepted)


def test_acceptance_is_conditional_and_ends_with_the_text():
    rejected_first, rejected_third, all_kept = a_round(4, 0, 1), a_round(4, 2, 3), a_round(4, 4, 5)
    ended_inside = a_round(4, 4, 2)  # the second draft ended the text: the two after it never counted
    assert positions([rejected_first, rejected_third, all_kept, ended_inside]) == ([4, 3, 2, 1], [3, 3, 1, 1])
    pooled = acceptance_by_position(made_up(1.5, n=2))
    assert list(pooled["acceptance"].unique()) == pytest.approx([30 / 50, 20 / 30])
