"""The live panel and the replay panel show exactly what was decoded or replayed, and every run comes to an end."""

from __future__ import annotations

import gc
import re
import threading
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html import unescape

import ipywidgets as w
import pytest
from ipywidgets.widgets import widget as registry
from rounds import ROUNDS, TEXT, decode, ids, round_of
from tiny import tiny_drafter, tiny_target

import dspark
from dspark.bench.arms import arm_colour, arm_label
from dspark.bench.replay import replay
from dspark.bench.results import write_results
from dspark.bench.trace import BROKEN, StepTimes, record
from dspark.bench.traces import save_trace, trace_row, traces_frame
from dspark.lab import strips, text
from dspark.lab.live import LivePanel
from dspark.lab.replaying import SAMPLE, ReplayPanel, trace_decode
from dspark.lab.session import Request, Session
from dspark.lab.widgets import PolicyControls, family
from dspark.round import Round
from dspark.schedule import POLICIES, FixedWindow, Parameter, PolicyRow, make_policy
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
    made = LivePanel(target, drafter, SHORT, policy="fixed", copy=False)
    yield made
    made.close()


def live_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dspark-live"]


def untimed(rounds: list[Round]) -> list[Round]:
    return [replace(r, draft_seconds=0.0, verify_seconds=0.0, seconds=0.0) for r in rounds]


def visible(html: str) -> str:
    """The text without legend and cursor; struck-through words included."""
    return unescape(re.sub(r"<[^>]*>", "", html.split("anywhere")[1].split(">", 1)[1].replace("↵", ""))).replace("▍", "")


def struck(html: str) -> str:
    return "".join(unescape(words) for words in re.findall(r"line-through[^>]*>([^<]*)<", html))


# ---- text


def test_finished_stream_reads_as_the_text_itself():
    html = text.streaming_text(ROUNDS, decode)
    assert visible(html) == TEXT and struck(html) == ""


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
    waiting = re.findall(r'title="(draft \d of round 2[^"]*)"', html)
    assert len(waiting) == 4 and not any("p_target" in hint for hint in waiting)


def test_html_in_tokens_is_escaped():
    hostile = '"><script>alert(1)</script>'
    for rounds in (ROUNDS[:2], ROUNDS[:4]):
        html = text.streaming_text(rounds, lambda tokens: hostile * len(tokens), ended=False)
        html += strips.heat(rounds, 5, decode=lambda _tokens: hostile).svg()
        assert "<script" not in html


def test_tally_leaves_the_prefill_out():
    t = text.tally(ROUNDS, [round_of(0, "", 0, 0, "H", seconds=9), *plain_rounds([120] * 3, 0.2)[1:]])
    assert (t.tokens, t.rounds, t.verified, t.rejected) == (12, 5, 13, 6)
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
    assert "n = 5 rounds" in svg.get("aria-label") and unescape(strips.COLOURS[colour]) in svg.get("aria-label")


def test_cells_get_darker_with_the_value_and_are_grey_where_it_is_unknown():
    r = replace(round_of(1, "ab", 1, 1, "ac"), confidence=(0.2, float("nan")), target_probs_of_drafts=(1.0,))
    fills = [
        [cell.get("fill") for cell in parsed(strips.heat([r], 2, c)).iter() if cell.get("rx") == "2"] for c in ("confidence", "target")
    ]
    assert fills == [["rgba(0,114,178,0.28)", "rgba(128,128,128,.12)"], ["rgba(0,114,178,1)", "rgba(128,128,128,.12)"]]


def test_unknown_colour_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'hue' is unknown: choose one of fate, confidence, target"):
        strips.heat(ROUNDS, 5, "hue")


@pytest.mark.parametrize("rounds", [[], ROUNDS[:1], [ROUNDS[0], ROUNDS[4]]], ids=["none", "prefill", "plain"])
def test_pictures_of_rounds_without_drafts_are_well_formed(rounds):
    for strip in (strips.heat(rounds, 3), strips.windows(rounds, 3), strips.race([("plain", rounds)], 3)):
        parsed(strip)


def test_window_picture_shows_what_was_asked_for_verified_and_accepted():
    svg = parsed(strips.windows(ROUNDS, 5))
    assert svg.get("aria-label").startswith("The window: 7 of 13 verified")
    hints = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(hints) == 3 * (len(ROUNDS) - 1) and "round 2: asked for 4, verified 4, accepted 2" in hints


