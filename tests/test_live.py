"""The live panel shows exactly what was decoded or replayed, and every run comes to an end."""

from __future__ import annotations

import gc
import json
import re
import threading
import tracemalloc
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from dataclasses import replace
from html import unescape

import anywidget
import ipywidgets as w
import nbformat
import pytest
from ipywidgets.widgets import widget as registry
from rounds import ROUNDS, TEXT, decode, ids, round_of
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.replay import replay
from dspark.bench.trace import BROKEN, StepTimes, prompt_of, record, shortened, trace_decode
from dspark.bench.traces import save_traces
from dspark.lab import strips, text
from dspark.lab.live import LivePanel
from dspark.lab.replaying import SAMPLE
from dspark.lab.rounds import Run
from dspark.lab.session import Request, Session
from dspark.lab.widgets import PolicyControls, family
from dspark.round import Round
from dspark.schedule import POLICIES, FixedWindow, Parameter, PolicyRow, make_policy
from dspark.schedule.policies import NeedsConfidence
from dspark.target.target import Target
from dspark.tune.profile import SPSCurve

SHORT = Request("An apple", max_new_tokens=12)
TIMES = StepTimes({1: 1e-3, 8: 2e-3}, {1: 1e-2, 9: 2e-2}, 1e-5, 1e-4)


class Bytes:
    """A tokenizer with one token per byte; other tokens have no text."""

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
    made = attached(target, drafter, SHORT, policy="fixed", copy=False)
    yield made
    made.close()


def attached(target: Target, drafter: object, *asked: object, **options: object) -> LivePanel:
    made = LivePanel(*asked, **options)
    made.attach(target, drafter)
    return made


def live_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dspark-live"]


def untimed(rounds: list[Round]) -> list[Round]:
    return [replace(r, draft_seconds=0.0, verify_seconds=0.0, seconds=0.0) for r in rounds]


def visible(html: str) -> str:
    """The text without legend and cursor; struck-through words included."""
    return unescape(re.sub(r"<[^>]*>", "", html.split("tab-size")[1].split(">", 1)[1].replace("↵", ""))).replace("▍", "")


def struck(html: str) -> str:
    return "".join(unescape(words) for words in re.findall(r"line-through[^>]*>([^<]*)<", html))


# ---- text


def test_finished_stream_reads_as_the_text_itself():
    html = text.streaming_text(ROUNDS, decode)
    assert visible(html) == TEXT and struck(html) == ""


def test_indentation_survives_an_export():
    exporter, pieces = pytest.importorskip("nbconvert").HTMLExporter(), ("if:", "\n   ", " go")
    rounds = [Round(index=i, committed=(i,), anchor=1, seconds=0.1) for i in range(3)]
    html = text.streaming_text(rounds, lambda tokens: "".join(pieces[t] for t in tokens))
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    page, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])]))
    assert visible(page[page.index('class="legend"') :].split("</pre>")[0]) == visible(html) == "if:\n    go"


def plain_rounds(tokens: list[int], seconds: float = 0.1) -> list[Round]:
    """The prefill, which commits "x", and one round of plain decoding for each further token."""
    return [round_of(0, "", 0, 0, "x"), *(Round(index=i, committed=(t,), anchor=1, seconds=seconds) for i, t in enumerate(tokens, 1))]


@pytest.mark.parametrize("words", ["a🙂b", "他说 hi", "👩‍🚀!"])
def test_characters_appear_only_when_all_their_bytes_are_decoded(words):
    rounds = plain_rounds(ids(words))
    for n in range(1, len(rounds) + 1):
        shown = visible(text.streaming_text(rounds[:n], decode, ended=False))
        assert BROKEN not in shown and "▯" not in shown
        assert f"x{words}".startswith(shown)
    assert shown == f"x{words}"


def test_bytes_of_an_unfinished_character_are_shown_as_a_box_at_the_end_only():
    rounds = plain_rounds(ids("🙂")[:2])
    assert visible(text.streaming_text(rounds, decode, ended=False)) == "x"
    assert visible(text.streaming_text(rounds, decode)) == "x▯"


def test_rejected_drafts_are_struck_through_until_the_next_round():
    at_round = [struck(text.streaming_text(ROUNDS[: n + 1], decode, ended=False)) for n in range(len(ROUNDS))]
    assert at_round == ["", "", ">d", "bcd", "", "yz"]


