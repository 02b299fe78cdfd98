"""Figures are pure functions of records, readable by everyone, and say what the records say."""

from __future__ import annotations

import re
from html import unescape
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dspark.bench.measure import Trial
from dspark.bench.prompts import data_dir
from dspark.bench.results import SCHEMA_VERSION, read_rows, write_results
from dspark.decode import Round
from dspark.lab import drafters, figures, proof, scheduling, static, tables
from dspark.schedule import PrefixScheduler

BYTES = {i: bytes([i]) for i in range(256)}
ROOT = Path(__file__).resolve().parents[1]


def decode(token_ids: list[int]) -> str:
    """The simplest byte-level tokenizer: one token per byte; 300 ends the text and has no letters."""
    return b"".join(BYTES.get(token, b"") for token in token_ids).decode(errors="replace")


def ids(text: str) -> list[int]:
    return list(text.encode())


def round_of(index: int, drafts: str, length: int, accepted: int, committed: str, source: str = "drafter", seconds: float = 0.1) -> Round:
    n = len(ids(drafts))
    return Round(
        index,
        None if index == 0 else 65,
        n,
        tuple(ids(drafts)),
        tuple(0.9 - 0.1 * k for k in range(n)),
        tuple(0.9**k for k in range(n)),
        length,
        accepted,
        tuple(ids(committed)),
        tuple(0.8 for _ in range(length)),
        tuple(0.7 for _ in range(n)),
        source,
        0.01,
        0.08,
        seconds,
    )


ROUNDS = [
    round_of(0, "", 0, 0, "H"),
    round_of(1, "ello", 4, 4, "ello "),
    round_of(2, "<c>d", 4, 2, "<c\n"),
    round_of(3, "abcd", 3, 1, "ax", "copy"),
    round_of(4, "", 0, 0, "&"),
    round_of(5, "yz", 2, 0, '"'),
]
TEXT = 'Hello <c\nax&"'


def visible(html: str) -> str:
    body = html.split("pre-wrap")[1].split(">", 1)[1]
    return unescape(re.sub(r"<[^>]*>", "", body.replace("↵", "")))


def test_every_committed_token_has_the_fate_that_its_round_gave_it():
    found = figures.fates(ROUNDS)
    assert decode([t.token_id for t in found]) == TEXT
    names = ["plain", *["draft"] * 4, "bonus", *["draft"] * 2, "correction", "copy", "correction", "plain", "correction"]
    assert [t.fate for t in found] == names
    assert [decode([t.replaced]) for t in found if t.replaced is not None] == [">", "b", "y"]


def test_accepted_drafts_behind_the_end_of_the_text_have_no_fate():
    ended = round_of(1, "abcd", 4, 3, "ab")
    assert [t.fate for t in figures.fates([ended])] == ["draft", "draft"]
    assert figures.draft_states([ended]) == [["accepted", "accepted", "in vain", "in vain"]]


def test_html_shows_the_text_and_escapes_all_of_it():
    html = figures.token_fates(ROUNDS, decode)
    assert visible(html) == TEXT
    assert "<c" not in html and 'title="correction · round 2, position 3 · instead of the draft “&gt;”' in html
    assert set(re.findall(r"</?(\w+)", html)) == {"div", "span"}


def test_a_hostile_token_cannot_break_out_of_text_or_tooltip():
    hostile = '"><script>alert(1)</script>'
    html = figures.token_fates([round_of(1, "abc", 3, 1, "ax")], lambda tokens: hostile if len(tokens) == 1 else "ab" + hostile)
    assert "<script" not in html and '""' not in html
    heat = figures.acceptance_heatmap(ROUNDS, None, lambda _tokens: hostile)
    assert "<script" not in heat.to_json().replace("\\u003c", "<")


@pytest.mark.parametrize("text", ["plain", "你好, 世界", "a🙂b", "👩‍🚀!", "é e\u0301", "👍🏽 ok", "🇫🇷"])
def test_tokens_are_grouped_until_characters_are_whole(text):
    pieces = figures.whole_pieces(ids(text), decode)
    assert "".join(piece for _, piece in pieces) == text
    assert sum(count for count, _ in pieces) == len(ids(text))
    assert all(count == len(ids(piece)) for count, piece in pieces)


def test_what_only_changes_a_character_stays_with_it():
    assert figures.whole_pieces(ids("👩‍🚀e\u0301👍🏽x"), decode) == [(11, "👩‍🚀"), (3, "e\u0301"), (8, "👍🏽"), (1, "x")]


def test_bytes_that_never_become_a_character_are_shown_as_a_box_and_lose_no_token():
    cut = ids("ab🙂")[:-1]
    assert figures.whole_pieces(cut, decode) == [(1, "a"), (1, "b"), (3, "▯")]
    wild = [0x80, *ids("ok"), 0xFF, 0xFE, 300, *ids("!")]
    pieces = figures.whole_pieces(wild, decode)
    assert sum(count for count, _ in pieces) == len(wild)
    html = figures.token_fates([round_of(0, "", 0, 0, "a"), Round(1, 1, 0, (), (), (), 0, 0, tuple(wild), (), (), "", 0, 0, 0)], decode)
    assert figures.NO_CHARACTER not in html and "ok" in visible(html)


