"""The live panel and the replay panel: what they show is what was decoded, and whatever is started comes to an end."""

from __future__ import annotations

import gc
import math
import re
import threading
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html import unescape

import ipywidgets as w
import pytest
import torch
from ipywidgets.widgets import widget as registry
from test_families import model_of
from test_lab import ROUNDS, TEXT, decode, ids, round_of
from tiny import Wavering, reference, tiny_drafter, tiny_target

import dspark
from dspark.bench.replay import replay
from dspark.bench.results import write_results
from dspark.bench.trace import StepTimes, record
from dspark.bench.trace_file import load_trace, save_trace, trace_row, traces_frame
from dspark.decode import Round
from dspark.lab import figures, sample, strips, text
from dspark.lab.controls import KINDS, PolicyControls, family, policy_of
from dspark.lab.live import KEPT, LivePanel, _whole
from dspark.lab.live_widgets import EXAMPLES
from dspark.lab.replaying import ReplayPanel, sample_traces, trace_decode
from dspark.lab.session import Request, Session, Watched
from dspark.lab.still import still
from dspark.schedule import SIBLING_RATES, PrefixScheduler
from dspark.target.target import Target
from dspark.tune.profile import SPSCurve

SHORT = Request("An apple", max_new_tokens=12)
LONGER = replace(SHORT, max_new_tokens=40)
TIMES = StepTimes({1: 1e-3, 8: 2e-3}, {1: 1e-2, 9: 2e-2}, 1e-5, 1e-4)


class Bytes:
    """A tokenizer of one token per byte; what is no byte has no letters."""

    chat_template = None

    def __call__(self, words: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(words.encode())}

    def decode(self, token_ids: list[int], **_: object) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def target() -> Target:
    bare = tiny_target(vocab_size=300)
    return Target(bare.model, Bytes(), "tiny")


@pytest.fixture(scope="module")
def drafter(target: Target) -> object:
    return tiny_drafter(target)


@pytest.fixture
def panel(target: Target, drafter: object) -> Iterator[LivePanel]:
    made = LivePanel(target, drafter, request=SHORT, prompt=SHORT.prompt)
    yield made
    made.close()