def test_rejected_drafts_are_shown_before_their_correction():
    shown = visible(text.streaming_text(ROUNDS[:4], decode, ended=False))
    assert shown == "Hello <c\nabcdx"


def test_drafts_before_verification_are_shown_after_the_text_without_the_verdict():
    html = text.streaming_text(ROUNDS[:3], decode, ended=False, judged=False)
    assert visible(html) == "Hello <c>d" and struck(html) == ""
    assert len(re.findall(r'class="draft"', html)) == 4 and 'data-r="2"' not in html


def test_html_in_tokens_is_escaped():
    hostile = '"><script>alert(1)</script>'
    for rounds in (ROUNDS[:2], ROUNDS[:4]):
        html = text.streaming_text(rounds, lambda tokens: hostile * len(tokens), ended=False)
        html += run_of(rounds, lambda tokens: hostile * len(tokens)).html()
        assert "<script" not in html


def test_tally_leaves_the_prefill_out():
    t = text.tally(ROUNDS, [round_of(0, "", 0, 0, "H", seconds=9), *plain_rounds([120] * 3, 0.2)[1:]])
    assert (t.rounds, t.verified, t.rejected) == (5, 13, 6)
    assert t.tokens_per_round == 12 / 5 and t.tokens_per_second == pytest.approx(24) and t.speedup == pytest.approx(24 / 5)
    assert t.words("now")[0] == "4.80× plain decoding" and "7 of 13 verified drafts accepted" in t.words("now")
    assert "×" not in text.tally(ROUNDS).words("now")[0] and text.tally(ROUNDS[:1]).words("now") == []


# ---- strips


def parsed(strip: strips.Strip) -> ET.Element:
    return ET.fromstring(strip.svg())


def linked(svg: ET.Element, *names: str) -> list[tuple[int, ...]]:
    """What data-r, data-n, … of the elements say, where all of them are given."""
    return [tuple(int(part.get(f"data-{n}")) for n in names) for part in svg.iter() if all(part.get(f"data-{n}") for n in names)]


def test_heatmap_has_a_cell_for_every_drafted_token_at_its_round_and_its_position_in_the_text():
    svg = parsed(strips.heat(ROUNDS))
    starts = {1: 1, 2: 6, 3: 9, 4: 11, 5: 12}  # "H" is the prefill's
    assert linked(svg, "r", "n", "k") == [(r.index, starts[r.index] + k, k) for r in ROUNDS for k in range(len(r.draft_tokens))]
    assert "7 of 14 accepted, n = 5 rounds" in svg.get("aria-label")


def test_every_state_of_a_draft_has_a_shape_of_its_own():
    bare = [
        re.sub(r'(fill|stroke)="rgba[^"]*"', "", strips._mark(0, 0, 9, 9, *which))
        for which in (("accepted", False), ("accepted", True), ("rejected", False), ("discarded", False), ("unchecked", False))
    ]
    filled = ["0.9" in strips._mark(0, 0, 9, 9, state, False) for state in ("accepted", "discarded")]
    assert len(set(bare)) == 5 and filled == [True, False]


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1], [ROUNDS[0], ROUNDS[4]]], ids=["none", "prefill", "plain"])
def test_pictures_of_rounds_without_drafts_are_well_formed(rounds):
    for strip in (strips.heat(rounds), strips.windows(rounds), strips.race([("plain", rounds)], 3)):
        parsed(strip)


def test_window_picture_shows_what_was_drafted_verified_and_accepted():
    svg = parsed(strips.windows(ROUNDS))
    assert svg.get("aria-label") == "The window: 7 of 13 verified drafts accepted, n = 5 rounds"
    bars = [[box.get("height") for box in group] for group in svg.iter() if group.tag.endswith("}g") and group.get("data-r") == "2"]
    assert bars == [["40.0", "40.0", "20.0"]]


def test_a_round_has_the_same_place_in_all_pictures_and_is_as_wide_as_what_it_committed():
    places = [
        {part.get("data-r"): (part.get("x"), part.get("width")) for part in parsed(strip).iter() if part.get("class") == "band"}
        for strip in (strips.heat(ROUNDS, 20), strips.windows(ROUNDS, 20))
    ]
    assert places[0] == places[1] and places[0]["2"] == ("30.00%", "14.25%")
    cells = [part for part in parsed(strips.race([("fixed", ROUNDS)], 20)).iter() if part.get("data-r") == "2"]
    assert [cell.get("x") for cell in cells] == ["30.00%", "35.00%", "40.00%"]


