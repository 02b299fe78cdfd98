"""Self-play on tiny random models: the invariants of the corpus, and an interrupted run loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dspark.files import file_sha256
from dspark.load import load_target
from dspark.target.target import Target
from dspark.train import selfplay, shards
from dspark.train.corpus import Corpus, check_seeds, concatenate, load_corpus, save_corpus
from dspark.train.selfplay import Subject, converse, load_subjects, pieces, sample, turns_of
from dspark.train.shards import near_duplicates, self_play
from dspark.verify.lean import lean_pass

torch.set_num_threads(1)

SPECIAL = ["<start>", "<end>", "<stop>", "<pad>", "<unk>"]
WORDS = ["system", "user", "assistant", "default", *(f"w{i}" for i in range(40))]
VOCAB = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<start> system default <end> ' }}{% endif %}"
    "{% for m in messages %}{{ '<start> ' + m['role'] + ' ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start> assistant ' }}{% endif %}"
)
NO_SYSTEM = (  # refuses a system message; a user turn ends with an ordinary word, an answer with <stop> after a space
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}{{ '<start> ' + m['content'] + ' assistant ' }}"
    "{% else %}{{ m['content'] + ' <stop>' }}{% endif %}{% endfor %}"
)
TALK = (
    Subject("near", 0.5, ("w0 w1", "w2"), (None, "w3 w4 w5")),
    Subject("far", 0.5, ("w6 w7 w8", "w9"), ("w10",)),
)


FEW = {"rows": 2, "tokens": 20}  # the fewest that fit


def ids_of(text: str) -> list[int]:
    return [VOCAB[word] for word in text.split()]


@pytest.fixture
def target() -> Target:
    return tiny_target()


def tiny_target(template: str | None = CHATML, seed: int = 0) -> Target:
    """A random model whose turns end now and then, and which never samples <pad> or <unk>."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=[VOCAB["<end>"], VOCAB["<stop>"]],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    words = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), ("<start>", "<end>", "<pad>", "<unk>"), strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<stop>"], **special)
    tokenizer.chat_template = template
    target = Target(model, tokenizer, "tiny")
    target.head.register_forward_hook(favour_ends)
    return target


def favour_ends(_head: object, _inputs: object, logits: Tensor) -> Tensor:
    logits = logits.index_fill(-1, torch.tensor(ids_of("<pad> <unk>")), -torch.inf)
    return logits.index_add(-1, torch.tensor(ids_of("<end> <stop>")), torch.ones(*logits.shape[:-1], 2))


