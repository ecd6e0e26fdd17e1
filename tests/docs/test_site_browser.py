"""The documentation site in a browser: search finds, no request leaves, everybody can read it."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus, urlsplit

import pytest

from tests.browser import AXE, RULES, Visit, needs_axe
from tests.docs.pages import ROOT

# A door, a page of tables, a page of code and the longest one; `make walk` visits every page.
SEEN = ("index.html", "docs/researcher.html", "docs/rescue.html", "docs/reference.html")
PAGES = [pytest.param("seen"), pytest.param("every", marks=pytest.mark.long)]
SEARCHED = {  # what somebody types -> the page that is among what is found
    "withdraw": "docs/intake.html",
    "trimmed_mean": "docs/strategies.html",
    "a site out of budget": "docs/rescue.html",
    "GPU": "docs/installing.html",
}
QUESTIONS = re.findall(
    r"^## (.+)$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.MULTILINE
)
FIRST = 2  # among so many results of a search a question has to be


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.long
@pytest.mark.parametrize("words", SEARCHED)
def test_search_finds_the_page(words: str, browser: Any, address: str) -> None:
    """Twin: what no page says is not found."""
    visit = Visit(browser, f"{address}/index.html")
    visit.page.keyboard.press("/")
    visit.page.keyboard.type(words)
    links = visit.page.locator("a[href*='.html']").locator("visible=true")
    hits = "a => a.map(e => e.href)"

    def found() -> bool:
        return any(SEARCHED[words] in href for href in links.evaluate_all(hits))

    before = visit.page.get_by_text("results").first
    before.wait_for(timeout=10_000)
    visit.until(found, 10)
    visit.page.keyboard.press("Control+a")
    visit.page.keyboard.type("xyzzyplugh")
    visit.page.get_by_text("No results").first.wait_for(timeout=10_000)


@pytest.mark.long
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_each_frequent_question_is_among_the_first_that_its_words_find(
    every: int, browser: Any, address: str
) -> None:
    """Each is a section of its own, so that its words stand in a title."""
    visit = Visit(browser, f"{address}/index.html")
    results = visit.page.locator("a[href*='.html?h=']").locator("visible=true")
    visit.page.keyboard.press("/")

    def is_found() -> bool:
        first = results.evaluate_all("a => a.map(e => e.href)")[:FIRST]
        return any("docs/faq.html" in href and wanted in unquote_plus(href) for href in first)

    assert len(QUESTIONS) >= 10
    for question in QUESTIONS[::every]:
        wanted = question.rstrip("?.")
        visit.page.keyboard.press("Control+a")
        visit.page.keyboard.type(wanted)
        visit.until(is_found, 10)


def pages(site: Path, which: str) -> list[str]:
    every = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    return [*SEEN] if which == "seen" else every


@pytest.mark.long
@pytest.mark.parametrize("which", PAGES)
def test_no_request_leaves_from_any_page(
    which: str, browser: Any, site: Path, address: str
) -> None:
    """Twin: a page that asks for a script elsewhere is found."""
    context = browser.new_context()
    page, asked = context.new_page(), list[str]()
    context.route(
        "**/*", lambda route: route.continue_() if _here(route, address) else route.abort()
    )
    page.on("request", lambda request: asked.append(request.url))
    visited = pages(site, which)
    for path in visited:
        page.goto(f"{address}/{path}", wait_until="domcontentloaded")
    elsewhere = {urlsplit(url).netloc for url in asked} - {urlsplit(address).netloc, ""}
    assert elsewhere == set() and len(asked) > len(visited)
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), "
        "{src: 'https://example.org/x.js'}))"
    )
    page.wait_for_timeout(300)
    assert "example.org" in {urlsplit(url).netloc for url in asked}
    context.close()


def _here(route: Any, address: str) -> bool:
    return str(route.request.url).startswith((address, "data:", "blob:"))


@needs_axe
@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("light", SEEN[:1]),
        ("dark", SEEN[1:2]),
        *(pytest.param(scheme, SEEN, marks=pytest.mark.long) for scheme in ("light", "dark")),
    ],
)
def test_axe_finds_nothing_serious_and_would(
    scheme: Any, names: tuple[str, ...], browser: Any, address: str
) -> None:
    """Twin: the same page with an image that nobody describes."""
    check = f"axe.run(document, {{runOnly: {json.dumps(RULES)}}}).then(r => r.violations"
    check += ".filter(v => ['serious', 'critical'].includes(v.impact)).map(v => v.id))"
    for name in names:
        visit = Visit(browser, f"{address}/{name}", color_scheme=scheme)
        visit.page.evaluate(AXE.read_text(encoding="utf-8"))
        assert visit.page.evaluate(check) == [], name
    visit.page.evaluate("document.querySelector('main').append(document.createElement('img'))")
    assert "image-alt" in visit.page.evaluate(check)


@pytest.mark.long
@pytest.mark.parametrize("which", PAGES)
def test_a_narrow_screen_has_every_page(which: str, browser: Any, site: Path, address: str) -> None:
    page = browser.new_context(viewport={"width": 360, "height": 740}).new_page()
    wide = {}
    for path in pages(site, which):
        if not path.startswith("docs/"):
            continue
        page.goto(f"{address}/{path}", wait_until="domcontentloaded")
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if over > 0:
            wide[path] = over
    assert wide == {}
