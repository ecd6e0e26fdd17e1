"""The pages in a browser: live, local, readable by all, and with the report's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fedtune.core.registry.rounding import rounded_up
from fedtune.observe import StatusFile
from fedtune.report.figures import format_short
from tests.browser import AXE, RULES, Visit, needs_axe
from tests.dashboard.conftest import Serve
from tests.dashboard.test_pages import MARKUP, answered


@pytest.fixture(scope="module")
def places(tried: Path, released: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    asked = answered(tried, tmp_path_factory.mktemp("asked"), prompt=f"Does it hurt? {MARKUP}")
    return [
        tried / "runs" / "tried",
        tried / "runs",
        tried / "north" / "site.toml",
        released,
        asked,
    ]


def test_the_figures_are_the_reports_to_the_last_digit_shown(
    browser: Any, served: Serve, tried: Path
) -> None:
    run = tried / "runs" / "tried"
    report = json.loads((run / "report.json").read_text())
    visit, metric = Visit(browser, served(run)), report["quality"]["metric"]
    found = visit.figures()
    assert found["epsilon"] == rounded_up(report["privacy"]["epsilon"])
    assert found["after"] == format_short(report["quality"]["after"][metric])
    for name, site in report["privacy"]["sites"].items():
        assert found[f"epsilon-{name}"] == rounded_up(site["epsilon"])
    visit.until(lambda: visit.page.evaluate("document.documentElement.dataset.drawn") == "2", 10)
    label = visit.page.get_attribute('[data-chart="epsilon"] .plot', "aria-label")
    last = report["rounds"][-1]["epsilon"]["north"]
    # Sites that paid the same share one curve, with both names.
    assert label.endswith(f"north, south from 0 to {rounded_up(last)}")
    legend = visit.page.inner_text('[data-chart="epsilon"] .legend')
    assert f"north, south {rounded_up(last)}" in legend


def test_no_request_leaves_and_nothing_is_complained_of(
    browser: Any, served: Serve, places: list[Path]
) -> None:
    """Twin: a script from elsewhere, put into a page, is refused by the policy and reported."""
    for place in places:
        address = served(place)
        visit = Visit(browser, address)
        here = urlsplit(address).netloc
        assert visit.asked and {urlsplit(url).netloc for url in visit.asked} == {here}
        assert visit.complaints == []
        assert "token" not in visit.page.url
    assert MARKUP in visit.text() and visit.page.query_selector("main img") is None
    visit.page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), "
        "{src: 'https://example.org/x.js'}))"
    )
    visit.page.wait_for_timeout(500)
    assert any("Content Security Policy" in text for text in visit.complaints)


@pytest.mark.long
@needs_axe
def test_axe_finds_nothing_and_would(browser: Any, served: Serve, places: list[Path]) -> None:
    """Twin: the same page with an image that nobody describes."""
    check = f"axe.run(document, {{runOnly: {json.dumps(RULES)}}})"
    check += ".then(r => r.violations.map(v => v.id))"
    for place in places:
        for scheme in ("light", "dark"):
            visit = Visit(browser, served(place), color_scheme=scheme)
            visit.page.evaluate(AXE.read_text(encoding="utf-8"))
            assert visit.page.evaluate(check) == [], (place, scheme)
    visit.page.evaluate("document.querySelector('main').append(document.createElement('img'))")
    assert "image-alt" in visit.page.evaluate(check)


@pytest.mark.long
def test_a_narrow_screen_has_the_whole_page(
    browser: Any, served: Serve, places: list[Path]
) -> None:
    for place in places:
        visit = Visit(browser, served(place), viewport={"width": 360, "height": 740})
        over = visit.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert over <= 0, (place, over)


def test_the_keyboard_reaches_everything_that_acts(
    browser: Any, served: Serve, tried: Path
) -> None:
    visit = Visit(browser, served(tried / "runs" / "tried"))
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.add(
            visit.page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
            )
        )
    assert "Dark or light" in reached and any(name.startswith("Copy:") for name in reached if name)
    visit.page.focus("#theme")
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.documentElement.dataset.theme") == "dark"


class Live:
    """A run that somebody else writes, round by round."""

    def __init__(self, run: Path) -> None:
        self.run, self.lines = run, list[str]()
        self.status = StatusFile(run)
        self.status("start", {"study": "gait", "done": 0, "rounds": 9, "private": True})

    def round(self, number: int) -> None:
        spent = {"north": number / 2, "south": number / 4}
        entry: dict[str, Any] = {"round": number, "seconds": 2.0, "epsilon": spent}
        entry |= {"participants": ["north", "south"], "missing": {}}
        entry |= {"quality": {"loss": 3 - number / 10}}
        self.lines.append(json.dumps(entry) + "\n")
        draft = self.run / "draft"
        draft.write_text("".join(self.lines))
        draft.replace(self.run / "metrics.jsonl")
        self.status("round", entry)


@pytest.mark.long
def test_a_live_study_moves_without_a_reload(browser: Any, serve: Serve, tmp_path: Path) -> None:
    live = Live(tmp_path / "run")
    live.round(1)
    visit = Visit(browser, serve(live.run))
    visit.page.evaluate("window.sameDocument = true")
    visit.until(lambda: visit.figures().get("round") == "1", 10)
    visit.until(lambda: "live" in visit.page.inner_text("#link"), 10)
    drawn = "document.documentElement.dataset.drawn"
    for number in (2, 3):
        live.round(number)
        visit.until(lambda n=number: visit.figures().get("round") == str(n), 20)
        spent = rounded_up(number / 2)  # in another part of the page, which comes by itself
        visit.until(lambda s=spent: visit.figures().get("epsilon-north") == s, 20)
        visit.until(lambda n=number: visit.page.evaluate(drawn) == str(n), 20)
    assert visit.page.evaluate("window.sameDocument") is True
    live.status.close()
    visit.until(lambda: "Killed" in visit.text() or "gone" in visit.text(), 20)


def test_a_wrong_token_sees_401(browser: Any, serve: Serve, tmp_path: Path) -> None:
    live = Live(tmp_path / "run")
    address = serve(live.run).partition("?")[0]
    page = browser.new_context().new_page()
    for query in ("", "?token=wrong"):
        assert page.goto(address + query).status == 401
        assert "gait" not in page.content()
