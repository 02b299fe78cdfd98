"""The linked view and the curve alone in Chromium: the scripts get a model of their own in place of JupyterLab's."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import NEEDED, SHOTS, barriers, needs_axe, opened
from rounds import ROUNDS, decode, round_of

from dspark.bench.traces import load_traces
from dspark.lab import rounds
from dspark.lab.replaying import SAMPLE, replayer, runs_over
from dspark.lab.rounds import Run, deflated

pytestmark = NEEDED
LAB = Path(rounds.__file__).parent
SHOW = """async ([script, values]) => {
  const heard = [];
  const slider = {get: (name) => values[name], on: (names, call) => heard.push([names, call]), off: () => {}};
  const model = {...slider, widget_manager: {get_model: async () => slider}};
  values = {slider: "IPY_MODEL_1", index: 0, ...values, pictures: Uint8Array.from(atob(values.pictures ?? ""), (c) => c.charCodeAt(0))};
  window.change = (changed) => {
    Object.assign(values, changed);
    for (const [names, call] of heard) if (Object.keys(changed).some((name) => names.includes(`change:${name}`))) call();
  };
  (await import(`data:text/javascript;base64,${script}`)).default.render({model, el: document.querySelector(".dspark-view")});
}"""


def shown(count: int = len(ROUNDS)) -> dict[str, object]:
    return picture(Run(rounds=ROUNDS[:count], plain=ROUNDS, arm="fixed", tokens=13, decode=decode))


def picture(run: Run) -> dict[str, object]:
    return {"html": run.html(), "details": run.details(), "stale": False}


def show(page: object, script: str, values: dict[str, object]) -> object:
    page.evaluate(SHOW, [base64.b64encode((LAB / script).read_bytes()).decode(), values])
    return page.locator(".dspark-view")


@pytest.fixture
def page() -> Iterator[object]:
    with opened(viewport={"width": 1000, "height": 700}) as page:
        css = (LAB / "rounds.css").read_text(encoding="utf-8")
        page.set_content(f'<html lang="en"><style>{css}</style><main class="dspark-panel"><div class="dspark-view"></div></main></html>')
        yield page
        page.screenshot(path=SHOTS / "view.png")
        assert page.complaints == []


def quoted(words: str) -> str:
    return f"“{words}”".replace("\n", "↵")


def test_pointing_at_anything_lights_its_round_alone_in_all_pictures(page):
    view = show(page, "rounds.js", shown())
    for item in view.locator("[data-r]:not(.band)").all():
        item.dispatch_event("pointerover")
        (number,) = {lit.get_attribute("data-r") for lit in view.locator(".on").all()}
        assert number == item.get_attribute("data-r")
        groups = view.evaluate("v => new Set([...v.querySelectorAll('.on')].map(e => e.closest('.text, svg').getAttribute('class'))).size")
        assert groups == (4 if number != "0" else 2), "the prefill drafts nothing"


def test_the_line_of_details_is_about_the_token_that_is_pointed_at(page):
    view, rows = show(page, "rounds.js", shown()), shown()["details"]
    line = view.locator(".details")
    for row in rows:
        for k, draft in enumerate(row["drafts"]):
            view.locator(f"g[data-r='{row['round']}'][data-k='{k}']").dispatch_event("pointerover")
            said = line.inner_text()
            assert said.startswith(f"{quoted(draft)} · draft, {row['states'][k]}") and f"round {row['round']}, position {k + 1}" in said
            confidence = row["confidence"][k] if k < len(row["confidence"]) else None
            assert confidence is None or f"confidence {confidence:.2f}" in said
        for i, token in enumerate(row["tokens"]):
            view.locator(f".text [data-n='{row['start'] + i}']").dispatch_event("pointerover")
            assert line.inner_text().startswith(f"{quoted(token)} · {row['fates'][i]} · round {row['round']}, position {i + 1}")


def test_keys_move_through_the_tokens_and_their_focus_survives_a_new_picture(page):
    view = show(page, "rounds.js", shown(4))
    place = "document.activeElement.dataset.n"
    view.locator(".text [tabindex='0']").focus()
    seen = [page.evaluate(place)]
    for key in ("ArrowRight", "ArrowDown", "ArrowUp", "End", "Home", "ArrowRight"):
        page.keyboard.press(key)
        seen.append(page.evaluate(place))
    assert seen == ["0", "1", "6", "5", "10", "0", "1"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    said = view.locator(".details").inner_text()
    page.evaluate("values => change(values)", shown())
    assert page.evaluate(place) == "1" and view.locator(".details").inner_text() == said
    page.keyboard.press("End")
    assert page.evaluate(place) == "12", "arrow keys go on in the new picture"


def test_a_stale_picture_is_grey_until_it_is_current_again(page):
    view = show(page, "rounds.js", shown()).locator(".dspark-rounds")
    grey = "v => getComputedStyle(v).filter.includes('grayscale(1)') && getComputedStyle(v).opacity < 1"
    for stale in (True, False):
        page.evaluate("values => change(values)", {"stale": stale})
        assert view.evaluate(grey) == stale


def test_every_place_of_a_slider_is_shown_at_once_and_as_if_it_were_drawn_anew(page):
    (_, trace), *_ = load_traces(SAMPLE)
    runs = runs_over((0.0, 0.04, 0.3, 1.0), replayer(trace), "confidence", {}, "threshold")
    inside = "v => v.querySelector('.dspark-rounds').innerHTML"
    anew, empty = [], page.content()
    for run in runs:
        anew.append(show(page, "rounds.js", picture(run)).evaluate(inside))
        page.set_content(empty)
    view = show(page, "rounds.js", picture(runs[0]) | {"pictures": base64.b64encode(deflated([*runs, None])).decode()})
    view.locator("svg.race").wait_for(state="attached")
    page.wait_for_timeout(500)  # until the pictures are inflated
    before = view.evaluate_handle("v => v.querySelector('.text [data-n]')")
    for index in (1, 3, 0, 2, 1):
        page.evaluate("values => change(values)", {"index": index})
        assert view.evaluate(inside) == anew[index]
    assert before.evaluate("e => e.isConnected"), "what stays the same is kept"
    page.evaluate("values => change(values)", {"index": 4})
    assert view.evaluate(inside) == anew[0], "an impossible place: what Python says"
    page.evaluate("values => change(values)", {"slider": "IPY_MODEL_2", "index": 1})
    assert view.evaluate(inside) == anew[0], "the pictures are another slider's"
    page.evaluate("values => change(values)", shown())
    page.evaluate("values => change(values)", {"index": 2})
    assert view.locator(".text").inner_text().startswith("Hello"), "a picture of other settings is not the slider's"


def test_drafts_that_look_alike_are_all_gone_after_their_round(page):
    run = {"rounds": [ROUNDS[0], round_of(1, "aaaa", 4, 0, "x")], "plain": (), "arm": "fixed", "tokens": 13, "decode": decode}
    view = show(page, "rounds.js", picture(Run(**run, ended=False, judged=False)))
    assert view.locator(".draft").count() == 4
    page.evaluate("values => change(values)", picture(Run(**run)))
    assert view.locator(".draft").count() == 0 and view.locator(".text").inner_text() == "Hx"


def test_the_dot_stands_on_the_curve_at_the_place_of_the_slider(page):
    lines = {"speed-up": [1, 3, 2, None], "τ": [1.5, 2, 2, None]}
    view = show(page, "curve.js", {"_options_labels": ["0", "0.1", "0.5", "1"], "lines": lines})
    view.locator("circle").first.wait_for(state="attached")
    for k in range(3):
        page.evaluate("values => change(values)", {"index": k})
        dots = view.evaluate("v => [...v.querySelectorAll('circle')].map(c => [parseFloat(c.getAttribute('cx')), +c.getAttribute('cy')])")
        points = view.evaluate("v => [...v.querySelectorAll('polyline')].map(l => l.getAttribute('points').trim().split(/\\s+/))")
        assert [x for x, _ in dots] == [pytest.approx(100 * k / 3)] * 2
        for (_, y), line in zip(dots, points, strict=True):
            assert float(line[k].split(",")[1]) == y
        assert f"speed-up {lines['speed-up'][k]:.2f}" in view.locator("svg[role=img]").get_attribute("aria-label")
    page.evaluate("values => change(values)", {"index": 3})
    assert view.locator("circle").count() == 0, "no dot where the curve has a gap"


@needs_axe
@pytest.mark.parametrize("script", ["rounds.js", "curve.js"])
def test_axe_finds_no_barrier(page, script):
    curve = {"_options_labels": ["0", "1"], "lines": {"τ": [1, 2]}}
    view = show(page, script, shown() | curve)
    assert barriers(page, ".dspark-panel") == []
    if script == "rounds.js":
        view.locator(".text [tabindex='0']").focus()
        page.evaluate("values => change(values)", {"stale": True})
        assert barriers(page, ".dspark-panel") == []