def play(target: Target, path: Path, rows: int = 10, **settings: object) -> Corpus:
    return self_play(target, path, **{"rows": rows, "tokens": 44, "batch": 4, "subjects": TALK, "seed": 4} | settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Ten rows in three parts, made without interruption."""
    return play(tiny_target(), tmp_path_factory.mktemp("whole") / "c.json")


def same(one: Corpus, other: Corpus) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("token_ids", "assistant", "temperature"))


def test_the_lean_pass_writes_the_same_conversations(whole: Corpus, tmp_path: Path) -> None:
    target = tiny_target()
    target.verifier = lean_pass(target)
    head = target.verifier.head
    target.verifier.head = lambda hidden: favour_ends(None, None, head(hidden))
    assert same(play(target, tmp_path / "c.json"), whole)


def turns_in(row: list[int]) -> list[tuple[str, int, int]]:
    """Read a CHATML row by its grammar alone: (speaker, first, stop) of each user text and of each answer, its end included."""
    at = row.index(VOCAB["user"]) + 1
    speaker, found = "user", []
    while at < len(row):
        end = next((i for i in range(at, len(row)) if row[i] in ids_of("<end> <stop>")), len(row) - 1) + 1
        found.append((speaker, at, end))
        speaker = "assistant" if speaker == "user" else "user"
        header = ids_of(f"<start> {speaker}")[: max(0, len(row) - end)]
        assert row[end : end + 2] == header, f"{speaker}'s header is missing at {end}"
        at = end + 2
    return found


def test_assistant_tokens_are_exactly_those_between_the_assistant_header_and_end_of_turn(target: Target, tmp_path: Path) -> None:
    corpus = play(target, tmp_path / "c.json", rows=24, batch=24)
    answers = 0
    for ids, mask in zip(corpus.token_ids.tolist(), corpus.assistant, strict=True):
        expected = torch.zeros(len(ids), dtype=torch.bool)
        for speaker, first, stop in turns_in(ids):
            if speaker == "assistant":
                expected[first:stop] = True
                answers += 1
        assert torch.equal(mask, expected)
    assert answers > 24, "rows must hold several turns for this test to mean something"


def test_every_row_starts_with_a_subject_in_proportion_to_the_shares(target: Target, tmp_path: Path) -> None:
    corpus = play(
        target,
        tmp_path / "c.json",
        rows=60,
        batch=60,
        tokens=20,
        subjects=(Subject("a", 3, ("w0 w1",), ("w3 w4",)), Subject("b", 1, ("w2",), ("w5",))),
    )
    starts = {
        "a": [ids_of("<start> system default <end> <start> user w0 w1"), ids_of("<start> system w3 w4 <end> <start> user")],
        "b": [ids_of("<start> system default <end> <start> user w2"), ids_of("<start> system w5 <end> <start> user")],
    }
    seen = [name for row in corpus.token_ids.tolist() for name, heads in starts.items() for head in heads if row[: len(head)] == head]
    assert len(seen) == len(corpus)
    assert 0.6 < seen.count("a") / len(seen) < 0.9


def test_the_corpus_never_contains_padding_and_every_row_is_full(whole: Corpus) -> None:
    assert whole.token_ids.shape == whole.assistant.shape == (10, 44)
    assert whole.token_ids.min() >= 0
    assert not torch.isin(whole.token_ids, torch.tensor(ids_of("<pad> <unk>"))).any()
    assert whole.assistant.any(1).all(), "a row without an answer teaches nothing"


def test_temperatures_take_turns_over_all_shards(whole: Corpus) -> None:
    assert torch.equal(whole.temperature, torch.tensor([0.0, 0.6, 1.0] * 3 + [0.0]))


def test_a_user_turn_that_is_too_long_is_cut_off(target: Target, tmp_path: Path) -> None:
    never = torch.tensor(ids_of("<end> <stop>"))
    target.head.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, never, -torch.inf))
    corpus = play(target, tmp_path / "c.json", rows=4, tokens=60)
    for ids, mask in zip(corpus.token_ids.tolist(), corpus.assistant, strict=True):
        (_, first, stop), (_, answer, last) = turns_in(ids)
        assert stop - first <= 60 // 3 + 1 + 3, "a third of the row, the end, the opening"
        assert mask.nonzero()[:, 0].tolist() == list(range(answer, last))


def test_greedy_rows_equal_model_generate(target: Target, whole: Corpus) -> None:
    greedy = whole.rows(whole.temperature == 0)
    for ids in greedy.token_ids:
        _, first, stop = next(turn for turn in turns_in(ids.tolist()) if turn[0] == "assistant")
        written = ids[:first]
        while len(written) < stop:
            written = torch.cat([written, target.model(written[None], use_cache=False).logits[0, -1].argmax()[None]])
        assert written.tolist() == ids[:stop].tolist()


def test_each_row_depends_on_its_own_history_only(target: Target) -> None:
    """Greedy on both sides, the same start gives the same row, whatever else is in the batch."""
    start, long = ids_of("<start> system default <end> <start> user w0"), ids_of("<start> system w3 w4 w5 <end> <start> user w6 w7 w8")
    cold, generator = torch.zeros(2), torch.Generator().manual_seed(0)
    alone = converse(target, turns_of(target), [start], cold[:1], 60, 0.0, generator)
    beside = converse(target, turns_of(target), [long, start], cold, 60, 0.0, generator)
    assert same(alone, beside.rows(slice(1, 2)))


def test_sampled_tokens_follow_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 0.5, -torch.inf]).expand(40_000, 7)
    draws = sample(logits, torch.full((40_000,), 0.7), torch.Generator().manual_seed(1))
    expected = 40_000 * torch.softmax(logits[0] / 0.7, -1)
    counts = torch.bincount(draws, minlength=7)
    assert counts[4] == counts[6] == 0, "a token of probability 0 was drawn"
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < 18.5, "chi-square, 4 degrees of freedom, p = 0.001"


@pytest.mark.parametrize(("uniform", "drawn"), [(0.0, [1, 0]), (1.0, [2, 0])])  # float32 rounds products up to the total itself
def test_no_token_of_probability_0_is_drawn_at_either_end(monkeypatch: pytest.MonkeyPatch, uniform: float, drawn: list[int]) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform))
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf], [1.0, -torch.inf, -torch.inf, -torch.inf]])
    assert sample(logits, torch.ones(2), torch.Generator()).tolist() == drawn


def test_each_speakers_turns_are_sampled_at_its_own_temperature(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(selfplay, "sample", lambda logits, heat, generator: used.append(heat.clone()) or sample(logits, heat, generator))
    start = ids_of("<start> system default <end> <start> user w0")
    made = converse(target, turns_of(target), [start] * 3, torch.tensor([0.0, 0.6, 1.0]), 60, 0.9, torch.Generator().manual_seed(0))
    for place, heat in enumerate(used, start=len(start)):
        answering = made.assistant[:, place]
        assert torch.equal(heat[answering], made.temperature[answering])
    for row, ids in enumerate(made.token_ids.tolist()):
        for speaker, first, stop in turns_in(ids):
            places = [p for p in range(max(first, len(start)), stop) if speaker == "user"]
            assert all(used[p - len(start)][row] == torch.tensor(0.9) for p in places)


def test_an_interrupted_run_resumes_to_the_same_corpus(target: Target, whole: Corpus, tmp_path: Path) -> None:
    stopped, calls = tmp_path / "stopped.json", iter(range(10**6))

    def stop(*_: object) -> None:
        if next(calls) == 50:  # in the middle of the second of three parts
            raise KeyboardInterrupt

    hook = target.head.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        play(target, stopped)
    hook.remove()
    assert not stopped.exists() and os.listdir(tmp_path / "stopped.shards") == ["000000.safetensors"]
    first = tmp_path / "stopped.shards" / "000000.safetensors"
    kept = first.stat().st_mtime_ns
    assert same(play(target, stopped), whole)
    assert first.stat().st_mtime_ns == kept, "a finished shard was made again"


def test_a_lost_shard_is_made_again_and_gives_the_same_corpus(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    first = play(target, path, rows=7, tokens=30)
    content = path.read_bytes()
    (tmp_path / "c.shards" / "000001.safetensors").unlink()
    assert same(play(target, path, rows=7, tokens=30), first)
    assert path.read_bytes() == content


def test_shards_and_seeds_give_different_rows(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TEMPERATURES", (1.0,))  # greedy answers to one start may coincide
    warm = {"rows": 4, "batch": 2}
    both = concatenate([play(target, tmp_path / "one.json", **warm), play(target, tmp_path / "other.json", **warm, seed=3)])
    assert len(set(map(tuple, both.token_ids.tolist()))) == 8


def test_more_rows_are_appended_after_the_full_shards(target: Target, whole: Corpus, tmp_path: Path) -> None:
    small = play(target, tmp_path / "c.json", rows=6)
    assert same(small.rows(slice(4)), whole.rows(slice(4)))
    assert same(play(target, tmp_path / "c.json"), whole)
    content = (tmp_path / "c.shards" / "000002.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"000002.safetensors has 2 rows, not 1: ask for more rows"):
        play(target, tmp_path / "c.json", rows=9)
    assert (tmp_path / "c.shards" / "000002.safetensors").read_bytes() == content


@pytest.mark.parametrize("other", [{"seed": 3}, {"tokens": 24}, {"batch": 5}, {"subjects": TALK[:1]}])
def test_settings_mismatch_is_refused(target: Target, tmp_path: Path, other: dict[str, object]) -> None:
    play(target, tmp_path / "c.json", **FEW)
    before = (tmp_path / "c.json").read_bytes()
    with pytest.raises(ValueError, match=r"was made with .*, not with .*: use the same settings or another path") as refusal:
        play(target, tmp_path / "c.json", **FEW | other)
    if "seed" in other:
        assert "{'seed': 4}" in str(refusal.value) and "{'seed': 3}" in str(refusal.value)
    assert (tmp_path / "c.json").read_bytes() == before


def test_another_target_is_refused(target: Target, tmp_path: Path) -> None:
    play(target, tmp_path / "c.json", **FEW)
    other = tiny_target(seed=1)
    with pytest.raises(ValueError, match=f"{target.digest}.*{other.digest}"):
        play(other, tmp_path / "c.json", **FEW)


def test_a_file_from_elsewhere_is_not_overwritten(target: Target, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"no manifest of a corpus .* choose another path"):
        play(target, tmp_path / "c.json", rows=2)
    assert (tmp_path / "c.json").read_bytes() == b"precious"


def test_a_full_disk_is_one_line_and_finished_shards_stay(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if "000001" in self.name:
            write(self, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device") as error:
        play(target, tmp_path / "c.json", rows=6)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["c.shards"] and os.listdir(tmp_path / "c.shards") == ["000000.safetensors"]
    monkeypatch.undo()
    assert len(play(target, tmp_path / "c.json", rows=6)) == 6


def test_the_manifest_alone_makes_the_shards_again(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    first = play(target, path)
    files, manifest = (sorted((tmp_path / "c.shards").iterdir()), json.loads(path.read_text()))
    content = [file.read_bytes() for file in files]
    assert [shard["seed"] for shard in manifest["shards"]] == ["4/0", "4/1", "4/2"]
    assert [shard["sha256"] for shard in manifest["shards"]] == [file_sha256(file) for file in files]
    assert sum(shard["response_tokens"] for shard in manifest["shards"]) == manifest["response_tokens"] == int(first.assistant.sum())
    shutil.rmtree(tmp_path / "c.shards")
    again = self_play(target, path, subjects=TALK)  # no setting but what the manifest says
    assert same(again, first) and [file.read_bytes() for file in files] == content and json.loads(path.read_text()) == manifest
    assert same(load_corpus(path, target), first)


def test_shards_that_another_machine_made_are_not_mixed_with_this_ones(target: Target, tmp_path: Path) -> None:
    play(target, path := tmp_path / "c.json")
    content = path.read_bytes()
    text = json.loads(content)
    text["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"000001.safetensors is not the shard of .*c.json, which .* delete .*c.json to use yours"):
        play(target, path)
    path.unlink()
    play(target, path)
    assert path.read_bytes() == content


def test_rows_that_repeat_earlier_answers_are_dropped_and_counted(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randint(0, 900, (6, 60), generator=torch.Generator().manual_seed(0))
    rows[:, :10] = torch.arange(10)  # one system prompt
    rows[2] = rows[0]
    rows[2, 30] = 901  # a near-duplicate
    rows[3, 20:], rows[4, 20:] = rows[1, 20:], 7  # half of a row, and one that repeats itself
    rows[3, 40:] = rows[5, :20] + 1000
    assistant = torch.ones(6, 60, dtype=torch.bool)
    assistant[:, :10] = False
    text = Corpus(rows, assistant, torch.ones(6))
    assert near_duplicates(text).tolist() == [False, False, True, False, False, False]
    assert not near_duplicates(text.rows(slice(2, 6))).any(), "the first of two stays"
    assert not near_duplicates(Corpus(rows[:, :4], assistant[:, :4], torch.ones(6))).any(), "too short to tell"

    target.head.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, torch.tensor(ids_of("<end> <stop>")), -torch.inf))
    monkeypatch.setattr(shards, "USER_TEMPERATURE", 0.0)
    monkeypatch.setattr(shards, "TEMPERATURES", (0.0,))
    greedy = play(target, path := tmp_path / "c.json", rows=8, subjects=(Subject("one", 1, ("w0",) * 9, ("w1",)),))
    manifest = json.loads(path.read_text())
    assert (len(greedy), manifest["near_duplicates"], manifest["rows"]) == (2, 6, 8), "an opening and a system prompt, then only copies"
    assert same(load_corpus(path), greedy) and manifest["response_tokens"] == int(greedy.assistant.sum())


def broken_manifests(path: Path) -> Iterator[tuple[str, str]]:
    """Change the files of a corpus, one way after another: (what, the error)."""
    content, file = path.read_text(), path.with_suffix(".shards") / "000001.safetensors"
    whole, again = file.read_bytes(), r"delete it, and `python -m dspark.train corpus --corpus .*c.json` makes it again"
    file.write_bytes(whole[:-50])
    yield "cut short", rf"000001.safetensors is missing or damaged .*: {again}"
    file.unlink()
    yield "missing", rf"000001.safetensors is missing or damaged .*: {again}"
    file.write_bytes((file.parent / "000000.safetensors").read_bytes())
    yield "another", rf"000001.safetensors is not the shard that .*c.json names: {again}"
    file.write_bytes(whole)
    path.write_text(content.replace('"4/1"', '"4/0"'))
    yield "same seed", "both hold the shard of seed 4/0: make one with another --seed"
    for wrong in (
        "",
        "[]",
        "{}",
        content.replace('"sha256"', '"md5"'),
        content.replace('"rows": 10', '"rows": 9'),
        content.replace('"batch": 4', '"batch": "4"'),
    ):
        path.write_text(wrong)
        yield "malformed", "c.json is no manifest of a corpus"
    path.write_text(content)


def test_a_corpus_whose_files_changed_is_refused_in_one_line(target: Target, tmp_path: Path) -> None:
    whole = play(target, path := tmp_path / "c.json")
    for what, error in broken_manifests(path):
        with pytest.raises(ValueError, match=error) as refusal:
            load_corpus(path, target)
        assert "\n" not in str(refusal.value), what
    assert same(load_corpus(path, target), whole)
    with pytest.raises(ValueError, match=f"c.json was written by tiny .{target.digest}., not by tiny .*: choose text of this target"):
        load_corpus(path, tiny_target(seed=1))
    shutil.copytree(tmp_path / "c.shards", tmp_path / "copy.shards")
    with pytest.raises(ValueError, match="both hold the shard of seed 4/0"):
        check_seeds(path, shutil.copy(path, tmp_path / "copy.json"))


def test_a_shard_in_the_place_of_another_is_refused(target: Target, tmp_path: Path) -> None:
    play(target, tmp_path / "c.json")
    first, second = (tmp_path / "c.shards" / f"00000{i}.safetensors" for i in (0, 1))
    shutil.copy(first, second)
    with pytest.raises(ValueError, match=r"000001.safetensors was made with {'shard': 0}, not with {'shard': 1}"):
        play(target, tmp_path / "c.json")


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_two_workers_make_the_same_corpus_as_one_process(tmp_path: Path, engine: str) -> None:
    ray = pytest.importorskip("ray") if engine == "ray" else None
    tiny_target().model.save_pretrained(tmp_path / "model")
    tiny_target().tokenizer.save_pretrained(tmp_path / "model")
    source = (str(tmp_path / "model"), "float32", "cpu")
    target = load_target(source[0], dtype=source[1])
    one = play(target, tmp_path / "one.json")
    try:
        two = play(target, tmp_path / "two.json", source=source, engine=engine, jobs=2)
    finally:
        if ray:
            ray.shutdown()
    assert same(one, two) and (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize(("largest", "stored"), [(65_535, "U16"), (65_536, "I32")])
def test_saving_and_loading_round_trips(tmp_path: Path, largest: int, stored: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, largest + 1, (5, 13), generator=generator)
    ids[2, 3] = largest
    corpus = Corpus(ids, torch.rand(5, 13, generator=generator) < 0.5, torch.tensor([0.0, 0.6, 1.0, 0.0, 0.6]))
    save_corpus(corpus, tmp_path / "new" / "c.safetensors")
    raw = (tmp_path / "new" / "c.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {name: entry["dtype"] for name, entry in header.items()} == {"token_ids": stored, "assistant_bits": "U8", "temperature": "F32"}
    loaded = load_corpus(tmp_path / "new" / "c.safetensors")
    assert same(loaded, corpus)
    assert (loaded.token_ids.dtype, loaded.assistant.dtype, loaded.temperature.dtype) == (torch.int64, torch.bool, torch.float32)
    assert os.listdir(tmp_path / "new") == ["c.safetensors"], "no scratch file stays"


def test_joined_corpora_keep_their_order_and_unequal_lengths_are_refused() -> None:
    one = Corpus(torch.arange(6).view(2, 3), torch.eye(3, dtype=torch.bool)[:2], torch.tensor([0.0, 1.0]))
    assert same(concatenate([one.rows(slice(1)), one.rows(slice(1, 2))]), one)
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens a row"):
        concatenate([one, Corpus(one.token_ids[:, :2], one.assistant[:, :2], one.temperature)])


def test_the_tokens_between_turns_come_from_the_template(target: Target) -> None:
    turns = turns_of(target)
    assert list(turns.to_assistant) == ids_of("<end> <start> assistant")
    assert list(turns.to_user) == ids_of("<start> user")
    assert set(turns.stops) == set(ids_of("<end> <stop>"))
    assert pieces(target.tokenizer, "w1 w2")[0].split() == "<start> system w1 w2 <end> <start> user".split()
    assert pieces(target.tokenizer, None)[0].split() == "<start> system default <end> <start> user".split()


def test_the_templates_end_of_turn_stops_a_turn_even_if_it_is_no_eos(target: Target) -> None:
    target.model.generation_config.eos_token_id = VOCAB["<stop>"]
    assert set(turns_of(target).stops) == set(ids_of("<end> <stop>"))


def test_a_template_without_system_role_or_end_of_user_turn_works(tmp_path: Path) -> None:
    target = tiny_target(NO_SYSTEM)
    turns = turns_of(target)
    assert (list(turns.to_assistant), list(turns.to_user)) == (ids_of("assistant"), ids_of("<start>"))
    corpus = play(target, tmp_path / "c.json", rows=6)
    assert (corpus.token_ids[:, 0] == VOCAB["<start>"]).all()
    for ids, mask in zip(corpus.token_ids.tolist(), corpus.assistant.tolist(), strict=True):
        begins = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        assert begins and all(ids[i - 1] == VOCAB["assistant"] for i in begins)


@pytest.mark.parametrize(
    ("template", "remedy"),
    [
        ("{{ messages[0]['content'] }}", "set another tokenizer.chat_template"),
        ("{{ raise_exception('never') }}", "the chat template refuses .* never"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(tmp_path: Path, template: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        play(tiny_target(template), tmp_path / "c.json")
    assert not any(tmp_path.iterdir())


def test_a_target_without_any_end_of_turn_is_refused(target: Target, tmp_path: Path) -> None:
    target.tokenizer.chat_template = "{% for m in messages %}{{ ' w1 ' + m['content'] + ' w2 ' }}{% endfor %}"
    target.model.generation_config.eos_token_id = target.config.eos_token_id = None
    with pytest.raises(ValueError, match="set eos_token_id in its generation config"):
        play(target, tmp_path / "c.json")


@pytest.mark.parametrize("bare", [False, True])
def test_a_model_without_chat_template_writes_free_text_from_its_first_token(tmp_path: Path, bare: bool) -> None:
    """A document is its first token, an opening, and the rest to learn from; after its end the next one begins."""
    target, start = tiny_target(None), VOCAB["<start>"]
    if bare:
        target, start = Target(target.model, None, "bare"), target.config.bos_token_id  # a token that also ends texts
    corpus = play(target, tmp_path / "c.json", rows=6, tokens=96)
    assert len({tuple(row) for row in corpus.token_ids[corpus.temperature == 0].tolist()}) > 1, "greedy rows are all alike"
    ends, documents, answers = ids_of("<end> <stop>"), 0, 0
    for ids, mask in zip(corpus.token_ids.tolist(), corpus.assistant.tolist(), strict=True):
        for i in range(len(ids)):
            if i == 0 or ids[i - 1] in ends:
                first, documents = i - (i > 0 and start in ends), documents + 1
                assert ids[first] == start or start in ends
            assert mask[i] == (i - first > 1 + 96 // 16), "the opening is not learnt from, and everything after it is"
            answers += mask[i]
    assert documents > len(corpus) and answers > 100


def test_a_model_without_any_first_token_is_refused(target: Target, tmp_path: Path) -> None:
    target.model.generation_config.eos_token_id = target.config.eos_token_id = target.config.bos_token_id = None
    with pytest.raises(ValueError, match="bare has no chat template and no first token of a text: set bos_token_id"):
        play(Target(target.model, None, "bare"), tmp_path / "c.json")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rows": 0}, "rows=0"),
        ({"batch": 0}, "batch=0"),
        ({"tokens": 12}, "tokens=12"),
        ({"tokens": 300}, "tokens=300"),
    ],
)
def test_settings_out_of_range_are_named(target: Target, tmp_path: Path, wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        play(target, tmp_path / "c.json", **wrong)
    assert not any(tmp_path.iterdir())


def test_the_shipped_subjects_are_diverse_and_their_weights_add_up() -> None:
    subjects = load_subjects()
    openings = [opening for subject in subjects for opening in subject.openings]
    assert {subject.name for subject in subjects} == {"chat", "mathematics", "code", "summaries", "structured"}
    assert len(set(openings)) == len(openings) >= 60
    assert not any(opening.endswith("  ") or opening.startswith(" ") for opening in openings)
    assert sum(weight for subject in subjects for weight, _, _ in subject.starts()) == pytest.approx(1)
