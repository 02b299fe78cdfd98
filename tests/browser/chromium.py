"""Chromium as the browser tests use it, and axe-core, which finds what keeps readers out. Either may be missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

try:
    from playwright import sync_api
except ImportError:
    sync_api = None
try:
    from axe_playwright_python.base import AXE_SCRIPT
except ImportError:
    AXE_SCRIPT = None
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
SHOTS = Path(__file__).resolve().parents[2] / "runs" / "browser"
INSTALL = "is not installed: pip install -c constraints.txt -e '.[browser]'"

# Marks instead of a module-level skip, because pytest counts a run without tests as a failure.
NEEDED = [
    pytest.mark.skipif(sync_api is None, reason=f"playwright {INSTALL}"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install your system's, or name one in CHROMIUM"),
]
needs_axe = pytest.mark.skipif(AXE_SCRIPT is None, reason=f"axe-playwright-python {INSTALL}")


@contextmanager
def opened(**options: object) -> Iterator[object]:
    """A new page; ``page.complaints`` collects the errors in the console. options: of Playwright's ``new_page``."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(**options)
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
        yield page
        browser.close()


def barriers(page: object, where: str) -> list[str]:
    """What axe finds in the elements of a CSS selector, one line for each rule and element."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE_SCRIPT)
    found = page.evaluate("where => axe.run(where, {resultTypes: ['violations']})", where)["violations"]
    return [f"{rule['id']}: {node['target']} {node['html'][:200]} {node['failureSummary']}" for rule in found for node in rule["nodes"]]