@pytest.fixture
def branching(target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[LivePanel]:
    """The prefix scheduler where a wider pass costs nothing, and a drafter whose second guess is right where its first was wrong."""
    monkeypatch.setattr("dspark.lab.live.sps_curve", lambda target: SPSCurve((1, 2), (1.0, 1.0)))
    made = LivePanel(target, wavering(target), request=LONGER, prompt=LONGER.prompt, policy="prefix")
    yield made
    made.close()


def wavering(target: Target) -> Wavering:
    return Wavering(target, reference(target, target.encode(LONGER.prompt), 60), 4, 0.4)


def live_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dspark-live"]


def untimed(rounds: list[Round]) -> list[Round]:
    return [replace(r, draft_seconds=0.0, verify_seconds=0.0, seconds=0.0) for r in rounds]


def visible(html: str) -> str:
    """What is read, the legend and the cursor left out; struck-through words included."""
    return unescape(re.sub(r"<[^>]*>", "", html.split("anywhere")[1].split(">", 1)[1].replace("↵", ""))).replace("▍", "")


def struck(html: str) -> str:
    return "".join(unescape(words) for words in re.findall(r"line-through[^>]*>([^<]*)<", html))


# ---- text


def test_finished_stream_reads_as_the_text_itself():
    html = text.streaming_text(ROUNDS, decode)
    assert visible(html) == TEXT and struck(html) == ""


@pytest.mark.parametrize("words", ["a🙂b", "他说 hi", "👩‍🚀!"])
def test_no_broken_character_is_ever_shown_while_the_text_grows(words):
    rounds = [
        round_of(0, "", 0, 0, "x"),
        *(Round(i, 1, 0, (), (), (), 0, 0, (b,), (), (), "", 0, 0, 0) for i, b in enumerate(ids(words), 1)),
    ]
    for n in range(1, len(rounds) + 1):
        shown = visible(text.streaming_text(rounds[:n], decode, ended=False))
        assert figures.NO_CHARACTER not in shown and "▯" not in shown
        assert f"x{words}".startswith(shown)
    assert shown == f"x{words}"


def test_bytes_that_wait_for_their_character_are_a_box_once_nothing_follows():
    rounds = [round_of(0, "", 0, 0, "x"), Round(1, 1, 0, (), (), (), 0, 0, tuple(ids("🙂")[:2]), (), (), "", 0, 0, 0)]
    assert visible(text.streaming_text(rounds, decode, ended=False)) == "x"
    assert visible(text.streaming_text(rounds, decode)) == "x▯"


def test_discarded_drafts_are_struck_through_until_the_next_round():
    at_round = [struck(text.streaming_text(ROUNDS[: n + 1], decode, ended=False)) for n in range(len(ROUNDS))]
    assert at_round == ["", "", ">d", "bcd", "", "yz"]


def test_struck_drafts_stand_before_the_correction_that_took_their_place():
    shown = visible(text.streaming_text(ROUNDS[:4], decode, ended=False))
    assert shown == "Hello <c\nabcdx"


def test_drafts_that_wait_are_shown_behind_the_text_and_hide_the_verdict():
    html = text.streaming_text(ROUNDS[:3], decode, ended=False, judged=False)
    assert visible(html) == "Hello <c>d" and struck(html) == ""
    waiting = re.findall(r'title="(draft \d of round 2[^"]*)"', html)
    assert len(waiting) == 4 and not any("p_target" in hint for hint in waiting)


def test_tooltip_names_what_the_target_would_rather_have_said():
    html = text.streaming_text(ROUNDS[:2], decode, alternatives={1: [[(ids("e")[0], 0.8), (ids('"')[0], 0.1)]]})
    assert "the target&#x27;s best: “e” 0.80, “&quot;” 0.10" in html


def test_hostile_tokens_stay_text():
    hostile = '"><script>alert(1)</script>'
    for rounds in (ROUNDS[:2], ROUNDS[:4]):
        html = text.streaming_text(rounds, lambda tokens: hostile * len(tokens), ended=False, alternatives={1: [[(1, 0.5)]]})
        html += strips.heat(rounds, 5, decode=lambda _tokens: hostile).svg()
        assert "<script" not in html


def test_tally_leaves_the_prefill_out():
    t = text.tally(ROUNDS, [round_of(0, "", 0, 0, "H", seconds=9), *(round_of(i, "", 0, 0, "x", seconds=0.2) for i in range(1, 4))])
    assert (t.tokens, t.rounds, t.checked, t.in_vain) == (12, 5, 13, 6)
    assert t.tokens_per_round == 12 / 5 and t.tokens_per_second == pytest.approx(24) and t.speedup == pytest.approx(24 / 5)
    assert "4.80×" in text.numbers(t) and "×" not in text.numbers(text.tally(ROUNDS)) and text.numbers(text.tally(ROUNDS[:1])) == ""


# ---- strips


def parsed(strip: strips.Strip) -> ET.Element:
    return ET.fromstring(strip.svg())


@pytest.mark.parametrize("colour", strips.COLOURS)
def test_heatmap_has_a_cell_for_every_drafted_token_in_each_colouring(colour):
    svg = parsed(strips.heat(ROUNDS, 5, colour, decode))
    hints = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(hints) == sum(len(r.draft_tokens) for r in ROUNDS)
    assert sum("rejected" in hint for hint in hints) == 3 and "round 3, position 1: accepted (copied) “a” · p_target 0.80" in hints[8]
    assert "n = 5 rounds" in svg.get("aria-label") and strips.COLOURS[colour] in svg.get("aria-label")


def test_value_colourings_deepen_with_the_value_and_stay_grey_where_it_is_unknown():
    r = replace(round_of(1, "ab", 1, 1, "ac"), confidence=(0.2, float("nan")), target_probs_of_drafts=(1.0,))
    fills = [
        [cell.get("fill") for cell in parsed(strips.heat([r], 2, c)).iter() if cell.get("rx") == "2"] for c in ("confidence", "target")
    ]
    assert fills == [["rgba(0,114,178,0.28)", "rgba(128,128,128,.12)"], ["rgba(0,114,178,1)", "rgba(128,128,128,.12)"]]


def test_unknown_colour_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'hue' is unknown: choose one of fate, confidence, target"):
        strips.heat(ROUNDS, 5, "hue")


def test_moves_that_are_drawn_are_the_windows_that_followed(target, drafter):
    policy = dspark.AdaptiveWindow(0.02, 0.004, 0.002)
    rounds = list(dspark.decode(target, drafter, [65, 66, 67], policy=policy, max_new_tokens=60))
    _, lines, found = strips.signals(rounds, policy, drafter.block_size)
    assert list(lines.values()) == [0.02, 0.004, 0.002] and len(found) == len(rounds) - 1
    told = {signal.move for signal in found}
    assert {"widen", "fall back"} <= told
    for signal, r, after in zip(found, rounds[1:], rounds[2:], strict=False):
        moved = {"widen": r.window + 1, "narrow": r.window - 1, "fall back": 0}.get(signal.move)
        assert moved is None or after.window == moved


def test_confidence_cut_is_drawn_at_the_value_that_made_it(target, drafter):
    policy = dspark.ConfidenceThreshold(0.4)
    rounds = list(dspark.decode(target, drafter, [65, 66, 67], policy=policy, max_new_tokens=40))
    _, lines, found = strips.signals(rounds, policy, drafter.block_size)
    assert lines == {"stop": 0.4} and {signal.move for signal in found} == {"", "cut"}
    assert all((signal.value < 0.4) == (signal.move == "cut") for signal in found if signal.value is not None)


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1], [ROUNDS[0], ROUNDS[4]]], ids=["none", "prefill", "plain"])
def test_strips_bear_rounds_without_drafts(rounds):
    for strip in (strips.heat(rounds, 3), strips.windows(rounds, dspark.AdaptiveWindow(), 3), strips.race({"one": rounds}, 1.0, 3)):
        parsed(strip)