def test_race_shows_only_what_was_there_at_that_time():
    assert [len(strips.reached(ROUNDS, t)) for t in (0, 0.1, 0.29, 0.3, 9)] == [1, 2, 3, 4, 6]
    plain = plain_rounds([120] * 12, 0.2)
    early = strips.race([("plain", plain), ("fixed:4+copy", ROUNDS[:3])], 13)
    names = [arm_label("plain"), arm_label("fixed:4+copy")]
    assert early.label == f"{names[0]}: 2 tokens in 0.20 s, 5.0 tokens/s; {names[1]}: 9 tokens in 0.20 s, 40.0 tokens/s"
    slow = strips.race([("plain", plain_rounds([120] * 3, 0.01)), ("fixed:4+copy", ROUNDS)], 13)
    assert slow.label.startswith(f"{names[0]}: 4 tokens in 0.03 s, 100.0 tokens/s; {names[1]}: 13 tokens in 0.50 s")
    assert all(arm_colour(arm) in slow.body for arm in ("plain", "fixed:4+copy"))


# ---- sessions


def session(target: Target, drafter: object, request: Request = SHORT, **options: object) -> Session:
    return Session(target, drafter, request, FixedWindow, **options)


@pytest.mark.parametrize("request_", [SHORT, replace(SHORT, temperature=0.9, top_p=0.8, seed=4)], ids=["greedy", "sampled"])
def test_session_makes_the_rounds_of_decode(target, drafter, request_):
    s = session(target, drafter, request=request_, plain=None).start()
    s.join()
    assert s.state == "done" and s.error == ""
    asked = {name: getattr(request_, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    assert untimed(s.rounds) == untimed(list(dspark.decode(target, drafter, request_.prompt, policy=dspark.FixedWindow(), **asked)))
    assert untimed(s.plain) == untimed(list(dspark.decode(target, None, request_.prompt, **asked)))


def test_stop_ends_the_recording_of_plain_decoding_and_nothing_is_drafted(target, drafter):
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


def test_each_step_is_one_round_and_stop_ends_a_waiting_session(target, drafter):
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


def test_slow_motion_shows_each_block_before_and_after_verification(target, drafter):
    seen = Seen()
    s = session(target, drafter, changed=seen, pause=lambda: 1e-4).start()
    s.join(30)
    for r in s.rounds:
        shown = [judged for state, n, judged in seen.shown if state == "decoding" and n == r.index + 1]
        assert shown == ([False, True] if r.draft_tokens else [True])


# ---- the live panel


def test_panel_shows_the_text_and_every_picture_of_its_run(panel, target, drafter):
    out = panel.run_to_end()
    assert out.token_ids == dspark.generate(target, drafter, SHORT.prompt, max_new_tokens=12).token_ids
    assert visible(panel.text.value) == visible(text.streaming_text(out.rounds, target.decode))
    assert "τ = <b>" in panel.numbers.value and "plain decoding" in panel.lanes.value
    assert f"n = {len(out.rounds) - 1} rounds" in panel.heat.value and "The window: " in panel.windows.value
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
    seen = [(window.max, window.value)]
    for value in (True, False):
        panel.copy.value = value
        seen.append((window.max, window.value))
    both = panel.source.block_size if panel.copy.value else dspark.ContextLookup(panel.drafter).block_size
    assert alone < both and seen == [(alone, alone), (both, both), (alone, alone)]


def test_without_a_race_plain_decoding_does_not_run(panel):
    panel.race.value = False
    panel.run_to_end()
    assert panel.session.plain == [] and panel.lanes.value == "" and "plain decoding" not in panel.numbers.value


def test_run_to_end_ignores_slow_motion(panel):
    panel.slow.value = True
    panel.run_to_end()
    assert panel.session.pause() == 0
    panel.step()
    assert panel.session.pause() > 0


def test_pictures_and_numbers_leave_out_the_round_that_is_not_verified_yet(panel):
    rounds = len(panel.run_to_end().rounds) - 1
    assert f"n = {rounds} rounds" in panel.heat.value
    panel.session.judged, panel.session.state = False, "decoding"
    panel.colour.value = "target"
    assert f"n = {rounds - 1} rounds" in panel.heat.value and f", {rounds - 1} rounds" in panel.numbers.value
    panel.session.judged, panel.session.state = True, "done"


def test_an_earlier_session_no_longer_changes_the_panel(panel):
    panel.run_to_end()
    earlier = panel.session
    panel.run_to_end()
    earlier.state, earlier.error = "failed", "too late"
    panel._changed(earlier)
    assert panel.message.value == "" and ">done<" in panel.status.value


def test_colour_switch_redraws_without_decoding(panel):
    panel.run_to_end()
    before = panel.session
    panel.colour.value = "target"
    assert "colour: the target" in panel.heat.value and panel.session is before


def test_contradicting_thresholds_are_an_error_in_the_panel_and_nothing_runs(panel):
    panel.controls.kind.value = "adaptive"
    panel.controls.sliders["narrow"].value = 0.9
    assert 'role="alert"' in panel.message.value and "thresholds must satisfy" in panel.message.value
    panel.run_button.click()
    assert panel.session is None
    with pytest.raises(ValueError, match="thresholds must satisfy"):
        panel.run_to_end()
    panel.controls.sliders["narrow"].value = 0.2
    assert panel.message.value == "" and panel.run_to_end().token_ids


def test_a_policy_that_needs_more_than_the_drafter_has_is_an_error_in_the_panel(target):
    panel = LivePanel(target, tiny_drafter(target, enable_confidence_head=False), SHORT, policy="fixed", copy=False)
    assert panel.message.value == ""
    for kind in [name for name, row in POLICIES.items() if row.needs_confidence]:
        panel.controls.kind.value = kind
        assert "needs a drafter with a confidence head" in panel.message.value
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
    assert message in panel.message.value and "Traceback" not in panel.message.value and ">failed<" in panel.status.value
    assert panel.run_to_end().token_ids and panel.message.value == ""


def test_empty_prompt_is_an_error(panel):
    panel.prompt.value = "   "
    with pytest.raises(ValueError, match="the prompt is empty"):
        panel.run_to_end()


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
    LivePanel(target, drafter, SHORT, policy="fixed").close()
    counts = []
    for _ in range(3):
        running = LivePanel(target, drafter, SHORT, policy="fixed")
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


@pytest.mark.parametrize("make", [lambda t, d: LivePanel(t, d, SHORT), lambda t, d: ReplayPanel()], ids=["live", "replay"])
def test_every_control_has_a_label_and_a_tooltip(make, target, drafter):
    made = make(target, drafter)
    controls = [member for member in family(made.box) if isinstance(member, w.DOMWidget) and not isinstance(member, w.Box | w.HTML)]
    assert len(controls) > 10
    for control in controls:
        assert control.description and control.tooltip, control
    made.close()


def test_a_policy_added_to_the_registry_is_in_the_menu_with_its_sliders(monkeypatch, target, drafter):
    length, share = Parameter("length", "drafts", "Drafts per round", 2, 1, 3, 1), Parameter("share", "a share", "Unused", 0.5, 0, 1, 0.1)
    row = PolicyRow("mine", "my policy", "#123456", lambda values, sps: FixedWindow(int(values["length"])), (length, share))
    monkeypatch.setitem(POLICIES, "mine", row)
    for panel in (LivePanel(target, drafter, SHORT, policy="mine:3", copy=False), ReplayPanel(policy="mine:3")):
        assert ("my policy", "mine") in panel.controls.kind.options
        sliders = panel.controls.sliders
        assert {n: (s.description, s.min, s.max, s.value) for n, s in sliders.items()} == {
            "length": ("drafts", 1, 3, 3),
            "share": ("a share", 0, 1, 0.5),
        }
        sliders["length"].value = 1
        rounds = panel.run_to_end().rounds if isinstance(panel, LivePanel) else panel.rounds
        assert max(len(r.draft_tokens) for r in rounds) == 1 and "my policy" in panel.lanes.value
        assert any(arm_colour(arm) in panel.lanes.value for arm in ("mine", "mine+copy"))
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
    assert name == "adaptive" and values == {"widen": 0.7, "narrow": 0.2, "fallback": 0.05, "window": controls.sliders["window"].max}
    for block_size in (5, 16, 3):
        controls.set_block_size(block_size)
        assert controls.sliders["window"].value == controls.sliders["window"].max == block_size
    controls.sliders["window"].value = 2
    controls.set_block_size(16)
    assert controls.sliders["window"].value == 2


@pytest.mark.parametrize(("spec", "message"), [("fast", "'fast'"), ("confidence:0.1,0.2", "at most")])
def test_wrong_policies_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        PolicyControls(spec, lambda: None)


# ---- the replay panel


@pytest.fixture
def replayed() -> Iterator[ReplayPanel]:
    made = ReplayPanel(policy="confidence:0.3")
    yield made
    made.close()


@pytest.mark.parametrize("window", [2, 5, 8, 12])
def test_replay_uses_the_window_that_it_is_given(tmp_path, window):
    target = tiny_target()
    long = record(target, dspark.ContextLookup(tiny_drafter(target)), [5, 6, 7, 8, 5, 6, 7], max_new_tokens=24)
    save_trace(long, tmp_path / "long.parquet")
    panel = ReplayPanel(tmp_path / "long.parquet", policy=f"fixed:{window}")
    assert panel.controls.sliders["window"].value == window and {r.window for r in panel.rounds[1:]} == {window}
    panel.close()


def test_shipped_trace_is_complete_small_and_moves_under_the_slider_without_a_model(replayed, monkeypatch):
    monkeypatch.setattr(Target, "forward", lambda *_, **__: pytest.fail("a model ran"))
    assert replayed.message.value == ""
    assert SAMPLE.stat().st_size < 60_000
    pictures, rejected = [], []
    for value in (0.0, 0.5, 1.0):
        replayed.controls.sliders["threshold"].value = value
        pictures.append((replayed.heat.value, replayed.windows.value, replayed.numbers.value))
        rejected.append(replayed.tally().rejected)
        assert replayed.rounds == replay(replayed.trace(), dspark.ConfidenceThreshold(value))
    assert rejected == sorted(rejected, reverse=True) and rejected[0] > rejected[-1]
    assert all(len(set(column)) == 3 for column in zip(*pictures, strict=True))


def test_heatmap_of_a_replay_changes_with_the_colour(replayed):
    pictures = set()
    for colour in replayed.colour.options:
        replayed.colour.value = colour
        pictures.add(replayed.heat.value)
    assert len(pictures) == len(replayed.colour.options) == 3


@pytest.mark.parametrize("kind", POLICIES)
def test_replay_shows_the_same_text_whatever_the_policy(replayed, kind):
    replayed.controls.kind.value = kind
    assert replayed.message.value == ""
    assert visible(replayed.text.value) == trace_decode(replayed.trace())(replayed.trace().token_ids)
    assert kind != "plain" or replayed.tally().speedup == pytest.approx(1)


def test_contradicting_thresholds_are_an_error_and_the_last_picture_stays(replayed):
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
    other = ReplayPanel(tmp_path / "kept.parquet", policy="confidence:0.3")
    assert other.numbers.value == numbers and other.trace().token_ids == made.token_ids
    other.close()


def test_a_file_of_several_traces_offers_each_by_its_prompt(replayed, target, drafter, tmp_path):
    made = [record(target, drafter, prompt, max_new_tokens=8, times=TIMES) for prompt in ("An apple", "Two pears")]
    write_results(traces_frame([trace_row(trace) for trace in made]), tmp_path / "two.parquet")
    replayed.path.value = str(tmp_path / "two.parquet")
    replayed.load_button.click()
    assert [label for label, _ in replayed.which.options] == ["An apple", "Two pears"]
    for i, trace in ((0, made[0]), (1, made[1]), (0, made[0])):
        replayed.which.index = i
        assert replayed.trace().token_ids == trace.token_ids and trace.about["prompt"] in replayed.about.value


def test_a_missing_file_is_an_error_and_the_trace_stays(replayed, tmp_path):
    before = replayed.trace()
    replayed.path.value = str(tmp_path / "none.parquet")
    replayed.load_button.click()
    assert 'role="alert"' in replayed.message.value and "none.parquet" in replayed.message.value and replayed.trace() is before
