"""Pages in a real browser: what it says on its console, asks of the network and measures.

The browser is the system's own, driven by playwright, which downloads nothing here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def browser(chromium: Path) -> Iterator[Browser]:
    """One Chromium for all tests of a process."""
    with sync_playwright() as playwright:
        # The sandbox needs user namespaces, which containers seldom have; the pages are our own.
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Browser, file: Path, **options: Any) -> Iterator[Page]:
    """A file in a window of its own; errors of its console and requests fail the test at the end.

    Args:
        browser: That of the fixture.
        file: An HTML file.
        options: Of the window, such as `viewport` and `color_scheme`.
    """
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    page = context.new_page()
    wrong: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
    page.on("request", lambda r: None if r.url.startswith("data:") else asked.append(r.url))
    page.goto(file.as_uri())
    try:
        yield page
        assert wrong == []
        assert asked == [file.as_uri()]
    finally:
        context.close()


def until(page: Page, condition: str, seconds: float = 10) -> None:
    """Wait for a condition in the page; playwright's own way is what our pages forbid: eval."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"after {seconds} s still not: {condition}"
        page.wait_for_timeout(20)


def complaints(page: Page) -> list[str]:
    """What axe-core finds wrong for people who see, hear or move otherwise (WCAG 2.1 AA)."""
    wanted = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    found = Axe().run(page, options=wanted).response["violations"]
    return [f"{v['id']}: {node['html'][:200]}" for v in found for node in v["nodes"]]