def test_a_tokenizer_that_drops_the_first_space_loses_none_inside():
    words = ["▁one", "▁two", "three", "▁four"]
    assert figures.whole_pieces([0, 1, 2, 3], lambda t: "".join(words[i] for i in t).replace("▁", " ").lstrip(" ")) == [
        (1, "one"),
        (1, " two"),
        (1, "three"),
        (1, " four"),
    ]


def test_a_character_of_tokens_with_different_fates_carries_all_their_colours():
    smile = ids("🙂")
    two = [
        Round(1, 1, 2, tuple(smile[:2]), (), (), 2, 2, tuple(smile[:3]), (0.5, 0.5), (0.5, 0.5), "drafter", 0, 0, 0),
        Round(2, 1, 0, (), (), (), 0, 0, (smile[3],), (), (), "", 0, 0, 0),
    ]
    span = re.search(r'<span title="accepted draft · round 1[^>]*>', figures.token_fates(two, decode))[0]
    for fate in ("draft", "bonus", "plain"):
        assert figures.FATES[fate].colour(0.33) in span


def test_heatmap_is_block_size_by_rounds_and_holds_every_state():
    figure = figures.acceptance_heatmap(ROUNDS, 7, decode)
    z = figure.data[0].z
    assert (len(z), {len(row) for row in z}) == (7, {len(ROUNDS) - 1})
    names = list(figures.DRAFT_STATES)
    first, third = ([None if row[i] is None else names[row[i]] for row in z] for i in (0, 2))
    assert first == ["accepted"] * 4 + [None] * 3
    assert third == ["accepted", "rejected", "in vain", "unchecked", None, None, None]
    assert "14 drafted tokens: 7 accepted (n = 5 rounds)" in figure.layout.title.text
    assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    assert len(figures.acceptance_heatmap(ROUNDS).data[0].z) == 4


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1], [ROUNDS[0], ROUNDS[4]]], ids=["none", "prefill", "plain"])
def test_figures_bear_rounds_without_drafts(rounds):
    assert figures.acceptance_heatmap(rounds, 3).data[0].z is not None
    figures.token_fates(rounds, decode)


def test_same_records_give_the_same_figures_and_stay_as_they_were():
    before = repr(ROUNDS)
    for draw in (
        lambda: figures.token_fates(ROUNDS, decode),
        lambda: figures.acceptance_heatmap(ROUNDS, 5, decode).to_json(),
        lambda: figures.race({"one": ROUNDS, "two": ROUNDS[:3]}).to_json(),
    ):
        assert draw() == draw()
    assert repr(ROUNDS) == before


@pytest.mark.parametrize(
    ("tokens", "names"),
    [(["a"], ["1: “a”", "2: not drawn"]), ([], ["1: not drawn", "2: not drawn"]), (None, ["draft 1", "draft 2"])],
    ids=["named", "nothing drawn", "nameless"],
)
def test_the_schedulers_path_names_what_was_drawn_and_what_was_not(tokens, names):
    path = list(PrefixScheduler({1: 1.0, 2: 0.9, 3: 0.5}.__getitem__).admissions([torch.tensor([0.9, 0.2])]))
    bars = scheduling.admission_path(path, tokens).data[0]
    assert list(bars.x) == ["anchor alone", *names]
    assert [round(y, 3) for y in bars.y] == [1.0, 1.71, 1.04]


def test_race_counts_tokens_over_seconds_behind_the_prefill():
    line = figures.race({"drafts": ROUNDS}).data[0]
    assert list(line.y) == [1, 6, 9, 11, 12, 13]
    assert line.x[0] == 0 and line.x[-1] == pytest.approx(0.5)
    assert line.name == "drafts: 13 tokens in 0.50 s"


# What red-green blindness leaves of a colour (Machado, Oliveira and Fernandes, 2009, severity 1), on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
}