def test_race_shows_only_what_was_there_at_that_time():
    assert [len(strips.reached(ROUNDS, t)) for t in (0, 0.1, 0.29, 0.3, 9)] == [1, 2, 3, 4, 6]
    plain = [round_of(0, "", 0, 0, "H"), *(round_of(i, "", 0, 0, "x", seconds=0.2) for i in range(1, 13))]
    early = strips.race({"plain": plain, "DSpark": ROUNDS[:3]}, 0.2, 13, ended=False)
    assert early.label == "plain: 2 tokens in 0.20 s, 5.0 tokens/s; DSpark: 9 tokens in 0.20 s, 40.0 tokens/s"
    late = strips.race({"plain": plain, "DSpark": ROUNDS}, 99, 13)
    assert late.label.count("finished") == 2 and "at token 3 when DSpark was through" in late.body


# ---- sessions


def session(
    target: Target, drafter: object, policy: dspark.FixedWindow | None = None, request: Request = SHORT, **options: object
) -> Session:
    return Session(target, drafter, request, lambda: policy or dspark.FixedWindow(), **options)


@pytest.mark.parametrize("request_", [SHORT, replace(SHORT, temperature=0.9, top_p=0.8, seed=4)], ids=["greedy", "sampled"])
def test_session_decodes_what_decode_decodes(target, drafter, request_):
    s = session(target, drafter, request=request_, plain=None, animated=False).start()
    s.join()
    assert s.state == "done" and s.error == ""
    asked = {name: getattr(request_, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    assert untimed(s.rounds) == untimed(list(dspark.decode(target, drafter, request_.prompt, **asked)))
    assert untimed(s.plain) == untimed(list(dspark.decode(target, None, request_.prompt, **asked)))
    for r in s.rounds:
        assert [len(row) for row in s.alternatives[r.index]] == [3] * (1 + r.verify_length)
        best = [row[0][0] for row in s.alternatives[r.index]]
        assert request_.temperature or best[len(r.committed) - 1] == r.committed[-1]


def test_alternatives_are_as_likely_as_the_temperature_makes_them(target):
    watched = Watched(target, 0.5)
    watched.logits = torch.tensor([[0.0, math.log(2), -math.inf]])
    ((first, second),) = watched.best(2)
    assert (first[0], second[0]) == (1, 0) and (first[1], second[1]) == pytest.approx((0.8, 0.2))


def test_alternatives_behind_an_accepted_sibling_are_the_siblings_own(target):
    beside = PrefixScheduler(lambda tokens: 1.0, sibling_rates=SIBLING_RATES)
    s = session(target, wavering(target), beside, LONGER).start()
    s.join(30)
    assert s.state == "done" and any(r.sibling is not None for r in s.rounds)
    for r in s.rounds:
        best = [row[0][0] for row in s.alternatives[r.index]]
        assert len(best) == 1 + r.verify_length
        assert best[: len(r.committed)] == list(r.committed), "without sampling the target's best is what is committed"


def test_clock_of_the_race_starts_behind_the_prefill(target, drafter):
    s = session(target, drafter).start()
    s.join(30)
    assert s.seconds == pytest.approx(sum(r.seconds for r in s.rounds[1:]))


def test_stop_ends_the_recording_of_plain_decoding_and_no_round_follows(target, drafter):
    s = session(target, drafter, plain=None, changed=lambda s: s.stop() if len(s.plain) == 2 else None).start()
    s.join(30)
    assert s.state == "stopped" and len(s.plain) == 2 and s.rounds == []


class Seen:
    """Counts what a session shows and lets a test wait for it."""

    def __init__(self) -> None:
        self.shown: list[tuple[str, int, bool]] = []
        self.there = threading.Condition()

    def __call__(self, s: Session) -> None:
        with self.there:
            self.shown.append((s.state, len(s.rounds), s.judged))
            self.there.notify_all()

    def wait_for(self, state: str, rounds: int) -> None:
        with self.there:
            assert self.there.wait_for(lambda: (state, rounds, True) in self.shown, 30), (state, rounds, self.shown)


def test_each_step_is_one_round_and_stop_ends_a_session_that_waits(target, drafter):
    seen = Seen()
    s = session(target, drafter, changed=seen, stepping=True).start()
    for n in (1, 2, 3):
        seen.wait_for("waiting", n)
        assert len(s.rounds) == n and s.running
        if n < 3:
            s.step()
    s.stop()
    assert s.state == "stopped" and len(s.rounds) == 3 and not live_threads()


def test_run_after_steps_goes_on_to_the_end(target, drafter):
    seen = Seen()
    s = session(target, drafter, changed=seen, stepping=True).start()
    seen.wait_for("waiting", 1)
    s.go_on()
    s.join(30)
    assert s.state == "done" and sum(len(r.committed) for r in s.rounds) == SHORT.max_new_tokens


def test_slow_motion_shows_each_block_before_and_after_its_check(target, drafter):
    seen = Seen()
    s = session(target, drafter, changed=seen, pause=lambda: 1e-4).start()
    s.join(30)
    for r in s.rounds:
        shown = [judged for state, n, judged in seen.shown if state == "decoding" and n == r.index + 1]
        assert shown == ([False, True] if r.draft_tokens else [True])


def test_race_goes_on_until_plain_decoding_is_through(target, drafter):
    plain = [round_of(0, "", 0, 0, "H"), *(round_of(i, "", 0, 0, "x", seconds=30.0) for i in range(1, 3))]
    rounds = len(list(dspark.decode(target, drafter, SHORT.prompt, max_new_tokens=12)))
    seen = Seen()
    s = session(target, drafter, plain=plain, changed=seen).start()
    seen.wait_for("racing", rounds)
    s.stop()
    assert s.state == "stopped" and s.seconds < 60
    s = session(target, drafter, plain=plain, animated=False).start()
    s.join(30)
    assert s.state == "done" and s.seconds == pytest.approx(60)


# ---- the live panel


def test_panel_shows_the_text_and_every_picture_of_its_run(panel, target, drafter):
    out = panel.run_to_end()
    assert out.token_ids == dspark.generate(target, drafter, SHORT.prompt, max_new_tokens=12).token_ids
    assert visible(panel.text.value) == visible(figures.token_fates(out.rounds, target.decode))
    assert "τ = <b>" in panel.numbers.value and "plain decoding" in panel.lanes.value
    assert f"n = {len(out.rounds) - 1} rounds" in panel.heat.value and "How far it looked" in panel.windows.value
    assert ">done<" in panel.status.value and panel.message.value == "" and not live_threads()
    for part in (panel.heat, panel.windows, panel.lanes):
        ET.fromstring(part.value)


def test_buttons_run_step_and_stop(panel):
    panel.race.value = False
    panel.step_button.click()
    for _ in range(3):
        wait_until(lambda: panel.session.state == "waiting" and not panel.stop_button.disabled)
        made = len(panel.session.rounds)
        panel.step_button.click()
        wait_until(lambda made=made: len(panel.session.rounds) > made)
    wait_until(lambda: "Step for the next round" in panel.status.value and panel.session.state == "waiting")
    panel.stop_button.click()
    assert ">stopped<" in panel.status.value and not live_threads()
    assert panel.stop_button.disabled and not panel.run_button.disabled
    panel.run_button.click()
    panel.session.join(30)
    assert ">done<" in panel.status.value and len(panel.session.rounds) > 4


def test_run_is_off_while_a_text_is_decoded(panel):
    panel.race.value, panel.slow.value = False, True
    panel.run_button.click()
    wait_until(lambda: panel.session.state == "decoding" and not panel.stop_button.disabled)
    assert panel.run_button.disabled
    panel.stop_button.click()
    assert not panel.run_button.disabled


def wait_until(holds: object) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if holds():
            return
        pause.wait(0.01)
    pytest.fail("it never came to that")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "prefix"])
