"""Figures are pure functions of records, can be read by everyone, and show what the records say."""

from __future__ import annotations

import re
from html import unescape
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from PIL import Image
from rounds import ROUNDS, TEXT, decode, ids, round_of

from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.measure import Trial, summary
from dspark.bench.results import SCHEMA_VERSION, read_rows, write_results
from dspark.bench.stats import BUSY, busy, speed_table, spread
from dspark.bench.trace import BROKEN
from dspark.files import data_dir
from dspark.lab import drafters, figures, scheduling, speed
from dspark.lab.text import span
from dspark.round import Round
from dspark.schedule import PrefixScheduler
from dspark.tune.predict import break_even
from dspark.tune.profile import SPSCurve

ROOT = Path(__file__).resolve().parents[1]


def test_every_committed_token_has_the_fate_that_its_round_gave_it():
    found = figures.fates(ROUNDS)
    assert decode([t.token_id for t in found]) == TEXT
    names = ["plain", *["draft"] * 4, "bonus", *["draft"] * 2, "correction", "copy", "correction", "plain", "correction"]
    assert [t.fate for t in found] == names
    assert [decode([t.round.draft_tokens[t.at]]) for t in found if t.fate == "correction"] == [">", "b", "y"]


def test_accepted_drafts_after_the_end_of_the_text_have_no_fate():
    ended = round_of(1, "abcd", 4, 3, "ab")
    assert [t.fate for t in figures.fates([ended])] == ["draft", "draft"]
    assert figures.draft_states(ended) == ["accepted", "accepted", "discarded", "discarded"]


def html(rounds: list[Round], decode=decode) -> str:
    """The tokens as a notebook shows them."""
    tokens, start, spans = figures.fates(rounds), 0, []
    for count, text in figures.whole_pieces([t.token_id for t in tokens], decode):
        spans.append(span(tokens[start : start + count], text, start))
        start += count
    return "".join(spans)


def visible(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html.replace("↵", "")))


def test_html_shows_the_text_and_escapes_all_of_it():
    shown = html(ROUNDS)
    assert visible(shown) == TEXT
    assert "<c" not in shown and shown.count('data-r="2"') == 3 and 'data-n="8"' in shown
    assert set(re.findall(r"</?(\w+)", shown)) == {"span"}


def test_a_hostile_token_cannot_break_out_of_the_text():
    hostile = '"><script>alert(1)</script>'
    shown = html([round_of(1, "abc", 3, 1, "ax")], lambda tokens: hostile if len(tokens) == 1 else "ab" + hostile)
    assert "<script" not in shown and '""' not in shown


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
    shown = html([round_of(0, "", 0, 0, "a"), Round(index=1, anchor=1, committed=tuple(wild))])
    assert BROKEN not in shown and "ok" in visible(shown)


def test_a_tokenizer_that_drops_the_first_space_loses_none_inside():
    words = ["▁one", "▁two", "three", "▁four"]
    assert figures.whole_pieces([0, 1, 2, 3], lambda t: "".join(words[i] for i in t).replace("▁", " ").lstrip(" ")) == [
        (1, "one"),
        (1, " two"),
        (1, "three"),
        (1, " four"),
    ]


def test_a_character_of_tokens_with_different_fates_has_all_their_colours():
    smile = tuple(ids("🙂"))
    drafts = {
        "draft_tokens": smile[:2],
        "confidence": (0.5, 0.5),
        "target_probs_of_drafts": (0.5, 0.5),
        "draft_probs_of_drafts": (0.5, 0.5),
    }
    first = Round(index=1, anchor=1, window=2, verify_length=2, accepted=2, committed=smile[:3], source="drafter", **drafts)
    shown = html([first, Round(index=2, anchor=1, committed=smile[3:])])
    for fate in ("draft", "bonus", "plain"):
        assert figures.FATES[fate].colour(0.33) in shown


def test_every_drafted_token_has_a_state():
    assert [len(figures.draft_states(r)) for r in ROUNDS] == [0, 4, 4, 4, 0, 2], "the prefill drafts nothing"
    assert figures.draft_states(ROUNDS[1]) == ["accepted"] * 4
    assert figures.draft_states(ROUNDS[3]) == ["accepted", "rejected", "discarded", "unchecked"]


def test_the_same_records_give_the_same_figures_and_are_not_changed():
    before = repr(ROUNDS)
    assert html(ROUNDS) == html(ROUNDS)
    assert repr(ROUNDS) == before


def test_the_schedulers_path_names_the_drafts_up_to_the_first_fall():
    path = list(PrefixScheduler({1: 1.0, 2: 0.9, 3: 0.5, 4: 0.4}.__getitem__).admissions([[0.9, 0.18, 0.162]]))
    (axes,) = scheduling.admission_path(path, ["a", "b", "c"], "a machine").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["anchor alone", "1: “a”", "2: “b”"]
    assert [round(bar.get_height(), 3) for bar in axes.patches] == [1.0, 1.71, 1.04]


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