def test_race_shows_only_what_was_there_at_that_time_and_what_plain_decoding_did_in_the_same_round():
    plain = plain_rounds([120] * 12, 0.2)
    early = strips.race([("plain", plain), ("fixed:4+copy", ROUNDS[:3])], 13)
    names = [arm_label("plain"), arm_label("fixed:4+copy")]
    assert early.label == f"{names[0]}: 2 tokens in 0.20 s; {names[1]}: 9 tokens in 0.20 s"
    assert linked(parsed(early), "r")[:2] == [(0,), (2,)], "the second plain token was decoded in round 2"
    slow = strips.race([("plain", plain_rounds([120] * 3, 0.01)), ("fixed:4+copy", ROUNDS)], 13)
    assert slow.label.startswith(f"{names[0]}: 4 tokens in 0.03 s; {names[1]}: 13 tokens in 0.50 s")
    assert all(arm_colour(arm) in slow.body for arm in ("plain", "fixed:4+copy"))


# ---- the view


def run_of(rounds: list[Round], decode: object = decode, **options: object) -> Run:
    return Run(rounds=rounds, plain=(), arm="fixed", tokens=13, decode=decode, **options)


def test_details_say_of_each_round_what_was_drafted_committed_and_known():
    rows = run_of(ROUNDS).details()
    row = rows[3]
    assert [r["start"] for r in rows] == [0, 1, 6, 9, 11, 12]
    assert (row["tokens"], row["drafts"], row["copied"], row["verified"]) == (["a", "x"], ["a", "b", "c", "d"], True, 3)
    assert row["fates"] == ["accepted copy from the context", "correction"]
    assert row["states"] == ["accepted", "rejected", "after a rejection", "not verified"] and row["p_target"] == [0.8] * 3


def test_unknown_numbers_are_none_because_json_has_no_nan():
    r = replace(ROUNDS[1], confidence=(0.2, float("nan"), 0.1, 0.1))
    assert run_of([ROUNDS[0], r]).details()[1]["confidence"] == [0.2, None, 0.1, 0.1]


def test_one_run_has_one_number_of_accepted_drafts():
    html = run_of(ROUNDS).html()
    assert set(re.findall(r"(\d+) of 13 verified drafts accepted", html)) == {"7"} and "7 of 14 accepted" in html


# ---- sessions


# ---- sessions


def session(target: Target, drafter: object, request: Request = SHORT, **options: object) -> Session:
    return Session(target, drafter, request, FixedWindow, **options)


def started(*args: object, **options: object) -> Session:
    made = session(*args, **options)
    made.start()
    return made