def test_every_policy_of_the_panel_gives_the_greedy_text(panel, target, kind):
    panel.controls.kind.value = kind
    panel.copy.value = kind == "adaptive"
    assert panel.run_to_end().token_ids == [token for r in panel.plain for token in r.committed]


def test_prefix_scheduler_takes_the_step_times_of_this_machine(panel, monkeypatch):
    monkeypatch.setattr("dspark.lab.live.sps_curve", lambda target: SPSCurve((1, 2), (1.0, 100.0)))
    panel.controls.kind.value = "prefix"
    assert all(r.verify_length == 0 for r in panel.run_to_end().rounds), "a second token in the pass is dear"


def test_sliders_reach_the_decoding(panel):
    panel.controls.sliders["window"].value = 2
    panel.length.value, panel.temperature.value, panel.top_p.value, panel.seed.value = 20, 0.7, 0.6, 9
    panel.prompt.value = "Oranges"
    out = panel.run_to_end()
    assert panel.session.request == Request("Oranges", 20, 0.7, 0.6, 9)
    assert max(len(r.draft_tokens) for r in out.rounds) == 2


def test_copying_widens_the_window_that_can_be_asked_for(panel):
    window, alone = panel.controls.sliders["window"], panel.drafter.block_size
    seen = [(window.max, window.value)]
    for value in (True, False):
        panel.copy.value = value
        seen.append((window.max, window.value))
    assert panel.source.block_size == alone < seen[1][0], "a window at the widest stays there"
    assert seen == [(alone, alone), (seen[1][0], seen[1][0]), (alone, alone)]