# ---- the race


def trial(tokens: list[int], per_round: int, seconds: float) -> Trial:
    starts = range(1, len(tokens), per_round)
    rounds = [Round(index=i, anchor=1, committed=tuple(tokens[at : at + per_round]), seconds=0.01) for i, at in enumerate(starts, 1)]
    return Trial(tokens, rounds, 0.1, seconds)


def test_race_numbers_are_the_benchs_paired_medians():
    text = list(range(9))
    heats = [{"plain": trial(text, 1, 0.8), "fixed": trial(text, 2, 0.8 / ratio)} for ratio in (1.5, 2.0, 4.0)]
    frame = speed.race_frame(heats, ["a", "b", "c"])
    numbers = speed.flat_summary(frame, "fixed")
    assert numbers["n"] == 3
    assert numbers["speedup"] == pytest.approx(2.0)
    assert (numbers["low"], numbers["high"]) == pytest.approx((1.5, 4.0))
    assert numbers["tokens_per_round"] == 2.0
    assert numbers["plain_tokens_per_second"] == pytest.approx(10.0)
    assert frame["equals_baseline"].all()
    table = speed.race_table(frame)
    assert list(table.index) == ["a", "b", "c"]
    assert list(table["tokens/s", "median", "fixed"]) == pytest.approx([15, 20, 40])
    assert not numbers["busy"]


def test_the_race_shows_the_heat_with_the_median_speed_up():
    text = list(range(9))
    heats = [{"plain": trial(text, 1, 0.8), "fixed": trial(text, per, 0.8 / ratio)} for per, ratio in ((2, 1.5), (3, 2.0), (4, 4.0))]
    (plain, _), (arm, rounds) = speed.median_heat(heats, "fixed")
    assert (plain, arm) == ("plain", "fixed") and [len(r.committed) for r in rounds] == [1, 3, 3, 2]


def test_with_fewer_than_three_prompts_there_is_no_interval_and_the_table_says_so():
    text = list(range(9))
    heats = [{"plain": trial(text, 1, 0.8), "fixed": trial(text, 2, 0.4)}] * 3
    assert speed.flat_summary(speed.race_frame(heats, ["a", "b", "c"]), "fixed")["low"] == pytest.approx(2.0)
    for prompts in (["a", "a", "a"], ["a", "b", "b"]):
        numbers = speed.flat_summary(speed.race_frame(heats, prompts), "fixed")
        assert np.isnan(numbers["low"]) and np.isnan(numbers["high"]) and numbers["speedup"] == pytest.approx(2.0)
    few = results().query("prompt_id.str.endswith('/0')")
    parts = [part for panel in speed.over(few, "plain").axes for part in panel.collections if isinstance(part, LineCollection)]
    drawn = [line for part in parts for line in part.get_segments() if len(line) and np.isfinite(line).all()]
    assert parts and not drawn, "an interval without the prompts for it"
    assert "[n too small]" in speed_table(few, "plain") and "[" not in re.sub(r"\[n too small\]|\[95 %", "", speed_table(few, "plain"))


@pytest.mark.parametrize("slow", ["one heat of three", "one step in five"])
def test_a_busy_machine_is_noticed_in_the_summary_the_table_and_the_figure(slow):
    assert busy(results()) == "" and spread(results()) < BUSY
    uneven = results()
    if slow == "one heat of three":
        uneven.loc[uneven.index % 3 == 0, "latency_ms"] *= 3  # every third row is one of plain decoding
        uneven.loc[uneven["prompt_id"].str.contains("[1-5]$"), "latency_ms"] /= 3
    else:
        uneven["round_ms_p90"] = 2.0 * uneven["round_ms"]
    assert spread(uneven) > BUSY and "busy" in busy(uneven)
    assert busy(uneven) in speed_table(uneven, "plain")
    assert "This machine was busy" in speed.over(uneven, "plain").get_supxlabel()
    assert speed.flat_summary(uneven, "fixed:5")["busy"]


def test_a_repeated_prompt_counts_once():
    text = list(range(9))
    heats = [{"plain": trial(text, 1, 0.8), "fixed": trial(text, 2, seconds)} for seconds in (0.4, 0.5, 0.1)]
    numbers = speed.flat_summary(speed.race_frame(heats, ["a", "a", "a"]), "fixed")
    assert numbers["n"] == 1
    assert numbers["speedup"] == pytest.approx(2.0), "the median of the repeats"


# ---- figures of results files


