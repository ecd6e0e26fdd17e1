"""A browser where one is installed, and a visit to a page with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

AXE = Path(os.environ.get("FEDTUNE_AXE", "node_modules/axe-core/axe.min.js"))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
# In a container /dev/shm may be too small for a page, whose process then ends.
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage"]
PENDING = ("Reading and checking", "Verifying every")
needs_axe = pytest.mark.skipif(
    not AXE.is_file(), reason=f"axe-core is not here: {AXE} (FEDTUNE_AXE)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no chromium is installed")
    driver = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (fedtune[browser])"
    )
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=binary, args=ARGUMENTS)
        yield started
        started.close()


class Visit:
    """A browser's visit: what it asked for, and what it complained of."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page, self.asked, self.complaints = self.context.new_page(), list[str](), list[str]()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(address)
        self.until(lambda: not any(word in self.text() for word in PENDING), 120)

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def text(self) -> str:
        return str(self.page.evaluate("document.body.innerText"))

    def figures(self) -> dict[str, str]:
        found = "[...document.querySelectorAll('[data-figure]')]"
        return dict(self.page.evaluate(f"{found}.map(e => [e.dataset.figure, e.innerText])"))

    def until(self, true: Any, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            if true():
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not in {seconds} s: {self.complaints} {self.text()[:2000]}")