def test_siblings_can_be_ticked_only_where_the_policy_and_the_target_have_them(panel):
    cannot = Target(model_of("GPT2LMHead"), Bytes(), "gpt2")
    other = LivePanel(cannot, tiny_drafter(cannot), policy="prefix")
    for kind in KINDS:
        panel.controls.kind.value = other.controls.kind.value = kind
        assert panel.siblings.disabled == (kind != "prefix"), kind
        assert other.siblings.disabled, kind
    other.close()


def test_a_panel_starts_with_the_prompt_and_the_ticks_it_is_given(target, drafter):
    for asked, prompt in ((None, None), (None, "mine"), (LONGER, None), (LONGER, "mine")):
        made = LivePanel(target, drafter, request=asked, prompt=prompt, policy="prefix", siblings=True)
        standing = asked or Request(EXAMPLES[0])
        assert made.request == (replace(standing, prompt=prompt) if prompt else standing)
        assert made.siblings.value and not made.copy.value
        made.close()


def test_ticked_siblings_are_checked_and_the_greedy_text_stays(branching):
    for ticked in (False, True):
        branching.siblings.value = ticked
        out = branching.run_to_end()
        assert out.token_ids == [token for r in branching.plain for token in r.committed]
        assert any(r.siblings for r in out.rounds) == any(r.sibling is not None for r in out.rounds) == ticked


def test_tick_for_siblings_means_nothing_under_another_policy(branching):
    branching.siblings.value = True
    for kind in KINDS:
        branching.controls.kind.value = kind
        assert any(r.siblings for r in branching.run_to_end().rounds) == (kind == "prefix"), kind
    assert branching.siblings.value, "the tick waits for the scheduler's return"


def test_tick_for_siblings_means_nothing_to_a_target_that_cannot_branch(monkeypatch):
    monkeypatch.setattr("dspark.lab.live.sps_curve", lambda target: SPSCurve((1, 2), (1.0, 1.0)))
    target = Target(model_of("GPT2LMHead"), Bytes(), "gpt2")
    asked = replace(SHORT, prompt="\x05\x06\x07")  # its vocabulary is small
    made = LivePanel(target, tiny_drafter(target), request=asked, prompt=asked.prompt, policy="prefix")
    made.siblings.value = True
    out = made.run_to_end()
    assert any(r.verify_length for r in out.rounds) and not any(r.siblings for r in out.rounds)
    made.close()


def test_every_sibling_is_shown_and_those_accepted_in_their_own_colour(branching):
    branching.siblings.value = True
    rounds = branching.run_to_end().rounds
    checked, accepted = sum(len(r.siblings) for r in rounds), sum(r.sibling is not None for r in rounds)
    found = text.tally(rounds)
    assert found.checked == sum(r.verify_length for r in rounds) + checked
    assert found.checked - found.in_vain == found.tokens - found.rounds, "every round commits what it keeps and one token more"
    guesses = re.findall(r" · second guess “[^”]*”: (\w+)", unescape(branching.heat.value))
    assert (len(guesses), guesses.count("accepted")) == (checked, accepted) and 0 < accepted < checked
    rejected = [hint for hint in unescape(branching.heat.value).split("<title>") if ": accepted" in hint.partition("second guess")[2]]
    assert len(rejected) == accepted and all("rejected" in hint.partition("·")[0] for hint in rejected)
    assert f"accepted second guess: {accepted}<" in branching.text.value
    assert branching.lanes.value.count(figures.FATES["sibling"].colour(0.85)) == accepted


def test_sibling_behind_the_end_of_the_text_is_not_shown_as_accepted():
    cut = replace(round_of(1, "abc", 3, 1, "a"), siblings=((2, ids("x")[0]),), sibling=ids("x")[0])
    whole = replace(cut, committed=tuple(ids("axy")))
    shown = [re.findall("second guess “x”: (\\w+)", strips.heat([r], 3, decode=decode).svg()) for r in (cut, whole)]
    assert shown == [["checked"], ["accepted"]]


def test_run_with_siblings_is_no_trace_and_that_is_told(branching, tmp_path):
    branching.siblings.value = True
    branching.run_to_end()
    branching.path.value = str(tmp_path / "run.parquet")
    branching.save_button.click()
    assert "a run with siblings cannot be kept as a trace" in branching.message.value and not list(tmp_path.iterdir())


def test_without_a_race_nothing_is_decoded_plainly(panel):
    panel.race.value = False
    panel.run_to_end()
    assert panel.plain == () and panel.lanes.value == "" and "plain decoding" not in panel.numbers.value


def test_slow_motion_is_for_the_eye_only(panel):
    panel.slow.value = True
    panel.run_to_end()
    assert panel.session.pause() == 0, "nobody watches a cell that waits"
    panel.step()
    assert panel.session.pause() > 0