@pytest.mark.parametrize("request_", [SHORT, replace(SHORT, temperature=0.9, top_p=0.8, seed=4)], ids=["greedy", "sampled"])
def test_session_makes_the_rounds_of_decode(target, drafter, request_):
    s = started(target, drafter, request=request_, plain=None)
    s.join()
    assert s.state == "done" and s.error == ""
    asked = {name: getattr(request_, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    assert untimed(s.rounds) == untimed(list(dspark.decode(target, drafter, request_.prompt, policy=dspark.FixedWindow(), **asked)))
    assert untimed(s.plain) == untimed(list(dspark.decode(target, None, request_.prompt, **asked)))


def test_stop_ends_the_recording_of_plain_decoding_and_nothing_is_drafted(target, drafter):
    s = started(target, drafter, plain=None, changed=lambda s: s.stop() if len(s.plain) == 2 else None)
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


def test_each_step_is_one_round_and_stop_ends_a_waiting_session(target, drafter):
    seen = Seen()
    s = started(target, drafter, changed=seen, stepping=True)
    for n in (1, 2, 3):
        seen.wait_for("waiting", n)
        assert len(s.rounds) == n and s.is_alive()
        if n < 3:
            s.go(stepping=True)
    s.stop()
    assert s.state == "stopped" and len(s.rounds) == 3 and not live_threads()


def test_run_after_steps_goes_on_to_the_end(target, drafter):
    seen = Seen()
    s = started(target, drafter, changed=seen, stepping=True)
    seen.wait_for("waiting", 1)
    s.go(stepping=False)
    s.join(30)
    assert s.state == "done" and sum(len(r.committed) for r in s.rounds) == SHORT.max_new_tokens


def test_slow_motion_shows_each_block_before_and_after_verification(target, drafter):
    seen = Seen()
    s = started(target, drafter, changed=seen, pause=lambda: 1e-4)
    s.join(30)
    for r in s.rounds:
        shown = [judged for state, n, judged in seen.shown if state == "decoding" and n == r.index + 1]
        assert shown == ([False, True] if r.draft_tokens else [True])


# ---- the live panel


def words(html: str) -> str:
    return unescape(re.sub(r"<[^>]*>", "", html))


def test_panel_shows_the_text_and_every_picture_of_its_run(panel, target, drafter):
    out = panel.run_to_end()
    assert out.token_ids == dspark.generate(target, drafter, SHORT.prompt, max_new_tokens=12).token_ids
    html = panel.view.html
    assert visible(html.split('<div class="details"')[0]) == visible(text.streaming_text(out.rounds, target.decode))
    assert f"n = {len(out.rounds) - 1} rounds" in html and "The window: " in html and "plain decoding: " in html
    assert [row["round"] for row in panel.view.details] == [r.index for r in out.rounds]
    assert "cursor" not in panel.view.html and not panel.view.stale
    assert words(panel.status.value) == "done" and panel.error == "" and not live_threads()
    for strip in panel.shown.strips().values():
        parsed(strip)


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
    assert words(panel.status.value) == "stopped" and not live_threads()
    assert panel.stop_button.disabled and not panel.run_button.disabled
    panel.run_button.click()
    panel.session.join(30)
    assert words(panel.status.value) == "done" and len(panel.session.rounds) > 4


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
    pytest.fail("this never became true")


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_of_the_menu_decodes_the_greedy_text(panel, monkeypatch, kind, copy):
    monkeypatch.setattr("dspark.lab.live.step_times", lambda target, source: SPSCurve((1, 2), (1.0, 1.0)))
    panel.controls.kind.value, panel.copy.value = kind, copy
    assert panel.run_to_end().token_ids == [token for r in panel.session.plain for token in r.committed]


def test_prefix_scheduler_reads_the_step_times_of_this_machine(panel, monkeypatch):
    monkeypatch.setattr("dspark.lab.live.step_times", lambda target, source: SPSCurve((1, 2), (1.0, 100.0)))
    panel.controls.kind.value = "prefix"
    assert all(r.verify_length == 0 for r in panel.run_to_end().rounds), "a second token in a pass costs a hundred times the first"


def test_sliders_reach_the_decoding(panel):
    panel.controls.sliders["window"].value = 2
    panel.length.value, panel.temperature.value, panel.top_p.value, panel.seed.value = 20, 0.7, 0.6, 9
    panel.prompt.value = "Oranges"
    out = panel.run_to_end()
    assert panel.session.request == Request("Oranges", 20, 0.7, 0.6, 9)
    assert max(len(r.draft_tokens) for r in out.rounds) == 2


def test_copying_raises_the_upper_end_of_the_window(panel):
    window, alone = panel.controls.sliders["window"], panel.drafter.block_size
    seen = [(window.options[-1], window.value)]
    for value in (True, False):
        panel.copy.value = value
        seen.append((window.options[-1], window.value))
    both = panel.source.block_size if panel.copy.value else dspark.ContextLookup(panel.drafter).block_size
    assert alone < both and seen == [(alone, alone), (both, both), (alone, alone)]


def test_without_a_race_plain_decoding_does_not_run(panel):
    panel.race.value = False
    panel.run_to_end()
    assert panel.session.plain == [] and "plain decoding" not in panel.view.html


def test_run_to_end_ignores_slow_motion(panel):
    panel.slow.value = True
    panel.run_to_end()
    assert panel.session.pause() == 0
    panel.step()
    assert panel.session.pause() > 0


def test_pictures_and_numbers_leave_out_the_round_that_is_not_verified_yet():
    run = run_of(ROUNDS[:3], ended=False, judged=False)
    assert "n = 1 rounds" in run.html() and run.tally().rounds == 1 and [row["round"] for row in run.details()] == [0, 1]


def test_an_earlier_session_no_longer_changes_the_panel(panel):
    panel.run_to_end()
    earlier = panel.session
    panel.run_to_end()
    earlier.state, earlier.error = "failed", "too late"
    panel._changed(earlier)
    assert panel.error == "" and words(panel.status.value) == "done"


def test_contradicting_thresholds_are_an_error_in_the_panel_and_nothing_runs(panel):
    panel.controls.kind.value = "adaptive"
    panel.controls.sliders["narrow"].value = 0.9
    assert 'role="alert"' in panel.status.value and "thresholds must satisfy" in panel.error
    panel.run_button.click()
    assert panel.session is None
    with pytest.raises(ValueError, match="thresholds must satisfy"):
        panel.run_to_end()
    panel.controls.sliders["narrow"].value = 0.2
    assert panel.error == "" and panel.run_to_end().token_ids


def test_a_policy_that_needs_more_than_the_drafter_has_is_an_error_in_the_panel(target):
    panel = attached(target, tiny_drafter(target, enable_confidence_head=False), SHORT, policy="fixed", copy=False)
    assert panel.error == ""
    for kind in [name for name in POLICIES if isinstance(make_policy(name, sps=lambda: float), NeedsConfidence)]:
        panel.controls.kind.value = kind
        assert "needs a drafter with a confidence head" in panel.error
    panel.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("too <long>\nmore"), "too &lt;long&gt;<"),
        (MemoryError(), "out of memory"),
        (RuntimeError("boom"), "RuntimeError: boom"),
    ],
)
def test_an_error_in_the_thread_is_one_sentence_in_the_panel(panel, monkeypatch, error, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(panel.target, "forward", fail)
        with pytest.raises(ValueError):
            panel.run_to_end()
    assert message in panel.status.value and "Traceback" not in panel.status.value and panel.session.state == "failed"
    assert panel.run_to_end().token_ids and panel.error == ""


def test_empty_prompt_is_an_error_and_the_last_picture_stays_grey(panel):
    panel.run_to_end()
    before = panel.view.html
    panel.prompt.value = "   "
    with pytest.raises(ValueError, match="the prompt is empty"):
        panel.run_to_end()
    assert 'role="alert"' in panel.status.value and panel.view.html == before and panel.view.stale
    panel.seed.value += 1
    panel.seed.value -= 1
    assert panel.view.stale, "these settings gave no picture"
    panel.prompt.value = SHORT.prompt
    panel.run_to_end()
    assert not panel.view.stale


def test_a_token_outside_of_the_panel_says_on_hover_where_it_comes_from():
    html = text.streaming_text(ROUNDS, decode)
    hints = [unescape(hint) for hint in re.findall(r'title="([^"]*)"', html)]
    assert len(hints) == len(TEXT)
    assert hints[9] == "accepted copy from the context, round 3, position 1" and hints[10] == "correction, round 3, position 2"


def test_plain_decoding_is_recorded_once_per_prompt(panel, monkeypatch):
    passes, forward = [], panel.target.forward
    monkeypatch.setattr(panel.target, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    spent = []
    for _ in range(2):
        passes.clear()
        rounds = panel.run_to_end().rounds
        spent.append(len(passes) - len(rounds))
    assert spent == [12, 0]


def test_an_interrupted_recording_is_not_used_again(panel):
    panel.run_to_end()
    whole = len(panel.session.plain)
    panel.prompt.value, panel.slow.value = "Pears", True
    panel.step_button.click()
    panel.stop_button.click()
    panel.run_to_end()
    assert len(panel.session.plain) == whole


def test_a_new_panel_closes_the_one_before_it(target, drafter):
    attached(target, drafter, SHORT, policy="fixed").close()
    counts = []
    for _ in range(3):
        running = attached(target, drafter, SHORT, policy="fixed")
        counts.append(len(registry._instances))
        running.step()
    assert len(set(counts)) == 1, "widgets of closed panels stay registered"
    assert len(live_threads()) == 1
    before = len(registry._instances)
    running.close()
    assert not live_threads() and len(registry._instances) < before


def test_closing_the_page_ends_the_decoding(panel):
    panel.step()
    assert live_threads()
    panel.box.close()
    assert not live_threads()


def test_runs_leave_no_threads_and_no_memory(panel):
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
        held = [runs(10), runs(25), runs(25)]
    finally:
        tracemalloc.stop()
    assert len(panel._recorded) == 1
    assert threading.active_count() <= threads  # one of an earlier test may end meanwhile
    growth = min(held[1] - held[0], held[2] - held[1])  # a leak grows each time, a filled cache does not
    assert growth < 25_000, f"{growth} bytes are still held after 25 more runs: more than 1 kB per run"


# ---- controls


def test_every_control_has_a_label_and_a_tooltip(panel):
    shown = (w.Box, w.HTML, anywidget.AnyWidget)
    controls = [member for member in family(panel.box) if isinstance(member, w.DOMWidget) and not isinstance(member, shown)]
    assert len(controls) > 20
    for control in controls:
        assert (control.description or control.placeholder) and control.tooltip, control


def test_a_policy_added_to_the_registry_is_in_the_menu_with_its_sliders(monkeypatch, target, drafter):
    length, share = Parameter("length", "drafts", "Drafts per round", 2, 1, 3, 1), Parameter("share", "a share", "Unused", 0.5, 0, 1, 0.1)
    row = PolicyRow("mine", "my policy", "#123456", lambda values, sps: FixedWindow(int(values["length"])), (length, share))
    monkeypatch.setitem(POLICIES, "mine", row)
    panel = attached(target, drafter, SHORT, policy="mine:3", copy=False)
    assert ("my policy", "mine") in panel.controls.kind.options
    sliders = panel.controls.sliders
    assert (sliders["length"].description, sliders["length"].options, sliders["length"].value) == ("drafts", (1, 2, 3), 3)
    assert (sliders["share"].description, sliders["share"].options[0], sliders["share"].value) == ("a share", 0, 0.5)
    sliders["length"].value = 1
    rounds = panel.run_to_end().rounds
    assert max(len(r.draft_tokens) for r in rounds) == 1 and "my policy" in panel.view.html and arm_colour("mine") in panel.view.html
    panel.offer(record(target, drafter, SHORT.prompt, max_new_tokens=12, times=TIMES))
    assert len(panel.curve.lines["τ"]) == len(panel.curve.slider.options) == 3
    panel.close()


def test_only_the_sliders_of_the_chosen_policy_are_shown_and_each_changes_the_policy():
    controls = PolicyControls("adaptive", lambda: None)
    controls.set_block_size(5)
    for kind, row in POLICIES.items():
        controls.kind.value = kind
        shown = [slider for slider in controls.box.children[1:] if slider.layout.display != "none"]
        assert shown == list(controls.sliders.values()) and list(controls.sliders) == [p.name for p in row.parameters]
        before = make_policy(*controls.chosen(), lambda: float)
        for name, slider in controls.sliders.items():
            start = slider.value
            slider.value = {"window": 2, "widen": 0.7, "narrow": 0.2, "fallback": 0.01}.get(name, 0.9)
            assert make_policy(*controls.chosen(), lambda: float) != before, (kind, name)
            slider.value = start


def test_sliders_start_at_the_given_numbers_or_the_defaults_and_stay_within_the_block():
    controls = PolicyControls("adaptive:0.7,0.2", lambda: None)
    name, values = controls.chosen()
    assert name == "adaptive" and values == {
        "widen": 0.7,
        "narrow": 0.2,
        "fallback": 0.05,
        "window": controls.sliders["window"].options[-1],
    }
    for block_size in (5, 16, 3):
        controls.set_block_size(block_size)
        assert controls.sliders["window"].value == controls.sliders["window"].options[-1] == block_size
    controls.sliders["window"].value = 2
    controls.set_block_size(16)
    assert controls.sliders["window"].value == 2


@pytest.mark.parametrize(("spec", "message"), [("fast", "'fast'"), ("confidence:0.1,0.2", "at most")])
def test_wrong_policies_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        PolicyControls(spec, lambda: None)


def test_a_slider_of_fractions_has_more_places_at_its_low_end_and_the_one_it_starts_at():
    places = PolicyControls("confidence:0.37", lambda: None).sliders["threshold"].options
    assert places[:4] == (0, 0.01, 0.02, 0.03) and places[-2:] == (0.95, 1) and 0.37 in places and len(places) < 40


# ---- traces

SAMPLED = Request("Write a Python class for a bank account with deposit, withdraw and balance methods.", 128)


@pytest.fixture
def replayed() -> Iterator[LivePanel]:
    made = LivePanel(SAMPLED, policy="confidence:0.3")
    yield made
    made.close()


@pytest.mark.parametrize("window", [2, 5, 8, 12])
def test_replay_uses_the_window_that_it_is_given(tmp_path, window):
    target = tiny_target()
    long = record(target, dspark.ContextLookup(tiny_drafter(target)), [5, 6, 7, 8, 5, 6, 7], max_new_tokens=24, times=TIMES)
    save_traces([long], tmp_path / "long.parquet")
    panel = LivePanel(Request(prompt_of(long), 24), policy=f"fixed:{window}", traces=tmp_path / "long.parquet")
    assert panel.controls.sliders["window"].value == window and {r.window for r in panel.shown.rounds[1:]} == {window}
    panel.close()


def test_panel_opens_played_and_moves_under_the_slider_without_a_model(replayed, monkeypatch):
    monkeypatch.setattr(Target, "forward", lambda *_, **__: pytest.fail("a model ran"))
    assert replayed.error == "" and not replayed.view.stale and "predicted" in replayed.view.html
    assert SAMPLE.stat().st_size < 60_000
    pictures, rejected = [], []
    for value in (0.0, 0.5, 1.0):
        replayed.controls.sliders["threshold"].value = value
        pictures.append(replayed.view.html)
        rejected.append(replayed.shown.tally().rejected)
        assert replayed.shown.rounds == replay(replayed.trace(), dspark.ConfidenceThreshold(value))
    assert rejected == sorted(rejected, reverse=True) and rejected[0] > rejected[-1] and len(set(pictures)) == 3


def test_the_curve_has_every_place_of_the_slider_and_its_dot_is_what_the_panel_shows(replayed):
    for kind, name in (("confidence", "threshold"), ("adaptive", "widen"), ("fixed", "window")):
        replayed.controls.kind.value = kind
        slider, speed = replayed.controls.sliders[name], replayed.curve.lines["speed-up"]
        assert len(slider.options) == len(speed) == len(replayed.curve.lines["τ"]) > 15
        at = next(i for i, value in enumerate(speed) if value is not None and i != slider.index)
        slider.index = at
        assert replayed.curve.slider is slider and speed[at] == pytest.approx(replayed.shown.tally().speedup)
        assert replayed.curve.lines["speed-up"] == speed, "moving along a curve does not change it"
    replayed.controls.kind.value = "mtp1"
    assert replayed.curve.lines == {}


def test_the_browser_has_the_picture_of_every_place_of_the_slider(replayed):
    slider, pictures = replayed.controls.sliders["threshold"], json.loads(zlib.decompress(replayed.view.pictures))
    assert replayed.view.slider is slider and len(pictures) == len(slider.options)
    for slider.index in (0, 9, len(pictures) - 1):
        assert pictures[slider.index] == [replayed.view.html, replayed.view.details]
    replayed.length.value = 60
    shorter = json.loads(zlib.decompress(replayed.view.pictures))
    assert shorter[slider.index] == [replayed.view.html, replayed.view.details] != pictures[slider.index]
    replayed.temperature.value = 0.5
    assert replayed.view.pictures == b"", "a sampled text has no trace"


def test_places_that_contradict_the_other_sliders_are_gaps_in_the_curve(replayed):
    replayed.controls.kind.value = "adaptive"
    replayed.controls.sliders["fallback"].value = 0.06
    gaps = [place for place, value in zip(replayed.curve.slider.options, replayed.curve.lines["τ"], strict=True) if value is None]
    assert gaps and min(gaps) > 0.3, "fallback above narrow"


@pytest.mark.parametrize("kind", POLICIES)
def test_replay_shows_the_same_text_whatever_the_policy(replayed, kind):
    replayed.controls.kind.value = kind
    assert replayed.error == ""
    shown = visible(replayed.view.html.split('<div class="details"')[0])
    assert shown == trace_decode(replayed.trace())(replayed.trace().token_ids)
    assert kind != "plain" or replayed.shown.tally().speedup == pytest.approx(1)


def test_contradicting_thresholds_are_an_error_and_the_last_picture_turns_grey(replayed):
    replayed.controls.kind.value = "adaptive"
    before = replayed.view.html
    replayed.controls.sliders["fallback"].value = 0.8
    assert "thresholds must satisfy" in replayed.error and replayed.view.html == before and replayed.view.stale
    replayed.controls.sliders["fallback"].value = 0.0
    assert replayed.error == "" and not replayed.view.stale


@pytest.mark.parametrize(("name", "value"), [("prompt", "Pears"), ("temperature", 0.5), ("copy", False), ("length", 512)])
def test_settings_without_a_trace_turn_what_is_shown_grey_until_they_are_back(replayed, name, value):
    setting = getattr(replayed, name)
    before = setting.value
    setting.value = value
    assert replayed.view.stale and "loads the models" in replayed.status.value
    setting.value = before
    assert not replayed.view.stale and "replayed" in replayed.status.value


def test_a_finished_run_turns_grey_when_a_setting_changes(panel):
    panel.run_to_end()
    panel.seed.value = 5
    assert panel.view.stale and "press Run" in panel.status.value
    panel.run_to_end()
    assert not panel.view.stale


@pytest.mark.parametrize("limit", [1, 9, 40])
def test_a_shorter_text_is_the_beginning_of_the_trace(target, drafter, limit):
    whole = record(target, drafter, "An apple", max_new_tokens=40, times=TIMES)
    short = record(target, drafter, "An apple", max_new_tokens=limit, times=TIMES)
    assert replay(shortened(whole, limit), FixedWindow(3))[1:] == replay(short, FixedWindow(3))[1:]
    assert shortened(short, limit + 1) is None


def test_a_trace_of_another_model_is_named(replayed, target, drafter):
    replayed.attach(target, drafter)
    assert "SmolLM2-135M-Instruct, not of the model that Run uses" in replayed.status.value


def test_without_models_run_says_so(replayed):
    assert replayed.run_button.disabled
    with pytest.raises(ValueError, match="run the cell that loads the models"):
        replayed.run_to_end()


def test_traces_save_and_load(panel, target, drafter, tmp_path):
    made = record(target, drafter, "An apple", max_new_tokens=10, times=TIMES)
    panel.offer(made)
    numbers = panel.shown.tally()
    panel.path.value = str(tmp_path / "kept.parquet")
    panel.save_button.click()
    assert "saved" in panel.status.value
    other = LivePanel(Request("An apple", 10), policy="fixed", copy=False, traces=tmp_path / "kept.parquet")
    assert other.shown.tally() == numbers and other.trace().token_ids == made.token_ids
    other.close()


def test_record_makes_the_sliders_replay_the_prompt_in_the_box(panel):
    panel.prompt.value = "Pears"
    panel.record_button.click()
    assert panel.error == "" and "replayed" in panel.status.value and panel.trace().about["prompt"] == "Pears"
    panel.prompt.value = " "
    panel.record_button.click()
    assert "the prompt is empty" in panel.error


def test_a_file_of_several_traces_offers_each_by_its_prompt(replayed, target, drafter, tmp_path):
    made = [record(target, drafter, prompt, max_new_tokens=8, times=TIMES) for prompt in ("An apple", "Two pears")]
    save_traces(made, tmp_path / "two.parquet")
    replayed.path.value = str(tmp_path / "two.parquet")
    replayed.load_button.click()
    assert {"▶ An apple", "▶ Two pears"} <= {label for label, _ in replayed.examples.options}
    assert replayed.prompt.value == "An apple" and replayed.trace().token_ids == made[0].token_ids
    replayed.examples.value = "Two pears"
    assert replayed.prompt.value == "Two pears" and replayed.trace().token_ids == made[1].token_ids and not replayed.view.stale


def test_a_missing_file_is_an_error_and_what_is_shown_stays(replayed, tmp_path):
    before = replayed.view.html
    replayed.path.value = str(tmp_path / "none.parquet")
    replayed.load_button.click()
    assert 'role="alert"' in replayed.status.value and "none.parquet" in replayed.error and replayed.view.html == before
    lost = LivePanel(SHORT, traces=tmp_path / "none.parquet")
    assert "none.parquet" in lost.error and lost.view.html == ""
    lost.close()


def test_a_prompt_longer_than_the_context_is_one_sentence(panel):
    panel.prompt.value = "apple " * 2000
    with pytest.raises(ValueError, match="takes at most 4096"):
        panel.run_to_end()
    assert 'role="alert"' in panel.status.value and "Traceback" not in panel.status.value


def test_the_output_also_holds_the_run_as_html_without_scripts(replayed, monkeypatch):
    shown = []
    monkeypatch.setattr("dspark.lab.live.display", shown.append)
    replayed._ipython_display_()
    assert shown[0] is replayed.box and shown[1].data.count("<svg") == 3 and "<script" not in shown[1].data