def lab(rgb: tuple[int, int, int], sight: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of a colour as somebody sees it."""
    value = np.array(rgb) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ (sight @ linear).clip(0, 1) / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("looks", [figures.FATES, figures.DRAFT_STATES], ids=["fates", "states"])
def test_colours_stay_apart_for_colour_blind_readers(sight, looks):
    for one, other in combinations(looks.values(), 2):
        distance = np.linalg.norm(lab(one.rgb, SIGHT[sight]) - lab(other.rgb, SIGHT[sight]))
        assert distance > 20, f"{one.label} and {other.label}: ΔE {distance:.0f}"


@pytest.mark.parametrize("ground", [(255, 255, 255), (17, 17, 17)], ids=["light", "dark"])
def test_grey_text_can_be_read_on_light_and_dark_pages(ground):
    def luminance(rgb: tuple[int, ...]) -> float:
        value = np.array(rgb) / 255
        return float(np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    grey = tuple(int(figures.GREY[i : i + 2], 16) for i in (1, 3, 5))
    light, dark = sorted((luminance(grey), luminance(ground)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 4


# ---- tables


def trial(tokens: list[int], per_round: int, seconds: float) -> Trial:
    rounds = [
        Round(i, 1, 0, (), (), (), 0, 0, tuple(tokens[1:][at : at + per_round]), (), (), "", 0.0, 0.01, 0.01)
        for i, at in enumerate(range(0, len(tokens) - 1, per_round), 1)
    ]
    return Trial(tokens, rounds, 0.1, seconds)


def test_race_numbers_are_the_benchs_paired_medians():
    text = list(range(9))
    heats = [{"plain": trial(text, 1, 0.8), "fixed": trial(text, 2, 0.8 / ratio)} for ratio in (1.5, 2.0, 4.0)]
    frame = tables.race_frame(heats, ["a", "b", "c"])
    numbers = tables.race_numbers(frame, "fixed")
    assert numbers["n"] == 3
    assert numbers["speedup"] == pytest.approx(2.0)
    assert (numbers["low"], numbers["high"]) == pytest.approx((1.5, 4.0))
    assert numbers["tokens_per_round"] == 2.0
    assert numbers["plain_tokens_per_second"] == pytest.approx(10.0)
    assert frame["equals_baseline"].all()
    table = tables.race_table(frame)
    assert list(table.index) == ["a", "b", "c"]
    assert list(table["tokens/s", "fixed"]) == pytest.approx([15, 20, 40])


def test_a_prompt_that_comes_again_is_a_repeat_and_counts_once():
    text = list(range(9))
    heats = [{"plain": trial(text, 1, 0.8), "fixed": trial(text, 2, seconds)} for seconds in (0.4, 0.5, 0.1)]
    numbers = tables.race_numbers(tables.race_frame(heats, ["a", "a", "a"]), "fixed")
    assert numbers["n"] == 1
    assert numbers["speedup"] == pytest.approx(2.0), "the median of the repeats"


# ---- the picture of RESULTS.md


def results(baseline: str = "plain") -> pd.DataFrame:
    text, rng, rows = list(range(33)), np.random.default_rng(0), []
    for domain in ("code", "chat"):
        for i in range(8):
            for arm, gain in (("plain", 1.0), ("generate", 0.9), ("fixed:5", 1.7)):
                made = tables.summary(trial(text, 1 if gain <= 1 else 2, 1 / gain * rng.uniform(0.9, 1.1)))
                rows.append({"arm": arm, "domain": domain, "prompt_id": f"{domain}/{i}", "equals_baseline": True} | made)
    shared = {"baseline": baseline, "target": "tiny", "temperature": 0.0, "dtype": "bfloat16", "max_new_tokens": 32, "n": 8}
    shared["schema_version"] = SCHEMA_VERSION
    return pd.DataFrame(rows).assign(**shared, split="test", threads=2, machine="a machine", device="cpu")


def test_picture_shows_every_arm_with_units_and_n_and_is_the_same_each_time(tmp_path):
    write_results(results(), tmp_path / "speed.parquet")
    for name in ("a.svg", "b.svg"):
        assert static.main(["--results", str(tmp_path / "speed.parquet"), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    figure = static.headline(results())
    speed, tau = figure.axes
    assert "(×)" in speed.get_ylabel() and "tokens per round" in tau.get_ylabel()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["transformers generate", "fixed:5"]
    assert "n = 8 test prompts a domain" in figure.get_supxlabel()


def test_picture_of_missing_results_is_one_line(tmp_path, capsys):
    assert static.main(["--results", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "a.svg")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_of_another_version_or_without_rows_is_refused_wherever_it_is_drawn(tmp_path, capsys):
    folder, frame = tmp_path / "results", results()
    unnamed = frame.drop(columns="schema_version")
    drawn = {"drafters-t0-dspark": lambda data: drafters.read_drafters(data / "results", 0.0)}
    for wrong, told in ((frame.assign(schema_version=99), "schema version 99"), (frame[:0], "no rows"), (unnamed, "schema version none")):
        for name, draw in drawn.items():
            path = folder / f"{name}.parquet"
            write_results(wrong, path)
            command = "train compare" if name.startswith("drafters") else "bench"
            with pytest.raises(ValueError, match=rf"{name}\.parquet has {told}.*dspark\.{command}"):
                draw(tmp_path)
            assert static.main(["--results", str(path), "--out", str(tmp_path / "a.svg")]) == 1
            assert told in capsys.readouterr().err
            path.unlink()
    write_results(pd.DataFrame({"bug": []}), folder / "proof-planted.parquet")
    with pytest.raises(ValueError, match=r"planted\.parquet has no rows.*make proof ARGS=planted"):
        proof.read_parts(folder)


@pytest.mark.parametrize("path", sorted((data_dir() / "results").glob("*.parquet")), ids=lambda path: path.stem)
def test_every_committed_results_file_says_its_schema_version(path):
    assert set(read_rows(path, "nothing")["schema_version"]) == {SCHEMA_VERSION}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_draws_results_that_were_not_looked_at(path):
    assert "read_results" not in path.read_text(encoding="utf-8")