def test_pictures_and_numbers_leave_out_the_round_that_waits_for_its_check(panel):
    rounds = len(panel.run_to_end().rounds) - 1
    assert f"n = {rounds} rounds" in panel.heat.value
    panel.session.judged, panel.session.state = False, "decoding"
    panel.colour.value = "target"
    assert f"n = {rounds - 1} rounds" in panel.heat.value and f", {rounds - 1} rounds" in panel.numbers.value
    panel.session.judged, panel.session.state = True, "done"


def test_session_of_an_earlier_run_says_no_more(panel):
    panel.run_to_end()
    earlier = panel.session
    panel.run_to_end()
    earlier.state, earlier.error = "failed", "too late"
    panel._changed(earlier)
    assert panel.message.value == "" and ">done<" in panel.status.value


def test_choosing_an_example_fills_the_prompt(panel):
    panel.example.value = panel.example.options[3][1]
    assert panel.prompt.value == panel.example.options[3][1] != SHORT.prompt


def test_colour_switch_redraws_without_decoding(panel):
    panel.run_to_end()
    before = panel.session
    panel.colour.value = "target"
    assert "colour: target mass" in panel.heat.value and panel.session is before


def test_contradicting_thresholds_are_told_at_once_and_nothing_runs(panel):
    panel.controls.kind.value = "adaptive"
    panel.controls.sliders["narrow"].value = 0.9
    assert 'role="alert"' in panel.message.value and "thresholds must satisfy" in panel.message.value
    panel.run_button.click()
    assert panel.session is None
    with pytest.raises(ValueError, match="thresholds must satisfy"):
        panel.run_to_end()
    panel.controls.sliders["narrow"].value = 0.2
    assert panel.message.value == "" and panel.run_to_end().token_ids


def test_policy_that_the_drafter_cannot_serve_is_told(target):
    panel = LivePanel(target, tiny_drafter(target, enable_confidence_head=False), request=SHORT, prompt=SHORT.prompt)
    assert panel.message.value == ""
    for kind in ("confidence", "prefix"):
        panel.controls.kind.value = kind
        assert "needs a drafter with a confidence head" in panel.message.value
    panel.close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("too <long>\nmore"), "too &lt;long&gt;<"),
        (MemoryError(), "no memory left"),
        (RuntimeError("boom"), "RuntimeError: boom"),
    ],
)
def test_error_in_the_thread_is_one_sentence_in_the_panel(panel, monkeypatch, error, told):
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(panel.target, "forward", fail)
        with pytest.raises(ValueError):
            panel.run_to_end()
    assert told in panel.message.value and "Traceback" not in panel.message.value and ">failed<" in panel.status.value
    assert panel.run_to_end().token_ids and panel.message.value == ""


def test_empty_prompt_is_one_sentence(panel):
    panel.prompt.value = "   "
    with pytest.raises(ValueError, match="the prompt is empty"):
        panel.run_to_end()


