"""Notebook 01 in a real browser: JupyterLab and Chromium, with keys and clicks. Run by ``make test-browser``.

Screenshots are kept in runs/browser.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from chromium import NEEDED, SHOTS, barriers, needs_axe, opened, sync_api

pytestmark = NEEDED
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_live_decoding.ipynb"
PATIENCE = int(os.environ.get("DSPARK_PATIENCE", 300_000))  # milliseconds; a busy machine may load the models slowly
SIZES = ((1440, 900), (1024, 768))
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"
CHOOSE = ".jp-Dialog button.jp-mod-accept"  # the dialog that asks for a kernel; it may cover the menu at any time
KERNEL_IDLE = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
# Milliseconds from a key on the slider to the new picture on the screen.
DRAWING = """view => new Promise((done) => {
  let pressed;
  document.addEventListener("keydown", () => { pressed = performance.now(); }, {capture: true, once: true});
  const seen = new MutationObserver(() => {
    seen.disconnect();
    requestAnimationFrame(() => setTimeout(() => done(performance.now() - pressed)));
  });
  seen.observe(view, {childList: true, subtree: true});
  setTimeout(() => done(null), 5000); // two places may have the same picture
})"""
# Errors that JupyterLab logs although nothing is wrong, each with its reason.
NOT_OURS = ("Could not restore the debugger state: Canceled future",)  # its debugger asks a kernel that is still connecting


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab with a copy of the notebook, since JupyterLab saves by itself."""
    folder, state = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    shutil.copy(NOTEBOOK, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}", "--LabApp.extension_manager=readonly"]
    places = {name: str(state / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    places["JUPYTERLAB_SETTINGS_DIR"] = str(_settings(state / "settings"))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (state / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **places, "PYTHONPATH": paths})
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", server, state / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def _settings(folder: Path) -> Path:
    """Settings that keep every cell in the page, fetch nothing, and show no news over the buttons."""
    chosen = {
        "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in chosen.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def page(lab: str) -> Iterator[object]:
    """The open notebook, at the size where all of the panel fits."""
    with opened(viewport={"width": 1440, "height": 900}) as page:
        page.set_default_timeout(PATIENCE)
        page.goto(lab)
        yield page
        _shot(page, "last")


def _shot(page: object, name: str) -> None:
    page.screenshot(path=SHOTS / f"{name}.png")


@pytest.mark.timeout(1500)
def test_live_notebook_replays_decodes_and_stops(page):
    _run_all(page)
    view = page.locator(".dspark-rounds")
    view.locator("svg.race").wait_for(state="attached")
    panel = page.locator(".dspark-panel")
    _all_cells_done(page)

    # Both themes at both sizes; at the larger one all of the panel is on the screen.
    for dark in (True, False):
        _theme(page, dark)
        for width, height in reversed(SIZES):
            page.set_viewport_size({"width": width, "height": height})
            _to_top(panel)
            page.wait_for_timeout(800)
            view.locator("g[data-k]").nth(20).hover()
            _shot(page, f"{'dark' if dark else 'light'}-{width}")
            box = view.bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= height - 24, "above JupyterLab's status bar"
            assert view.locator(".key").first.is_visible()
    box = panel.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= 900 - 24
    sizes = view.evaluate("v => [...v.querySelectorAll('text, span, b, select')].map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 12
    assert page.locator(".dspark-still").is_hidden()

    # Pointing at any kind of element lights the same round in all of them.
    lit = "v => new Set([...v.querySelectorAll('.on')].map(e => e.closest('.text, svg').getAttribute('class'))).size"
    for part in (".text [data-r='9']", "svg.drafts g[data-r='9']", "svg.windows g[data-r='9']", "svg.race rect[data-r='9'][data-n]"):
        view.locator(part).first.hover(force=True)
        assert view.evaluate(lit) == 4
        assert "round 9" in view.locator(".details").inner_text()
        assert set(view.evaluate("v => [...v.querySelectorAll('.on')].map(e => e.dataset.r)")) == {"9"}

    # Keys alone: a token takes the focus, arrows move it, and its focus can be seen.
    view.locator(".text [tabindex='0']").focus()
    seen = [view.locator(".details").inner_text()]
    for key in ("ArrowRight", "ArrowDown", "End"):
        page.keyboard.press(key)
        seen.append(view.locator(".details").inner_text())
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert len(set(seen)) == 4
    view.locator("select").select_option("confidence")
    _shot(page, "focus")

    # The threshold's slider replays the trace.
    numbers, handle = view.locator(".numbers"), panel.get_by_role("slider").first
    before = numbers.inner_text()
    handle.focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    sync_api.expect(numbers).not_to_have_text(before)
    panel.locator("[role=status]", has_text="replayed from a trace").wait_for()
    assert handle.get_attribute("aria-valuetext") == "0.22", "screen readers hear the value, not the index"
    _shot(page, "replay")
    _measure_drawing(page, view, handle)

    # In slow motion it cannot finish before Stop is pressed. What was shown is grey until then.
    _button(panel, "more").click()
    panel.get_by_role("checkbox", name="slow motion").check()
    panel.locator("textarea").fill("Count from one to a hundred in words.")
    panel.locator("textarea").blur()
    page.locator(".dspark-rounds.stale").wait_for()
    _shot(page, "stale")
    _button(panel, "Run").click()
    written, status = view.locator(".text [data-n]"), panel.locator(".dspark-controls [role=status]")
    sync_api.expect(status).to_have_text("decoding", timeout=PATIENCE)
    view.locator(".text .draft").first.wait_for()
    for at_least in (2, 6):  # the text grows while it decodes
        written.nth(at_least).wait_for()
    _shot(page, "decoding")
    _button(panel, "Stop").click()
    sync_api.expect(status).to_have_text("stopped", timeout=PATIENCE)
    tokens = written.count()
    page.wait_for_timeout(3000)  # two rounds of slow motion
    assert written.count() == tokens < 120, "decoding went on after Stop"
    sync_api.expect(_button(panel, "Run")).to_be_enabled()
    sync_api.expect(_button(panel, "Stop")).to_be_disabled()
    panel.locator("textarea").fill("")
    _button(panel, "Run").click()
    panel.locator("[role=alert]", has_text="the prompt is empty").wait_for()
    page.locator(".dspark-rounds.stale").wait_for()
    assert written.count() == tokens, "the last picture stays"
    _shot(page, "stopped")
    assert not page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count()
    assert [words for words in page.complaints if not words.startswith(NOT_OURS)] == []


@needs_axe
@pytest.mark.timeout(1500)
def test_axe_finds_no_barrier_in_the_panel_in_any_state(page):
    _run_all(page)
    panel = page.locator(".dspark-panel")
    panel.locator("svg.race").wait_for(state="attached")
    _all_cells_done(page)
    found = {}
    for dark in (True, False):
        _theme(page, dark)
        found["dark" if dark else "light"] = barriers(page, ".dspark-panel")
    panel.locator(".text [tabindex='0']").focus()
    _button(panel, "more").click()
    found["focus and more"] = barriers(page, ".dspark-panel")
    panel.locator("textarea").fill("")
    panel.locator("textarea").blur()
    page.locator(".dspark-rounds.stale").wait_for()
    found["stale"] = barriers(page, ".dspark-panel")
    _button(panel, "Run").click()
    panel.locator("[role=alert]").wait_for()
    found["error"] = barriers(page, ".dspark-panel")
    assert not any(found.values()), json.dumps(found, indent=1, ensure_ascii=False)


def _measure_drawing(page: object, view: object, handle: object) -> None:
    """Keep the median of eleven moves of the slider beside the screenshots; nothing is asserted about time."""
    handle.focus()
    times = []
    for n in range(11):
        key = "ArrowLeft" if n % 2 else "ArrowRight"
        page.evaluate(f"() => {{ window.drawn = ({DRAWING})(document.querySelector('.dspark-rounds')); }}")
        page.keyboard.press(key)
        times += filter(None, [page.evaluate("window.drawn")])
        page.wait_for_timeout(500)
    assert times, "the slider changed nothing"
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    words = f"from the slider to the picture {median(times):.0f} ms (median of {len(times)}, {load})\n"
    (SHOTS / "drawing.txt").write_text(words, encoding="utf-8")


def _theme(page: object, dark: bool) -> None:
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    for name in ("Theme", f"JupyterLab {'Dark' if dark else 'Light'}"):
        page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(f"body[data-jp-theme-light='{str(not dark).lower()}']").wait_for(state="attached")
    page.wait_for_timeout(1000)  # for the new colours


def _to_top(panel: object) -> None:
    panel.evaluate("element => element.scrollIntoView(true)")


def _button(where: object, name: str) -> object:
    """A button by its label; in its accessible name an icon precedes the label."""
    return where.get_by_role("button", name=re.compile(rf"(^|\W){name}$"))


def _run_all(page: object) -> None:
    """Run All Cells when the kernel has been idle for a while, and again if the request was lost.

    While the page opens, the kernel is reported idle before it exists, and it may connect twice; requests made before that are lost.
    A cell that ran has a number.
    """
    choose = page.locator(CHOOSE)
    page.add_locator_handler(choose, lambda: choose.click())
    ran = f"{PROMPTS}.some(words => /[0-9]/.test(words))"
    for _ in range(5):
        _stays(page, KERNEL_IDLE, seconds=3)
        if page.evaluate(ran):  # it did run, after the timeout
            return
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_function(ran, timeout=30_000)
            return
        except sync_api.TimeoutError:
            continue
    pytest.fail("no cell ran")


def _stays(page: object, condition: str, seconds: int) -> None:
    """Wait until the condition has been true for that long."""
    seen, end = 0, time.monotonic() + PATIENCE / 1000
    while seen < 5 * seconds:
        assert time.monotonic() < end, f"never true for {seconds} s: {condition}"
        seen = seen + 1 if page.evaluate(condition) else 0
        if page.locator(CHOOSE).is_visible():  # evaluate alone does not call the handler
            page.locator(CHOOSE).click()
        page.wait_for_timeout(200)


def _all_cells_done(page: object) -> None:
    page.wait_for_function(f"/[0-9]/.test({PROMPTS}.at(-1))")
