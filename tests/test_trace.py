"""A trace is replayed as the policy would have decoded, and a file gives back the trace that went into it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_decode import greedy_reference, policies
from tiny import Wavering, full_disk, random_prompt, tiny_drafter, tiny_target

import dspark
from dspark.bench.prompts import data_dir
from dspark.bench.replay import Oracle, replay
from dspark.bench.results import read_results, write_results
from dspark.bench.trace import StepTimes, Trace, record, texts_of, trace_decode
from dspark.bench.traces import load_traces, save_traces
from dspark.draft.lookup import ContextLookup
from dspark.round import Round
from dspark.schedule import Policy, Shortened
from dspark.tune.calibrate import rollouts

TIMES = StepTimes({n: 1e-3 + 1e-4 * n for n in range(9)}, {n: 1e-2 + 1e-3 * n for n in range(1, 10)}, 1e-5, 1e-4)
PROMPT = [5, 6, 7]
REAL = ("confidence", "target_probs_of_drafts", "draft_probs_of_drafts")


def untimed(rounds: list[Round]) -> list[Round]:
    return [replace(r, draft_seconds=0.0, verify_seconds=0.0, seconds=0.0) for r in rounds]


def assert_same(found: list[Round], expected: list[Round], *about: object) -> None:
    """But for seconds, and for the last digits that passes of different width do not share."""
    for a, b in zip(untimed(found), untimed(expected), strict=True):
        close = {name: pytest.approx(getattr(b, name), rel=1e-3, abs=1e-5) for name in REAL}
        assert {name: getattr(a, name) for name in REAL} == close, (a, b, *about)
        assert replace(a, **dict.fromkeys(REAL, ())) == replace(b, **dict.fromkeys(REAL, ())), about


def all_policies(block_size: int) -> list[Policy]:
    return [*policies(block_size), dspark.AdaptiveWindow(0.02, 0.01, 0.005), Shortened(dspark.PrefixScheduler(TIMES.sps), 2)]


@pytest.mark.parametrize("source", ["drafter", "copying", "wavering"])
@pytest.mark.parametrize("seed", range(3))
def test_a_replay_gives_the_rounds_of_decoding_whatever_the_policy(source: str, seed: int) -> None:
    """Random drafts, copies of a text that repeats itself, and drafts that are mostly right; several limits."""
    target = tiny_target(seed=seed, eos_token_id=None)
    prompt = random_prompt(seed, 6) * (3 if source == "copying" else 1)
    drafter = tiny_drafter(target, seed=seed)
    if source == "copying":
        drafter = dspark.ContextLookup(drafter, 1, max_copy=6)
    if source == "wavering":
        drafter = Wavering(target, greedy_reference(target, prompt, 60), 4, seed=seed)
    seen = set()
    for limit in (24, 7, 1):
        trace = record(target, drafter, prompt, max_new_tokens=limit, times=TIMES)
        for policy in all_policies(drafter.block_size):
            expected = dspark.generate(target, drafter, prompt, max_new_tokens=limit, policy=policy).rounds
            assert_same(replay(trace, policy), expected, policy, limit)
            seen |= {(r.source, r.verify_length, r.accepted) for r in expected}
    assert len(seen) > 4


@pytest.mark.parametrize("place", range(1, 10))
def test_a_replay_ends_where_decoding_ends_with_the_end_of_text_anywhere_in_a_block(place: int) -> None:
    target = tiny_target(seed=3, eos_token_id=None)
    text = greedy_reference(target, PROMPT, 40)
    drafter = Wavering(target, text, 5, errors=0.1, seed=place)
    target.eos_token_ids = frozenset([text[place]])
    trace = record(target, drafter, PROMPT, max_new_tokens=20, times=TIMES)
    assert trace.token_ids == text[: text.index(text[place]) + 1]
    for policy in all_policies(5):
        expected = dspark.generate(target, drafter, PROMPT, max_new_tokens=20, policy=policy).rounds
        assert_same(replay(trace, policy), expected, policy)


def test_a_trace_ends_with_the_targets_context() -> None:
    target = tiny_target(eos_token_id=None, max_position_embeddings=24)
    drafter = tiny_drafter(target)
    trace = record(target, drafter, PROMPT * 3, max_new_tokens=99, times=TIMES)
    assert len(trace.token_ids) == 15
    for policy in all_policies(4):
        expected = dspark.generate(target, drafter, PROMPT * 3, max_new_tokens=99, policy=policy).rounds
        assert_same(replay(trace, policy), expected, policy)


def test_every_position_of_a_complete_trace_holds_a_whole_checked_block() -> None:
    target = tiny_target(eos_token_id=None)
    trace = record(target, tiny_drafter(target), PROMPT, max_new_tokens=12, times=TIMES)
    text = trace.token_ids
    assert [r.anchor for r in trace.rounds] == [None, *text[:-1]]
    for i, r in enumerate(trace.rounds[1:], 1):
        assert r.index == i and len(r.draft_tokens) == len(r.target_probs_of_drafts) == r.verify_length == 4
        agreeing = [a == b for a, b in zip(r.draft_tokens, text[i:], strict=False)]
        assert r.accepted >= min([*[k for k, same in enumerate(agreeing) if not same], len(agreeing)])
        assert list(r.committed[: len(text) - i]) == text[i : i + r.accepted + 1]


def test_seconds_are_the_traces_step_times() -> None:
    target = tiny_target(eos_token_id=None)
    trace = record(target, tiny_drafter(target), PROMPT, max_new_tokens=12, times=TIMES)
    for policy in (dspark.FixedWindow(2), dspark.Autoregressive(), dspark.ConfidenceThreshold(0.3)):
        for r in replay(trace, policy)[1:]:
            assert r.draft_seconds == pytest.approx(TIMES.draft[len(r.draft_tokens)] if r.source else 0.0)
            assert r.verify_seconds == pytest.approx(TIMES.verify[1 + r.verify_length])
            assert r.seconds == pytest.approx(r.draft_seconds + r.verify_seconds + 1e-4)


def test_no_policy_is_faster_than_the_oracle() -> None:
    target = tiny_target(eos_token_id=None)
    for seed in range(3):
        drafter = Wavering(target, greedy_reference(target, PROMPT, 80), 5, errors=0.3, seed=seed)
        trace = record(target, drafter, PROMPT, max_new_tokens=40, times=TIMES)
        fastest = sum(r.seconds for r in replay(trace, Oracle())[1:])
        others = [sum(r.seconds for r in replay(trace, policy)[1:]) for policy in all_policies(5)]
        assert fastest <= min(others) and fastest < 0.99 * min(others)
        assert all(r.accepted == r.verify_length for r in replay(trace, Oracle()))
        assert [t for r in replay(trace, Oracle()) for t in r.committed] == trace.token_ids


def test_step_times_are_measured_for_every_width() -> None:
    target = tiny_target(eos_token_id=None)
    trace = record(target, dspark.ContextLookup(tiny_drafter(target), 1, max_copy=6), PROMPT, max_new_tokens=4)
    assert list(trace.times.draft) == [1, 2, 3, 4] and list(trace.times.verify) == [1, 2, 3, 4, 5, 6, 7]
    assert all(seconds > 0 for seconds in (*trace.times.draft.values(), *trace.times.verify.values()))
    assert all(r.seconds > 0 for r in replay(trace, dspark.FixedWindow()))


@pytest.mark.parametrize("prompt", [[5, 6, 7, 8, 5, 6, 7], torch.tensor([[5, 6, 7, 8, 5, 6, 7]])], ids=["list", "tensor"])
def test_lookups_without_a_drafter_are_recorded_and_the_prompt_is_kept(prompt: object) -> None:
    target = tiny_target()
    trace = record(target, ContextLookup(None, target=target), prompt, max_new_tokens=12)
    assert trace.about["prompt"] == [5, 6, 7, 8, 5, 6, 7] and trace.about["drafter"] == "ContextLookup"
    assert trace.times.draft and len(trace.token_ids) == 12


def test_a_file_gives_back_the_trace(tmp_path) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    trace = record(target, drafter, PROMPT, max_new_tokens=9, times=TIMES)
    save_traces([trace], tmp_path / "trace.parquet")
    found = load_traces(tmp_path / "trace.parquet")[0][1]
    assert found.about == trace.about
    for kept, made in zip(found.rounds, trace.rounds, strict=True):
        seconds = {name: pytest.approx(getattr(made, name), rel=1e-6) for name in ("draft_seconds", "verify_seconds", "seconds")}
        assert {name: getattr(kept, name) for name in seconds} == seconds
    assert untimed(found.rounds) == untimed(trace.rounds)
    types = {type(value) for r in found.rounds for value in (r.accepted, r.anchor, *r.committed, *r.confidence)}
    assert types <= {int, float, type(None)}
    assert replay(found, dspark.FixedWindow())  # and what was loaded can be replayed


def test_characters_of_several_tokens_are_read_from_a_file_as_they_were_written(tmp_path, monkeypatch) -> None:
    target, text = tiny_target(vocab_size=256), "so 🙂é done"
    monkeypatch.setattr(target, "decode", lambda ids: bytes(ids).decode("utf-8", "replace"))
    prefill, first, rest = text.encode()[:1], text.encode()[1:5], text.encode()[5:]  # the face is cut in two
    drafts = tuple("🙂".encode())
    rounds = [Round(index=0, committed=tuple(prefill))]
    some = dict.fromkeys(("confidence", "target_probs_of_drafts", "draft_probs_of_drafts"), (0.5,) * 4)
    for i, committed in enumerate((first, rest), 1):
        about = {"anchor": 7, "window": 4, "draft_tokens": drafts, "verify_length": 4, "source": "drafter"}
        rounds.append(Round(index=i, committed=tuple(committed), **about, **some))
    empty = record(target, dspark.ContextLookup(None, target=target), [1], max_new_tokens=1, times=TIMES)
    trace = Trace(tuple(rounds), empty.about)
    save_traces([replace(trace, about=trace.about | texts_of(target, trace))], tmp_path / "t.parquet")
    decode = trace_decode(load_traces(tmp_path / "t.parquet")[0][1])
    assert decode(list(text.encode())) == text and decode(list(drafts)) == "🙂" and decode(list(drafts[:2])) == "\ufffd\ufffd"
    assert decode([3]) == "⟨3⟩"


def test_the_traces_in_data_load_and_replay_over_their_own_greedy_text() -> None:
    results = data_dir() / "results"
    traces = [
        load_traces(results / "traces" / "sample.parquet")[0][1],
        *(trace for _, trace in load_traces(results / "traces-test.parquet")[:4]),
    ]
    for trace in traces:
        policies = (dspark.FixedWindow(), dspark.MTP1(), dspark.ConfidenceThreshold(0.3), dspark.PrefixScheduler(trace.times.sps), Oracle())
        for policy in policies:
            rounds = replay(trace, policy)
            assert [token for r in rounds for token in r.committed] == trace.token_ids
            assert all(r.accepted <= r.verify_length <= len(r.draft_tokens) == len(r.survival) for r in rounds)


def test_a_policy_that_the_drafter_cannot_serve_is_refused() -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match="block size 4"):
        replay(record(target, tiny_drafter(target), PROMPT, max_new_tokens=5, times=TIMES), dspark.FixedWindow(5))


def test_a_foreign_or_damaged_file_is_one_clear_error(tmp_path) -> None:
    target = tiny_target()
    path = tmp_path / "trace.parquet"
    trace = record(target, tiny_drafter(target), PROMPT, max_new_tokens=5, times=TIMES)
    with pytest.raises(ValueError, match="no results"):
        load_traces(path)[0][1]
    save_traces([trace], path)
    frame = read_results(path)
    write_results(frame.assign(schema_version=99), path)
    with pytest.raises(ValueError, match=r"trace\.parquet has schema version 99.*make it again"):
        load_traces(path)[0][1]
    write_results(pd.DataFrame({"schema_version": [1], "arm": ["plain"]}), path)
    with pytest.raises(ValueError, match="holds no traces"):
        load_traces(path)[0][1]
    write_results(frame[:0], path)
    with pytest.raises(ValueError, match="no rows"):
        load_traces(path)[0][1]
    write_results(pd.concat([frame, frame]), path)
    assert len(load_traces(path)) == 2
    for content in ("{}", "a,b\n1,2\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match="not a Parquet") as error:
            load_traces(path)
        assert "delete" not in str(error.value)
    write_results(frame, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(64) + whole[104:])  # of a compressed page
    with pytest.raises(ValueError, match=r"trace\.parquet is not a Parquet"):
        load_traces(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_traces(tmp_path)
    for about in ("", "{}", "[]", None):
        write_results(frame.assign(about=[about]), path)
        with pytest.raises(ValueError, match=r"trace\.parquet holds a trace that cannot be read") as error:
            load_traces(path)
        assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_trace(tmp_path) -> None:
    target = tiny_target(eos_token_id=None)
    path = tmp_path / "trace.parquet"
    save_traces([record(target, tiny_drafter(target), PROMPT, max_new_tokens=5, times=TIMES)], path)
    before = path.read_bytes()
    longer = record(target, tiny_drafter(target), PROMPT, max_new_tokens=300, times=TIMES)
    with pytest.raises(ValueError, match="cannot write"), full_disk():
        save_traces([longer], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["trace.parquet"]


def test_rollouts_for_calibration_come_from_a_loaded_trace(tmp_path) -> None:
    target = tiny_target(eos_token_id=None)
    trace = record(target, tiny_drafter(target), PROMPT, max_new_tokens=12, times=TIMES)
    save_traces([trace], tmp_path / "trace.parquet")
    assert (
        rollouts(load_traces(tmp_path / "trace.parquet")[0][1].rounds, 4).survived.tolist() == rollouts(trace.rounds, 4).survived.tolist()
    )