def test_plain_decoding_is_recorded_once_for_each_prompt(panel, monkeypatch):
    passes, forward = [], panel.target.forward
    monkeypatch.setattr(panel.target, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    spent = []
    for _ in range(2):
        passes.clear()
        rounds = panel.run_to_end().rounds
        spent.append(len(passes) - len(rounds))
    assert spent == [12, 0]


def test_recording_is_whole_once_the_text_has_ended(target):
    (end,) = target.eos_token_ids
    first, last = round_of(0, "", 0, 0, "ab"), replace(round_of(1, "", 0, 0, "c"), committed=(end,))
    assert _whole([first, last], SHORT, target) and not _whole([first], SHORT, target)
    assert _whole([first], replace(SHORT, max_new_tokens=2), target)


def test_half_a_recording_is_not_raced_against_later(panel):
    panel.run_to_end()
    whole = len(panel.plain)
    panel.prompt.value, panel.slow.value = "Pears", True
    panel.step_button.click()
    panel.stop_button.click()
    panel.run_to_end()
    assert len(panel.plain) == whole


def test_new_panel_closes_the_one_before_it_and_leaves_nothing_behind(target, drafter):
    LivePanel(target, drafter, request=SHORT, prompt=SHORT.prompt).close()
    counts = []
    for _ in range(3):
        running = LivePanel(target, drafter, request=SHORT, prompt=SHORT.prompt)
        counts.append(len(registry._instances))
        running.step()
    assert len(set(counts)) == 1, "widgets of closed panels stay registered"
    assert len(live_threads()) == 1
    before = len(registry._instances)
    running.close()
    assert not live_threads() and len(registry._instances) < before


def test_page_that_closes_the_panel_ends_the_decoding(panel):
    panel.step()
    assert live_threads()
    panel.box.close()
    assert not live_threads()


def test_fifty_runs_leave_no_threads_and_no_memory(panel):
    def runs(n: int) -> int:
        for i in range(n):
            panel.seed.value = i  # another recording each time
            panel.run_to_end()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    panel.length.value = 8
    threads = threading.active_count()
    tracemalloc.start()
    try:
        held = [runs(10), runs(50), runs(50)]
    finally:
        tracemalloc.stop()
    assert len(panel._recorded) == KEPT
    assert threading.active_count() <= threads  # one that an earlier test left may end meanwhile
    growth = min(held[1] - held[0], held[2] - held[1])  # a leak grows each time, a cache that fills does not
    assert growth < 50_000, f"{growth} bytes stay after 50 more runs: more than a kB a run"


def test_run_can_be_kept_as_a_trace_and_a_bad_path_is_told(panel, tmp_path):
    panel.save_button.click()
    assert "press Run first" in panel.message.value
    out = panel.run_to_end()
    panel.path.value = str(tmp_path / "folder" / "run.parquet")
    panel.save_button.click()
    kept = load_trace(panel.path.value)
    assert kept.token_ids == out.token_ids and kept.about["prompt"] == SHORT.prompt and not kept.complete
    (tmp_path / "file").write_text("")
    panel.path.value = str(tmp_path / "file" / "run.parquet")
    panel.save_button.click()
    assert 'role="alert"' in panel.message.value


# ---- controls


@pytest.mark.parametrize("make", [lambda t, d: LivePanel(t, d), lambda t, d: ReplayPanel()], ids=["live", "replay"])
def test_every_control_has_a_label_and_a_tooltip(make, target, drafter):
    made = make(target, drafter)
    controls = [member for member in family(made.box) if isinstance(member, w.DOMWidget) and not isinstance(member, w.Box | w.HTML)]
    assert len(controls) > 10
    for control in controls:
        assert control.description and control.tooltip, control
    made.close()


def test_only_the_sliders_that_the_policy_reads_are_shown():
    controls = PolicyControls("adaptive", 5, lambda: None)
    shown = {}
    for kind in KINDS:
        controls.kind.value = kind
        shown[kind] = {name for name, slider in controls.sliders.items() if slider.layout.display != "none"}
        before = policy_of(*controls.chosen(), lambda: float)
        for name, slider in controls.sliders.items():
            start = slider.value
            slider.value = {"window": 2, "widen": 0.7, "narrow": 0.2, "fallback": 0.01}.get(name, 0.9)
            assert (policy_of(*controls.chosen(), lambda: float) != before) == (name in shown[kind]), (kind, name)
            slider.value = start
    assert shown["adaptive"] == {"window", "widen", "narrow", "fallback"} and shown["plain"] == set()


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="policy 'fast' is unknown"):
        PolicyControls("fast", 5, lambda: None)
    with pytest.raises(ValueError, match="has no 'widden'"):
        PolicyControls("adaptive", 5, lambda: None, widden=0.5)


# ---- the replay panel


@pytest.fixture
def replayed() -> Iterator[ReplayPanel]:
    made = ReplayPanel()
    yield made
    made.close()


@pytest.mark.parametrize("window", [2, 5, 8, 12])
def test_a_window_that_is_asked_for_is_the_one_that_is_shown(tmp_path, window):
    target = tiny_target()
    long = record(target, dspark.ContextLookup(tiny_drafter(target)), [5, 6, 7, 8, 5, 6, 7], max_new_tokens=24)
    save_trace(long, tmp_path / "long.parquet")
    panel = ReplayPanel(tmp_path / "long.parquet", policy="fixed", window=window)
    assert panel.controls.sliders["window"].value == window and {r.window for r in panel.rounds[1:]} == {window}
    panel.close()


def test_shipped_trace_is_complete_small_and_moves_under_the_slider_without_a_model(replayed, monkeypatch):
    monkeypatch.setattr(Target, "forward", lambda *_, **__: pytest.fail("a model ran"))
    assert replayed.message.value == "" and replayed.trace.complete
    assert (sample_traces() / "sample.parquet").stat().st_size < 60_000
    pictures, vain = [], []
    for value in (0.0, 0.5, 1.0):
        replayed.controls.sliders["threshold"].value = value
        pictures.append((replayed.heat.value, replayed.windows.value, replayed.numbers.value))
        vain.append(replayed.tally().in_vain)
        assert replayed.rounds == replay(replayed.trace, dspark.ConfidenceThreshold(value))
    assert vain == sorted(vain, reverse=True) and vain[0] > vain[-1]
    assert all(len(set(column)) == 3 for column in zip(*pictures, strict=True))


def test_heatmap_of_a_replay_changes_with_the_colour(replayed):
    pictures = set()
    for _, colour in replayed.colour.options:
        replayed.colour.value = colour
        pictures.add(replayed.heat.value)
    assert len(pictures) == len(replayed.colour.options) == 3


def test_a_tokenizer_that_is_there_is_used_instead_of_the_traces_pieces():
    made = ReplayPanel(decode=lambda token_ids: "x" * len(token_ids))
    assert visible(made.text.value) == "x" * len(made.trace.token_ids)
    made.close()


def test_thresholds_of_a_replay_answer_while_they_are_dragged(replayed):
    assert all(slider.continuous_update for slider in replayed.controls.sliders.values())