def results(baseline: str = "plain") -> pd.DataFrame:
    text, rng, rows = list(range(33)), np.random.default_rng(0), []
    for domain in ("code", "chat"):
        for i in range(8):
            for arm, gain in (("plain", 1.0), ("generate", 0.9), ("fixed:5", 1.7)):
                made = summary(trial(text, 1 if gain <= 1 else 2, 1 / gain * rng.uniform(0.9, 1.1)))
                rows.append({"arm": arm, "domain": domain, "prompt_id": f"{domain}/{i}", "equals_baseline": True} | made)
    shared = {"baseline": baseline, "target": "tiny", "temperature": 0.0, "dtype": "bfloat16", "max_new_tokens": 32, "n": 8}
    shared["schema_version"] = SCHEMA_VERSION
    return pd.DataFrame(rows).assign(**shared, split="test", threads=2, machine="a machine", device="cpu")


def test_a_file_of_another_version_or_without_rows_is_refused(tmp_path):
    folder, frame = tmp_path, results()
    unnamed = frame.drop(columns="schema_version")
    for wrong, said in ((frame.assign(schema_version=99), "schema version 99"), (frame[:0], "no rows"), (unnamed, "schema version none")):
        write_results(wrong, folder / "drafters-t0-dspark.parquet")
        with pytest.raises(ValueError, match=rf"drafters-t0-dspark\.parquet has {said}.*dspark\.train compare"):
            drafters.read_drafters(folder, 0.0)


def test_an_arm_has_one_colour_and_one_label_in_every_figure():
    frame, arm = results(), "fixed:5"
    figure = speed.over(frame, "plain")
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [arm_label("generate"), arm_label(arm)]
    for panel in figure.axes:
        dots, bars = panel.collections
        assert [to_hex(colour) for colour in dots.get_facecolors()] == [arm_colour("generate"), arm_colour(arm)]
        assert [to_hex(colour) for colour in bars.get_colors()] == [arm_colour("generate"), arm_colour(arm)]


def test_measured_speed_ups_have_intervals_round_them_in_every_domain_and_over_all():
    figure = speed.over(results(), "plain")
    assert [panel.get_title("left").partition(",")[0] for panel in figure.axes] == ["all", "code", "chat"]
    for panel in figure.axes:
        dots, bars = panel.collections
        for (speedup, _), ((low, _), (high, _)) in zip(dots.get_offsets(), bars.get_segments(), strict=True):
            assert low <= speedup <= high


def test_figures_of_speed_say_what_they_find_with_units_and_how_many():
    figure = speed.over(results(), "plain")
    assert "fixed window 5: 1.7" in figure.get_suptitle() and "n = 8 test prompts per domain" in figure.get_supxlabel()
    assert "(×)" in figure.axes[1].get_xlabel() and figure.axes[0].get_title("left") == "all, n = 16"


def test_a_figure_travels_as_a_png_with_its_finding_as_the_text_for_screen_readers():
    figure = figures.distributions({"target": [0.5, 0.5], "drafter": [0.9, 0.1]}, ["$", "“世界”"], "A finding", "n = 1")
    png, about = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and about["alt"] == "A finding"
    ink = np.asarray(Image.open(BytesIO(png)).convert("RGBA"))
    assert (ink[..., 3] == 0).mean() > 0.5 and len(np.unique(ink[ink[..., 3] > 0][:, :3], axis=0)) > 1, (
        "a transparent ground with ink on it"
    )
    assert ink.shape[1] == 2 * about["width"]


def test_the_needed_tau_rises_with_the_window_and_the_speed_up():
    points = break_even(SPSCurve((1, 8), (0.030, 0.044)), range(1, 6), 0.006, [1.0, 1.5])
    *lines, ceiling = speed.needed(points, "a finding", "tiny").axes[0].lines
    assert list(ceiling.get_ydata()) == [2, 3, 4, 5, 6] and len(lines) == 4
    slow, _, fast, free = (list(line.get_ydata()) for line in lines)
    assert (
        fast == sorted(fast) and all(a < b for a, b in zip(slow, fast, strict=True)) and all(a < b for a, b in zip(free, fast, strict=True))
    )


def test_the_published_range_is_drawn_over_mtp1_alone():
    frame = results().replace({"arm": {"generate": "mtp1"}})
    assert "quoted: 1.57–1.85×" in " ".join(speed.over(frame, "mtp1", quoted=True).get_supxlabel().split())
    with pytest.raises(ValueError, match="not over 'plain'"):
        speed.over(frame, "plain", quoted=True)


@pytest.mark.parametrize("path", sorted((data_dir() / "results").glob("*.parquet")), ids=lambda path: path.stem)
def test_every_committed_results_file_says_its_schema_version(path):
    assert set(read_rows(path, "nothing")["schema_version"]) == {SCHEMA_VERSION}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_notebook_reads_results_without_checking_their_version(path):
    assert "read_results" not in path.read_text(encoding="utf-8")
