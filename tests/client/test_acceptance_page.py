"""The page of an acceptance in a browser: light and dark, wide, narrow, printed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.acceptance import CLASSES, planted
from fedtune.core.config import AcceptanceTable
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.files import Place
from fedtune.officer.acceptance.figures import figures_of
from fedtune.officer.acceptance.models import BASE, MODEL, START, Scored
from fedtune.officer.acceptance.page import page
from fedtune.officer.acceptance.records import TRAINED, HeldOut
from tests.browser import AXE, RULES, Visit, browser, needs_axe

__all__ = ["browser"]  # a fixture
SETTINGS = {
    "path": "none.csv",
    "columns": {"text": "text", "label": "label", "patient": "patient"},
    "groups": ["ward", "sex"],
    "thresholds": {"accuracy": 0.6, "ece": 0.2, "f1": 0.5},
    "recall": {"a": 0.5},
    "differences": {"accuracy": 0.2},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every part that it may have: groups that differ and some that are not resolved,
    another model that was not measured, patients left out, earlier looks."""
    table = AcceptanceTable.model_validate(SETTINGS, strict=False)
    scores, units, groups = planted(1)
    held_out = HeldOut(
        dataset=Dataset([], 400, Counter()),
        units=units,
        places=[Place("a-file-with-a-long-name.csv", n) for n in range(len(units))],
        keyed="0" * 64,
        compared_by="contents",
        training_read=False,
        known_since="2026-11-28",
        groups=groups,
        left_out=Counter({TRAINED: 3}),
        rejected=Counter({"unknown label": 2}),
    )
    models = {MODEL: scores, BASE: planted(2, skill=0.1).scores}
    missing = {START: "it is not in the folder"}
    figures = {"study": "lungs", "site": "north"}
    figures |= figures_of(table, Scored(held_out, models, CLASSES, 4, missing))
    figures["looks"] = {"earlier": 2, "models": 1, "settings": 2}
    digests = dict.fromkeys(("plan", "base", "adapter"), "sha256:" + "0" * 64)
    record: dict[str, Any] = dict.fromkeys(("settings", "held_out", "key", "signature"), "0" * 128)
    record |= {"decision": figures["decision"], "time": "2026-11-28T18:00:00Z", "model": digests}
    record |= {"login": "officer", "person": ""}
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(figures, record), encoding="utf-8")
    return path


def test_the_page_says_all_that_there_is_to_say(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    for said in (
        "Private to the site north",
        "Refused.",
        "ward = west (accuracy, worse",
        "8 of at least 20 patients",
        "public start: it is not in the folder",
        "left out, trained on here",
        "looked at 2 times before",
        "the ledger&#x27;s memory alone",
        "knows who trained here since 2026-11-28 alone",
        "no coordinator&#x27;s training or release may follow from it",
    ):
        assert said in text, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_whole_page_is_on_the_screen(
    browser: Any, written: Path, scheme: str, width: int
) -> None:
    size = {"width": width, "height": 800}
    visit = Visit(browser, written.as_uri(), color_scheme=scheme, viewport=size)
    assert visit.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert visit.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in visit.asked)
    shown = "[...document.images].map(i => i.naturalWidth > 0 && i.clientWidth <= innerWidth)"
    assert visit.page.evaluate(shown) == [True, True]


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, written: Path, scheme: str) -> None:
    visit = Visit(browser, written.as_uri(), color_scheme=scheme, bypass_csp=True)
    visit.page.evaluate(AXE.read_text(encoding="utf-8"))
    check = f"axe.run(document, {{runOnly: {json.dumps(RULES)}}})"
    assert visit.page.evaluate(check + ".then(r => r.violations.map(v => v.id))") == []


def test_it_prints_on_pages_of_paper_in_light_colours(browser: Any, written: Path) -> None:
    visit = Visit(browser, written.as_uri(), color_scheme="dark")
    visit.page.emulate_media(media="print")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert visit.page.evaluate(colour) == "rgb(255, 255, 255)"
    assert visit.page.pdf(format="A4").startswith(b"%PDF")