@pytest.mark.parametrize(("kind", "on"), [("confidence", "survival"), ("conditional", "conditional")])
def test_a_threshold_is_held_against_what_its_policy_names(replayed, kind, on):
    replayed.controls.kind.value, replayed.controls.sliders["threshold"].value = kind, 0.4
    assert replayed.rounds == replay(replayed.trace, dspark.ConfidenceThreshold(0.4, on=on))


@pytest.mark.parametrize("kind", KINDS)
def test_replay_shows_the_same_text_whatever_the_policy(replayed, kind):
    replayed.controls.kind.value = kind
    assert replayed.message.value == ""
    assert visible(replayed.text.value) == trace_decode(replayed.trace)(replayed.trace.token_ids)
    assert kind != "plain" or replayed.tally().speedup == pytest.approx(1)


def test_replay_offers_no_siblings(replayed):
    assert not [member for member in family(replayed.box) if getattr(member, "description", "") == "siblings"]
    for kind in KINDS:
        replayed.controls.kind.value = kind
        assert not any(r.siblings for r in replayed.rounds) and replayed.message.value == "", kind


def test_contradicting_thresholds_are_told_and_the_last_picture_stays(replayed):
    replayed.controls.kind.value = "adaptive"
    before = replayed.heat.value
    replayed.controls.sliders["fallback"].value = 0.8
    assert "thresholds must satisfy" in replayed.message.value and replayed.heat.value == before
    replayed.controls.sliders["fallback"].value = 0.0
    assert replayed.message.value == ""


def test_traces_save_and_load(replayed, target, drafter, tmp_path):
    made = record(target, drafter, "An apple", max_new_tokens=10, times=TIMES)
    replayed.show(made)
    numbers = replayed.numbers.value
    replayed.path.value = str(tmp_path / "kept.parquet")
    replayed.save_button.click()
    assert "saved" in replayed.message.value
    other = ReplayPanel(tmp_path / "kept.parquet")
    assert other.numbers.value == numbers and other.trace.token_ids == made.token_ids
    other.close()


def test_file_of_several_traces_offers_each_by_its_prompt(replayed, target, drafter, tmp_path):
    made = [record(target, drafter, prompt, max_new_tokens=8, times=TIMES) for prompt in ("An apple", "Two pears")]
    write_results(traces_frame([trace_row(trace) for trace in made]), tmp_path / "two.parquet")
    replayed.path.value = str(tmp_path / "two.parquet")
    replayed.load_button.click()
    assert [label for label, _ in replayed.which.options] == ["An apple", "Two pears"]
    for i, trace in ((0, made[0]), (1, made[1])):
        replayed.which.value = i
        assert replayed.which.index == i and replayed.trace.token_ids == trace.token_ids
        assert trace.about["prompt"] in replayed.about.value


def test_missing_file_is_told_and_the_trace_stays(replayed, tmp_path):
    before = replayed.trace
    replayed.path.value = str(tmp_path / "none.parquet")
    replayed.load_button.click()
    assert 'role="alert"' in replayed.message.value and "none.parquet" in replayed.message.value and replayed.trace is before


def test_live_run_says_what_cannot_be_replayed(replayed, panel):
    panel.run_to_end()
    replayed.show(panel.trace())
    assert replayed.message.value == "" and "estimates only" in replayed.about.value
    replayed.controls.kind.value = "adaptive"
    assert "record a complete trace" in replayed.message.value


# ---- the still picture


def test_picture_in_the_repository_is_that_of_the_shipped_trace(tmp_path, capsys):
    trace = load_trace(sample_traces() / "sample.parquet")
    drawn = still(trace)
    ET.fromstring(drawn)
    assert drawn == (sample_traces().parents[1] / "figures" / "live.svg").read_text(encoding="utf-8"), (
        "run python -m dspark.lab.sample --picture"
    )
    assert sample.main(["--picture", "--figure", str(tmp_path / "live.svg")]) == 0
    assert (tmp_path / "live.svg").read_text(encoding="utf-8") == drawn


def test_picture_keeps_to_its_lines_and_is_well_formed_whatever_the_tokens_are(target, drafter):
    pieces = {token: ("\x00\x1b<&\t", "世界", "\n", "words")[token % 4] for token in range(300)}
    trace = record(target, drafter, "An apple", max_new_tokens=30, times=TIMES)
    trace = replace(trace, about=trace.about | {"pieces": pieces})
    heights = [float(ET.fromstring(still(trace, lines=n)).get("viewBox").split()[3]) for n in (1, 3)]
    assert heights[0] < heights[1]
    assert "世界" in still(trace) and "\x00" not in still(trace)


def test_sample_command_tells_what_is_wrong_in_one_line(tmp_path, capsys):
    assert sample.main(["--picture", "--out", str(tmp_path / "none.parquet"), "--figure", str(tmp_path / "a.svg")]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "a.svg").exists()
